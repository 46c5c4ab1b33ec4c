"""The modules are what the notebooks export, with nbdev 2 (settings.ini) and 3 (pyproject.toml)."""

import difflib
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(folder: Path) -> dict:  # path -> text
    "The modules of a package, without nbdev's index, which git ignores."
    paths = [p for p in folder.rglob("*.py") if p.name != "_modidx.py"]
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in paths}


def test_modules_are_what_the_notebooks_export(tmp_path):
    "With the nbdev that is installed; its export must not touch anything else either."
    pytest.importorskip("nbdev")
    configs = ("settings.ini", "pyproject.toml", "setup.py")
    for name in configs:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "mllm_compress").mkdir()
    shutil.copy(ROOT / "mllm_compress/__init__.py", tmp_path / "mllm_compress")
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    environment = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, env=environment)
    ours, fresh = modules(ROOT / "mllm_compress"), modules(tmp_path / "mllm_compress")
    assert set(ours) == set(fresh)
    for name in ours:
        lines = (ours[name].splitlines(True), fresh[name].splitlines(True))
        differs = difflib.unified_diff(*lines, f"mllm_compress/{name}", "notebook")
        assert ours[name] == fresh[name], "".join(list(differs)[:30])
    for name in configs:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_both_configurations_of_nbdev_agree():
    tomllib = pytest.importorskip("tomllib")
    block = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = dict(config["DEFAULT"])
    assert set(block) - set(settings) == {"update_pyproject"}  # of nbdev 3 alone
    written = lambda value: " ".join(value) if isinstance(value, list) else str(value)
    both = set(block) & set(settings)
    assert {key: written(block[key]) for key in both} == {key: settings[key] for key in both}
