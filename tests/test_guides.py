"""The guides run from top to bottom, say what they promise, and hold no path of a machine."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

GUIDES = sorted((Path(__file__).parents[1] / "nbs/guides").glob("*.ipynb"))


def test_the_guides_are_there():
    assert [p.stem for p in GUIDES] == [
        "add_a_benchmark",
        "add_a_model",
        "add_a_pruning_criterion",
        "compress_your_own_llava",
    ]


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_a_guide_runs_and_is_a_page(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nb = nbformat.read(path, 4)
    assert (
        nb.cells[0].source.startswith("# ") and "\n> " in nb.cells[0].source and len(nb.cells) < 30
    )
    assert not any(
        place in path.read_text(encoding="utf-8")
        for place in ("/work/", "/tmp/", "/home/", "/root/")
    )
    NotebookClient(
        nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


def test_the_commands_of_the_compression_guide_exist():
    from typer.testing import CliRunner

    from mllm_compress.cli.app import app

    text = next(p for p in GUIDES if p.stem == "compress_your_own_llava").read_text(
        encoding="utf-8"
    )
    for command, options in (
        ("convert", ["--tower", "--dtype"]),
        ("score", ["--method", "--data", "--image-root", "--samples", "--device"]),
        ("prune", ["--scores", "--ratio"]),
        ("recover", ["--teacher", "--recipe", "--fraction", "--batch-size", "--passes"]),
        ("evaluate", ["--dense", "--benchmark"]),
    ):
        help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert f"mllm-compress {command} " in text and all(
            o in text and o in help_text for o in options
        ), command
