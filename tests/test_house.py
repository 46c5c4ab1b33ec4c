"""The plan of the package: imports flow one way, public names are few, exported cells are short."""

import ast
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import notebook_map
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, LIBRARY = ROOT / "mllm_compress", ROOT / "nbs/library"
METHOD = ["utils", "anatomy", "zoo", "data", "importance", "pruning", "checkpoint", "recovery"]
METHOD += ["evaluation", "cost"]
ROOMS = METHOD + ["study", "cli"]  # a room imports only from rooms to its left
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name != "_modidx.py"
}
NOTEBOOKS = sorted(LIBRARY.glob("*/[0-9]*.ipynb"))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(module: str) -> str:
    "The room of a module; empty for the package itself and its `__main__`."
    return (module.split(".") + [""])[1].removeprefix("__main__")


# Imports


def imported(module: str) -> list:
    "The modules of the package that a module imports, inside functions too."
    path, found = MODULES[module], []
    home = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = home.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{a.name}" for a in node.names if a.name != "__version__"]
            found += [name if name in MODULES else base for name in names]
    return [name for name in found if name.split(".")[0] == "mllm_compress" and name != module]


def test_the_rooms_are_known():
    assert sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")) == sorted(ROOMS)
    assert sorted(p.name for p in LIBRARY.iterdir() if p.is_dir()) == sorted(ROOMS)


def test_no_import_goes_upwards():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if room(module)
        for other in imported(module)
        if not room(other) or ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not wrong, wrong


def test_no_circle_of_imports():
    graph = {m: {other for other in imported(m) if other in MODULES} for m in MODULES if room(m)}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_relative_imports_are_resolved():
    "The graph is not empty by mistake."
    assert "mllm_compress.importance.criteria" in imported("mllm_compress.study.experiments")
    assert "mllm_compress.data" in imported("mllm_compress.study.profile_inputs")


HEAVY = "matplotlib seaborn papermill nbformat nbconvert IPython ipykernel jupyter_client typer"


def test_the_method_imports_without_what_draws_and_runs_notebooks():
    modules = [m for m in MODULES if room(m) in METHOD]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY.split()} if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


# Public names


def public(name: str) -> list:
    return importlib.import_module(f"mllm_compress.{name}").__all__


def test_public_names_are_about_a_hundred():
    names = {(name, public_name) for name in ROOMS for public_name in public(name)}
    assert 80 <= len(names) <= 110, len(names)


@pytest.mark.parametrize("name", ROOMS)
def test_what_a_room_hands_on_is_documented(name):
    module = importlib.import_module(f"mllm_compress.{name}")
    assert module.__doc__
    assert len(module.__all__) == len(set(module.__all__)) <= 10
    for one in module.__all__:
        value = getattr(module, one)
        if callable(value) or isinstance(value, ModuleType):
            text = value.__doc__ or ""
            assert text and not text.startswith(f"{one}("), f"{name}.{one}"  # dataclass's own


def test_modules_make_public_only_what_their_room_hands_on():
    total, wrong = 0, []
    for module in (m for m in MODULES if m.count(".") == 2):
        own = getattr(importlib.import_module(module), "__all__", [])
        handed = public(room(module))
        total += len(own)
        if module.rpartition(".")[2] not in handed:  # a module handed on as a whole
            wrong += [f"{module}.{name}" for name in own if name not in handed]
    assert not wrong, f"`#| exporti`, or add to 00_index.ipynb: {wrong}"
    assert total <= 110, total


# Cells


def exported_cells(path: Path):  # yields (index, lines of code, only imports, after prose)
    "The exported cells of a notebook."
    before, cells = "", json.loads(path.read_text(encoding="utf-8"))["cells"]
    for k, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"(?m)^#\|\s*export", text):
            lines = [s for s in text.splitlines() if s.strip() and not s.startswith("#|")]
            kinds = (ast.Import, ast.ImportFrom)
            only = all(isinstance(node, kinds) for node in ast.parse("\n".join(lines)).body)
            yield k, len(lines), only, before == "markdown"
        before = cell["cell_type"]


@pytest.fixture(scope="module")
def cells() -> dict:  # notebook -> its exported cells, without those that only import
    rooms = [p for p in NOTEBOOKS if p.name != "00_index.ipynb"]
    return {short(p): [c for c in exported_cells(p) if not c[2]] for p in rooms}


def test_exported_cells_are_short(cells):
    lines = {f"{name}, cell {c[0]}": c[1] for name, found in cells.items() for c in found}
    assert statistics.median(lines.values()) <= 14
    assert not {where: n for where, n in lines.items() if n > 40}


def test_prose_stands_before_exported_cells(cells):
    bare = {name: [c[0] for c in found if not c[3]] for name, found in cells.items()}
    assert not {name: where for name, where in bare.items() if len(where) > 2}


# Lines


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff")
    run = [sys.executable, "-m", "ruff", *command, "--no-cache", "--output-format", "concise"]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr


# Requirements

IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}
WITH = {"huggingface_hub", "tokenizers"}  # of transformers
WITH_STUDY = {"IPython", "nbclient", "markupsafe"}  # of ipykernel, papermill, jinja2


def required(*keys: str) -> set:
    "The names that the requirements of settings.ini are imported as."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    text = " ".join(config["DEFAULT"][key] for key in keys)
    names = [re.match(r"[\w-]+", one)[0] for one in text.split()]
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def packages(module: str) -> set:
    "The packages that a module imports, except in `try` and `with naming_extras()`."
    tree, found = ast.parse(MODULES[module].read_text(encoding="utf-8")), set()
    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        or isinstance(node, ast.With)
        and "naming_extras" in ast.unparse(node.items[0])
    ]
    optional = {id(n) for g in guarded for b in g.body for n in ast.walk(b)}
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazily":
            found.add(ast.literal_eval(node.args[0]))
    return found - set(sys.stdlib_module_names) - {"mllm_compress"}


@pytest.mark.parametrize("name", ROOMS)
def test_requirements_name_what_is_imported(name):
    allowed = required("requirements") | WITH
    if name == "study":
        allowed |= required("study_requirements") | WITH_STUDY
    if name == "evaluation":
        allowed |= required("lmms_eval_requirements")
    wrong = {m: packages(m) - allowed for m in MODULES if room(m) == name}
    assert not {module: missing for module, missing in wrong.items() if missing}


def test_every_requirement_is_used():
    used = set().union(*(packages(m) for m in MODULES))
    by_name = {"ipykernel", "jupyterlab", "nbconvert", "accelerate", "peft"}  # started, or by name
    by_name |= {"ipywidgets"}  # of nbs/start/play.ipynb
    unused = required("requirements", "study_requirements") - used - by_name
    assert not unused


def test_lab_serves_the_repository():
    "So that links from notebooks to figures work."
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(text for text in makefile.splitlines() if "jupyter lab" in text)
    assert "--ServerApp.root_dir=. " in line and "/lab/tree/nbs" in line


# Extras

BLOCKED = """
import sys
for name in sys.argv[1].split(","): sys.modules[name] = None
from typer.testing import CliRunner
from mllm_compress.cli.app import app
from mllm_compress.zoo.models import load_model
import mllm_compress.study
for line in sys.argv[2:]:
    found = CliRunner().invoke(app, line.split())
    print(found.exit_code, found.output.strip().splitlines()[-1], found.exception)
"""


def without(missing: str, *lines: str) -> list:
    "The last lines of commands where packages are missing."
    run = [sys.executable, "-W", "ignore", "-c", BLOCKED, missing, *lines]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_without_the_extra_of_the_study_the_method_runs(tmp_path):
    missing = "matplotlib,seaborn,papermill,nbformat,nbconvert,IPython,ipykernel"
    score = f"score smoke-llava -o {tmp_path}/s --samples 2 --scenes 4"
    prune = f"prune smoke-llava -o {tmp_path}/p --scores {tmp_path}/s --ratio 0.3"
    *done, study = without(missing, score, prune, "study --profile smoke --status")
    assert all(line.startswith("0 written to") for line in done), done
    assert study.startswith("2 Error: ") and "pip install 'mllm_compress[study]'" in study


def test_a_processor_that_needs_torchvision_names_its_extra():
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    from mllm_compress.zoo.releases import ProcessorParts, internvl_processor

    parts = ProcessorParts(None, "", "<image>", 0, 4)
    with pytest.raises(ImportError, match=r"pip install 'mllm_compress\[vision\]'"):
        internvl_processor(parts, None, None)


# The map of the notebooks


def test_the_map_lists_every_notebook():
    found = (ROOT / "nbs/README.md").read_text(encoding="utf-8")
    assert found == notebook_map.text(), "run: python tests/notebook_map.py"
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            assert f"({path.relative_to(ROOT / 'nbs').as_posix()})" in found, path
    assert notebook_map.ROOMS == ROOMS
    assert sorted(notebook_map.METHOD + notebook_map.REST) == sorted(ROOMS)


def test_llms_txt_is_generated_and_its_links_exist():
    found = (ROOT / "llms.txt").read_text(encoding="utf-8")
    assert found == notebook_map.llms(), "run: python tests/notebook_map.py"
    links = re.findall(r"\]\(([^)]+)\)", found)
    assert len(links) > 30 and not [link for link in links if not (ROOT / link).exists()]
    assert "prune, reconstruct" in found and "- recover: Train" in found


def test_contributing_names_every_requirement():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Dependencies")[1].split("\n\n")[1]
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    keys = [key for key in config["DEFAULT"] if key.endswith("requirements")]
    names = [re.match(r"[\w-]+", one)[0] for key in keys for one in config["DEFAULT"][key].split()]
    listed = set(re.findall(r"[\w-]+", "\n".join(row.split("|")[1] for row in table.splitlines())))
    assert len(keys) == 8 and set(names) - listed == set()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:nbs|tests|requirements)/[\w/.]+\w)`", text):
        assert (ROOT / path).exists(), path
