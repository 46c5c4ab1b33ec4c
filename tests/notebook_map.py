"""nbs/README.md, the map of the notebooks: `python tests/notebook_map.py` writes it."""

import csv
import json
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
ROOMS = (
    "utils anatomy zoo data importance pruning checkpoint recovery evaluation cost study".split()
)
ROOMS += ["reporting", "cli"]  # as they may import each other
METHOD = ["anatomy", "importance", "pruning", "recovery", "evaluation", "cost"]  # read these first
REST = ["zoo", "data", "checkpoint", "study", "reporting", "cli", "utils"]
INTRO = """# The notebooks

Written by `python tests/notebook_map.py` from the first cell of every notebook.
"""
LIBRARY = """## Library

A folder is a room of the package: `nbs/library/pruning/03_plans.ipynb` exports
`mllm_compress/pruning/plans.py`. The order below is the order of reading, the method first.
Imports go one way: a room imports only from rooms to its left in
{rooms}.
"""
SHOWN = "class decoder score layerwise uniform blockwise reconstruct recover evaluate cache reload"
SHOWN = SHOWN.split()
SUPPORT = """What the contract test finds on small random models of every class
(`tests/test_contract.py`). On a checkpoint of yours: `mllm-compress check FOLDER`. *stock*: plain
`transformers` loads the pruned checkpoint; *own format*: `load_pruned` does, because layers differ
in width or the class allows no such head count. Processors of Qwen-VL, InternVL, LLaVA-OneVision,
Pixtral and SmolVLM need torchvision: `pip install 'mllm_compress[vision]'`. Mixtures of experts and
decoders that share keys and values between layers are refused, with the reason. A new class is one
row: [add a model](guides/add_a_model.ipynb).
"""


def head(path: Path) -> tuple:  # (title, line)
    "Title and one line of a notebook."
    text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, *rest = text.splitlines()
    line = next((r for r in rest if r.startswith("> ")), "> ")
    return title.removeprefix("# "), line.removeprefix("> ")


def entry(path: Path) -> str:
    "A line of a list."
    title, line = head(path)
    return f"- [{title}]({path.relative_to(NOTEBOOKS).as_posix()}): {line}"


def section(title: str, folder: str) -> list:
    "The lines of a folder."
    paths = sorted((NOTEBOOKS / folder).glob("*.ipynb"))
    return [f"## {title}", "", *map(entry, paths), ""] if paths else []


def room(name: str) -> list:
    "The lines of a room, headed by its front door."
    front, *paths = sorted((NOTEBOOKS / "library" / name).glob("*.ipynb"))
    title, line = head(front)
    link = front.relative_to(NOTEBOOKS).as_posix()
    return [f"### [{title}]({link})", "", line, "", *map(entry, paths), ""]


def items() -> list:
    "Which notebook is which table or figure of the paper."
    path = NOTEBOOKS.parent / "mllm_compress" / "templates" / "items.csv"
    there = {p.stem for p in (NOTEBOOKS / "study").glob("*.ipynb")}
    lines = ["| in the paper | what | notebook |", "| --- | --- | --- |"]
    with path.open(encoding="utf-8", newline="") as rows:
        for item, what, name in list(csv.reader(rows))[1:]:
            link = f"[{name}](study/{name}.ipynb)" if name in there else f"{name} (not there yet)"
            lines.append(f"| {item} | {what} | {link} |")
    return [*lines, ""]


def support() -> list:
    "What works on which model, as the contract test found it (figures/support.csv)."
    with (NOTEBOOKS.parent / "figures/support.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    shown = [head.index(name) for name in SHOWN]
    lines = ["## Support", "", SUPPORT, f"| {' | '.join(SHOWN)} |", "| --- " * len(SHOWN) + "|"]
    rows = [[row[k] for k in shown] for row in rows]
    lines += [f"| {' | '.join([row[0] or 'text only', *row[1:]])} |" for row in rows]
    return lines


def text() -> str:
    "The map."
    lines = [INTRO, "## Start", "", entry(NOTEBOOKS / "index.ipynb")]
    lines += map(entry, sorted((NOTEBOOKS / "start").glob("*.ipynb")))
    lines += ["", LIBRARY.format(rooms=", ".join(f"`{name}`" for name in ROOMS))]
    for name in METHOD + REST:
        lines += room(name)
    front = sorted((NOTEBOOKS / "library").glob("*.ipynb"))  # of the package itself
    lines += ["### The package", "", *map(entry, front), ""] if front else []
    study, blank, *rest = section("The study, a notebook per table or figure", "study")
    lines += [study, blank, *items(), *rest]
    lines += section("Guides", "guides") + support()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (NOTEBOOKS / "README.md").write_text(text(), encoding="utf-8")
