"""The documentation site: `make docs` builds it with Sphinx; its pages are the notebooks."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
from fastcore.docments import docments

project, copyright = "mllm_compress", "2026, the mllm_compress authors"
html_title, html_theme = "mllm_compress", "furo"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
exclude_patterns = ["**.failed.ipynb", "**/.ipynb_checkpoints"]
exclude_patterns += ["figures/quick/*", "figures/**.md"]
html_copy_source = False
html_static_path, html_css_files = ["static"], ["custom.css"]
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
suppress_warnings += ["toc.not_included"]

nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "code", "code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

autodoc_member_order, autodoc_typehints = "bysource", "description"
autodoc_typehints_description_target = "documented"

# Rooms of the library in the order of reading; each has a page of its public names.
ROOMS = ("utils", "anatomy", "zoo", "data", "importance", "pruning", "checkpoint")
ROOMS += ("recovery", "evaluation", "cost", "study")


# %% Pages that are made from elsewhere


def write_group(source: Path, name: str, title: str, pages: list) -> None:
    "A page that lists others, for the contents."
    listed = "\n".join(f"/{page.relative_to(source).with_suffix('')}" for page in pages)
    text = f"# {title}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    (source / "made" / f"{name}.md").write_text(text, encoding="utf-8")


def write_groups(source: Path) -> None:
    "The pages that list a profile's notebooks or a room's."
    found = lambda pattern: sorted(source.glob(pattern))
    title = "The study at profile quick"
    write_group(source, "study", title, found("nbs/study/[0-9]*.ipynb"))
    for path in found("figures/*/01_models.ipynb"):
        profile = path.parent.name
        if profile != "quick":  # whose notebooks are those in nbs/study
            pages = [p for p in found(f"figures/{profile}/[0-9]*.ipynb") if "failed" not in p.name]
            write_group(source, f"study-{profile}", f"The study at profile {profile}", pages)
    for room in (*ROOMS, "cli"):
        write_group(source, f"library-{room}", room, found(f"nbs/library/{room}/*.ipynb"))


def write_names(source: Path, room: str) -> None:
    "The page of a room's public names."
    module = importlib.import_module(f"mllm_compress.{room}")
    lines = [module.__name__, "=" * len(module.__name__), "", module.__doc__ or "", ""]
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            lines += [f".. automodule:: {value.__name__}", "   :members:", ""]
        elif isinstance(value, type):
            lines += [f".. autoclass:: {module.__name__}.{name}", "   :members:", ""]
        elif callable(value):
            lines += [f".. autofunction:: {module.__name__}.{name}", ""]
        else:
            rows = ", ".join(f"``{key}``" for key in value) if isinstance(value, dict) else ""
            lines += [f".. py:data:: {module.__name__}.{name}", "", f"   {rows}", ""]
    (source / "made" / f"names-{room}.rst").write_text("\n".join(lines), encoding="utf-8")


def write_commands(source: Path) -> None:
    "The page of the command line."
    command = [sys.executable, "-m", "typer", "mllm_compress.cli", "utils", "docs"]
    command += ["--name", "mllm-compress", "--title", "The command line"]
    command += ["--output", str(source / "made" / "command_line.md")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_benchmarks(source: Path) -> None:
    "The page of other methods' own code beside ours."
    rows = pd.read_csv(source / "figures/bench/peers.csv").query("source == 'this script'")
    texts = ["quotes", "technical", "licences", "docstrings"]
    rows = rows.sort_values("over_dense")
    rows = rows[["method", "removed", *texts, "over_dense", "cpu_seconds", "decode"]]
    rows.columns = ["method", "removed", *texts, "over dense", "CPU s", "decoding, of dense"]
    lines = ["", "## Perplexity on four texts", "", *[f"|{'|'.join(rows)}|"]]
    lines.append("|---" * len(rows.columns) + "|")
    for row in rows.itertuples(index=False):
        numbers = ("" if number != number else f"{number:,.4g}" for number in row[1:])
        lines.append(f"|{'|'.join([row[0], *numbers])}|")
    about = (source / "bench/peers/README.md").read_text(encoding="utf-8")
    page = f"{about}\n" + "\n".join(lines) + "\n"
    (source / "made" / "benchmarks.md").write_text(page, encoding="utf-8")


# %% What Sphinx calls


def documented(app, what, name, value, options, lines: list) -> None:
    "Add the comments beside parameters to a docstring, as a list of fields."
    if what not in ("function", "method", "class") or name.endswith("__init__"):
        return
    try:
        found = docments(value, full=True)
    except (TypeError, OSError, SyntaxError, ValueError):  # no source, or none of Python
        return
    lines.append("")
    for parameter, about in found.items():
        text = " ".join((about["docment"] or "").split())
        if text:
            field = "returns" if parameter == "return" else f"param {parameter}"
            lines.append(f":{field}: {text}")


def adapted(app, page: str, source: list) -> None:
    "Executed notebooks link as those in nbs/study do; cells of nbdev show what a reader needs."
    path = Path(app.env.doc2path(page))
    if path.suffix != ".ipynb":
        return
    text = source[0]
    if page.startswith("figures/"):
        text = text.replace("](../", "](../../nbs/").replace("](../../nbs/../", "](../../")
    nb = json.loads(text)
    for cell in nb["cells"]:
        code, tags = "".join(cell["source"]), cell["metadata"].setdefault("tags", [])
        if cell["cell_type"] != "code":
            continue
        hidden = cell["metadata"].get("jupyter", {}).get("source_hidden")
        first = re.sub(r"(?m)^(#.*|from .+ import \([^)]*\)|from .+|import .+)?\n?", "", code)
        if code.startswith(("#| hide", "#| default_exp")):
            tags.append("remove-cell")
        elif "hide-input" not in tags and (hidden or not first.strip()):  # or imports only
            tags.append("hide-input")
        lines = code.splitlines(keepends=True)
        cell["source"] = [line for line in lines if not line.startswith("#|")]
    source[0] = json.dumps(nb)


def setup(app) -> None:
    "Make the pages that are not notebooks, and connect the two functions above."
    source = Path(app.srcdir)
    (source / "made").mkdir(exist_ok=True)
    write_groups(source)
    write_commands(source)
    write_benchmarks(source)
    for room in ROOMS:
        write_names(source, room)
    app.connect("autodoc-process-docstring", documented)
    app.connect("source-read", adapted)
