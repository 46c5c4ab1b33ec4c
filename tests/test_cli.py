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


@pytest.mark.parametrize(
    "args, says",
    [
        (
            ("study", "--profile", "huge"),
            "use authors, eyes, gpu, llava-small, paper, quick, smoke, smol, tiny",
        ),
        (("study", "--profile", "smoke", "--only", "99_none"), "01_models, 02_pruning"),
        (
            (
                "study",
                "--profile",
                "smoke",
                "--only",
                "02_pruning",
                "-p",
                "ratio=[0.3]",
                "--dry-run",
            ),
            "ratios: list = []",
        ),
        (
            ("study", "--profile", "smoke", "--only", "02_pruning", "-p", "seeds=0", "--dry-run"),
            "seeds must be of type list",
        ),
        (("study", "--profile", "smoke", "-p", "seeds"), "NAME=VALUE"),
        (
            ("study", "--profile", "smoke", "-p", "ratios=[0.3"),
            "The value of ratios cannot be read",
        ),
        (("study", "--profile", "smoke", "-p", "profile=tiny"), "given by --profile"),
        (
            ("study", "--profile", "smoke", "-p", "ratios=[0.3]", "--dry-run"),
            "01_models: Unknown parameter",
        ),
        (
            (
                "study",
                "--profile",
                "smoke",
                "--only",
                "02_pruning",
                "-p",
                "ratios=[a]",
                "--dry-run",
            ),
            "ratio must be a number",
        ),
        (
            ("study", "--profile", "smoke", "--only", "02_pruning", "-p", "seeds=[a]", "--dry-run"),
            "seed must be a whole number",
        ),
        (
            (
                "study",
                "--profile",
                "smoke",
                "--only",
                "04_distillation",
                "-p",
                "fewer={sft: {ratio: [0.3]}}",
                "--dry-run",
            ),
            "fewer: sft must hold ratios or seeds",
        ),
        (
            ("study", "--profile", "smoke", "--only", "02_pruning", "--workers", "-1", "--dry-run"),
            "workers is -1",
        ),
        (
            ("study", "--profile", "smoke", "--executor", "slrm", "--dry-run"),
            "Unknown executor 'slrm': use one of local, inline, slurm",
        ),
        (
            ("study", "--profile", "smoke", "--executor", "slurm", "--workers", "4", "--dry-run"),
            "jobs_at_once",
        ),
        (
            (
                "study",
                "--profile",
                "smoke",
                "--only",
                "02_pruning",
                "-p",
                "seeds=[0]",
                "-p",
                "seeds=[1]",
                "--dry-run",
            ),
            "seeds is given twice",
        ),
        (
            ("study", "--profile", "smoke", "-p", "seeds=[0]", "--dry-run"),
            "Name the notebook that the parameter is for with --only",
        ),
        (
            ("study", "--profile", "tiny", "--only", "06_best", "-p", "compare=false", "--dry-run"),
            "an empty compare means 'as the profile says', and profile tiny says True",
        ),
        (("advise", "--model", "m", "--ratio", "1.5"), "outside (0, 0.95)"),
        (("cost", "no-such-model"), "Unknown model 'no-such-model'"),
        (("score", "smoke-llava", "--out", "x", "--method", "luck"), "use one of"),
        (("evaluate", "smoke-llava", "--device", "gpu"), "Unknown device 'gpu'"),
        (("evaluate", "smoke-llava", "--device", "cuda:64"), "There is no cuda:64 here"),
        (
            ("evaluate", "smoke-llava", "--out", "no-such-folder/rows.csv"),
            "There is no folder no-such-folder",
        ),
    ],
)
def test_mistakes_are_answered(args, says):
    assert says in ask(*args, code=2)


def test_advice_without_results_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "run mllm-compress study --profile smoke first" in ask(
        "advise", "--model", "m", "--ratio", ".3", "--profile", "smoke", code=2
    )


def test_score_prune_recover_evaluate_cost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask("score", "smoke-llava", "-o", "scores", "--samples", 4, "--scenes", 8)
    assert (
        "achieved"
        in ask("prune", "smoke-llava", "-o", "small", "--scores", "scores", "--ratio", 0.3).lower()
        and Path("small").is_dir()
    )
    Path("kept").mkdir()
    Path("kept/notes.txt").write_text("mine")
    assert "was not written by save_pruned" in ask(
        "recover", "no-such-folder", "--teacher", "smoke-llava", "-o", "kept", code=2
    )  # said before anything is loaded, let alone trained
    assert "was not written by save_pruned" in ask(
        "prune", "smoke-llava", "-o", "kept", "--scores", "scores", "--ratio", 0.3, code=2
    )
    assert "trained on" in ask(
        "recover",
        "small",
        "--teacher",
        "smoke-llava",
        "-o",
        "again",
        "--fraction",
        ".005",
        "--scenes",
        8,
    )
    text = ask(
        "evaluate", "again", "--benchmark", "scenes/hallucination", "--limit", 4, "-o", "rows.csv"
    )
    assert "scenes/hallucination" in text and Path("rows.csv").exists()
    assert "parameters" in ask("cost", "small")


def test_prune_refuses_a_ratio_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask("score", "smoke-llava", "-o", "scores", "--samples", 4, "--scenes", 8)
    assert "ratio" in ask(
        "prune", "smoke-llava", "-o", "small", "--scores", "scores", "--ratio", 1.0, code=2
    )
    assert not Path("small").exists()


def test_advice_names_the_setting_that_kept_most(monkeypatch):
    import numpy as np
    import pandas as pd

    from mllm_compress.study import advice

    def made(pruning, ratio, worth):
        return {
            "model": "m",
            "pruning": pruning,
            "ratio": ratio,
            "requested_ratio": ratio,
            "achieved_ratio": ratio,
            "importance": "x",
            "recovery": "none",
            "train": "projector+lm",
            "fraction": 1.0,
            "epochs": 0,
            "calibration": "default",
            "seed": 0,
            "status": "done",
            "error": "",
            "profile": "p",
            "benchmark": "b",
            "score": 100 * worth,
            "n": 200,
            "units": np.arange(200) < 200 * worth,
        }

    frame = pd.DataFrame(
        [made("none", 0.0, 1.0), made("layerwise", 0.3, 0.7), made("widthwise", 0.3, 0.9)]
    )
    monkeypatch.setattr(advice, "evidence", lambda profile: frame)
    text = ask("advise", "--model", "m", "--ratio", ".3", "--no-training")
    assert (
        "prune widthwise" in text.split(".")[0] + text.split(".")[1]
        and "kept 90.0 %" in text
        and "keeps 20.0 [" in text
    )
    assert "Nothing was studied within" in ask(
        "advise", "--model", "m", "--ratio", ".8", "--no-training", code=2
    )


def test_convert_an_original_release(golden, tmp_path, monkeypatch):
    import shutil

    from original_layouts import copy_of
    from transformers import AutoModelForImageTextToText

    monkeypatch.chdir(tmp_path)
    source = copy_of(golden / "original_layout", "llava", tmp_path)
    shutil.move(source / "vision_tower", "clip")
    assert (
        "Download openai/clip-vit-large-patch14-336" in ask("convert", source, "out", code=2)
        and not Path("out").exists()
    )
    text = ask("convert", source, "out", "--tower", "clip", "--dtype", "bfloat16")
    assert "vicuna_v1" in text and "bfloat16" in text and "written to out" in text
    assert str(AutoModelForImageTextToText.from_pretrained("out").dtype) == "torch.bfloat16"
    for args, says in (
        ((source, "out", "--tower", "clip"), "exists and is not an empty folder"),
        (("out", "again"), "original layouts that can be read are LlavaLlamaForCausalLM"),
        (("nowhere", "again"), "is not a folder"),
        ((source, "again", "--dtype", "int8"), "use one of float32, bfloat16, float16"),
    ):
        assert says in ask("convert", *args, code=2)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert (
        "weights_only=True" in ask("convert", source, "again", "--tower", "clip", code=2)
        and not Path("again").exists()
    )


def test_what_fits_on_which_card():
    assert "use" in ask(
        "recover", "x", "--teacher", "y", "-o", "z", "--recipe", "gpt", code=2
    ) and "LLaVA-v1.5-7B" in ask("cards", "LLaVA", code=2)


def test_every_command_takes_quiet_verbose_and_json():
    "Before or after the name of the command; --json on all that print a result."
    from typer.main import get_command

    group = get_command(app)
    context = group.make_context("mllm-compress", ["models"])
    for name in group.list_commands(context):
        flags = {flag for p in group.get_command(context, name).params for flag in p.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--json"} <= flags, name


def test_verbose_says_what_happens_and_quiet_nothing():
    before, after = (CliRunner().invoke(app, a) for a in (["-v", "models"], ["models", "-v"]))
    for result in (before, after):
        assert "torch" in result.stderr and "MiB of memory" in result.stderr
        assert "torch" not in result.stdout and "tiny-llava" in result.stdout
    assert CliRunner().invoke(app, ["models", "-q"]).stderr == ""
    wrong = CliRunner().invoke(app, ["-q", "models", "-v"])
    assert wrong.exit_code == 2 and "contradict each other" in wrong.output
    failed = CliRunner().invoke(app, ["cost", "no-such-model", "-v"])
    assert failed.exit_code == 2 and "Traceback" in failed.stderr


def test_commands_of_the_study_as_json(tmp_path, monkeypatch):
    import json

    from mllm_compress.study import page, runner

    def said(*args, code=0):
        result = CliRunner().invoke(app, [*args, "--json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    found = said("study", "--profile", "smoke", "--only", "02_pruning", "--dry-run")
    assert found["exit_code"] == 0 and "02_pruning" in found["lines"][0]
    monkeypatch.setattr(runner, "run_study", lambda *a: print("PROBLEM: it rains") or 1)
    found = said("study", "--profile", "smoke", code=1)
    assert found["problems"] == ["it rains"] and found["exit_code"] == 1
    monkeypatch.setattr(page, "build", lambda profile: tmp_path / "index.html")
    assert said("report")["page"] == f"file://{tmp_path / 'index.html'}"


def test_a_mistake_in_the_data_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    from mllm_compress import checkpoint
    from mllm_compress.cli import requests

    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('[{"id": 7, "question": "why?", "answer": null}]')
    monkeypatch.setattr(requests, "load", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(requests, "check_models", lambda *a: None)
    monkeypatch.setattr(checkpoint, "is_checkpoint", lambda *a: True)
    data = ("--data", "bad.json")
    for args in (
        ("score", "smoke-llava", "-o", "out"),
        ("recover", "x", "--teacher", "smoke-llava", "-o", "out"),
        ("evaluate", "smoke-llava", "--benchmark", "perplexity"),
    ):
        assert "Entry 7" in ask(*args, *data, code=2)
