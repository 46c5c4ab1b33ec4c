"""The numbers of every loss and of the training loop may change only with their versions.

A curve belongs to a row of LOSSES or to a fixed set of losses: a new row moves no other number."""

import pytest
import torch
from golden_versions import check_golden, check_no_stale

from mllm_compress.data.batches import SizedCache
from mllm_compress.data.scenes import scene_data
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.recovery.losses import LOSSES, Loss
from mllm_compress.recovery.training import RECOVERY_VERSION, recover
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.stages import stage_keys
from mllm_compress.utils.methods import GREY, Look

LOSS_TABLE = "LOSSES (nbs/library/recovery/01_losses.ipynb)"
LOOP = "RECOVERY_VERSION (nbs/library/recovery/05_training.ipynb)"
ROW_OR_LOOP = f"{LOSS_TABLE}; or, if the curves of the fixed sets moved too, raise {LOOP},"
FIXED = ("sft", "logits_kd", "reverse_logits_kd", "hidden_kd")  # not LOSSES: it may grow
CONFIGS = {
    "all losses": {"losses": dict.fromkeys(FIXED, 0.25)},
    "projector": {"train": "projector"},
    "all positions": {"positions": "all", "turns": "sequential"},
    "lora": {"lora": {"r": 4, "lora_dropout": 0.1}},
}


def step_tensors() -> dict:
    "Fixed tensors under the names that losses need: 3 positions, 6 tokens, 4 hidden channels."
    g = torch.Generator().manual_seed(0)
    tensors = {f"{who}_logits": torch.randn(3, 6, generator=g) for who in ("student", "teacher")}
    tensors |= {f"{who}_hidden": torch.randn(3, 4, generator=g) for who in ("student", "teacher")}
    tensors |= {f"{w}_blocks": torch.randn(3, 2, 4, generator=g) for w in ("student", "teacher")}
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


@pytest.fixture(scope="module")
def curve(pair):
    "Three steps of a recovery with some options; the loss and its terms at every step."
    student, teacher, processor = pair
    options = dict(device="cpu", progress=False, cache=SizedCache(2**31))
    data = scene_data("train", 12)

    def numbers(**chosen) -> dict:
        losses = {"sft": 0.5, "hidden_kd": 0.5}
        usual = {"batch_size": 4, "lr": 1e-3, "held_out": 0.0, "losses": losses}
        config = RecoveryConfig(**usual | chosen)
        history = recover(student, teacher, data, config, processor, **options).history
        assert len(history) == 3
        return {column: history[column].tolist() for column in ("loss", *config.losses)}

    return numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_curves(name, curve, update_golden):
    "The training loop, on fixed losses."
    check_golden("recovery", name, RECOVERY_VERSION, curve(**CONFIGS[name]), update_golden, LOOP)


@pytest.mark.parametrize("name", LOSSES)
def test_the_curve_of_a_loss(name, curve, update_golden):
    version = [RECOVERY_VERSION, LOSSES[name].version]
    numbers = curve(losses={name: 1.0})
    check_golden("loss curve", name, version, numbers, update_golden, ROW_OR_LOOP)


@pytest.mark.parametrize("kind", ["loss", "recovery", "loss curve"])
def test_no_golden_value_is_stale(kind, update_golden):
    check_no_stale(kind, CONFIGS if kind == "recovery" else LOSSES, update_golden)


def test_a_new_loss_moves_no_golden_number_and_no_key(curve, monkeypatch):
    profile = load_profile("smoke")
    experiments = [
        Experiment("smoke-llava", "layerwise", 0.3, recovery=r, fraction=0.5)
        for r in ("sft", "sft+hidden_kd", "logits_kd")
    ]
    keys = lambda: [stage_keys(experiment, profile)["student"] for experiment in experiments]
    before = keys()
    new = Loss(
        lambda logits, targets: logits.float().logsumexp(-1),
        needs=("answer_logits", "targets"),
        version=1,
        look=Look("new", GREY, "o"),
        help="a loss that is not in the golden files",
    )
    monkeypatch.setitem(LOSSES, "new", new)
    assert keys() == before
    test_loss_curves("all losses", curve, False)
    test_losses("sft", False)
    test_the_curve_of_a_loss("sft", curve, False)
    with pytest.raises(AssertionError, match="no golden value yet") as error:
        check_golden("loss", "new", 1, {}, False, LOSS_TABLE)
    assert "RECOVERY_VERSION" not in str(error.value)
