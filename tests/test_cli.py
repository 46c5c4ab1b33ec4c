"""The command line: every step of a practitioner, and an answer to every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import facts, run
from typer.testing import CliRunner

from mllm_compress.cli import app


def test_advice_without_results_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("advise", "--model", "m", "--ratio", ".3", "--profile", "smoke", code=2)
    assert "run mllm-compress study --profile smoke first" in said


def test_advice_of_the_command_is_that_of_the_function():
    from mllm_compress import advise

    text = run("advise", "--model", "tiny-bunny", "--ratio", ".3", "--no-training")
    assert text.strip() == str(advise("tiny-bunny", 0.3, training=False)).strip()
    far = run("advise", "--model", "tiny-bunny", "--ratio", ".94", "--no-training", code=2)
    assert "Nothing was studied within" in far


def test_convert_an_original_release(golden, tmp_path, monkeypatch):
    import shutil

    from original_layouts import copy_of
    from transformers import AutoModelForImageTextToText

    monkeypatch.chdir(tmp_path)
    source = copy_of(golden / "original_layout", "llava", tmp_path)
    shutil.move(source / "vision_tower", "clip")
    said = run("convert", source, "out", code=2)
    assert "Download openai/clip-vit-large-patch14-336" in said and not Path("out").exists()
    text = run("convert", source, "out", "--tower", "clip", "--dtype", "bfloat16")
    assert "vicuna_v1" in text and "bfloat16" in text and "written to out" in text
    assert str(AutoModelForImageTextToText.from_pretrained("out").dtype) == "torch.bfloat16"
    assert "exists and was not written" in run("convert", source, "out", "--tower", "clip", code=2)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    said = run("convert", source, "again", "--tower", "clip", code=2)
    assert "weights_only=True" in said and not Path("again").exists()


def test_every_command_takes_quiet_verbose_and_json():
    "Before or after the name of the command; --json on all that print a result."
    from typer.main import get_command

    group = get_command(app)
    context = group.make_context("mllm-compress", ["models"])
    for name in group.list_commands(context):
        flags = {flag for p in group.get_command(context, name).params for flag in p.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--json"} <= flags, name


def test_a_request_is_the_same_from_python_a_file_and_options(tmp_path, monkeypatch):
    "And an option of the command line wins over the file."
    from mllm_compress.cli.pruning import PruneRequest, prune

    monkeypatch.chdir(tmp_path)
    values = {"model": "smoke-llava", "ratio": 0.3, "method": "magnitude", "round_to": 4}
    named = {f"--{k.replace('_', '-')}": v for k, v in values.items() if k != "model"}
    options = [x for pair in named.items() for x in pair]
    prune(PruneRequest(**values, out="python"))
    run("prune", "smoke-llava", "-o", "options", *options)
    Path("run.yaml").write_text(yaml.safe_dump(values | {"out": "file", "ratio": 0.9}))
    run("prune", "--config", "run.yaml", "--ratio", 0.3)
    weights = {Path(out, "model.safetensors").read_bytes() for out in ("python", "options", "file")}
    assert len(weights) == 1
    for wrong, says in (({"rat": 1}, "Unknown option 'rat'"), ({"ratio": "x"}, "ratio is 'x'")):
        with pytest.raises(ValueError, match=says):
            PruneRequest(**{"model": "a", "out": "b", "ratio": 0.3} | wrong)


def test_help_imports_no_torch():
    code = "import sys; from mllm_compress.cli import app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


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
    from mllm_compress.study import report as page
    from mllm_compress.study import runner

    found = facts("study", "--profile", "smoke", "--only", "02_pruning", "--dry-run")
    assert found["exit_code"] == 0 and "02_pruning" in found["lines"][0]
    monkeypatch.setattr(runner, "run_study", lambda *a: print("PROBLEM: it rains") or 1)
    found = facts("study", "--profile", "smoke", code=1)
    assert found["problems"] == ["it rains"] and found["exit_code"] == 1
    monkeypatch.setattr(page, "build", lambda profile: tmp_path / "index.html")
    assert facts("report")["page"] == f"file://{tmp_path / 'index.html'}"


def test_a_mistake_in_the_data_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    from mllm_compress import checkpoint
    from mllm_compress.cli import requests

    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('[{"id": 7, "question": "why?", "answer": null}]')
    monkeypatch.setattr(requests, "load", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(requests, "check_models", lambda *a: None)
    monkeypatch.setattr(checkpoint.formats, "is_checkpoint", lambda *a: True)
    data = ("--data", "bad.json")
    for args in (
        ("score", "smoke-llava", "-o", "out"),
        ("recover", "x", "--teacher", "smoke-llava", "-o", "out"),
        ("evaluate", "smoke-llava", "--benchmark", "perplexity"),
    ):
        assert "Entry 7" in run(*args, *data, code=2)
