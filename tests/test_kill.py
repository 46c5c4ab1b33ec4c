"""Nothing lost: the real command, killed, interrupted and started twice, at random moments."""

import multiprocessing.resource_tracker
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tqdm import tqdm

from mllm_compress.cli import app
from mllm_compress.study import notebooks, runner
from mllm_compress.study import runs as study
from mllm_compress.study.experiments import Experiment

pytestmark = pytest.mark.slow  # whole processes

ROOT = Path(__file__).parent.parent
VOLATILE = ["seconds", "peak_memory_mb", "date"]  # differ from run to run
GRID = """
from mllm_compress import study
from mllm_compress.study.report import Report
from mllm_compress.study import Experiment

experiments = [Experiment("smoke-llava")]
experiments += [
    Experiment("smoke-llava", p, r) for p in ("layerwise", "widthwise") for r in (0.3, 0.45)
]
experiments += [
    Experiment("smoke-llava", "layerwise", r, recovery="sft+hidden_kd", fraction=0.5)
    for r in (0.3, 0.45)
]
"""
SHOW = """
frame = study.run(experiments, profile)
columns = ["pruning", "ratio", "recovery", "benchmark", "score", "low", "high"]
Report("01_table", profile).table(frame[columns], "scores", "Scores.")
"""
PARAMETERS = 'profile: str = "smoke"  # models, data and budgets'
NOTEBOOK = new_notebook(
    cells=[
        new_markdown_cell("# A table\n> Of a few experiments."),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(GRID, metadata={"tags": ["grid"]}),
        new_code_cell(SHOW),
    ],
    metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
)
EXPERIMENTS = 7


def prepare(folder: Path) -> Path:
    "A checkout with one study notebook and a small profile."
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "nbs/study").mkdir(parents=True)
    nbformat.write(NOTEBOOK, folder / "nbs/study/01_table.ipynb")
    profile = (ROOT / "mllm_compress/profiles/smoke.yaml").read_text()
    (folder / "small.yaml").write_text(
        profile.partition("\nnotebooks:")[0].replace("workers: 2", "workers: 1") + "\n"
    )
    return folder


@pytest.fixture
def checkout(tmp_path):
    "Such a checkout; whatever still runs in it is ended afterwards."
    multiprocessing.resource_tracker.ensure_running()  # elsewhere: it serves this process
    yield prepare(tmp_path)
    for pid in alive(tmp_path):
        os.kill(pid, signal.SIGKILL) if pid != os.getpid() else None


class Run:
    "`mllm-compress study` in a process group of its own, forked so that imports are paid once."

    def __init__(self, folder: Path, *extra):
        self.out, self.code = folder / f"said-{time.time_ns()}.txt", None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(folder)
        with open(self.out, "w") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        tqdm.set_lock(threading.RLock())  # the one it has is shared with the process of the tests
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70
        try:
            code = app(["study", "--profile", "small.yaml", *extra], standalone_mode=True)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            for end in (multiprocessing.util._exit_function, sys.stdout.flush, sys.stderr.flush):
                end()
            os._exit(code or 0)

    def ended(self) -> bool:
        if self.code is None:
            pid, state = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(state)
        return self.code is not None

    def signal(self, which) -> None:
        if not self.ended():
            os.killpg(self.pid, which)

    def says(self, code: int = 0) -> str:
        "What it printed, once it has ended with this exit code."
        assert soon(self.ended, 300)
        text = self.out.read_text()
        assert self.code == code, text
        return text


def alive(folder: Path) -> list:
    "The processes that have this folder, or one below it, as their current one."
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            there = Path(os.readlink(link))
        except OSError:
            continue
        if there.is_relative_to(folder):
            found.append(int(link.parent.name))
    return found


def soon(condition, seconds: float = 20) -> bool:
    "Whether a condition becomes true in time."
    end = time.time() + seconds
    while not (met := condition()) and time.time() < end:
        time.sleep(0.02)
    return bool(met)


def results(folder: Path) -> dict:  # name of a finished experiment -> when it was finished
    return {p.stem: p.stat().st_mtime_ns for p in folder.glob("runs/small/experiment/*.json")}


def tables(folder: Path) -> tuple:
    "The bytes of the table, and the lines of experiments.csv.xz that are the same in every run."
    figures = folder / "runs/small/figures"
    lines = pd.read_csv(figures / "experiments.csv.xz").drop(columns=VOLATILE)
    return (figures / "01_table-scores.csv").read_bytes(), lines.to_csv()


linux = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks into /proc")


def computed(folder: Path, checkout: Path) -> None:
    "Give a checkout the results of another one, and not its notebooks."
    without = shutil.ignore_patterns("figures")
    shutil.copytree(folder / "runs", checkout / "runs", ignore=without)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A checkout in which two runs, started at once, went through undisturbed."
    folder = prepare(tmp_path_factory.mktemp("whole"))
    said = [run.says() for run in [Run(folder), Run(folder)]]
    return folder, said


@linux
def test_two_runs_on_one_store_do_each_cell_once(whole):
    folder, said = whole
    line = f"{EXPERIMENTS} experiments of profile small, {EXPERIMENTS} with results."
    assert all(line in text and "leaked" not in text for text in said), said  # no semaphore
    logs = folder.glob("runs/small/logs/*.txt")
    begun = {p.stem: p.read_text().count(": process ") for p in logs}
    assert len(begun) == len(results(folder)) and set(begun.values()) == {1}
    assert len(tables(folder)[1].splitlines()) == 1 + EXPERIMENTS * 2


@linux
def test_killed_at_random_moments_ends_in_the_same_tables(checkout, whole):
    rng, kept, log = random.Random(seed := time.time_ns()), {}, []
    some = rng.randint(1, EXPERIMENTS - 1)
    moments = [
        (lambda: True, 4),
        (lambda: len(results(checkout)) >= some, 0.5),
        (lambda: list(checkout.glob("runs/small/figures/.*.part*")), 4),
    ]  # starting, computing, in the notebook
    for reached, longest in moments:
        run = Run(checkout)
        assert soon(lambda: reached() or run.ended(), 200)
        time.sleep(rng.uniform(0, longest))
        run.signal(signal.SIGKILL)
        soon(run.ended)
        assert all(results(checkout)[name] == when for name, when in kept.items()), log
        kept = results(checkout)
        log.append(f"ended with {run.code} and {len(kept)} results (seed {seed})")
    Run(checkout).says()
    now = results(checkout)
    print(*log, sep="\n")
    assert len(now) == EXPERIMENTS and all(now[name] == when for name, when in kept.items()), log
    assert tables(checkout) == tables(whole[0]), log
    assert not list((checkout / "runs").rglob(".*.part*")) and soon(lambda: not alive(checkout), 60)


@linux
@pytest.mark.parametrize("where", ["experiments", "notebook"])
def test_ctrl_c_stops_cleanly_and_leaves_no_process(checkout, whole, where):
    if where == "notebook":
        computed(whole[0], checkout)
    reached = {
        "experiments": lambda: results(checkout),
        "notebook": lambda: list(checkout.glob("runs/small/figures/.*.part*")),
    }[where]
    run = Run(checkout)
    assert soon(lambda: reached() or run.ended(), 200)
    run.signal(signal.SIGINT)
    text = run.says(130)
    assert "Stopped. Finished results are kept" in text and "Traceback" not in text
    assert soon(lambda: not alive(checkout), 60), alive(checkout)
    assert not list((checkout / "runs").rglob(".*.part*"))


@linux
@pytest.mark.parametrize("which, code", [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_who_ends_the_master_alone_ends_its_workers(checkout, which, code):
    run = Run(checkout)
    assert soon(lambda: results(checkout) or run.ended(), 200)
    os.kill(run.pid, which)  # as `kill` or a batch system does: the workers do not hear it
    text = run.says(code)
    assert "Traceback" not in text and ("Stopped. Finished results are kept" in text) == (
        which == signal.SIGTERM
    )
    assert soon(lambda: not alive(checkout), 20), alive(checkout)


def test_a_timed_notebook_has_all_threads_and_a_broken_one_stops_none(checkout, whole, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # which a quiet command of another test sets
    computed(whole[0], checkout)
    nb = nbformat.read("nbs/study/01_table.ipynb", 4)
    nb.cells[-1].source = "print('so far')\n1 / 0"
    nbformat.write(nb, "nbs/study/03_broken.ipynb")
    nb.cells[2:] = [new_code_cell("import os\n\nprint('here', os.environ.get('TQDM_DISABLE'))")]
    nb.cells[-1].metadata["tags"] = ["clock"]
    nbformat.write(nb, "nbs/study/04_alone.ipynb")
    (problem,) = runner.run_notebooks(runner.plan_study("small.yaml"), "small.yaml")
    assert problem.startswith("03_broken failed in cell") and "ZeroDivisionError" in problem
    made = Path("runs/small/figures")
    assert (made / "01_table-scores.csv").read_bytes() == tables(whole[0])[0]
    assert "here None" in (made / "04_alone.ipynb").read_text()
    assert "so far" in (made / "03_broken.failed.ipynb").read_text()
    assert sorted(p.stem[:9] for p in made.glob("*.ipynb")) == ["01_table", "03_broken", "04_alone"]


def test_a_notebook_whose_kernel_dies_stops_no_other(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    starts = "p = __import__('multiprocessing').get_context('spawn').Process()\np.start()\np.join()"
    starts += "\nprint('mine' in globals(), p.exitcode)"
    sources = {"01_table": starts, "02_dies": "import os\n\nos._exit(3)"}
    for name, source in (sources | {"03_third": sources["01_table"]}).items():
        nb = nbformat.from_dict(NOTEBOOK)
        nb.cells = [nb.cells[1], new_code_cell("experiments = []", metadata={"tags": ["grid"]})]
        nb.cells.append(new_code_cell(source))
        nbformat.write(nb, checkout / f"nbs/study/{name}.ipynb")
    (problem,) = runner.run_notebooks(runner.plan_study("small.yaml"), "small.yaml")
    assert problem.startswith("02_dies failed") and "Dead" in problem
    for name in ("01_table", "03_third"):
        assert "False 0" in Path(f"runs/small/figures/{name}.ipynb").read_text()
    assert soon(lambda: alive(checkout) == [os.getpid()], 60), alive(checkout)


def test_damage_and_failure_are_named_and_mended(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    bad = [
        Experiment("smoke-llava", "widthwise", 0.94),
        *(Experiment("smoke-llava", "layerwise", r) for r in (0.3, 0.45)),
    ]
    monkeypatch.setattr(runner, "experiments_of_plan", lambda _: bad)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: [])
    monkeypatch.setattr(runner.page, "build", lambda _: checkout / "runs/small/figures/index.html")
    assert runner.run_study("small.yaml", executor="inline") == 1
    text = capsys.readouterr().out
    for says in ("1 FAILED", "widthwise 94%", "log: runs/small/logs/", "PROBLEM: some experiments"):
        assert says in text
    file = sorted(checkout.glob("runs/small/score/*.json"))[0]
    file.write_text(file.read_text().replace('"score":', '"score":1', 1))
    with pytest.warns(UserWarning, match=f"The score {file.stem} is corrupt"):
        runner.run_study("small.yaml", executor="inline")
    assert len(results(checkout)) == 2 and file.exists()
    assert list(checkout.glob(f"runs/small/corrupt/score-{file.stem}-*"))
    capsys.readouterr()
    runner.dry_run("small.yaml")
    plan = capsys.readouterr().out
    assert (plan.count("  cached "), plan.count("  missing ")) == (2, 1)
    assert "3 experiments, 1 missing" in plan
    runner.show_status("small.yaml")
    assert "2 results of profile small" in capsys.readouterr().out


def test_figures_carry_their_results(checkout, whole, monkeypatch):
    archive = whole[0] / "runs/small/figures/results.zip"
    said = Run(checkout, "--reuse", str(archive)).says()
    assert f"stages of {EXPERIMENTS} experiments taken, 0 experiments were in the store" in said
    assert not list(checkout.glob("runs/small/logs/*"))  # nothing was computed
    assert tables(checkout) == tables(whole[0])
    assert (checkout / "runs/small/figures/results.zip").read_bytes() == archive.read_bytes()


def test_notebooks_do_not_try_again_what_failed_and_a_failed_one_stops_nobody(
    checkout, monkeypatch, capsys
):
    monkeypatch.chdir(checkout)
    bad, told = Experiment("smoke-llava", "widthwise", 0.94), {}
    monkeypatch.setattr(runner, "experiments_of_plan", lambda _: [bad])
    monkeypatch.setattr(runner.page, "build", lambda _: checkout / "runs/small/figures/index.html")

    def notebook(parameters, **options):
        failing = lambda todo, *_: ((e, "failed", "tried") for e in todo)
        monkeypatch.setattr(study, "EXECUTORS", {"inline": failing})
        both = [bad, Experiment("smoke-llava", "layerwise", 0.3)]
        told["frame"] = study.run(both, parameters["profile"], quiet=True)
        raise RuntimeError("Kernel died")

    monkeypatch.setattr(notebooks.papermill, "execute_notebook", notebook)
    assert runner.run_study("small.yaml", executor="inline") == 1
    bad_error, new_error = told["frame"].set_index("pruning").error[["widthwise", "layerwise"]]
    assert "ValueError" in bad_error
    assert new_error == "tried"  # what nobody has tried is computed, where the rest was
    text = capsys.readouterr().out
    assert "PROBLEM: some experiments failed" in text
    assert "PROBLEM: 01_table failed: RuntimeError: Kernel died" in text
    assert study.RUN_CONTEXT not in os.environ
    with pytest.raises(ValueError, match="given by --profile"):
        runner.plan_study("small.yaml", given={"profile": "tiny"})
    with pytest.raises(ValueError, match="^01_table: Unknown parameter 'seeds'"):
        runner.plan_study("small.yaml", given={"seeds": [0]})


def test_what_is_absent_is_named_before_anything_starts(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    text = Path("small.yaml").read_text() + "folders: {big-llava: /no/such/llava}\n"
    for ours, theirs in (
        ("{scenes: 12}", "{json: $NOWHERE/mix.json, image_root: $NOWHERE/images}"),
        ("[scenes/open, scenes/hallucination]", "[pope, mmmu]"),
        ("  questions: 8", "  root: nowhere\n  questions: 8"),
        ("smoke-", "big-"),
    ):
        assert ours in text
        text = text.replace(ours, theirs)
    Path("real.yaml").write_text(text)
    lacking = [
        "model big-llava: nothing at /no/such/llava",
        "model big-bunny: nothing at big-bunny",
        "training json: $NOWHERE/mix.json: the environment variable NOWHERE is not set",
        "training image_root",
        "benchmark pope: There is no data/test-*.parquet",
        "benchmark mmmu",
    ]
    for attempt in (
        lambda: runner.run_study("real.yaml"),
        lambda: study.run([Experiment("big-llava")], "real.yaml"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            attempt()
        assert not [line for line in lacking if line not in str(error.value)], str(error.value)
    assert not Path("runs").exists()
    runner.dry_run("real.yaml")
    plan = capsys.readouterr().out
    assert all(line in plan for line in lacking)
    unknown = "{0} experiments, {0} missing, {0} of them of unknown".format(EXPERIMENTS)
    assert unknown in plan
