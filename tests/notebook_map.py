"""Files that follow from others, written by `python tests/notebook_map.py`.

The map of the notebooks (nbs/README.md), llms.txt, the rows of tables that the help of commands
lists (mllm_compress/cli/rows.json), and the outputs of nbs/study, which are those of profile quick.
"""

import ast
import csv
import json
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
PACKAGES = (
    "utils anatomy zoo data importance pruning checkpoint recovery evaluation cost study".split()
)
PACKAGES += ["cli"]  # as they may import each other
METHOD = ["anatomy", "importance", "pruning", "recovery", "evaluation", "cost"]  # read these first
REST = ["zoo", "data", "checkpoint", "study", "cli", "utils"]
START = ["quickstart", "play", "compress_your_own"]
INTRO = """# The notebooks

Written by `python tests/notebook_map.py` from the first cell of every notebook.
"""
LIBRARY = """## Library

Each folder is a subpackage: `nbs/library/pruning/04_plans.ipynb` exports
`mllm_compress/pruning/plans.py`. The order below is the order of reading, the method first.
A subpackage imports only from those before it in
{packages}.
"""
SHOWN = "class decoder score layerwise uniform blockwise reconstruct recover evaluate cache reload"
SHOWN = SHOWN.split()
SUPPORT = """What the contract test finds on small random models of every class
(`tests/test_contract.py`). On a checkpoint of yours: `mllm-compress check FOLDER`. *stock*: plain
`transformers` loads the pruned checkpoint; *own format*: `load_pruned` does, because layers differ
in width or the class allows no such head count. Processors of Qwen-VL, InternVL, LLaVA-OneVision,
Pixtral and SmolVLM need torchvision: `pip install 'mllm_compress[vision]'`. Of decoders
that share keys and values between layers Gemma 4's are supported, whose heads stay; others are
refused, with the reason. A new class is one row:
[add a model](guides/add_a_model.ipynb).
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


def start() -> list:
    "The start notebooks, in the order of reading."
    there = (NOTEBOOKS / "start").glob("*.ipynb")
    return sorted(there, key=lambda path: (START.index(path.stem), path))


def section(title: str, folder: str) -> list:
    "The lines of a folder."
    paths = sorted((NOTEBOOKS / folder).glob("*.ipynb"))
    return [f"## {title}", "", *map(entry, paths), ""] if paths else []


def package(name: str) -> list:
    "The lines of a subpackage, headed by its first notebook."
    front, *paths = sorted((NOTEBOOKS / "library" / name).glob("*.ipynb"))
    title, line = head(front)
    link = front.relative_to(NOTEBOOKS).as_posix()
    return [f"### [{title}]({link})", "", line, "", *map(entry, paths), ""]


def items() -> list:
    "Which notebook is which table or figure of the paper."
    path = NOTEBOOKS.parent / "tests" / "items.csv"
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
    lines += map(entry, start())
    lines += ["", LIBRARY.format(packages=", ".join(f"`{name}`" for name in PACKAGES))]
    for name in METHOD + REST:
        lines += package(name)
    front = sorted((NOTEBOOKS / "library").glob("*.ipynb"))  # of the package itself
    lines += ["### The package", "", *map(entry, front), ""] if front else []
    study, blank, *rest = section("The study, a notebook per table or figure", "study")
    lines += [study, blank, *items(), *rest]
    lines += section("Guides", "guides") + support()
    return "\n".join(lines).rstrip() + "\n"


# llms.txt: what a language model that helps a user has to know of this repository

ABOUT = """# mllm_compress

> Prunes the language decoder of multimodal LLMs, recovers it, and re-runs the study behind both.

Install: `pip install .` in a clone; `'.[study]'` adds notebooks and figures. The notebooks in
`nbs/` are the source; `mllm_compress/` is generated from `nbs/library/` and never edited by hand. A
ratio is the fraction of LM-decoder parameters removed. A model is a shipped name (`tiny-llava`,
`tiny-bunny`), a folder, or a hub id.
"""


def names_of(package: str) -> list:
    "The public names of a subpackage."
    path = NOTEBOOKS.parent / "mllm_compress" / package / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    return ast.literal_eval(assigned[0].value)


def commands() -> list:  # of (name, first line of its help)
    "The commands of the command line."
    from mllm_compress.cli import app

    named = [(c.name or c.callback.__name__, c.callback.__doc__) for c in app.registered_commands]
    return sorted(named)  # the order of registration depends on what was imported first


def llms() -> str:
    "llms.txt."
    link = lambda path: entry(path).replace("](", "](nbs/")
    paths = lambda folder: sorted((NOTEBOOKS / folder).glob("*.ipynb"))
    lines = [ABOUT, "## Start", "", "- [README](README.md)", *map(link, start())]
    lines += ["- [Map of all notebooks](nbs/README.md)", "- [Contributing](CONTRIBUTING.md)"]
    lines += ["", "## Python, by module", ""]
    for name in METHOD + REST:
        front = f"nbs/library/{name}/00_index.ipynb"
        shown = ", ".join(names_of(name))
        lines.append(f"- [mllm_compress.{name}]({front}): {shown}")
    lines += ["", "## Command line: mllm-compress", ""]
    lines += [f"- {name}: {about}" for name, about in commands()]
    for title, folder in (("Study", "study"), ("Guides", "guides")):
        lines += ["", f"## {title}", "", *map(link, paths(folder))]
    return "\n".join(lines) + "\n"


def rows() -> str:
    "rows.json: for each command, what its tables add to the help of its options."
    from mllm_compress import zoo
    from mllm_compress.cli import app

    def listed(table: dict) -> str:
        texts = {name: getattr(row, "help", None) or str(row) for name, row in table.items()}
        ended = lambda text: text if text.endswith((".", "?")) else f"{text}."
        return " ".join(f"{name}: {ended(text)}" for name, text in texts.items())

    filled = {"models": dict(zoo.MODELS)}  # which the command prints
    for command in app.registered_commands:
        if tables := command.callback.request.tables:
            name = command.name or command.callback.__name__
            filled[name] = {field: listed(table()) for field, table in tables.items()}
    return json.dumps(dict(sorted(filled.items())), indent=1, ensure_ascii=False) + "\n"


def show_quick() -> None:
    "Copy the outputs of profile quick into the notebooks that they were run from."
    for path in (NOTEBOOKS.parent / "figures/quick").glob("[0-9]*.ipynb"):
        source, run = NOTEBOOKS / "study" / path.name, nbformat.read(path, 4)
        notebook = nbformat.read(source, 4)
        given = [c for c in run.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        for cell, done in zip(notebook.cells, given, strict=True):
            if cell.cell_type == "code":
                cell.outputs = done.outputs
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = None
        nbformat.write(notebook, source)


if __name__ == "__main__":
    show_quick()
    (NOTEBOOKS / "README.md").write_text(text(), encoding="utf-8")
    (NOTEBOOKS.parent / "llms.txt").write_text(llms(), encoding="utf-8")
    (NOTEBOOKS.parent / "mllm_compress/cli/rows.json").write_text(rows(), encoding="utf-8")
