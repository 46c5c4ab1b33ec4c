"""The complete paper profile on converted fixtures with fabricated data in the real layouts.

Several processes train an experiment together here as well, but on a CPU without sharding: that
(FSDP) is tested with the trainer, in test_recovery. The Slurm executor has tests of its own.
"""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import run
from original_layouts import instruction_json, with_tokenizer
from test_benchmarks import SETS, write

from mllm_compress.evaluation.benchmarks import REAL_SUITE
from mllm_compress.recovery.config import PAPER
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile, training_of
from mllm_compress.study.stages import recovery_config, result_of, subject_key
from mllm_compress.study.store import Store
from mllm_compress.study.workers import complete

pytestmark = pytest.mark.slow  # whole processes

ROOT = Path(__file__).parent.parent
FAMILY = {"llava-v1.5-7b": "llava", "bunny-v1.0-3b": "bunny", "mini-internvl-4b": "internvl"}
NOTEBOOKS = sorted(
    p.stem for p in (ROOT / "nbs/study").glob("[0-9]*.ipynb") if not p.stem.startswith("00_")
)
PAPER_YAML = yaml.safe_load((ROOT / "mllm_compress/profiles/paper.yaml").read_text())


# ---- the profile says what the original does


@pytest.mark.parametrize("model", FAMILY)
def test_hyperparameters_are_the_originals(model):
    profile = load_profile("paper")
    cell = Experiment(model, "layerwise", 0.3, recovery="sft+hidden_kd", fraction=0.05)
    config = recovery_config(cell, profile)
    for key, value in PAPER[FAMILY[model]].items():
        assert getattr(config, key) == value, key
    assert config.batch_size == 128 and profile.dtype == "bfloat16"
    assert profile.evaluation.benchmarks == list(REAL_SUITE)
    projector = replace(cell, ratio=0.15, recovery="sft", train="projector", fraction=1.0)
    assert recovery_config(projector, profile).lora is None


def test_each_model_has_the_data_of_its_authors():
    profile = load_profile("paper")
    llava, bunny = "llava_v1_5_mix665k.json", "bunny_695k.json"
    files = [Path(training_of(m, profile).json).name for m in profile.models]
    assert files == [llava, bunny, llava]


# ---- the rehearsal


@pytest.fixture(scope="module")
def rehearsal(golden, tmp_path_factory):
    "A machine on which everything is where the paper profile looks for it, only smaller."
    place = tmp_path_factory.mktemp("rehearsal")
    models, data = place / "models", place / "data"
    models.mkdir()
    for model, given in PAPER_YAML["folders"].items():
        name = FAMILY[model]
        folder = with_tokenizer(golden / "original_layout", name, place / "fixtures")
        if name == "llava":  # the release has no tower
            shutil.move(folder / "vision_tower", models / "clip-vit-large-patch14-336")
        shutil.move(folder, models / Path(given).name)
    for name, images in (("llava_v1_5_mix665k", "mix665k"), ("bunny_695k", "bunny_695k")):
        (data / images).mkdir(parents=True)
        (data / f"{name}.json").write_text(json.dumps(instruction_json(data / images, 60)))
    write(place / "sets", SETS)
    return place


def smaller(profile: dict) -> dict:
    "The paper profile with fewer cells and steps that a toy can take; all else as it is."
    return profile | {
        "ratios": [0.3],
        "fractions": [0.05, 0.5],
        "seeds": [0],
        "calibration": {"samples": 4, "batch_size": 1},
        "workers": 1,
        "notebooks": {
            "02b_calibration": {"sizes": [2], "criteria": ["magnitude", "angular_distance"]},
            "04_distillation": {"objectives": ["sft", "hidden_kd", "sft+hidden_kd"]},
            "11_beyond": {"others": ["Wanda-sp"]},
        },
        "evaluation": profile["evaluation"] | {"questions": 2},
        "recovery": profile["recovery"]
        | {"batch_size": 4, "passes": 2, "optimizer": "adamw_torch", "max_length": 512},
    }


@pytest.fixture
def machine(rehearsal, monkeypatch):
    "The environment of that machine."
    for name, folder in (("MODELS", "models"), ("DATA", "data"), ("BENCHMARKS", "sets")):
        monkeypatch.setenv(f"MLLM_COMPRESS_{name}", str(rehearsal / folder))


def able(profile: dict) -> dict:
    "Without the models that this installation cannot load."
    if importlib.util.find_spec("torchvision"):
        return profile
    lost = "mini-internvl-4b"
    profile = profile | {"models": [name for name in profile["models"] if name != lost]}
    for key in ("printed", "folders", "per_model"):
        profile[key] = {name: value for name, value in profile[key].items() if name != lost}
    return profile


def test_the_paper_profile_end_to_end(machine, tmp_path, monkeypatch):
    "Every notebook of the study."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs/study", tmp_path / "nbs/study")
    monkeypatch.chdir(tmp_path)
    profile = able(smaller(PAPER_YAML))
    (tmp_path / "rehearsal.yaml").write_text(yaml.safe_dump(profile))
    plan = run("study", "--profile", "rehearsal.yaml", "--dry-run")
    assert "This machine lacks" not in plan and "GPU hours" in plan
    text = run("study", "--profile", "rehearsal.yaml", "--executor", "inline")
    assert "FAILED" not in text and "PROBLEM" not in text
    table = pd.read_csv(tmp_path / "runs/rehearsal/figures/06_best-scores.csv")
    assert set(table.model) == set(profile["models"]) and set(REAL_SUITE) <= set(table.columns)
    figures = tmp_path / "runs/rehearsal/figures"
    assert (figures / "index.html").exists()
    assert not [name for name in NOTEBOOKS if not (figures / f"{name}.ipynb").exists()]
    runs = tmp_path / "runs/rehearsal"
    read = lambda stage: [json.loads(p.read_text())["value"] for p in runs.glob(f"{stage}/*.json")]
    trained = {value["training"]["samples"] for value in read("student")}
    assert trained == {3, 30}  # 5 and 50 % of 60
    assert {value["row"]["benchmark"] for value in read("score")} == set(REAL_SUITE)


@pytest.mark.parametrize("model", ["llava-v1.5-7b", "bunny-v1.0-3b"])
def test_two_processes_train_an_experiment_of_profile_paper(machine, model, tmp_path, monkeypatch):
    "Adapters, gradient checkpointing, half precision, and checkpoints that go in the end."
    monkeypatch.chdir(tmp_path)
    profile = smaller(PAPER_YAML) | {"checkpoint_every": 1}
    (tmp_path / "rehearsal.yaml").write_text(yaml.safe_dump(profile))
    one, store = load_profile("rehearsal.yaml"), Store(tmp_path / "one")
    two = replace(one, processes=2, slurm=replace(one.slurm, gpus=2))
    experiment = Experiment(model, "layerwise", 0.3, recovery="sft+hidden_kd", fraction=0.5)
    together = Store(tmp_path / "two")
    assert complete(experiment, one, store) == complete(experiment, two, together) == ("done", "")
    results = result_of(experiment, one, store), result_of(experiment, two, together)
    loss = [result["training"]["loss"] for result in results]
    assert loss[0] == pytest.approx(loss[1], rel=2e-2)
    assert not together.checkpoints(subject_key(experiment, two)).exists()
