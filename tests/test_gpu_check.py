"""The same numbers on $MLLM_COMPRESS_DEVICE as on the CPU; and gpu-check at toy shapes."""

import copy
import os

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mllm_compress import recovery
from mllm_compress.cli import gpu_check
from mllm_compress.cli.app import app
from mllm_compress.cost.memory import KINDS, training_kind
from mllm_compress.data import calibration_batches, scene_data
from mllm_compress.evaluation.scoring import evaluate
from mllm_compress.importance.criteria import width_importance
from mllm_compress.importance.influence import block_influence
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model

DEVICE = os.environ.get("MLLM_COMPRESS_DEVICE", "cpu")


def on(batches):
    return [{k: v.to(DEVICE) for k, v in b.items()} for b in batches]


# ---- device-sensitive


@pytest.mark.device
@pytest.mark.parametrize("name", ["smoke-llava", "smoke-bunny"])
def test_scores_are_those_of_the_cpu(name):
    (here, processor), (there, _) = load_model(name), load_model(name, device=DEVICE)
    batches = calibration_batches(scene_data("train", 8), processor, 4, 2)
    assert torch.allclose(
        block_influence(there, on(batches)).values.cpu(),
        block_influence(here, batches).values,
        atol=1e-4,
    )
    a, b = (
        width_importance(there, on(batches), method="taylor"),
        width_importance(here, batches, method="taylor"),
    )
    for i in b.heads:
        assert torch.allclose(
            a.heads[i].cpu(), b.heads[i], rtol=2e-2, atol=1e-6
        ) and torch.allclose(a.neurons[i].cpu(), b.neurons[i], rtol=2e-2, atol=1e-6)


@pytest.mark.device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recovery_lowers_the_loss_and_the_result_answers(precision):
    teacher, processor = load_model("smoke-llava", device=DEVICE)
    student = apply_plan(teacher, plan_layerwise(teacher, layers=[1]))
    config = recovery.RecoveryConfig(
        losses={"hidden_kd": 1.0}, batch_size=4, epochs=3, lr=1e-3, precision=precision
    )
    result = recovery.recover(
        student,
        teacher,
        scene_data("train", 8),
        config,
        processor=processor,
        device=DEVICE,
        progress=False,
    )
    assert (
        result.history.loss.iloc[-1] < result.history.loss.iloc[0]
        and next(result.model.parameters()).device.type == torch.device(DEVICE).type
    )
    assert evaluate(result.model, processor, ["scenes/hallucination"], limit=4).n.tolist() == [4]


@pytest.mark.device
def test_answers_are_those_of_the_cpu():
    (here, processor), (there, _) = (
        load_model("tiny-llava"),
        load_model("tiny-llava", device=DEVICE),
    )
    a, b = (
        evaluate(m, processor, ["scenes/open"], limit=32, return_predictions=True)[1].prediction
        for m in (here, there)
    )
    assert (a == b).mean() > 0.95


# ---- the check itself


def test_without_a_gpu_it_says_so_and_exits_cleanly(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["gpu-check"])
    assert result.exit_code == 0 and "No GPU here" in result.output and not list(tmp_path.iterdir())


def test_a_step_trains_what_its_kind_says():
    model, _ = load_model("smoke-bunny", dtype=torch.bfloat16)
    batch, before = gpu_check.random_batch(model, 24, 8), copy.deepcopy(model.state_dict())
    for kind in KINDS:
        step = gpu_check.recovery_step(model, model, training_kind(kind), batch)
        assert all(torch.isfinite(torch.tensor([step(), step()])))
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items()
    )  # the model itself is left alone


def test_the_whole_check_at_toy_shapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        gpu_check, "device_tests", lambda device: 0
    )  # they would run this test again
    asked = []
    monkeypatch.setattr(gpu_check.runner, "run_study", lambda profile: asked.append(profile) or 0)
    monkeypatch.setattr(
        gpu_check,
        "gpu_study",
        lambda models, device, original=gpu_check.gpu_study: original(
            models,
            device,
            config=recovery.RecoveryConfig(losses={"sft": 1.0}, batch_size=256),
            scenes=2,
            sizes={f: {"layers": 2, "hidden": 96} for f in gpu_check.SIZES},
        ),
    )
    monkeypatch.setattr(gpu_check.data, "small_data", scene_data)
    monkeypatch.setenv("MLLM_COMPRESS_MODELS", "")
    assert (
        gpu_check.gpu_check(
            tmp_path / "models", device="cpu", build=gpu_check.toy_model, text_tokens=24
        )
        == 0
    )
    assert asked == ["gpu"] and sorted(p.name for p in (tmp_path / "models").iterdir()) == [
        "gpu-bunny",
        "gpu-llava",
    ]
    table = pd.read_csv(next((tmp_path / "figures/gpu").glob("check-*.csv")))
    assert (
        set(table.model) == set(gpu_check.REAL)
        and len(table) == 2 * (2 + 3 + 6)
        and (table.seconds > 0).all()
        and table.device.nunique() == 1
    )
