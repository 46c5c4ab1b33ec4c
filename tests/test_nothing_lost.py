"""A signal, a full disk, a read-only folder or a killed save loses nothing of the user's."""

import asyncio
import errno
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import facts, run, save_models, stop_at_the_second_write
from PIL import Image
from safetensors import SafetensorError

from mllm_compress.checkpoint import load_pruned, save_pruned, verify
from mllm_compress.checkpoint import saving as target
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.utils import files
from mllm_compress.utils.files import clean_leftovers, replacing_folder


def tree(folder) -> dict:
    "The bytes of every file of a folder."
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_llava, tiny_lm):
    folder = tmp_path_factory.mktemp("shop")
    model, processor = tiny_llava
    save_models(folder, tiny_llava, tiny_lm)
    plan = plan_layerwise(model, layers=[1])
    save_pruned(apply_plan(model, plan), plan, folder / "small", processor)
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    pairs = {"image": "0.png", "question": "what color is the circle?", "answer": "red"}
    (folder / "mine.json").write_text(json.dumps([{"id": k, **pairs} for k in range(6)]))
    return folder


DATA = ("--data", "mine.json")
COMMANDS = {  # command -> (its arguments, where it is interrupted, what it says)
    "score": (
        ("score", "llava", "-o", "out", *DATA),
        "mllm_compress.importance.criteria.CRITERIA",
        "continues from there",
    ),
    "prune": (
        ("prune", "llava", "-o", "out", "--layers", "1"),
        "mllm_compress.checkpoint.from_files.write_weights",
        "Nothing was written",
    ),
    "recover": (
        ("recover", "small", "--teacher", "llava", "-o", "out", *DATA),
        "mllm_compress.recovery.training.RecoveryTrainer",
        "continues from there",
    ),
    "recover-without-checkpoints": (
        ("recover", "small", "--teacher", "llava", "-o", "out", *DATA, "--save-every", "0"),
        "mllm_compress.recovery.training.RecoveryTrainer",
        "nothing is kept",
    ),
    "evaluate": (
        ("evaluate", "llava", "--questions", "mine.json"),
        "mllm_compress.evaluation.scoring.answer_questions",
        "Nothing is kept without --out or --answers",
    ),
    "evaluate-kept": (
        ("evaluate", "llava", "--questions", "mine.json", "-o", "rows.csv"),
        "mllm_compress.evaluation.scoring.answer_questions",
        "continues from there",
    ),
    "compare": (
        ("compare", "llava", "small", "--questions", "mine.json"),
        "mllm_compress.evaluation.scoring.answer_questions",
        "Nothing is kept",
    ),
    "cost": (("cost", "llava"), "mllm_compress.cost.report.part_parameters", "Stopped"),
    "show": (("show", "small"), "mllm_compress.checkpoint.formats.sha256", "Stopped"),
    "study": (
        ("study", "--profile", "smoke", "--status"),
        "mllm_compress.study.runner.show_status",
        "Finished results are kept",
    ),
}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_a_command_with_a_true_sentence(here, monkeypatch, command, how):
    args, where, says = COMMANDS[command]
    before, sent = tree(here), []

    def interrupt(*given, **options):
        sent.append(how)
        os.kill(os.getpid(), how)
        raise AssertionError("the signal was not handled")

    if where.endswith("CRITERIA"):
        import dataclasses

        from mllm_compress.importance.criteria import CRITERIA

        row = CRITERIA["layerwise", "block_influence"]
        function = lambda model, batches, mode="default": interrupt()
        stopped = dataclasses.replace(row, function=function)
        monkeypatch.setitem(CRITERIA, ("layerwise", "block_influence"), stopped)
    else:
        monkeypatch.setattr(where, interrupt)
    handler = signal.getsignal(signal.SIGTERM)
    assert says in run(*args, code=130) and sent == [how]
    assert signal.getsignal(signal.SIGTERM) == handler
    left = {k: v for k, v in tree(here).items() if not k.startswith((".out.training", ".rows.csv"))}
    assert left == before


def test_an_error_of_a_stopped_library_is_no_bug(here, monkeypatch):
    def interrupt(*given):
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise asyncio.InvalidStateError("invalid state")  # as an event loop may

    monkeypatch.setattr("mllm_compress.cli.requests.emit", interrupt)
    assert run("models", code=130).startswith("Stopped.")


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("No space left on device"),
)


@pytest.mark.parametrize("error", FULL, ids=["json", "safetensors"])
@pytest.mark.parametrize("command", ["recover", "prune"])
def test_a_disk_that_fills_up_costs_no_training(here, monkeypatch, command, error):
    from mllm_compress.checkpoint import saving

    write, seen = saving.formats.write_manifest, []

    def full(folder, **facts):
        seen.append(folder)
        if ".out." in folder.name:
            raise error
        return write(folder, **facts)

    monkeypatch.setattr(saving.formats, "write_manifest", full)
    args = ("recover", "small", "--teacher", "llava", *DATA, "--batch-size", 3)
    args = ("prune", "llava", "--layers", "1") if command == "prune" else args
    text = run(*args, "-o", "out", code=2)
    assert "was saved to" in text and "out-rescued" in text and not Path("out").exists()
    load_pruned("out-rescued")
    if command == "recover":
        assert list(Path(".out.training").glob("checkpoint-*"))  # and so is the training


def test_no_place_at_all(tmp_path):
    def save(folder):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="nor any other folder: free space"):
        target.save_or_rescue(save, tmp_path / "out")


@pytest.mark.parametrize(
    "args",
    [
        ("prune", "llava", "-o", "out", "--ratio", "0.3", *DATA),
        ("recover", "small", "--teacher", "llava", "-o", "out", *DATA),
    ],
)
def test_a_full_disk_is_found_before_the_work(here, monkeypatch, args):
    usage = shutil.disk_usage(here)._replace(free=10)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda folder: usage)
    before = tree(here)
    text = run(*args, code=2)
    assert "MiB are free" in text and "free some space" in text and tree(here) == before


def test_a_training_without_checkpoints_needs_less_room(here, monkeypatch):
    size = sum(p.stat().st_size for p in Path("small").iterdir())
    usage = shutil.disk_usage(here)._replace(free=4 * size)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda folder: usage)
    args = ("recover", "small", "--teacher", "llava", "-o", "out", *DATA)
    assert "MiB are free" in run(*args, code=2)
    run(*args, "--save-every", "0")


READ_ONLY = [
    ("score", "llava", "-o", "out", *DATA),
    ("prune", "llava", "-o", "out", "--ratio", "0.3"),
    ("recover", "small", "--teacher", "llava", "-o", "out", *DATA),
    ("evaluate", "llava", "-o", "rows.csv", "--questions", "mine.json"),
    ("compare", "llava", "small", "-o", "out"),
    ("convert", "llava", "out"),
]


@pytest.mark.parametrize("args", READ_ONLY, ids=lambda a: a[0])
def test_a_read_only_folder_is_found_before_the_work(here, monkeypatch, args):
    def refuse(dir=None):
        raise OSError(errno.EROFS, "Read-only file system")

    fail = lambda *a: pytest.fail("a model was loaded")
    monkeypatch.setattr("mllm_compress.cli.requests.load", fail)
    monkeypatch.setattr(target.tempfile, "TemporaryFile", refuse)
    before = tree(here)
    text = run(*args, code=2)
    assert "Read-only file system" in text and "choose another folder" in text
    assert tree(here) == before


def test_overwrite_removes_only_the_files_of_the_manifest(here):
    (here / "small/notes").mkdir()
    (here / "small/notes/log.txt").write_text("years of work")
    (here / "small/link").symlink_to("config.json")
    args = ("prune", "llava", "-o", "small", "--layers", "0,2")
    assert "--overwrite" in run(*args, code=2)
    assert len(verify("small")["files"]) and load_pruned("small")[2].removed_layers == (1,)
    run(*args, "--overwrite")
    assert load_pruned("small")[2].removed_layers == (0, 2)
    assert Path("small/notes/log.txt").read_text() == "years of work"
    assert Path("small/link").is_symlink() and "notes/log.txt" not in verify("small")["files"]
    run(*args, "--overwrite")
    assert Path("small/notes/log.txt").read_text() == "years of work"


def test_an_export_replaces_only_its_own_files(here):
    args = ("export", "small", "--to", "transformers", "-o", "exp")
    first = facts(*args)["bytes"]
    (here / "exp/sub").mkdir()
    mine = [here / "exp" / name for name in ("notes.txt", "sub/adapter.safetensors")]
    for path in (*mine, here / "exp/config.json"):
        path.write_text("years of work")
    assert facts(*args, "--overwrite")["bytes"] == first  # of its own files alone
    kept = [path.read_text() == "years of work" for path in (*mine, here / "exp/config.json")]
    assert kept == [True, True, False]


def test_a_name_that_the_new_checkpoint_needs_is_not_taken_from_the_user(here):
    Path("small/plan.png").write_text("mine")
    args = ("prune", "llava", "-o", "small", "--layers", "0", "--overwrite")
    assert "move it away" in run(*args, code=2)
    assert Path("small/plan.png").read_text() == "mine"
    assert load_pruned("small")[2].removed_layers == (1,)


def test_leftovers_of_killed_saves_are_cleaned(here):
    for name in (".out.0123abcd.new", ".out.89abcdef.new", ".other.1234abcd.new"):
        (here / name).mkdir()
        (here / name / "model.safetensors").write_text("half")
    run("prune", "llava", "-o", "out", "--layers", "1")
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == [
        ".other.1234abcd.new"
    ]
    load_pruned("out")


def test_a_save_in_progress_is_left_alone(tmp_path):
    with replacing_folder(tmp_path / "out") as new:
        clean_leftovers(tmp_path / "out")
        assert new.is_dir()
        with replacing_folder(tmp_path / "out") as other:
            (other / "a").write_text("1")
        (new / "a").write_text("2")
    assert tree(tmp_path) == {"out/a": b"2"}


METHODS = ("block_influence", "taylor", "activation", "gauss_newton")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_scoring_goes_on_to_the_same_bits(here, monkeypatch, method, how):
    entry = json.loads(Path("mine.json").read_text())[0]
    Path("mine.json").write_text(json.dumps([entry | {"id": k} for k in range(40)]))
    args = ("score", "llava", "--method", method, *DATA, "--samples", 40)
    run(*args, "-o", "whole")
    done = stop_at_the_second_write(monkeypatch, how)
    assert "continues from there" in run(*args, "-o", "parts", code=130)
    assert not Path("parts").exists() and list(Path(".parts.unfinished").glob("*/sums.*"))
    run(*args, "-o", "parts")
    steps = [1, 2, 3, 4] if method == "taylor" else [1, 2, 3]  # layers, or batches
    assert done == steps and not Path(".parts.unfinished").exists()
    assert tree("whole") == tree("parts")


def test_sums_of_another_pass_or_damaged_ones_are_not_used(tmp_path, monkeypatch):
    def left(key):
        totals = {}
        with files.resuming(tmp_path / "pass", key):
            for k in files.batches_left(3, totals):
                totals["sum"] = totals.get("sum", torch.zeros(2)) + k
        return totals["sum"].tolist()

    sums = tmp_path / "pass/this/sums.safetensors"
    files.write_sums(tmp_path / "pass/another/sums.safetensors", 2, {"sum": torch.ones(2)})
    assert left("this") == [3, 3] and [p.name for p in sums.parents[1].iterdir()] == ["this"]
    files.write_sums(sums, 2, {"sum": torch.ones(2)})
    assert left("this") == [3, 3]  # 1 and the last batch
    for content in (b"", b"x" * 100):
        sums.write_bytes(content)
        assert left("this") == [3, 3]
    monkeypatch.setattr(files, "write_sums", lambda *a: 1 / 0)
    sums.unlink()
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert left("this") == [3, 3]


def test_results_are_shown_although_their_file_finds_no_space(here, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mllm_compress.cli.measuring.write_atomically", full)
    text = run("evaluate", "llava", "--questions", "mine.json", "-o", "rows.csv", code=2)
    assert " mine " in text and "Free some space" in text
