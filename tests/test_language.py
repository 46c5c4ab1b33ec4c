"""Prose uses standard terms: what a reader of notebooks, docstrings and README does not meet."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TERMS = {  # what must not occur (a pattern) -> what is written instead
    r"chance among so many": "after correction for multiple comparisons",
    r"all are to be right together": "with simultaneous 95 % intervals",
    r"least sure|in widths of (its|the) interval": "smallest relative to its standard error",
    r"contrary in \d": "contradicted in 5 of 8 settings",
    r"\bprinted (number|value|size|table|score)s?\b": "reported in the paper",
    r"\bas the paper prints\b": "as reported in the paper",
    r"\b(kept|found) (again )?by what (determines|they were)": "cached under a hash of the inputs",
    r"\bthe right to (make|write|compute)\b": "the file lock of the result",
    r"\b(model|run|pass) without data\b": "on the meta device",
    r"\bas small as it goes\b": "one training step at batch size 1",
    r"\bhands? on\b": "passes; returns; lists",
    r"\bis our line\b|\bline is ours\b": "we call … the threshold",
    r"\bdiffers in one number\b": "runs as a profile with one changed value",
    r"\bguesser\b": "question-only baseline",
    r"\b(what|who|whoever) hears\b|\blistener\b": "hooks; callers",
    r"\bfor free\b": "without further cost",
    r"\bproves? nothing\b": "is no evidence",
    r"\bto please\b|\bflatters?\b": "biased; too high",
    r"\bblind spot\b": "what fails, and when",
    r"\bwhatever became of\b": "whatever the answers are",
    r"\bworth waiting\b": "does more data help?",
    r"\b(failed|finished|missing|stored) cells?\b": "experiments",
    r"\bwhat it got to\b": "its partial outputs",
}


def texts() -> list:  # of (where, text)
    "Markdown cells, docstrings, and the texts at the top of the repository."
    found = [(name, (ROOT / name).read_text("utf-8")) for name in ("README.md", "CONTRIBUTING.md")]
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            prose = [("".join(c["source"])) for c in cells if c["cell_type"] == "markdown"]
            found += [(path.relative_to(ROOT).as_posix(), text) for text in prose]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    for path in sorted((ROOT / "mllm_compress").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [(path.relative_to(ROOT).as_posix(), text) for text in own if text]
    return [(where, re.sub(r"\s+", " ", text)) for where, text in found]


TEXTS = texts()


@pytest.mark.parametrize("pattern", TERMS)
def test_prose_uses_standard_terms(pattern):
    hits = [(w, m[0]) for w, text in TEXTS for m in re.finditer(pattern, text, re.IGNORECASE)]
    assert not hits, f"write {TERMS[pattern]!r} instead: {hits}"


def test_the_texts_are_read():
    wheres = {where for where, _ in TEXTS}
    assert "nbs/study/02_pruning.ipynb" in wheres and "mllm_compress/pruning/plans.py" in wheres
    assert len(TEXTS) > 3000
