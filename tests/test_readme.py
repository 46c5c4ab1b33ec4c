"""The README says what the index notebook says, and its numbers are those of the results."""

import json
from pathlib import Path

from mllm_compress.reporting.effects import Estimate

ROOT = Path(__file__).parents[1]


def test_readme_is_the_index_notebook():
    readme = (ROOT / "README.md").read_text()
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).replace("](../", "](").splitlines():
                assert line in readme, line


def test_readme_shows_what_the_index_notebook_shows():
    readme = (ROOT / "README.md").read_text()
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    shown = [
        "".join(o["data"]["text/markdown"])
        for c in cells
        for o in c.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    ]
    assert len(shown) == 4 and "## Four lines" in readme
    for text in shown:
        for line in text.replace("](../", "](").splitlines():
            assert line in readme, line


def test_readme_tells_the_verdicts_of_the_results():
    "Claim, word, average effect and counts, as the committed results have them."
    readme = (ROOT / "README.md").read_text()
    profile = "tiny" if (ROOT / "figures/tiny/experiments.csv").exists() else "quick"
    for name in ("02_pruning-verdict", "05_data-verdict", "06_best-choice"):
        verdict = json.loads((ROOT / f"figures/{profile}/{name}.json").read_text())
        row = next(
            line for line in readme.splitlines() if f"| {verdict['claim'].rstrip('.')} |" in line
        )
        average = format(Estimate(**verdict["average"]), "+1") if verdict["average"] else "–"
        assert f"**{verdict['word']}**" in row and average in row and verdict["settings"] in row
    assert verdict["basis"] in readme  # n, seeds and profile


def test_readme_points_at_files_that_exist():
    import re

    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("study", "test"):
        assert f"make {target}" in (ROOT / "README.md").read_text() and f"\n{target}: " in makefile
