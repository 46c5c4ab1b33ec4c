"""One student trained by several processes; a killed training that goes on; workers and GPUs."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from mllm_compress.recovery.training import RecoveryTrainer
from mllm_compress.study import stages, workers
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import Profile, Slurm, checked, load_profile, read_strictly
from mllm_compress.study.stages import name_of, subject_key
from mllm_compress.study.store import Store

SMOKE = load_profile("smoke")
SMOKE = replace(
    SMOKE, evaluation=replace(SMOKE.evaluation, benchmarks=["scenes/hallucination"], questions=8)
)
EXPERIMENT = Experiment("smoke-bunny", "widthwise", 0.3, recovery="sft+hidden_kd", fraction=0.5)


def result_of(profile, store, experiment=EXPERIMENT) -> dict:
    "An experiment's result, computed if it is not there."
    assert workers.complete(experiment, profile, store) == ("done", "")
    return stages.result_of(experiment, profile, store)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return result_of(SMOKE, Store(tmp_path_factory.mktemp("alone")))


def test_two_processes_train_what_one_trains(alone, tmp_path, capfd):
    "The same global batches: the same loss but for rounding, in the same place of the store."
    two = result_of(replace(SMOKE, processes=2), Store(tmp_path))
    assert name_of(EXPERIMENT, replace(SMOKE, processes=2)) == name_of(EXPERIMENT, SMOKE)
    assert two["training"]["loss"] == pytest.approx(alone["training"]["loss"], rel=1e-3)
    assert two["training"]["samples"] == alone["training"]["samples"]
    assert two["plan"] == alone["plan"]
    assert [r["benchmark"] for r in two["rows"]] == [r["benchmark"] for r in alone["rows"]]


@pytest.mark.slow
def test_what_goes_wrong_in_the_processes_is_told(tmp_path, capfd):
    profile = replace(SMOKE, processes=2, recovery=SMOKE.recovery | {"optimizer": "none_such"})
    status, message = workers.complete(EXPERIMENT, profile, Store(tmp_path))
    assert status == "failed" and "none_such" in message
    assert "one of the 2 processes that train this experiment has failed" in message


ORPHAN = """
import os, time
from multiprocessing import get_context
from mllm_compress.study.stages import end_with_master

sleeps = lambda: (end_with_master(), time.sleep(600))
get_context("fork").Process(target=sleeps).start()
os._exit(0)
"""


@pytest.mark.slow
def test_processes_do_not_outlive_the_one_that_started_them():
    subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=60)  # its pipe ends


def test_a_killed_cell_goes_on_from_its_checkpoint(alone, tmp_path, monkeypatch):
    "Its checkpoints go when its result is there."
    profile, store, steps = replace(SMOKE, checkpoint_every=1), Store(tmp_path), []
    real = RecoveryTrainer.training_step

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) > 1 and self.state.global_step == 1:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "training_step", counted)
    longer = replace(profile, recovery=profile.recovery | {"epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        workers.complete(EXPERIMENT, longer, store)
    folder = store.checkpoints(subject_key(EXPERIMENT, longer))
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(RecoveryTrainer, "training_step", real)
    resumed = result_of(longer, store)
    whole = result_of(replace(longer, checkpoint_every=0), Store(tmp_path / "whole"))
    assert not folder.exists() and name_of(EXPERIMENT, profile) == name_of(EXPERIMENT, SMOKE)
    assert resumed["training"]["loss"] == whole["training"]["loss"]
    assert (resumed["rows"], resumed["units"]) == (whole["rows"], whole["units"])


def test_a_profile_gives_each_process_a_gpu():
    with pytest.raises(ValueError, match="processes is 2 and a Slurm job gets 3 GPUs"):
        checked(replace(SMOKE, processes=2, slurm=Slurm(gpus=3)))
    with pytest.raises(ValueError, match="processes"):
        checked(replace(SMOKE, processes=0))
    profile = checked(replace(SMOKE, processes=4, slurm=Slurm(gpus=4)))
    assert read_strictly(Profile, asdict(profile), "profile") == profile


def test_workers_share_the_gpus_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.devices() == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert workers.devices(processes=2) == ["cuda:0", "cuda:2"]
    monkeypatch.setattr(workers, "cores", lambda: 32)
    assert workers.surroundings("cuda:1")["OMP_NUM_THREADS"] == "8"  # of four GPUs, on 32 cores
    assert workers.surroundings("cpu", threads=3)["OMP_NUM_THREADS"] == "3"
    with pytest.raises(ValueError, match="8 processes are to train an experiment together.*has 4"):
        workers.check_gpus(replace(SMOKE, processes=8))
