"""Every cell of every library notebook runs, with its assertions."""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "nbs/library"
NOTEBOOKS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in LIBRARY.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
LONG = """checkpoint/03_loading cost/01_arithmetic cost/02_memory cost/05_report
importance/04_gauss_newton pruning/06_reconstruction pruning/07_search pruning/08_one_step
recovery/05_training study/11_workers study/14_forecast study/30_runner"""  # 15 s and more
SKIPPED = re.compile(r"(?m)^#\|\s*(default_exp|eval:\s*false)|nbdev_export\(\)")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    "A copy of what lessons read, so that they cannot write into the repository."
    folder = tmp_path_factory.mktemp("lessons")
    for name in ("settings.ini", "pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "figures"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("mllm_compress", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def marked(name: str):
    "A notebook; `make test` leaves out those that take long."
    long = name.removeprefix("nbs/library/").removesuffix(".ipynb") in LONG.split()
    return pytest.param(name, marks=[pytest.mark.slow] if long else [])


@pytest.mark.parametrize("name", map(marked, NOTEBOOKS))
def test_lessons_hold(name, checkout, monkeypatch):
    """The cells run one after another in this process, as a kernel would run them.

    A fresh kernel per notebook would spend most of its time on importing PyTorch.
    """
    import torch

    from mllm_compress.cli import app
    from mllm_compress.evaluation.benchmarks import BENCHMARKS, register_benchmarks

    commands = list(app.registered_commands)  # a lesson of the command line defines them again
    benchmarks = dict(BENCHMARKS)  # and one of the benchmarks registers them again
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir((checkout / name).parent)
    environment, threads = dict(os.environ), torch.get_num_threads()
    scope = {"__name__": "lesson", "display": print}
    torch.manual_seed(0)
    try:
        for cell in nbformat.read(checkout / name, 4).cells:
            if cell.cell_type == "code" and not SKIPPED.search(cell.source):
                code = compile(ast.parse(cell.source), f"{name} {cell.id}", "exec")
                exec(code, scope)  # noqa: S102
    finally:
        app.registered_commands[:] = commands
        register_benchmarks(benchmarks.values())
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        torch.set_num_threads(threads)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
