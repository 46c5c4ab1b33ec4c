"""Notebooks and package in step, parameters strict, and every study notebook runs."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mllm_compress.study import notebooks, runner, stages, store
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.notebooks import check_parameters, parameters_of, parse_parameters
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.store import results_of

ROOT = Path(__file__).parent.parent
STUDY = sorted(p for p in (ROOT / "nbs/study").glob("*.ipynb"))
PLACES = ("/work/", "/tmp/", "/home/", "/root/")
LIBRARY = sorted((ROOT / "nbs/library").rglob("[0-9]*.ipynb"))


def test_parameters_tag_survives_cleaning(tmp_path):
    pytest.importorskip("nbdev.clean")
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs/study", tmp_path / "nbs/study")
    (tmp_path / "mllm_compress").mkdir()
    code = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    for path in STUDY:
        cleaned = nbformat.read(tmp_path / "nbs/study" / path.name, 4)
        assert parameters_of(cleaned) == parameters_of(nbformat.read(path, 4))


@pytest.mark.parametrize("path", STUDY, ids=lambda p: p.stem)
def test_study_notebooks_have_a_skeleton_and_no_machine_paths(path):
    nb = nbformat.read(path, 4)
    assert nb.cells[0].source.startswith("# ") and "\n> " in nb.cells[0].source
    assert all("  # " in p.line or p.line[-1] in "{[" for p in parameters_of(nb).values())
    assert not [place for place in PLACES if place in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_library_notebooks_show_nothing_of_the_machine_that_ran_them(path):
    outputs = [o for c in nbformat.read(path, 4).cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs for place in PLACES if place in str(o)]


def demo(source: str):
    "A notebook with this parameters cell."
    cells = [
        new_code_cell(source, metadata={"tags": ["parameters"]}),
        new_code_cell("experiments = seeds", metadata={"tags": ["grid"]}),
    ]
    return new_notebook(cells=cells)


GOOD = """profile: str = "quick"  # which
seeds: list = [0]  # which draws
lr: float = 1.0  # rate
fast: bool = False  # or slow"""


@pytest.mark.parametrize(
    "given", [{"seed": [0]}, {"seeds": 0}, {"profile": 3}, {"lr": "1"}, {"lr": True}, {"fast": 1}]
)
def test_wrong_parameters_are_errors_that_list_the_right_ones(given):
    with pytest.raises(ValueError, match="(?s)The notebook has:.*seeds: list = .0.  # which draws"):
        check_parameters(parameters_of(demo(GOOD)), given)


def test_right_parameters_pass():
    right = {"lr": 1, "fast": True}
    assert check_parameters(parameters_of(demo(GOOD)), right) == right
    parsed = parse_parameters(["profile=tiny", "lrs=[1e-3, 2]", "name=1e"])
    assert parsed == {"profile": "tiny", "lrs": [0.001, 2], "name": "1e"}
    with pytest.raises(ValueError, match="seeds is given twice"):
        parse_parameters(["seeds=[0]", "seeds=[1]"])


@pytest.mark.parametrize(
    "source", ["seeds = [0]", "seeds: list = range(3)", "import os", "seeds: list"]
)
def test_a_parameters_cell_holds_annotated_literals_only(source):
    with pytest.raises(ValueError):
        parameters_of(demo(source))
    with pytest.raises(ValueError, match="one cell tagged 'parameters'"):
        parameters_of(new_notebook())


# ---- when a notebook is up to date


EXPERIMENT = Experiment("smoke-llava")
GRID = """
from mllm_compress.study.experiments import Experiment

experiments = [Experiment("smoke-llava")]
"""


def fabricate(results, score: float, seconds: float = 1) -> None:
    "Write stages of a dense model that has not run."
    smoke = load_profile("smoke")
    for name in smoke.evaluation.benchmarks:
        row = {"benchmark": name, "score": score}
        value = {"row": row, "units": [], "sample": [], "record": {"seconds": seconds}}
        store.write(results, stages.inputs_of("score", EXPERIMENT, smoke, name), value)


@pytest.fixture
def world(tmp_path, monkeypatch):
    "A checkout with a result, and a notebook that needs it; its run leaves what `leaves` says."
    (tmp_path / "nbs/study").mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "nbs/study/01_table.ipynb"
    parameters = 'profile: str = "smoke"  # scale\nratios: list = []  # removed'
    nb = demo(parameters)
    nb.cells[1].source = GRID
    nbformat.write(nb, source)
    results = results_of(load_profile("smoke"))
    fabricate(results, 50)
    world = SimpleNamespace(
        runs=0,
        leaves={"01_table-scores.csv": "50"},
        results=results,
        figures=tmp_path / "runs/smoke/figures",
        source=source,
        fails=False,
    )

    def run(output_path, **options):
        world.runs += 1
        for name, text in world.leaves.items():
            (Path(output_path).parent / name).write_text(text)
        if world.fails:
            raise RuntimeError("in its last cell")

    def execute(**given):
        given = {"profile": "smoke"} | given
        notebook = notebooks.Execution("01_table", source, given)
        world.problems = runner.run_notebooks({"01_table": notebook}, "smoke")
        return notebook.target

    monkeypatch.setattr(notebooks.papermill, "execute_notebook", run)
    world.execute = execute
    return world


def test_a_notebook_is_run_again_when_what_it_shows_has_changed(world):
    world.execute()
    world.execute()
    assert world.runs == 1
    fabricate(world.results, 50, seconds=99)
    world.execute()
    assert world.runs == 1, "how long an experiment took is not shown"
    fabricate(world.results, 51)
    world.execute()
    assert world.runs == 2, "computed again, with another score under the same key"
    nb = nbformat.read(world.source, 4)
    nb.cells.append(new_code_cell("1 + 1"))
    nbformat.write(nb, world.source)
    world.execute()
    assert world.runs == 3


def test_a_run_with_parameters_of_its_own_leaves_the_other_files_alone(world):
    world.execute()
    before = {p.name: p.read_bytes() for p in world.figures.iterdir()}
    world.leaves = {"01_table-scores.csv": "a trial"}
    target = world.execute(ratios=[0.3])
    assert world.runs == 2 and target.parent.parent == world.figures.parents[1] / "scratch"
    assert (target.parent / "01_table-scores.csv").read_text() == "a trial"
    assert {p.name: p.read_bytes() for p in world.figures.iterdir()} == before


def test_files_of_a_notebook_are_its_own(world):
    world.leaves["01_table-choice.json"] = "{}"
    world.execute()
    del world.leaves["01_table-choice.json"]
    (world.figures / "01_table-scores.csv").write_text("somebody's")
    world.execute()
    assert world.runs == 2 and (world.figures / "01_table-scores.csv").read_text() == "50"
    assert [p.name for p in world.figures.glob("01_table-*")] == ["01_table-scores.csv"], (
        "what is no longer written goes"
    )


def test_a_run_that_fails_halfway_is_not_taken_for_a_whole_one(world):
    world.execute()
    world.fails, world.leaves = True, {"01_table-scores.csv": "-1"}
    nb = nbformat.read(world.source, 4)
    nbformat.write(new_notebook(cells=[*nb.cells, new_code_cell("1 / 0")]), world.source)
    world.execute()
    assert world.problems[0].startswith("01_table failed: RuntimeError: in its last cell (see runs")
    nbformat.write(nb, world.source)
    world.fails, world.leaves = False, {"01_table-scores.csv": "50"}
    world.execute()
    assert world.runs == 3 and (world.figures / "01_table-scores.csv").read_text() == "50"


def made_from(*given) -> str:
    "The hash that an executed notebook is marked with."
    return notebooks.content_hash(notebooks.shown_by(*given))


def test_a_notebook_without_experiments_belongs_to_its_models_and_its_machine(world, monkeypatch):
    nb, smoke = demo(GOOD), load_profile("smoke")
    nb.cells = nb.cells[:1]
    here = made_from(nb, {}, [], smoke)
    monkeypatch.setattr(notebooks.platform, "node", lambda: "elsewhere")
    elsewhere, board = made_from(nb, {}, [], smoke), made_from(demo(GOOD), {}, [], smoke)
    assert elsewhere != here
    monkeypatch.setattr(notebooks.platform, "node", lambda: "back")
    assert made_from(demo(GOOD), {}, [], smoke) == board  # which has experiments
    monkeypatch.setattr(notebooks.profiles, "model_identity", lambda source: "another")
    assert made_from(demo(GOOD), {}, [], smoke) not in (here, elsewhere, board)


def test_a_scoreboard_is_drawn_again_when_another_profile_says_something_new(world):
    other = world.source.parents[2] / "figures/other"
    other.mkdir(parents=True)
    (other / "10_findings.ipynb").touch()
    verdict, smoke = other / "10_findings-verdicts.json", load_profile("smoke")
    verdict.write_text("supported")
    board = demo(GOOD)
    alone = made_from(board, {}, [], smoke)
    board.cells[1].metadata.tags = ["grid", "profiles"]
    before = made_from(board, {}, [], smoke)
    verdict.write_text("contradicted")
    assert len({alone, before, made_from(board, {}, [], smoke)}) == 3
    assert made_from(demo(GOOD), {}, [], smoke) == alone


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A bare checkout to run the study in: settings and study notebooks."
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs/study", folder / "nbs/study")
    return folder


SOME = "02_pruning", "05_data", "10_findings", "11_beyond"


@pytest.mark.parametrize("only", [SOME, pytest.param((), marks=pytest.mark.slow)])
def test_the_study_runs_at_smoke_and_once(only, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    assert runner.run_study("smoke", only=only, workers=2) == 0
    made = checkout / "runs/smoke/figures"
    for path in STUDY:
        if path.stem.startswith("00") or only and path.stem not in only:
            continue
        nb = nbformat.read(made / path.name, 4)
        outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
        assert not [o for o in outputs if o.output_type == "error"]
        assert list(made.glob(f"{path.stem}-*.csv")) and nb.metadata.mllm_compress.made_from
    page = (made / "index.html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in page and "<details><summary>code</summary>" in page
    assert str(checkout) not in page
    written = {p: p.stat().st_mtime_ns for p in made.glob("*.ipynb")}
    assert runner.run_study("smoke", only=only, workers=2) == 0
    assert {p: p.stat().st_mtime_ns for p in made.glob("*.ipynb")} == written, "nothing changed"
    assert "Figures and tables: runs/smoke/figures/" in capsys.readouterr().out
    assert not (checkout / "figures").exists()
