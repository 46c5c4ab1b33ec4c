"""Stored results survive changes of code: notebooks of a copy are edited, exported and run."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole processes

pytest.importorskip("nbdev.export")
ROOT = Path(__file__).parents[1]
LIBRARY = "nbs/library"

GRID = """
import json
from dataclasses import replace
from mllm_compress.study import stages
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.runs import run, status
from mllm_compress.study.store import results_of

p = load_profile("smoke")
few = replace(p.evaluation, benchmarks=["scenes/open", "scenes/hallucination"], questions=4)
steps = p.recovery | {"batch_size": 2}  # more than one, which has a learning rate of zero
p = replace(p, name="trial", evaluation=few, students="all", recovery=steps)
E = lambda *a, **k: Experiment("smoke-llava", *a, **k)
grid = {
    "dense": E(),
    "layers": E("layerwise", 0.3),
    "taylor": E("widthwise", 0.3),
    "magnitude": E("widthwise", 0.3, "magnitude"),
    "magnitude sft": E("widthwise", 0.3, "magnitude", recovery="sft", fraction=0.5),
    "layers hidden": E("layerwise", 0.3, recovery="hidden_kd", fraction=0.5),
    "layers both": E("layerwise", 0.3, recovery="sft+hidden_kd", fraction=0.5),
    "bunny": Experiment("smoke-bunny", "layerwise", 0.45),
}
results = results_of(p)
missing = lambda p=p: {n: stages.missing_stages(e, p, results) for n, e in grid.items()}
lacking = lambda: {name: found for name, found in missing().items() if found["score"]}
count = lambda: {s: len(results.keys(s)) for s in ("scores", "plan", "student", "answers", "score")}
"""


class Copy:
    "A copy of the repository with a store of results."

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"):
            shutil.copy(ROOT / name, folder)
        ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "_modidx.py")
        for name in ("nbs", "mllm_compress"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        (folder / "tests").symlink_to(ROOT / "tests")
        self.notebooks, self.modules = self.hashes("nbs"), self.hashes("mllm_compress")

    def hashes(self, name: str) -> dict:  # path -> hash
        "What the notebooks or the modules hold."
        paths = [p for end in ("ipynb", "py") for p in (self.folder / name).rglob(f"*.{end}")]
        return {
            str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in paths
            if p.name != "_modidx.py"
        }

    def changed(self) -> tuple:  # (notebooks, modules)
        "What differs from the repository."
        pairs = (("nbs", self.notebooks), ("mllm_compress", self.modules))
        return tuple(
            sorted(k for k, v in self.hashes(name).items() if before.get(k) != v)
            for name, before in pairs
        )

    def restore(self) -> None:
        "Take all edits back."
        for path in sum(self.changed(), []):
            shutil.copy(ROOT / path, self.folder / path)

    def edit(self, notebook: str, change) -> int:  # how many cells were changed
        "Change the exported cells of a notebook; `change` maps the text of a cell to a new one."
        path, count = self.folder / LIBRARY / notebook, 0
        content = json.loads(path.read_text(encoding="utf-8"))
        for cell in content["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"(?m)^#\|\s*export", text):
                new = change(text)
                count += new != text
                cell["source"] = new.splitlines(keepends=True)
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return count

    def replace(self, notebook: str, old: str, new: str) -> None:
        "Replace a text that stands in one exported cell."
        assert self.edit(notebook, lambda text: text.replace(old, new)) == 1, old

    def append(self, notebook: str, *cells: str) -> None:
        "Add exported cells at the end of a notebook."
        path = self.folder / LIBRARY / notebook
        content = json.loads(path.read_text(encoding="utf-8"))
        for k, text in enumerate(cells):
            cell = {"cell_type": "code", "id": f"new-{k}", "metadata": {}, "outputs": []}
            source = f"#| exporti\n{text}".splitlines(keepends=True)
            content["cells"].append(cell | {"execution_count": None, "source": source})
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def call(self, code: str, *args: str) -> str:
        "Run Python in the copy and return what it prints."
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code, *args]
        options = {"env": environment, "cwd": self.folder, "timeout": 170}
        found = subprocess.run(command, capture_output=True, text=True, **options)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    def ask(self, code: str = "found = None", export: bool = True) -> tuple:  # (missing, found)
        "Export the notebooks; the experiments that lack a result; then what `code` finds."
        begin = "from nbdev.doclinks import nbdev_export\nnbdev_export()\n" if export else ""
        end = "\nprint(json.dumps([before, found]))"
        text = self.call(begin + GRID + "before = lacking()\n" + code + end)
        return tuple(json.loads(text.splitlines()[-1]))


@pytest.fixture(scope="module")
def _copy(tmp_path_factory) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("copy"))
    code = "run(grid.values(), p, 'inline', quiet=True)\nfound = [lacking(), count()]"
    before, (after, copy.stored) = copy.ask(code, export=False)
    assert len(before) == 8 and after == {}
    assert copy.stored == {"scores": 4, "plan": 4, "student": 3, "answers": 16, "score": 16}
    return copy


@pytest.fixture
def copy(_copy) -> Copy:
    "The copy as the repository is, with a store of eight experiments."
    yield _copy
    _copy.restore()


def cell_of(guide: str, start: str) -> str:
    "The code cell of a guide that holds a text, without its assertions."
    cells = json.loads((ROOT / f"nbs/guides/{guide}.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    text = next(code for code in codes if start in code)
    return "\n".join(line for line in text.splitlines() if not line.startswith("assert "))


# Rewording


def reworded(text: str) -> str:
    "A cell with other error messages."
    return re.sub(r'(raise \w+\(\s*f?")(?=\w|\{)', r"\1Reworded: ", text)


def test_error_messages_of_all_modules_are_reworded(copy):
    notebooks = sorted((copy.folder / LIBRARY).glob("*/[0-9]*.ipynb"))
    names = [str(p.relative_to(copy.folder / LIBRARY)) for p in notebooks]
    packages = {name.split("/")[0] for name in names if copy.edit(name, reworded)}
    assert packages == {p.parent.name for p in notebooks}
    cached = "int(status(grid.values(), p).cached.sum())"
    before, (cached, file) = copy.ask(f"found = [{cached}, stages.__file__]")
    assert before == {} and cached == 8 and file.startswith(str(copy.folder))
    assert len(copy.changed()[1]) > 30


# A new row


def test_a_criterion_is_added_as_the_guide_says(copy):
    notebook, guide = "importance/05_criteria.ipynb", "add_a_pruning_criterion"
    copy.append(notebook, cell_of(guide, "def wanda"), cell_of(guide, 'CRITERIA["widthwise"'))
    code = """
from typer.testing import CliRunner
from mllm_compress.cli import app
from mllm_compress.cli.pruning import ScoreRequest
from mllm_compress.study.style import look
say = lambda *args: CliRunner().invoke(app, ["score", *args]).output
new = E("widthwise", 0.3, "wanda")
row = run([new], p, "inline", quiet=True).iloc[0]
drawn = look("wanda")
wrong = say("smoke-llava", "-o", "x", "--method", "luck")
rows = str(ScoreRequest.tables["method"]())
found = [rows, wrong, row.status, row.error, drawn.label, drawn.color, count()]
"""
    before, (helped, error, state, why, label, color, stored) = copy.ask(code)
    changed = ([f"{LIBRARY}/{notebook}"], ["mllm_compress/importance/criteria.py"])
    assert before == {} and copy.changed() == changed
    assert "wanda" in helped and "norms of their inputs" in helped and "wanda" in error
    assert (state, label, color) == ("done", "Wanda", "#E69F00"), why
    more = {"scores": 1, "plan": 1, "student": 0, "answers": 2, "score": 2}
    assert stored == {stage: n + more[stage] for stage, n in copy.stored.items()}
    copy.stored = stored


def test_a_decoder_family_and_a_multimodal_class_are_added_as_the_guide_says(copy):
    "A row in each of two notebooks, and the contract of a class holds."
    wrapper = cell_of("add_a_model", row := 'WRAPPERS["lighton_ocr"]')
    wrapper = wrapper[wrapper.index(row) :]
    config = cell_of("add_a_model", "AutoConfig.for_model").split("try:")[0]
    copy.append("anatomy/02_families.ipynb", cell_of("add_a_model", 'FAMILIES["starcoder2"]'))
    copy.append("anatomy/01_wrappers.ipynb", wrapper)
    code = f"""{config}
from mllm_compress import anatomy
from mllm_compress.cli.check import Case, run_checks
checks = run_checks(Case(model), ("parts", "cost", "uniform"))
found = [{{check.check: check.passed for check in checks}}, list(anatomy.FAMILIES)]
"""
    before, (checks, families) = copy.ask(code)
    assert before == {} and checks == {"parts": True, "cost": True, "uniform": True}
    assert "starcoder2" in families


BENCHMARK = """
def colour_questions(split: str = "test", limit: int | None = None, root=None) -> list:
    "Three questions about a red picture."
    from PIL import Image

    image = Image.new("RGB", (32, 32), "red")
    pairs = (("red", "yes"), ("blue", "no"), ("green", "no"))
    ask = lambda colour: f"is the picture {colour}?" + SHORT
    return [Question(c, ask(c), a, (image,), ("yes", "no")) for c, a in pairs][:limit]


COLOURS = Benchmark("colours", "yes_no", colour_questions, help="A colour.", source="colours 1")
register_benchmarks([COLOURS])
"""


def test_a_benchmark_is_added_and_only_its_answers_are_computed(copy):
    copy.append("evaluation/01_benchmarks.ipynb", BENCHMARK)
    code = """
few = replace(few, benchmarks=[*few.benchmarks, "colours"])
q = replace(p, evaluation=few)
plan = status(grid.values(), q)
open_stages, trained = missing(q), []
stages.recover = lambda *a, **k: trained.append(a)
frame = run(grid.values(), q, "inline", quiet=True)
found = [open_stages, bool(plan.trains.any()), len(trained)]
found += [frame.status.tolist(), frame.benchmark.tolist(), count()]
"""
    before, (open_stages, trains, trained, states, names, stored) = copy.ask(code)
    assert before == {} and len(copy.changed()[0]) == 1
    assert set(map(str, open_stages.values())) == {"{'score': ['colours'], 'answers': ['colours']}"}
    assert not trains and trained == 0
    assert set(states) == {"done"} and names.count("colours") == 8
    more = {"scores": 0, "plan": 0, "student": 0, "answers": 8, "score": 8}
    assert stored == {stage: n + more[stage] for stage, n in copy.stored.items()}
    copy.stored = stored


# A new version

BOTH = ["scenes/open", "scenes/hallucination"]
ANSWERS = {"score": BOTH, "answers": BOTH}
ALL = ["dense", "layers", "taylor", "magnitude", "magnitude sft"]
ALL += ["layers hidden", "layers both", "bunny"]


@pytest.mark.parametrize(
    "notebook, old, new, gone",
    [
        (
            "importance/05_criteria.ipynb",
            "        magnitude,\n        look",
            "        magnitude,\n        version=2,\n        look",
            {"magnitude": ANSWERS, "magnitude sft": ANSWERS},
        ),
        (
            "recovery/01_losses.ipynb",
            '("student_hidden", "teacher_hidden"),\n        look',
            '("student_hidden", "teacher_hidden"),\n        version=2,\n        look',
            {"layers hidden": ANSWERS, "layers both": ANSWERS},
        ),
        (
            "evaluation/03_scorers.ipynb",
            "Scorer(yes_no, yes_no_score)",
            "Scorer(yes_no, yes_no_score, version=2)",
            dict.fromkeys(ALL, {"score": ["scenes/hallucination"], "answers": []}),
        ),
    ],
    ids=["criterion", "loss", "scorer"],
)
def test_a_new_version_asks_for_the_results_of_its_method_only(copy, notebook, old, new, gone):
    copy.replace(notebook, old, new)
    assert copy.ask()[0] == gone
