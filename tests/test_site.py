"""The pages of a study and the documentation site, and links between notebooks."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mllm_compress.study import report as page

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "llms.txt", "nbs/README.md")]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    "A checkout with an executed notebook, and one that failed."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    figures = tmp_path / "runs/smoke/figures"
    for folder in (tmp_path / "nbs/study", figures):
        folder.mkdir(parents=True)
        first = new_markdown_cell("# A title\n> A claim: $x^2$, see [b](../library/b.ipynb).")
        cells = [first, new_code_cell("hidden_code = 1")]
        nbformat.write(new_notebook(cells=cells), folder / "01_a.ipynb")
    (figures / "02_b.failed.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    return page.build("smoke")


def test_a_page_has_failures_folded_code_and_links_that_lead_somewhere(made):
    assert made == made.parents[3] / "runs/smoke/figures/index.html"
    text = made.read_text(encoding="utf-8")
    assert "02_b" in text
    assert "<details><summary>code</summary>" in text and "hidden_code" in text
    assert 'href="../../../nbs/library/b.ipynb"' in text and 'id="01_a"' in text


@pytest.mark.parametrize("path", TEXTS + NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_texts_and_notebooks_exist(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        assert (path.parent / place).exists(), target
        if anchor and (path.parent / place).suffix in ("", ".md"):  # of this page, or of a text
            page = text if not place else (path.parent / place).read_text(encoding="utf-8")
            heads = re.findall(r"(?m)^#+ (.+)$", page.lower())
            slugs = {re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in heads}
            assert anchor.lower() in slugs, target


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_git_keeps_results_tables_and_executed_notebooks():
    command = ["git", "ls-files", "figures"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    kept = {".zip", ".csv", ".xz", ".json", ".png", ".svg", ".ipynb"}
    assert not [path for path in tracked if Path(path).suffix not in kept]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("myst_nb"), reason="no MyST-NB here")
def test_the_site_has_notebooks_names_with_parameters_and_commands(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("site/index.md", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    for name in ("nbs/library/pruning", "nbs/study", "nbs/start", "bench/peers", "figures/bench"):
        shutil.copytree(ROOT / name, source / name)
    options = ["-q", "-b", "html", "-c", str(ROOT / "site")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    study = (out / "nbs/study/02_pruning.html").read_text(encoding="utf-8")
    assert "Layers or width?" in study and 'hide above-input"' in study
    names = (out / "made/names-pruning.html").read_text(encoding="utf-8")
    assert "plan_layerwise" in names and "Parameters" in names
    commands = (out / "made/command_line.html").read_text(encoding="utf-8")
    assert "--ratio" in commands and (out / "search.html").exists()
