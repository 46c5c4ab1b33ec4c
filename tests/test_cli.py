"""The command line: every step of a practitioner, and an answer to every mistake."""
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mllm_compress.cli import app


def ask(*args, code=0) -> str:
    "Run a command and return what it prints."
    result = CliRunner().invoke(app, list(map(str, args)), catch_exceptions=code == 2)
    assert result.exit_code == code, result.output
    return result.output


def test_models_are_listed():
    text = ask("models")
    assert "tiny-llava" in text and "smoke-bunny" in text


@pytest.mark.parametrize("args, says", [
    (("study", "--profile", "huge"), "use quick, smoke, tiny"),
    (("study", "--profile", "smoke", "--only", "99_none"), "01_models, 02_pruning"),
    (("study", "--profile", "smoke", "--only", "02_pruning", "-p", "ratio=[0.3]", "--dry-run"), "ratios: list = []"),
    (("study", "--profile", "smoke", "--only", "02_pruning", "-p", "seeds=0", "--dry-run"), "seeds must be of type list"),
    (("study", "--profile", "smoke", "-p", "seeds"), "NAME=VALUE"),
    (("advise", "--model", "m", "--ratio", "1.5"), "outside (0, 0.95)"),
    (("cost", "no-such-model"), "Unknown model 'no-such-model'"),
    (("score", "smoke-llava", "--out", "x", "--method", "luck"), "use one of"),
])
def test_mistakes_are_answered(args, says):
    assert says in ask(*args, code=2)


def test_advice_without_results_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "run mllm-compress study --profile smoke first" in ask("advise", "--model", "m", "--ratio", ".3", "--profile", "smoke", code=2)


def test_score_prune_recover_evaluate_cost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask("score", "smoke-llava", "-o", "scores", "--samples", 4, "--scenes", 8)
    assert "achieved" in ask("prune", "smoke-llava", "-o", "small", "--scores", "scores", "--ratio", .3).lower() and Path("small").is_dir()
    assert "trained on" in ask("recover", "small", "--teacher", "smoke-llava", "-o", "again", "--fraction", ".005", "--scenes", 8)
    text = ask("evaluate", "again", "--benchmark", "scenes/hallucination", "--limit", 4, "-o", "rows.csv")
    assert "scenes/hallucination" in text and Path("rows.csv").exists()
    assert "parameters" in ask("cost", "small")


def test_prune_refuses_a_ratio_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask("score", "smoke-llava", "-o", "scores", "--samples", 4, "--scenes", 8)
    assert "ratio" in ask("prune", "smoke-llava", "-o", "small", "--scores", "scores", "--ratio", 1.0, code=2)
    assert not Path("small").exists()
