"""The commands of README work, and it says what the index notebook and the results say."""

import ast
import contextlib
import io
import json
import re
import shlex

import nbformat
import pytest
import yaml
from commands import options_of
from notebook_map import NOTEBOOKS

from mllm_compress.study.notebooks import check_parameters, parameters_of

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


def test_readme_is_the_index_notebook_and_shows_what_it_shows():
    texts = ["".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown"]
    outputs = [o.get("data", {}) for c in CELLS for o in c.get("outputs", [])]
    shown = ["".join(data["text/markdown"]) for data in outputs if "text/markdown" in data]
    assert len(shown) == 10
    for text in texts + shown:
        for line in text.replace("](../", "](").replace("../figures", "figures").splitlines():
            assert line in README, line


# Its numbers


def test_the_tables_and_sentences_follow_from_the_committed_files(monkeypatch):
    "Every quick cell of the index notebook gives again what it shows."
    monkeypatch.chdir(NOTEBOOKS)
    names, compared = {}, 0
    for cell in CELLS:
        source = "".join(cell["source"])
        if (
            cell["cell_type"] != "code"
            or "plan_study" in source
            or "evaluate(" in source
            or "savefig(" in source
        ):
            continue
        *before, last = ast.parse(source).body
        exec(compile(ast.Module(before, []), "index", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "index", "eval"), names)
        (output,) = cell["outputs"]
        assert value.data == "".join(output["data"]["text/markdown"])
        compared += 1
    assert compared == 7


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
    found = [words for words in lines_of_shell() if words[0] not in (".", "git")]
    assert [".", ".venv/bin/activate"] in lines_of_shell()  # where make installs
    assert {words[0] for words in found} == programs
    for words in found:
        if words[0] == "make":
            assert set(words[1:]) <= known, words


@pytest.mark.parametrize(
    "words", [w for w in lines_of_shell() if w[0] == "mllm-compress"], ids=" ".join
)
def test_a_command_line_has_its_options(words):
    assert {w for w in words if w.startswith("--")} <= options_of(words[1]), words


def test_the_papermill_command_has_parameters_of_its_notebook():
    (words,) = [w for w in lines_of_shell() if w[0] == "papermill"]
    known = parameters_of(nbformat.read(ROOT / words[1], 4))
    given = {words[words.index("-p") + 1]: words[words.index("-p") + 2]}
    given |= yaml.safe_load(words[words.index("-y") + 1])
    assert check_parameters(known, given) == {"profile": "quick", "ratios": [0.3]}
