"""The same numbers on $MLLM_COMPRESS_DEVICE as on the CPU: `make gpu-check`."""

import os

import pytest
import torch

from mllm_compress import recovery
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
