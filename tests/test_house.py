"""The study stands on public names of the library, which knows nothing of the study."""

import ast
import importlib
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import notebook_map
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mllm_compress"
LIBRARY = "utils anatomy zoo data importance pruning checkpoint recovery evaluation cost".split()
ORDER = [*LIBRARY, "study", "cli"]  # a subpackage imports only from those before it
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name != "_modidx.py"
}


def subpackage(module: str) -> str:  # empty for the package itself and its `__main__`
    return (module.split(".") + [""])[1].removeprefix("__main__")


def imports(module: str) -> list:  # of (module, name or "")
    "What a module imports from the package, inside functions and by name as a string too."
    path, pairs = MODULES[module], []
    home = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            pairs.append((node.value, ""))
        elif isinstance(node, ast.ImportFrom):
            parts = home.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                pairs.append((whole, "") if whole in MODULES else (base, alias.name))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mc."):
            whole = f"mllm_compress{ast.unparse(node)[2:]}"  # imported when it is used
            pairs.append((whole, "") if whole in MODULES else tuple(whole.rsplit(".", 1)))
    return [(m, name) for m, name in pairs if m in MODULES and m != module]


def test_the_subpackages_are_known():
    assert sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")) == sorted(ORDER)


def test_no_import_goes_upwards():
    "The library never imports the study or the command line."
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if subpackage(module)
        for other, name in imports(module)
        if subpackage(other) and ORDER.index(subpackage(other)) > ORDER.index(subpackage(module))
    ]
    assert not wrong, wrong


def test_the_study_and_the_command_line_use_public_names_of_the_library():
    wrong = [
        f"{module} imports {other}.{name}"
        for module in MODULES
        if subpackage(module) in ("study", "cli")
        for other, name in imports(module)
        if name and subpackage(other) in LIBRARY
        if name not in importlib.import_module(other).__all__
    ]
    assert not wrong, f"`#| export` makes a name public: {wrong}"


def test_no_circle_of_imports():
    graph = {m: {other for other, _ in imports(m)} for m in MODULES if subpackage(m)}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


HEAVY = "matplotlib seaborn papermill nbformat nbconvert IPython ipykernel jupyter_client typer"


def test_the_library_imports_without_what_draws_and_runs_notebooks():
    code = (
        "import importlib, sys\n"
        f"for name in {[m for m in MODULES if subpackage(m) in LIBRARY]}:\n"
        "    importlib.import_module(name)\n"
        f"print([name for name in {HEAVY.split()} if name in sys.modules])"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", ORDER)
def test_public_names_are_documented(name):
    module = importlib.import_module(f"mllm_compress.{name}")
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        text = value.__doc__ or ""
        says = inspect.isclass(value) or inspect.isroutine(value)
        assert not says or text and not text.startswith(f"{public}("), public


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff")
    run = [sys.executable, "-m", "ruff", *command, "--no-cache", "--output-format", "concise"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


BLOCKED = """
import sys
for name in sys.argv[1].split(","): sys.modules[name] = None
from typer.testing import CliRunner
from mllm_compress.cli import app
for line in sys.argv[2:]:
    done = CliRunner().invoke(app, line.split())
    print(done.exit_code, done.output.strip().splitlines()[-1], done.exception)
"""


def test_without_the_extra_of_the_study_the_library_runs(tmp_path):
    missing = "matplotlib,seaborn,papermill,nbformat,nbconvert,IPython,ipykernel"
    prune = f"prune smoke-llava -o {tmp_path}/p --ratio 0.3 --method magnitude"
    run = [sys.executable, "-W", "ignore", "-c", BLOCKED, missing, prune]
    run.append("study --profile smoke --status")
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pruned, study = done.stdout.splitlines()
    assert pruned.startswith("0 written to")
    assert study.startswith("2 Error: ") and "pip install 'mllm_compress[study]'" in study


def test_the_map_lists_every_notebook():
    "nbs/README.md and llms.txt are written by tests/notebook_map.py."
    text = (ROOT / "nbs/README.md").read_text(encoding="utf-8")
    assert text == notebook_map.text(), "run: python tests/notebook_map.py"
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            assert f"({path.relative_to(ROOT / 'nbs').as_posix()})" in text, path
    llms = (ROOT / "llms.txt").read_text(encoding="utf-8")
    assert llms == notebook_map.llms(), "run: python tests/notebook_map.py"


def test_the_help_of_commands_lists_the_rows_of_tables():
    text = (PACKAGE / "cli/rows.json").read_text(encoding="utf-8")
    assert text == notebook_map.rows(), "run: python tests/notebook_map.py"
