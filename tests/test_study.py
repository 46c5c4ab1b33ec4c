"""The results store, cells and profiles, and the running of cells: nothing lost, nothing twice, nothing hidden."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mllm_compress.reporting import effects
from mllm_compress.study import runs as study
from mllm_compress.study import store
from mllm_compress.study import workers as executors
from mllm_compress.study.experiments import (
    IMPORTANCE,
    Calibration,
    Experiment,
    canonical,
    load_profile,
    profile_names,
    read_strictly,
)
from mllm_compress.study.stages import SCORES, identity, recovery_config
from mllm_compress.study.store import NotOurs, Store


@pytest.fixture
def away(tmp_path, monkeypatch):
    "A current folder outside of the checkout, so that results go there."
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMOKE = replace(
    load_profile("smoke"),
    evaluation=replace(
        load_profile("smoke").evaluation, benchmarks=["scenes/hallucination"], questions=4
    ),
)
DENSE, LAYERS, WIDTH = (
    Experiment("smoke-llava"),
    Experiment("smoke-llava", "layerwise", 0.3),
    Experiment("smoke-llava", "widthwise", 0.3),
)


# ---- the store


def test_store_refuses_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(NotOurs, match="not a results store"):
        Store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_new_store_may_be_opened_by_many_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    for k in range(20):
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(lambda _: Store(tmp_path / f"s{k}"), range(16)))) == 16
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".store.json.1234").touch()  # a run was killed while it marked the folder
    assert Store(tmp_path / "t").names() == []


def test_store_refuses_another_format(tmp_path):
    (tmp_path / "store.json").write_text('{"mllm_compress store": 99}')
    with pytest.raises(NotOurs, match="format"):
        Store(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", '{"seal": 1}', "[]", '"text"'])
def test_corrupt_result_is_named_moved_and_missing(tmp_path, damage):
    s = Store(tmp_path / "s")
    name = store.write(s, {"a": 1}, {"score": 2.0})
    s.file(name).write_text(damage)
    with pytest.warns(UserWarning, match=name):
        assert store.read(s, name) is None
    assert s.names() == [] and len(list((s.folder / "corrupt").iterdir())) == 1
    store.write(s, {"a": 1}, {"score": 2.0})
    assert store.read(s, name)["result"] == {"score": 2.0}


def test_a_result_that_was_made_anew_is_not_moved_aside(tmp_path, monkeypatch):
    from contextlib import contextmanager

    s = Store(tmp_path / "s")
    name = store.write(s, {"a": 1}, {"score": 2.0})
    good = s.file(name).read_text()
    s.file(name).write_text("{")

    @contextmanager
    def late(*args, **kw):  # another run mends it while we wait
        s.file(name).write_text(good)
        yield True

    monkeypatch.setattr(store, "lock", late)
    assert store.read(s, name)["result"] == {"score": 2.0} and not list(
        (s.folder / "corrupt").iterdir()
    )
    s.file(name).write_text("{")
    monkeypatch.setattr(
        store, "lock", contextmanager(lambda *a, **k: iter([s.file(name).unlink()]))
    )  # or has just moved it
    assert store.read(s, name) is None


def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError):
        store.write_atomically(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())


def test_damaged_shared_work_is_made_again(tmp_path):
    s, made = Store(tmp_path / "s"), []

    def build(folder):
        made.append(1)
        (folder / "scores.bin").write_bytes(b"0" * 100)

    folder = store.shared(s, {"w": 1}, build)
    (folder / "scores.bin").write_bytes(b"0" * 10)
    store._is_whole.cache_clear()
    with pytest.warns(UserWarning, match="damaged"):
        again = store.shared(s, {"w": 1}, build)
    assert (
        len(made) == 2
        and (again / "scores.bin").stat().st_size == 100
        and list((s.folder / "corrupt").glob("shared-*"))
    )
    (again / "inputs.json").write_text('{"w": 1}')  # from before there were seals
    store._is_whole.cache_clear()
    store.shared(s, {"w": 1}, build)
    assert len(made) == 2


def test_a_result_in_another_ones_folder_is_not_believed(tmp_path):
    s = Store(tmp_path / "s")
    one, two = (store.write(s, {"a": i}, {"score": i}) for i in (1, 2))
    s.file(two).write_bytes(s.file(one).read_bytes())
    with pytest.warns(UserWarning):
        assert store.read(s, two) is None
    assert store.read(s, one)["result"] == {"score": 1}


@pytest.mark.parametrize(
    "forge, kept",
    [
        (lambda t: t, True),
        (lambda t: t.replace('"score": 2.0', '"score": 3.0'), False),
        (lambda t: t[:20], False),
        (lambda t: "[]", False),
    ],
)
def test_results_travel_and_are_believed_only_with_their_seal(tmp_path, forge, kept):
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    name = store.write(ours, {"a": 1}, {"score": 2.0})
    with zipfile.ZipFile(tmp_path / "results.zip", "w") as archive:
        archive.writestr(f"{name}.json", forge(ours.file(name).read_text()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert (
            store.unpack(tmp_path / "results.zip", theirs) == [name] * kept
            and theirs.names() == [name] * kept
        )
    assert kept or name in str(told[0].message)


def test_what_is_no_file_of_results_is_refused(tmp_path):
    (tmp_path / "notes.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="not a file of results"):
        store.unpack(tmp_path / "notes.zip", Store(tmp_path / "s"))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        store.unpack(tmp_path / "gone.zip", Store(tmp_path / "s"))


def test_a_packed_result_stays_when_its_store_is_gone(tmp_path):
    s, path = Store(tmp_path / "s"), tmp_path / "results.zip"
    names = [store.write(s, {"a": k}, {"score": float(k)}) for k in range(3)]
    store.pack(s, names[:2], path)
    store.pack(
        Store(tmp_path / "new"), names[1:], path
    )  # the first is no longer wanted, the third nowhere to be had
    assert store.unpack(path, Store(tmp_path / "again")) == names[1:2]


def test_lock_ends_with_its_process(tmp_path):
    s = Store(tmp_path / "s")
    code = (
        "import sys, time; from mllm_compress.study import store\n"
        "with store.lock(store.Store(sys.argv[1]), 'x') as held: print(held, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(s.folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline().strip() == "True"
    with store.lock(s, "x") as held:
        assert not held
    other.kill()
    other.wait()
    with store.lock(s, "x") as held:
        assert held


def test_failed_shared_work_leaves_nothing_and_is_built_again(tmp_path):
    s = Store(tmp_path / "s")

    def broken(folder):
        (folder / "half").touch()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        store.shared(s, {"w": 1}, broken)
    folder = store.shared(s, {"w": 1}, lambda f: (f / "whole").touch())
    assert (folder / "whole").exists() and not (folder / "half").exists()


def test_every_step_of_a_result_is_in_its_name(monkeypatch):
    "A change of a function of `experiment` renames exactly the results that it makes."
    from mllm_compress.study import stages as experiment

    trained = replace(LAYERS, recovery="sft", fraction=0.5)
    names = lambda: [study.name_of(c, SMOKE) for c in (DENSE, LAYERS, trained)]
    before, honest = names(), experiment.inspect.getsource
    for function, renamed in (
        ("units_of", [1, 1, 1]),
        ("random_layers", [0, 1, 1]),
        ("trained_in_float32", [0, 0, 1]),
    ):
        monkeypatch.setattr(
            experiment.inspect,
            "getsource",
            lambda f: honest(f) + "\n    pass" * (f.__name__ == function),
        )
        assert names() == before, "a running process keeps the names of the code that it runs"
        experiment._ours.cache_clear()
        assert [a != b for a, b in zip(before, names())] == [bool(r) for r in renamed], function
        monkeypatch.setattr(experiment.inspect, "getsource", honest)
        experiment._ours.cache_clear()
        assert names() == before


def test_code_fingerprint_ignores_comments_and_sees_code():
    base = "def f(x):\n    'Why.'\n    return x + 1\n"
    assert store.source_fingerprint(base) == store.source_fingerprint(
        base.replace("Why.", "Because.") + "# a remark\n"
    )
    assert store.source_fingerprint(base) != store.source_fingerprint(base.replace("+", "-"))


# ---- cells and profiles


@pytest.mark.parametrize(
    "wrong",
    [
        dict(pruning="depth", ratio=0.3),
        dict(pruning="layerwise", ratio=1.0),
        dict(pruning="layerwise", ratio=0.0),
        dict(ratio=0.3),
        dict(pruning="layerwise", ratio=0.3, importance="taylor"),
        dict(recovery="sft+magic"),
        dict(recovery="sft+sft"),
        dict(recovery="sft", train="vision"),
        dict(recovery="sft", fraction=0.0),
        dict(seed="first"),
        dict(seed=True),
        dict(seed=1.5),
        dict(pruning="layerwise", ratio="a third"),
    ],
)
def test_nonsense_cells_are_refused(wrong):
    with pytest.raises(ValueError):
        Experiment("m", **wrong)


def test_equal_experiments_have_one_name():
    assert repr(
        Experiment("m", "layerwise", np.float64(0.3), recovery="sft", fraction=1, seed=np.int64(2))
    ) == repr(Experiment("m", "layerwise", 0.3, recovery="sft", fraction=1.0, seed=2))
    assert canonical(Experiment("m", seed=3)) == canonical(
        Experiment("m", fraction=0.5, train="projector")
    )
    a, b = (
        Experiment("smoke-llava", "layerwise", 0.3, recovery=r)
        for r in ("sft+hidden_kd", "hidden_kd+sft")
    )
    assert (
        study.name_of(a, SMOKE)
        == study.name_of(b, SMOKE)
        != study.name_of(replace(a, seed=1), SMOKE)
    )


def test_every_importance_can_be_computed():
    assert {(p, i) for p, names in IMPORTANCE.items() for i in names if p != "none"} == set(SCORES)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_read(name):
    profile = load_profile(name)
    cell = Experiment(
        profile.models[0],
        "widthwise",
        profile.ratios[0],
        recovery="sft+hidden_kd",
        fraction=profile.fractions[0],
    )
    assert recovery_config(cell, profile).losses == {"sft": 0.5, "hidden_kd": 0.5} and profile.about


@pytest.mark.parametrize(
    "text, says",
    [
        ("ratios: [0.3", "is not YAML"),
        ("- a\n- b", "must hold keys and values"),
        ("ratios: [a]", "each of ratios must be a number"),
        ("seeds: [0.5]", "each of seeds must be a whole number"),
        ("seeds: [0, 1, 0]", "names a value twice"),
        ("workers: -1", "workers is -1"),
        (
            "learning_rates: {projector+lm: {hidden_kd+sft: 0.1}}",
            "write 'sft.hidden_kd', not 'hidden_kd.sft'",
        ),
        ("recovery: {epochs: 1, seed: 7}", "recovery may not set seed: every cell has its own"),
    ],
)
def test_profiles_that_cannot_be_read(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    lines = [
        l
        for l in (executors.home() / "mllm_compress/profiles/smoke.yaml").read_text().splitlines()
        if l.split(":")[0] != text.split(":")[0]
    ]
    path.write_text(text if text.startswith("-") else "\n".join([*lines, text]))
    with pytest.raises(ValueError, match=says):
        load_profile(path)


def test_profile_with_a_typing_mistake(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (
        study.store.Path(__file__).parent.parent / "mllm_compress/profiles/smoke.yaml"
    ).read_text()
    path.write_text(text.replace("seeds:", "seed:"))
    with pytest.raises(ValueError, match="unknown seed; the keys are name, about, models"):
        load_profile(path)
    path.write_text(text.replace("[0.3, 0.45]", "[0.3, 1.45]"))
    with pytest.raises(ValueError, match="1.45 is outside"):
        load_profile(path)
    with pytest.raises(ValueError, match="use gpu, paper, quick, smoke, tiny"):
        load_profile("nope")
    with pytest.raises(ValueError, match="samples must be of type int"):
        read_strictly(Calibration, {"samples": True, "batch_size": 1}, "x")


def test_training_settings_change_only_trained_cells():
    other = replace(SMOKE, recovery=SMOKE.recovery | {"epochs": 7})
    assert identity(LAYERS, SMOKE) == identity(LAYERS, other)
    trained = replace(LAYERS, recovery="sft", fraction=0.5)
    assert identity(trained, SMOKE) != identity(trained, other)


# ---- running


def test_failure_is_reported_and_stops_nobody(away, capsys):
    bad = Experiment("smoke-llava", "widthwise", 0.94)
    frame = study.run([bad, DENSE, LAYERS], SMOKE, executor="inline")
    assert frame.groupby("status").size().to_dict() == {"done": 2, "failed": 1}
    assert (
        "1 FAILED" in capsys.readouterr().out
        and "ValueError" in frame[frame.status == "failed"].error.iloc[0]
    )
    log = study.results_of(SMOKE).log(study.name_of(bad, SMOKE))
    assert "Traceback" in log.read_text()


def test_local_equals_inline_and_nothing_is_computed_twice(away, monkeypatch):
    cells = [DENSE, LAYERS, WIDTH, replace(LAYERS, recovery="sft", fraction=0.5)]
    one = study.run(cells, replace(SMOKE, name="one"), executor="inline", quiet=True)
    two = study.run(cells, replace(SMOKE, name="two"), executor="local", workers=2, quiet=True)
    same = ["pruning", "recovery", "benchmark", "score", "achieved_ratio", "candidate_score"]
    pd.testing.assert_frame_equal(one[same], two[same])
    logs = [p.read_text() for p in (away / "runs/two/logs").glob("*.txt")]
    assert len(logs) == 4 and all(
        ", 1 thread, on cpu" in text for text in logs
    )  # two workers on two cores must not ask for four
    monkeypatch.setattr(executors, "compute", lambda *a: pytest.fail("computed twice"))
    again = study.run(cells, replace(SMOKE, name="one"), executor="inline", quiet=True)
    pd.testing.assert_frame_equal(one.drop(columns="units"), again.drop(columns="units"))


def test_killed_run_resumes_to_the_same_frame(away):
    code = (
        "from dataclasses import replace; from mllm_compress.study import runs as study; from mllm_compress.study.experiments import Experiment, load_profile\n"
        "p = load_profile('smoke'); p = replace(p, evaluation=replace(p.evaluation, benchmarks=['scenes/hallucination'], questions=4))\n"
        "study.run([Experiment('smoke-llava')] + [Experiment('smoke-llava', 'layerwise', r) for r in (.2, .3, .45, .6)], p, executor='inline', quiet=True)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=away, start_new_session=True)
    results = away / "runs/smoke/results"
    while run.poll() is None and not (results.exists() and list(results.glob("*/result.json"))):
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kept = {p: p.stat().st_mtime_ns for p in results.glob("*/result.json")}
    cells = [DENSE] + [Experiment("smoke-llava", "layerwise", r) for r in (0.2, 0.3, 0.45, 0.6)]
    resumed = study.run(cells, SMOKE, executor="inline", quiet=True)
    fresh = study.run(cells, replace(SMOKE, name="fresh"), executor="inline", quiet=True)
    assert kept and all(p.stat().st_mtime_ns == t for p, t in kept.items())
    same = ["ratio", "benchmark", "score", "low", "high", "achieved_ratio"]
    pd.testing.assert_frame_equal(resumed[same], fresh[same])


def test_a_bar_learns_how_long_the_rest_will_take(away):
    trained, failing = (
        replace(LAYERS, recovery="sft", fraction=0.5),
        Experiment("smoke-llava", "widthwise", 0.94),
    )
    cells = [DENSE, LAYERS, failing, trained]
    said, known = [], study.at_hand(cells, SMOKE)
    for cell, word, _ in executors.inline(cells, SMOKE, study.results_of(SMOKE)):
        known = study._learned(known, cell, word, SMOKE)
        said.append((known.seconds.isna().sum(), study.time_left(known, 1)))
    assert [n for n, _ in said] == [3, 2, 1, 0] and said[-1][1] == "nothing left"
    assert all("and 1 cell of a kind not seen yet left" in text for _, text in said[:2])
    assert said[2][1] == "1 cell of a kind not seen yet left" and len(known) == 3
    assert (
        study.at_once("inline", SMOKE) == 1
        and study.at_once("local", SMOKE, 3) == 3
        and study.at_once("slurm", SMOKE) == SMOKE.slurm.jobs_at_once
    )


def test_busy_cell_is_left_to_the_other_run(away):
    results = study.results_of(SMOKE)
    with store.lock(results, study.name_of(DENSE, SMOKE)):
        word, holder = executors.complete(DENSE, SMOKE, results)
    assert word == "busy" and f"process {os.getpid()}, since" in holder
    assert executors.complete(DENSE, SMOKE, results) == ("done", "")


def test_whatever_goes_wrong_is_a_failed_cell(away, monkeypatch):
    results = study.results_of(SMOKE)
    monkeypatch.setattr(
        executors.store,
        "read",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    word, message = executors.complete(DENSE, SMOKE, results)
    assert word == "failed" and "No space left" in message


def test_a_worker_that_dies_while_idle_is_replaced(away):
    "Killed between two cells, it fails the one that it is given next, and the run goes on with another worker."
    results = study.results_of(SMOKE)
    run = executors.local([DENSE, LAYERS, WIDTH], SMOKE, results, workers=1)
    assert next(run)[1] == "done"
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    assert sorted(word for _, word, _ in run) == ["done", "failed"]


def test_a_failure_on_a_gpu_costs_one_cell_and_one_worker(monkeypatch):
    "An error of the device breaks whatever its process does next; on a CPU a worker goes on."

    class Fragile:
        "A worker whose device breaks at the first cell that asks for too much."

        made = []

        def __init__(self, profile, folder, device):
            self.args, self.cell, self.last, self.pipe, self.broken = (
                (profile, folder, device),
                None,
                None,
                object(),
                False,
            )
            self.made.append(device)

        def give(self, cell):
            self.cell = self.last = cell

        def take(self):
            cell, self.cell, self.broken = self.cell, None, self.broken or self.cell.ratio > 0.9
            return cell, "failed" if self.broken else "done", ""

        def stop(self):
            pass

    monkeypatch.setattr(executors, "Worker", Fragile)
    monkeypatch.setattr(executors, "wait", lambda pipes: pipes)
    cells, results = (
        [
            Experiment("m", "widthwise", 0.94),
            Experiment("m", "widthwise", 0.3),
            Experiment("m", "widthwise", 0.5),
        ],
        study.results_of(SMOKE),
    )
    for device, made, failed in (("cuda:0", 2, 1), ("cpu", 1, 3)):
        Fragile.made.clear()
        monkeypatch.setattr(executors, "devices", lambda *_: [device])
        assert [word for _, word, _ in executors.local(cells, SMOKE, results)].count(
            "failed"
        ) == failed and Fragile.made == [device] * made


def test_a_cell_that_is_named_twice_counts_once(away):
    "Else one seed would pass for two."
    assert len(study.run([DENSE, LAYERS, LAYERS], SMOKE, executor="inline", quiet=True)) == len(
        study.run([DENSE, LAYERS], SMOKE, executor="inline", quiet=True)
    )


def test_the_device_is_free_while_others_train_on_it():
    class Model:
        place = ["cuda:0"]

        def to(self, device):
            self.place = [*self.place, device]

    from mllm_compress.study import stages as experiment

    teacher, student = Model(), Model()
    with pytest.raises(RuntimeError), experiment._off("cuda:0", teacher, student):
        assert teacher.place[-1] == student.place[-1] == "cpu"
        raise RuntimeError
    assert teacher.place[-1] == student.place[-1] == "cuda:0"


def test_what_a_worker_finds_in_its_environment(monkeypatch):
    one = executors._surroundings("cpu")
    assert {one[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {
        "1"
    } and "CUDA_VISIBLE_DEVICES" not in one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert (
        executors._surroundings("cuda:2", 2)["CUDA_VISIBLE_DEVICES"] == "6,7"
        and executors._surroundings("cuda:1")["CUDA_VISIBLE_DEVICES"] == "5"
    )


def test_workers_are_counted():
    with pytest.raises(ValueError, match="workers is -1"):
        executors.devices(-1)
    with pytest.raises(ValueError, match="workers is -2"):
        study.run([DENSE], replace(SMOKE, workers=-2))
    assert len(executors.devices(3)) == 3 and 1 <= executors._cores() <= os.cpu_count()


def test_what_a_store_has_from_other_times_is_passed_over(away):
    results = study.results_of(SMOKE)
    assert executors.complete(DENSE, SMOKE, results)[0] == "done"
    for cell in (
        {"model": "gone"},
        {"model": "smoke-llava", "depth": 3},
        {"model": "smoke-llava", "pruning": "odd"},
    ):
        store.write(results, {"cell": cell}, {})
    assert list(study.stored(SMOKE)) == [DENSE] and len(results.names()) == 4


def test_a_tower_that_lies_elsewhere_is_part_of_the_name(tmp_path):
    towers = [tmp_path / name for name in "ab"]
    for tower in towers:
        tower.mkdir()
        (tower / "weights").write_text(tower.name)
    names = {
        study.name_of(LAYERS, replace(SMOKE, towers={"smoke-llava": str(t)} if t else {}))
        for t in (None, *towers)
    }
    assert len(names) == 3


def test_a_precision_left_open_is_settled_by_who_submits():
    from mllm_compress.study.stages import precision_here, settled

    left_open = replace(
        SMOKE,
        recovery=SMOKE.recovery | {"precision": "fastest"},
        per_model={"smoke-llava": {"recovery": {"precision": "fastest"}}},
    )
    found = settled(left_open)
    assert (
        found.recovery["precision"]
        == found.per_model["smoke-llava"]["recovery"]["precision"]
        == precision_here()
    )
    cell = replace(LAYERS, recovery="sft")
    assert study.name_of(cell, found) == study.name_of(cell, left_open) and settled(SMOKE) == SMOKE


# ---- effects


def frame_of(worth: dict, dense: float = 100.0) -> pd.DataFrame:
    "A study frame from {(pruning, seed): worth of each question}."
    rows = [
        {
            "model": "m",
            "pruning": p,
            "requested_ratio": 0.3 * (p != "none"),
            "importance": "",
            "recovery": "none",
            "train": "",
            "fraction": 1.0,
            "seed": s,
            "status": "done",
            "benchmark": b,
            "score": 100 * np.mean(u),
            "units": np.array(u, float),
            "achieved_ratio": 0.3,
        }
        for (p, s), by in worth.items()
        for b, u in by.items()
    ]
    return pd.DataFrame(rows)


def test_avg_percent_is_the_mean_of_ratios():
    f = frame_of(
        {
            ("none", 0): {"a": [1, 1, 1, 0], "b": [1, 0]},
            ("layerwise", 0): {"a": [1, 1, 0, 0], "b": [1, 0]},
        }
    )
    row = effects.summary(f).set_index("pruning").loc["layerwise"]
    assert (
        row.avg_percent == pytest.approx(100 * (0.5 / 0.75 + 1) / 2)
        and row.n == 6
        and row.low < row.avg_percent < row.high
    )


def test_the_original_keeps_all_of_itself_and_shares_are_paired_with_it():
    rng = np.random.default_rng(0)
    hard = rng.random(600) < 0.4
    f = frame_of(
        {
            ("none", 0): {"a": ~hard, "b": np.ones(300)},
            ("layerwise", 0): {"a": ~hard & (rng.random(600) < 0.95), "b": rng.random(300) < 0.9},
        }
    )
    rows = effects.summary(f).set_index("pruning")
    assert tuple(rows.loc["none", ["avg_percent", "low", "high"]]) == (100, 100, 100)
    u, d = (
        np.stack([f[f.pruning == p].set_index("benchmark").units["a"]])
        for p in ("layerwise", "none")
    )
    draws = [
        100 * u[0][k].mean() / d[0][k].mean()
        for k in (rng.integers(0, 600, 600) for _ in range(4000))
    ]  # pairs drawn again: the bootstrap
    only_a = effects.estimate([effects._shares(u, d[0], "a")])
    assert only_a.value == pytest.approx(100 * u.mean() / d.mean()) and (
        only_a.high - only_a.low
    ) / np.subtract(*np.quantile(draws, [0.975, 0.025])) == pytest.approx(1, abs=0.08)
    with pytest.raises(ValueError, match="evaluate both on the same"):
        effects._shares(u[:, :5], d[0], "a")


def test_units_of_every_scorer_average_to_its_score():
    "MME sums two hundred points a subtask: its units must say the same as its score."
    from mllm_compress.evaluation.benchmarks import benchmark
    from mllm_compress.evaluation.scorers import SCORERS
    from mllm_compress.study.stages import units_of

    rng = np.random.default_rng(1)
    paired = lambda name: (
        name.startswith("mme") or name in ("scenes/perception", "scenes/hallucination")
    )
    answers = pd.DataFrame(
        [
            {
                "benchmark": name,
                "id": f"{name}{k}",
                "group": f"g{k // 2}" if paired(name) else None,
                "subtask": f"s{int(k > 89)}" if name.startswith("mme") else None,
                "value": float(rng.random() < 0.7),
                "answer": "yes" if k % 2 else "no",
                "parsed": "yes",
            }
            for name in (
                "mme_perception",
                "mme_cognition",
                "pope",
                "scenes/perception",
                "scenes/hallucination",
                "gqa",
            )
            for k in range(120)
        ]
    )
    for name, units in units_of(answers).items():
        score = SCORERS[benchmark(name).scorer].combine(answers[answers.benchmark == name])["score"]
        assert 100 * np.mean(units) == pytest.approx(score, abs=0.01) and len(units) == (
            60 if paired(name) else 120
        ), name
        if name == "scenes/hallucination":  # scored one by one, kept two by two
            assert (
                units
                == answers[answers.benchmark == name]
                .groupby("group", sort=False)
                .value.mean()
                .tolist()
            )
        assert (score > 150) == name.startswith("mme")  # a sum over two subtasks


def test_groups_of_unequal_size_count_by_their_questions():
    from mllm_compress.study.stages import units_of

    answers = pd.DataFrame(
        [
            {"benchmark": "gqa", "id": f"q{k}", "group": group, "value": value}
            for k, (group, value) in enumerate(
                [("a", 1.0), ("a", 1.0), ("a", 0.0), ("b", 1.0), (None, 0.0)]
            )
        ]
    )
    units = units_of(answers)["gqa"]
    assert (
        len(units) == 3
        and np.mean(units) == pytest.approx(3 / 5)
        and units == pytest.approx([2 * 3 / 5, 3 / 5, 0], abs=1e-6)
    )


def test_difference_of_equal_answers_is_exactly_zero():
    u = {"a": [1, 0, 1, 1]}
    f = frame_of({("none", 0): {"a": [1, 1, 1, 1]}, ("layerwise", 0): u, ("widthwise", 0): u})
    d = effects.difference(f, "m", {"pruning": "layerwise"}, {"pruning": "widthwise"})
    assert (d.value, d.low, d.high) == (0, 0, 0)


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    runs = {("layerwise", s): {"a": rng.random(400) < p} for s, p in enumerate((0.5, 0.7, 0.9))}
    f = frame_of({("none", 0): {"a": np.ones(400)}, **runs})
    row = effects.summary(f).set_index("pruning").loc["layerwise"]
    assert (
        row.seeds == 3 and row.high - row.low > 60
    )  # t with two degrees of freedom, spread of 20 points
