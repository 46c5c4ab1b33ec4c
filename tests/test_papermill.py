"""Study notebooks as people run them: papermill and jupyter execute, from any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from mllm_compress.study.notebooks import check_injected
from mllm_compress.utils.files import checkout

pytestmark = pytest.mark.slow  # whole processes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "A copy of this checkout, from which the package is imported."
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs/study", folder / "nbs/study")
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mllm_compress", folder / "mllm_compress", ignore=hidden)
    return folder


def run(source: Path, *command: str, cwd: Path):
    "A command with the package of the copied checkout."
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MPLBACKEND": "agg"}
    environment = os.environ | {"PYTHONPATH": str(source)} | quiet
    command = [sys.executable, "-m", *command]
    how = dict(capture_output=True, text=True, timeout=300)
    return subprocess.run(command, cwd=cwd, env=environment, **how)


def papermill(source: Path, cwd: Path, *given: str):
    "The second notebook at profile smoke, from some folder."
    notebook = str(source / "nbs/study/02_pruning.ipynb")
    options = ("-p", "profile", "smoke", "--no-progress-bar", "-k", "python3")
    return run(source, "papermill", notebook, "out.ipynb", *options, *given, cwd=cwd)


def test_papermill_from_another_folder_uses_the_checkout_and_its_scratch_folder(source, tmp_path):
    done = papermill(source, tmp_path, "-y", "ratios: [0.3]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
    (scratch,) = (source / "runs/scratch").iterdir()
    table = (scratch / "02_pruning-scores.csv").read_text()
    assert "layerwise" in table and "0.45" not in table  # the profile's other ratio
    assert (source / "runs/smoke/score").is_dir() and not (source / "figures").exists()
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    shown = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert f"files are written to runs/scratch/{scratch.name}" in shown


@pytest.mark.parametrize(
    "given, message",
    [
        (("-p", "ratoi", "0.3"), "Unknown parameter 'ratoi'. The notebook has:"),
        (("-p", "ratios", "0.3"), "Parameter ratios must be of type list, not 0.3"),
    ],
    ids=["mistyped", "type"],
)
def test_a_wrong_parameter_is_an_error_before_all_work(source, tmp_path, given, message):
    before = sorted(source.glob("runs/*/*"))
    done = papermill(source, tmp_path, *given)
    assert done.returncode != 0 and message in done.stderr
    assert "ratios: list = []  # of LM-decoder parameters" in done.stderr
    assert sorted(source.glob("runs/*/*")) == before


def test_jupyter_runs_a_notebook_with_its_defaults(source, tmp_path):
    shutil.copytree(source / "nbs", tmp_path / "nbs")
    shutil.copy(source / "settings.ini", tmp_path)
    done = run(source, "jupyter", "execute", "nbs/study/01_models.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny-llava" in (tmp_path / "runs/quick/figures/01_models-parameters.csv").read_text()


def test_only_a_study_notebook_is_checked(monkeypatch):
    check_injected()  # no notebook, no error
    shell = SimpleNamespace(user_ns={"In": ["", "x = 1", "# Parameters\nratoi = [0.3]\n"]})
    monkeypatch.setattr("mllm_compress.study.notebooks.get_ipython", lambda: shell)
    check_injected()
    shell.user_ns["In"][1] = 'profile: str = "quick"  # scale'
    with pytest.raises(ValueError, match="Unknown parameter 'ratoi'"):
        check_injected()


def test_the_named_checkout_is_used_where_the_folder_is_in_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLLM_COMPRESS_CHECKOUT", raising=False)
    assert checkout() == tmp_path
    monkeypatch.setenv("MLLM_COMPRESS_CHECKOUT", str(ROOT))
    assert checkout() == ROOT
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    assert checkout() == tmp_path
