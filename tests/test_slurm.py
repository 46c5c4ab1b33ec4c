"""The Slurm executor: on a real cluster of one node, or on the local executor of submitit."""

import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import submitit

from mllm_compress.study import runs as study
from mllm_compress.study import slurm
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import PROFILES, Slurm, load_profile
from mllm_compress.study.stages import key_of, name_of
from mllm_compress.study.store import results_of

pytestmark = pytest.mark.slow  # whole processes

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
NAMES = [name_of(e, SMOKE) for e in EXPERIMENTS]
SAME = ["model", "pruning", "recovery", "ratio", "benchmark", "score", "low", "high"]
SAME += ["achieved_ratio", "candidate_score", "status", "error"]


answer = shutil.which("sinfo") and subprocess.run("sinfo", capture_output=True, timeout=20)
real = pytest.mark.skipif(not answer or answer.returncode, reason="no Slurm answers here")


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
    os.chdir(tmp_path_factory.mktemp("inline"))
    frame = study.run(EXPERIMENTS, SMOKE, executor="inline", quiet=True)
    os.chdir(before)
    return frame


def finished(results) -> dict:  # name of a finished experiment -> when its score was written
    (benchmark,) = SMOKE.evaluation.benchmarks
    keys = {name_of(e, SMOKE): key_of("score", e, SMOKE, benchmark) for e in EXPERIMENTS}
    paths = {name: results.path("score", key) for name, key in keys.items()}
    return {name: p.stat().st_mtime_ns for name, p in paths.items() if p.exists()}


# ---- a real cluster


@real
def test_study_on_slurm_equals_local_and_survives_scancel_and_requeue(cluster, undisturbed, capsys):
    frames = []
    run = threading.Thread(
        target=lambda: frames.append(study.run(EXPERIMENTS, SMOKE, executor="slurm")), daemon=True
    )
    run.start()
    results = results_of(SMOKE)
    while run.is_alive() and not finished(results):
        time.sleep(0.02)  # until a job is at work and has finished an experiment
    kept = finished(results)
    jobs = slurm.in_queue(set(NAMES), results)
    job = next(job.job_id for job, names in jobs.items() if set(names) & set(kept))
    subprocess.run(["scancel", job], check=True)
    while subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode:
        time.sleep(0.1)
    run.join(120)
    pd.testing.assert_frame_equal(frames[0][SAME], undisturbed[SAME])
    assert kept.items() <= finished(results).items()
    assert len(jobs) == 2 and "1 FAILED" in capsys.readouterr().out


@real
def test_a_study_that_lost_its_terminal_watches_the_jobs_it_left(cluster):
    results = results_of(SMOKE)
    slurm.submit([EXPERIMENTS[:1]], 1, SMOKE, results)
    while not slurm.in_queue(set(NAMES[:1]), results):
        time.sleep(0.05)
    assert study.run(EXPERIMENTS[:1], SMOKE, executor="slurm", quiet=True).status.eq("done").all()
    assert len(list(results.folder.glob(f"slurm/*/{slurm.JOBS}"))) == 1


@real
def test_ctrl_c_takes_the_jobs_back(cluster, monkeypatch):
    results, stop = results_of(SMOKE), lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(slurm, "queue", stop)  # Ctrl-C comes while the run watches
    with pytest.raises(KeyboardInterrupt):
        study.run(EXPERIMENTS, SMOKE, executor="slurm", quiet=True)
    monkeypatch.undo()
    for _ in range(200):
        if not (jobs := slurm.in_queue(set(NAMES), results)):
            return
        time.sleep(0.05)
    pytest.fail(f"{jobs} still in the queue")


@real
def test_what_slurm_refuses_is_said_in_its_words(cluster):
    nowhere = replace(SMOKE, slurm=Slurm(partition="nowhere"))
    with pytest.raises(ValueError, match="(?s)slurm section of profile on-slurm.*[Pp]artition"):
        study.run(EXPERIMENTS[:1], nowhere, executor="slurm", quiet=True)


# ---- without one


class Here(submitit.LocalExecutor):
    "Jobs as processes of this machine, by the same calls of submitit."

    def __init__(self, folder, max_num_timeout=3):
        super().__init__(folder)

    def update_parameters(self, **options):
        super().update_parameters(timeout_min=options["time"])


def test_jobs_of_submitit_equal_a_local_run(cluster, undisturbed, monkeypatch, capsys):
    jobs, submit = {}, slurm.submit
    monkeypatch.setattr(slurm.submitit, "SlurmExecutor", Here)
    monkeypatch.setattr(slurm, "submit", lambda *given: jobs.update(new := submit(*given)) or new)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name if name == "sbatch" else None)
    monkeypatch.setattr(slurm, "queue", lambda: {job.job_id for job in jobs if not job.done()})
    frame = study.run(EXPERIMENTS[3:], SMOKE, executor="slurm")
    expected = undisturbed[undisturbed.model == "smoke-bunny"].reset_index(drop=True)
    pd.testing.assert_frame_equal(frame[SAME], expected[SAME])
    assert "1 FAILED" in capsys.readouterr().out
    assert [sorted(names) for names in jobs.values()] == [sorted(NAMES[3:])]
    logs = [p.read_text() for p in results_of(SMOKE).folder.glob("logs/*.txt")]
    assert len(logs) == 3 and all(f", {SMOKE.slurm.cpus} thread" in text for text in logs)


class Job:
    "A job that has returned some answers, or none yet."

    def __init__(self, folder, job_id: str, answers=None):
        self.job_id, self.answers = job_id, answers
        self.paths = SimpleNamespace(result_pickle=folder / f"{job_id}.pkl", stderr="log.err")
        if answers is not None:
            self.paths.result_pickle.touch()

    def result(self):
        return self.answers


def test_a_job_that_vanished_is_a_failed_experiment(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "POLL", 0)
    monkeypatch.setattr(slurm, "queue", lambda: set())
    answers = list(slurm.watch({Job(cluster, "7_0"): ["a", "b"]}))
    assert [(name, word) for name, word, _ in answers] == [("a", "failed"), ("b", "failed")]
    assert "job 7_0 left the queue" in answers[0][2]
    monkeypatch.setattr(slurm, "queue", lambda: None)  # a silent cluster has lost nothing
    done = Job(cluster, "7_1", [("a", "done", "")])
    assert list(slurm.watch({done: ["a"]})) == [("a", "done", "")]


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
    assert len({name_of(EXPERIMENTS[1], load_profile(p)) for p in (path, "smoke")}) == 1


def test_nothing_is_submitted_while_slurm_does_not_answer(cluster, monkeypatch):
    results, queue = results_of(SMOKE), slurm.queue
    (results.folder / "slurm/earlier").mkdir(parents=True)
    (results.folder / "slurm/earlier" / slurm.JOBS).write_text('[["a"], ["a", "b"]]')
    alive = {"7_0": "mllm-compress-earlier", "8_0": "somebody's", "8_1": "mllm-compress-other"}
    monkeypatch.setattr(slurm, "queue", lambda: alive)
    jobs = slurm.in_queue({"a"}, results)
    assert [(job.job_id, names) for job, names in jobs.items()] == [("7_0", ["a"])]
    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr(slurm, "POLL", 0)
    given = [SimpleNamespace(returncode=code, stdout="7_0 a job\n") for code in (1, 1, 0, 1, 1, 1)]
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **how: given.pop(0))
    assert slurm.queue() == {"7_0": "a job"} and len(given) == 3  # the third time
    with pytest.raises(ValueError, match="does not answer"):
        slurm.in_queue({"a"}, results)


def test_ctrl_c_within_the_submission_loses_no_job(cluster, monkeypatch):
    "The note is there before Slurm has the jobs, and names them by what they carry."
    results, carried = results_of(SMOKE), []

    class Interrupted(submitit.SlurmExecutor):
        "Slurm has taken the jobs; the run never hears of it."

        def map_array(self, *_):
            carried.append(self.parameters["job_name"])
            raise KeyboardInterrupt

    monkeypatch.setattr(slurm.submitit.SlurmExecutor, "affinity", classmethod(lambda _: 1))
    monkeypatch.setattr(slurm.submitit, "SlurmExecutor", Interrupted)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: "/usr/bin/" + name)
    with pytest.raises(KeyboardInterrupt):
        list(slurm.slurm(EXPERIMENTS[:2], SMOKE, results))
    monkeypatch.setattr(slurm, "queue", lambda: {"7_0": carried[0], "8": "somebody's"})
    jobs = slurm.in_queue(set(NAMES), results)
    assert [(job.job_id, set(names)) for job, names in jobs.items()] == [("7_0", set(NAMES[:2]))]
