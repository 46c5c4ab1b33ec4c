"""The Slurm executor on a real Slurm of one node (`.ci/slurm` starts one)."""

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import pandas as pd
import pytest

from mllm_compress.study import runs as study
from mllm_compress.study import slurm
from mllm_compress.study.cache_keys import name_of, score_keys, subject_key
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import PROFILES, Slurm, load_profile
from mllm_compress.study.students import checkpoints_of
from mllm_compress.study.workers import results_of

SMOKE = load_profile("smoke")
SMOKE = replace(
    SMOKE,
    name="on-slurm",
    evaluation=replace(SMOKE.evaluation, benchmarks=["scenes/hallucination"], questions=4),
    slurm=Slurm(minutes=1, memory_gb=1, experiments_per_job=3),
)
EXPERIMENTS = [
    Experiment("smoke-llava"),
    Experiment("smoke-llava", "layerwise", 0.3),
    Experiment("smoke-llava", "layerwise", 0.45),
    Experiment("smoke-bunny"),
    Experiment("smoke-bunny", "widthwise", 0.94),
    Experiment("smoke-bunny", "widthwise", 0.3, recovery="sft", fraction=0.5),
]
SAME = [
    "model",
    "pruning",
    "recovery",
    "ratio",
    "benchmark",
    "score",
    "low",
    "high",
    "achieved_ratio",
    "candidate_score",
    "status",
    "error",
]


def answers(*command) -> bool:
    "Whether a command exists and succeeds."
    return (
        shutil.which(command[0]) is not None
        and subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    )


real = pytest.mark.skipif(not answers("sinfo"), reason="no Slurm answers here")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "A folder to study in, in which the cluster is looked at often."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "POLL", 0.25)
    monkeypatch.setattr(slurm, "PATIENCE", 40)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The same study without Slurm."
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("local"))
    frame = study.run(EXPERIMENTS, SMOKE, executor="inline", quiet=True)
    os.chdir(before)
    return frame


def finished(results) -> dict:  # name of a finished experiment -> when its score was written
    keys = {name_of(e, SMOKE): score_keys(e, SMOKE).values() for e in EXPERIMENTS}
    paths = {name: [results.path("score", k) for k in own] for name, own in keys.items()}
    done = {name: own for name, own in paths.items() if all(p.exists() for p in own)}
    return {name: own[0].stat().st_mtime_ns for name, own in done.items()}


def pickles(folder) -> list:
    return [p.name for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle")]


@real
def test_study_on_slurm_equals_local_and_survives_scancel_and_requeue(cluster, undisturbed, capsys):
    frames = []
    run = threading.Thread(
        target=lambda: frames.append(study.run(EXPERIMENTS, SMOKE, executor="slurm")), daemon=True
    )
    run.start()
    results = results_of(SMOKE)
    while run.is_alive() and not finished(results):
        time.sleep(0.02)  # until a job is at work and has finished a cell
    kept = finished(results)
    (mark,) = results.folder.glob("slurm/*/array.json")
    array = slurm.Array(mark.parent, **json.loads(mark.read_text()))
    job = array.job(next(iter(kept)))
    subprocess.run(["scancel", job], check=True)
    while subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode:
        time.sleep(0.1)
    run.join(90)
    pd.testing.assert_frame_equal(frames[0][SAME], undisturbed[SAME])
    assert all(
        f", {SMOKE.slurm.cpus} thread" in p.read_text() for p in results.folder.glob("logs/*.txt")
    )
    assert kept.items() <= finished(results).items()
    while job in slurm.queue():
        time.sleep(0.1)
    lives = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
    ).stdout
    assert "Restarts=1" in lives and "JobState=COMPLETED" in lives and len(array.jobs) == 2
    assert "1 FAILED" in capsys.readouterr().out and not pickles(cluster)


@real
def test_a_study_that_lost_its_terminal_watches_the_jobs_it_left(cluster):
    results = results_of(SMOKE)
    array = slurm.submit([EXPERIMENTS[:1]], 1, SMOKE, results)
    while not slurm.in_queue({name_of(EXPERIMENTS[0], SMOKE)}, results):
        time.sleep(0.05)
    frame = study.run(EXPERIMENTS[:1], SMOKE, executor="slurm", quiet=True)
    assert frame.status.eq("done").all() and [
        p.parent.name for p in results.folder.glob("slurm/*/array.json")
    ] == [array.folder.name]


@real
def test_ctrl_c_takes_the_jobs_back(cluster, monkeypatch):
    results = results_of(SMOKE)
    stop = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(slurm.time, "sleep", stop)  # Ctrl-C comes while the run watches
    with pytest.raises(KeyboardInterrupt):
        study.run(EXPERIMENTS, SMOKE, executor="slurm", quiet=True)
    monkeypatch.undo()
    (mark,) = results.folder.glob("slurm/*/array.json")
    jobs = {f"{json.loads(mark.read_text())['id']}_{k}" for k in range(2)}
    for _ in range(200):
        if not jobs & slurm.queue():
            return
        time.sleep(0.05)
    pytest.fail(f"{jobs & slurm.queue()} still in the queue")


@real
def test_what_slurm_refuses_is_said_in_its_words(cluster):
    nowhere, misspelled = (
        replace(SMOKE, slurm=s)
        for s in (Slurm(partition="nowhere"), Slurm(options={"acount": "vision"}))
    )
    with pytest.raises(ValueError, match="(?s)slurm section of profile on-slurm.*[Pp]artition"):
        study.run(EXPERIMENTS[:1], nowhere, executor="slurm", quiet=True)
    with pytest.raises(ValueError, match="(?s)acount.*account"):
        study.run(EXPERIMENTS[:1], misspelled, executor="slurm", quiet=True)


def test_a_job_that_vanished_is_a_failed_cell(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "POLL", 0)
    monkeypatch.setattr(slurm, "queue", lambda: set())
    (cluster / "array").mkdir()
    answers = list(slurm.watch([slurm.Array(cluster / "array", "7", [["a", "b"]])]))
    assert [(name, word) for name, word, _ in answers] == [
        ("a", "failed"),
        ("b", "failed"),
    ] and "job 7_0 left the queue" in answers[0][2]
    monkeypatch.setattr(
        slurm, "queue", lambda: None
    )  # a cluster that does not answer has lost nothing
    watching = slurm.watch([slurm.Array(cluster / "array", "7", [["a"]])])
    (cluster / "array/a.json").write_text('["done", ""]')
    assert list(watching) == [("a", "done", "")]


def test_a_cell_that_a_jobs_time_is_too_short_for_fails_and_the_rest_is_requeued(
    cluster, monkeypatch
):
    results, commands = results_of(SMOKE), []
    folder = slurm.write_array([EXPERIMENTS[:3]], SMOKE, results)
    names = [name_of(c, SMOKE) for c in EXPERIMENTS[:3]]

    def slow(*_):
        raise slurm.TimeIsUp

    now = time.time
    monkeypatch.setattr(slurm, "complete_logged", slow)
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(slurm.signal, "signal", lambda *_: None)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    slurm.serve(folder)  # the signal comes at once: Slurm wants the node back
    assert slurm.Array(folder, "7", [names]).answer(names[0]) is None and commands == [
        ["scontrol", "requeue", "123"]
    ]
    clock, commands[:] = (
        itertools.chain([0.0], itertools.repeat(3600.0)),
        [],
    )  # an hour later: the job has had its time
    monkeypatch.setattr(slurm.time, "time", lambda: next(clock))
    checkpoint = checkpoints_of(subject_key(EXPERIMENTS[0], SMOKE), results) / "checkpoint-4"

    def learning(*_):
        checkpoint.mkdir(parents=True, exist_ok=True)
        raise slurm.TimeIsUp

    monkeypatch.setattr(slurm, "complete_logged", learning)
    slurm.serve(folder)  # its training got on: it may take several lives
    assert slurm.Array(folder, "7", [names]).answer(names[0]) is None and commands == [
        ["scontrol", "requeue", "123"]
    ]
    clock, commands[:] = itertools.chain([0.0], itertools.repeat(3600.0)), []
    monkeypatch.setattr(slurm.time, "time", lambda: next(clock))
    slurm.serve(folder)  # and now it did not
    word, message = slurm.Array(folder, "7", [names]).answer(names[0])
    assert (
        word == "failed"
        and "training_minutes" in message
        and commands == [["scontrol", "requeue", "123"]]
    )
    monkeypatch.setattr(slurm.time, "time", now)
    monkeypatch.setattr(slurm, "complete_logged", lambda *_: ("done", ""))
    slurm.serve(folder)  # its next life leaves the failed cell alone
    assert [slurm.Array(folder, "7", [names]).answer(n)[0] for n in names] == [
        "failed",
        "done",
        "done",
    ]


def test_options_are_checked_before_anything_is_submitted(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (PROFILES / "smoke.yaml").read_text()
    path.write_text(text + "slurm: {gpus: 1, hours: 3}\n")
    with pytest.raises(ValueError, match="slurm: unknown hours; the keys are partition, minutes"):
        load_profile(path)
    path.write_text(text + "slurm: {options: {setup: [module load cuda]}}\n")
    with pytest.raises(ValueError, match="belong to setup of the slurm section itself"):
        load_profile(path)
    path.write_text(text + "slurm: {gpus: 1, minutes: 30}\n")
    assert load_profile(path).slurm == Slurm(gpus=1, minutes=30)
    assert name_of(EXPERIMENTS[1], load_profile(path)) == name_of(
        EXPERIMENTS[1], load_profile("smoke")
    )


def test_what_a_job_asks_for():
    asked = slurm.parameters(
        90,
        Slurm(
            gpus=2,
            cpus=6,
            memory_gb=1.5,
            jobs_at_once=7,
            partition="long",
            setup=["module load cuda"],
            options={"account": "us"},
        ),
    )
    assert {
        k: asked[k]
        for k in (
            "time",
            "gpus_per_node",
            "cpus_per_task",
            "mem",
            "array_parallelism",
            "partition",
            "account",
        )
    } == {
        "time": 90,
        "gpus_per_node": 2,
        "cpus_per_task": 6,
        "mem": "1536MB",
        "array_parallelism": 7,
        "partition": "long",
        "account": "us",
    }
    assert [
        f"export {name}=6"
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    ] == asked["setup"][:3] and asked["setup"][-1] == "module load cuda"
    assert slurm.parameters(90, Slurm(options={"additional_parameters": {"reservation": "ours"}}))[
        "additional_parameters"
    ] == {"requeue": True, "reservation": "ours"}
    assert asked["additional_parameters"] == {"requeue": True} and not {
        "gpus_per_node",
        "partition",
    } & set(slurm.parameters(90, Slurm()))


def test_a_cell_that_another_run_has_never_fails_for_want_of_time(cluster, monkeypatch):
    results, commands = results_of(SMOKE), []
    folder = slurm.write_array([EXPERIMENTS[:2]], SMOKE, results)
    monkeypatch.setattr(slurm, "complete_logged", lambda *_: ("busy", ""))
    monkeypatch.setattr(
        slurm.time, "sleep", slurm._time_is_up
    )  # the signal comes while the job waits for the other run
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(slurm.signal, "signal", lambda *_: None)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    slurm.serve(folder)
    assert commands == [["scontrol", "requeue", "123"]] and not [
        p for p in folder.glob("*.json") if p.name != "jobs.json"
    ]


def test_after_a_failure_on_a_gpu_the_others_get_a_new_job(cluster, monkeypatch):
    results, commands = results_of(SMOKE), []
    folder = slurm.write_array([EXPERIMENTS[:3]], SMOKE, results)
    monkeypatch.setattr(slurm, "devices", lambda *_: ["cuda:0"])
    monkeypatch.setattr(
        slurm,
        "complete_logged",
        lambda cell, *_: (
            ("failed", "AcceleratorError: device-side assert")
            if cell == EXPERIMENTS[0]
            else ("done", "")
        ),
    )
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(slurm.signal, "signal", lambda *_: None)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    answers = lambda: [
        slurm.Array(folder, "7", []).answer(name_of(c, SMOKE)) for c in EXPERIMENTS[:3]
    ]
    slurm.serve(folder)
    assert [a and a[0] for a in answers()] == ["failed", None, None] and commands == [
        ["scontrol", "requeue", "123"]
    ]
    slurm.serve(folder)  # its next life
    assert [a[0] for a in answers()] == ["failed", "done", "done"] and len(commands) == 1


def test_nothing_is_submitted_while_slurm_does_not_answer(cluster, monkeypatch):
    results = results_of(SMOKE)
    (results.folder / "slurm/earlier").mkdir(parents=True)
    (results.folder / "slurm/earlier/array.json").write_text('{"id": "7", "jobs": [["a"]]}')
    monkeypatch.setattr(slurm, "POLL", 0)
    answers = iter([None, None, {"7_0"}])
    monkeypatch.setattr(slurm, "queue", lambda: next(answers))
    (array,) = slurm.in_queue({"a"}, results)
    assert array.id == "7"
    monkeypatch.setattr(slurm, "queue", lambda: None)
    with pytest.raises(ValueError, match="does not answer"):
        slurm.in_queue({"a"}, results)


def test_jobs_that_will_never_start_are_named_once(cluster, monkeypatch, capsys):
    reasons = "7_0|PartitionTimeLimit\n7_1|Resources\n8_0|JobHeldUser\n"
    monkeypatch.setattr(slurm.shutil, "which", lambda _: "/usr/bin/squeue")
    monkeypatch.setattr(
        slurm.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, reasons, "")
    )
    assert slurm.stuck({"7_0", "7_1"}) == {"7_0": "PartitionTimeLimit"} and slurm.stuck(
        {"8_0"}
    ) == {"8_0": "JobHeldUser"}
    results = results_of(SMOKE)
    array = slurm.Array(slurm.write_array([EXPERIMENTS[:1]], SMOKE, results), "7", [["a"]])
    looks = iter(range(3))

    def look(_):
        if next(looks, None) is None:
            (array.folder / "a.json").write_text('["done", ""]')

    monkeypatch.setattr(slurm.time, "sleep", look)
    monkeypatch.setattr(slurm, "queue", lambda: {"7_0"})
    assert list(slurm.watch([array])) == [("a", "done", "")]
    said = capsys.readouterr()
    assert (said.out + said.err).count("Slurm job 7_0 waits: PartitionTimeLimit") == 1


def test_cells_of_another_run_that_took_its_jobs_back_are_submitted_once(cluster, monkeypatch):
    results, submitted = results_of(SMOKE), []
    names = [name_of(c, SMOKE) for c in EXPERIMENTS[:3]]
    theirs = slurm.Array(cluster / "theirs", "7", [names[:2]])
    theirs.folder.mkdir()
    (theirs.folder / f"{names[1]}.json").write_text('["failed", "an error of its own"]')

    def submit(jobs, minutes, profile, store):
        array = slurm.Array(
            cluster / f"ours{len(submitted)}",
            str(8 + len(submitted)),
            [[name_of(c, SMOKE) for c in job] for job in jobs],
        )
        array.folder.mkdir()
        for job in array.jobs:
            for name in job:
                (array.folder / f"{name}.json").write_text('["done", ""]')
        submitted.append([c for job in jobs for c in job])
        return array

    monkeypatch.setattr(slurm, "POLL", 0)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name if name == "sbatch" else None)
    monkeypatch.setattr(slurm, "queue", lambda: set())
    monkeypatch.setattr(slurm, "in_queue", lambda names, store: [theirs])
    monkeypatch.setattr(slurm, "submit", submit)
    answers = {
        cell: (status, message)
        for cell, status, message in slurm.slurm(EXPERIMENTS[:3], SMOKE, results)
    }
    assert submitted == [
        [EXPERIMENTS[2]],
        [EXPERIMENTS[0]],
    ]  # what nobody had, then what the other run gave up
    assert answers == {
        EXPERIMENTS[0]: ("done", ""),
        EXPERIMENTS[1]: ("failed", "an error of its own"),
        EXPERIMENTS[2]: ("done", ""),
    }
