"""The numbers of every loss and of the training loop may change only with their versions."""

import copy

import pytest
import torch
from golden_versions import check_golden, check_no_stale

from mllm_compress.anatomy.families import anatomy
from mllm_compress.data.scenes import scene_data
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.recovery.losses import LOSSES
from mllm_compress.recovery.states import TeacherCache
from mllm_compress.recovery.training import RECOVERY_VERSION, recover

LOSS_TABLE = "LOSSES (nbs/library/recovery/01_losses.ipynb)"
LOOP = "RECOVERY_VERSION (nbs/library/recovery/07_training.ipynb)"
CONFIGS = {
    "all losses": {"losses": dict.fromkeys(LOSSES, 0.25)},
    "projector": {"train": "projector"},
    "all positions": {"positions": "all", "turns": "sequential"},
    "lora": {"lora": {"r": 4, "lora_dropout": 0.1}},
}


def step_tensors() -> dict:
    "Fixed tensors under the names that losses need: 3 positions, 6 tokens, 4 hidden channels."
    g = torch.Generator().manual_seed(0)
    tensors = {f"{who}_logits": torch.randn(3, 6, generator=g) for who in ("student", "teacher")}
    tensors |= {f"{who}_hidden": torch.randn(3, 4, generator=g) for who in ("student", "teacher")}
    answers = {"answer_logits": tensors["student_logits"], "targets": torch.tensor([1, 5, 2])}
    return tensors | answers | {"temperature": 2.0}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, update_golden):
    loss, tensors = LOSSES[name], step_tensors()
    values = loss.function(*(tensors[needed] for needed in loss.needs))
    numbers = {
        "values": values.tolist(),
        "divisors": [loss.divisor(positions) for positions in ("answer", "all")],
    }
    check_golden("loss", name, loss.version, numbers, update_golden, LOSS_TABLE)


def test_no_stale_losses(update_golden):
    check_no_stale("loss", LOSSES, update_golden)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_curves(name, tiny_llava, update_golden):
    "Three steps of a recovery, compared to four significant digits."
    teacher, processor = tiny_llava
    student, g = copy.deepcopy(teacher), torch.Generator().manual_seed(1)
    for p in anatomy(student).decoder.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    config = RecoveryConfig(batch_size=4, lr=1e-3, **CONFIGS[name])
    options = dict(cache=TeacherCache(), device="cpu", progress=False)
    data = scene_data("train", 12)
    history = recover(student, teacher, data, config, processor, **options).history
    numbers = {column: history[column].tolist() for column in ("loss", *config.losses)}
    assert len(history) == 3
    check_golden("recovery", name, RECOVERY_VERSION, numbers, update_golden, LOOP)


def test_no_stale_loss_curves(update_golden):
    check_no_stale("recovery", CONFIGS, update_golden)
