"""README is short, its commands work, and it says what the index notebook and the results say."""

import contextlib
import io
import json
import re
import shlex
from xml.etree import ElementTree

import nbformat
import pytest
from notebook_map import NOTEBOOKS
from typer.testing import CliRunner

from mllm_compress.cli.app import app
from mllm_compress.study import front_page, schematic
from mllm_compress.study.claims import CLAIMS
from mllm_compress.study.notebooks import check_parameters
from mllm_compress.study.statistics import Estimate

ROOT = NOTEBOOKS.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CELLS = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]


def blocks(language: str) -> list:
    "The code blocks of README in a language."
    return re.findall(rf"```{language}\n(.*?)\n```", README, re.DOTALL)


def lines_of_shell() -> list:
    "The commands in README, as lists of words."
    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


# What it says


def test_readme_is_the_index_notebook():
    for cell in CELLS:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).replace("](../", "](").splitlines():
                assert line in README, line


def test_readme_shows_what_the_index_notebook_shows():
    outputs = [o.get("data", {}) for c in CELLS for o in c.get("outputs", [])]
    shown = ["".join(data["text/markdown"]) for data in outputs if "text/markdown" in data]
    assert len(shown) == 7
    for text in shown:
        for line in text.replace("](../", "](").splitlines():
            assert line in README, line


def test_readme_is_short():
    assert len(README.split()) <= 900


def test_readme_has_its_parts_in_order():
    parts = ("Does it work?", "Install", "What works", "Reproduce", "Results", "Your own model")
    places = [README.index(f"## {part}") for part in (*parts, "Extend", "Limits", "Cite")]
    assert places == sorted(places)
    first = README[: places[0]]
    assert "figures/readme/schematic.svg" in first and first.count("\n> ") == 1
    assert README.index("```python") < places[2], "code comes early"


def test_readme_points_at_files_that_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) > 12
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists() if path else f"## {anchor.capitalize()}" in README, target
        if anchor and path:
            heads = re.findall(r"(?m)^#+ (.+)", (ROOT / path).read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert anchor in slugs, target


# Its numbers


def test_the_tables_and_sentences_follow_from_the_committed_files():
    computed = [front_page.answers()]
    computed += [front_page.support_table(), front_page.claims_table(), front_page.by_score()]
    small = front_page.first_with(front_page.COLUMNS["small"], "09_cost-pareto.csv")
    answered = front_page.first_with(front_page.COLUMNS["small"], "07_qualitative-answers.csv")
    computed += [front_page.latency_caption(small), front_page.answers_caption(answered)]
    for text in computed:
        assert text in README, "run: make readme"


def test_readme_has_the_verdicts_of_the_results():
    "Claim, word and average effect, as the committed verdicts have them."
    for title, profile in front_page.claims_columns().items():
        assert f"{title} (`{profile}`)" in README
        for n, claim in CLAIMS.items():
            names = [f"{claim.notebook}-verdict", f"{claim.notebook}-choice"]
            paths = [
                path
                for p in front_page.COLUMNS[title]
                for name in (f"10_findings-claim-{n}", *names)
                if (path := ROOT / f"figures/{p}/{name}.json").exists()
            ]
            said = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            said = [v for v in said if v["claim"] == claim.text]
            verdict = next((v for v in said if v["average"]), {"average": None})
            start = f"|{claim.text.split(':')[0].rstrip('.')}|"
            row = next(line for line in README.splitlines() if line.startswith(start))
            if verdict["average"]:
                assert f"**{verdict['word']}** {Estimate(**verdict['average']):+1}" in row
            else:
                assert "not tested" in row


def test_a_scale_without_results_says_so(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path)
    said = [front_page.answer(scale)[0] for scale in front_page.SCALES]
    assert ["no results" in text for text in said] == [True, True, True, False]
    assert "not run" in said[3]
    assert not re.search(r"\d %", "".join(said)) and front_page.claims_columns() == {}


# Its pictures


def test_the_schematic_and_the_badges_are_those_of_the_code():
    drawn = (ROOT / "figures/readme/schematic.svg").read_text(encoding="utf-8")
    assert drawn == schematic.schematic()
    for path in sorted((NOTEBOOKS / "start").glob("*.ipynb")):
        name = path.stem.replace("_", "-")
        badge = (ROOT / f"figures/readme/run-{name}.svg").read_text(encoding="utf-8")
        assert badge == schematic.badge("run offline", f"jupyter lab nbs/start/{path.name}")


def test_the_schematic_is_legible_on_white_and_on_black():
    "Every text stands in a white box; what stands outside has a middle grey."
    space = "{http://www.w3.org/2000/svg}"
    tree = ElementTree.fromstring(schematic.schematic())
    place = lambda node: [float(node.get(k)) for k in ("x", "y", "width", "height")]
    boxes = [place(n) for n in tree.iter(f"{space}rect") if n.get("fill") == "#ffffff"]
    for node in tree.iter(f"{space}text"):
        x, y = float(node.get("x")), float(node.get("y"))
        assert any(a < x < a + w and b < y < b + h for a, b, w, h in boxes), node.text
    lines = {node.get("stroke") for node in tree.iter(f"{space}polyline")}
    assert lines == {schematic.GREY}


# Its commands


def test_the_code_prints_what_readme_shows(tmp_path, monkeypatch):
    "Counts are equal; scores may differ by a few answers on another machine."
    (code,), (shown,) = blocks("python"), blocks("text")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    score = r"mean score ([\d.]+)"
    assert re.sub(score, "", printed.getvalue().strip()) == re.sub(score, "", shown)
    pairs = zip(re.findall(score, printed.getvalue()), re.findall(score, shown))
    assert all(abs(float(a) - float(b)) < 5 for a, b in pairs)
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "smaller")
    assert f"{loaded.num_parameters():,} parameters" in shown


def test_every_command_exists():
    known = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    programs = {"make", "pip", "papermill", "mllm-compress"}
    found = [words for words in lines_of_shell() if words[0] != "."]
    assert [".", ".venv/bin/activate"] in lines_of_shell()  # where make installs
    assert {words[0] for words in found} == programs
    for words in found:
        if words[0] == "make":
            assert set(words[1:]) <= known, words


@pytest.mark.parametrize(
    "words", [w for w in lines_of_shell() if w[0] == "mllm-compress"], ids=" ".join
)
def test_a_command_line_has_its_options(words):
    wide = {"COLUMNS": "200"}
    text = CliRunner().invoke(app, [words[1], "--help"], env=wide).output
    options = re.findall(r"--[\w-]+", text)
    assert {w for w in words if w.startswith("--")} <= set(options), words


def test_the_papermill_command_has_parameters_of_its_notebook():
    import yaml

    (words,) = [w for w in lines_of_shell() if w[0] == "papermill"]
    nb = nbformat.read(ROOT / words[1], 4)
    given = {words[words.index("-p") + 1]: words[words.index("-p") + 2]}
    given |= yaml.safe_load(words[words.index("-y") + 1])
    assert check_parameters(nb, given) == {"profile": "quick", "ratios": [0.3]}
