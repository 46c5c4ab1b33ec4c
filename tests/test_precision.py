"""Half precision is for weights; `fastest` becomes a precision that the machine computes in."""

from dataclasses import replace

import pytest
import torch

from mllm_compress.recovery.config import RecoveryConfig, settled
from mllm_compress.study import stages
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.store import Store
from mllm_compress.zoo.models import load_model


def test_fastest_precision_is_settled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for able, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able, raising=False)
        assert settled(RecoveryConfig(precision="fastest")).precision == precision
        assert settled(RecoveryConfig(precision="bf16")).precision == "bf16"


def rotary(model) -> torch.Tensor:
    return model.model.language_model.rotary_emb.inv_freq


@pytest.mark.parametrize("name", ["smoke-llava", "smoke-bunny", "tiny-llava"])
def test_half_precision_is_for_weights(name):
    "Rotary frequencies rounded to bfloat16 would misplace every token of a long prompt."
    full, half = load_model(name)[0], load_model(name, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert rotary(half).dtype == torch.float32 and torch.equal(rotary(half), rotary(full))


def test_a_student_trained_in_float32_goes_back_to_half_without_its_frequencies(tmp_path):
    profile = load_profile("smoke")
    profile = replace(profile, dtype="bfloat16", recovery=profile.recovery | {"precision": "bf16"})
    experiment = Experiment("smoke-llava", "layerwise", 0.3, recovery="sft", fraction=0.5)
    results = Store(tmp_path)
    student = stages.student_of(experiment, profile, results, "cpu")
    training = stages.value_of("student", experiment, profile, results)["training"]
    assert training["precision"] == "bf16" and training["samples"] > 0
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert torch.equal(rotary(student), rotary(load_model("smoke-llava")[0]))
