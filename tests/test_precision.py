"""A profile that asks for the fastest precision gets one that the machine computes in, and the result's name says which."""
import torch

from mllm_compress import experiment
from mllm_compress.cells import Cell, load_profile


def test_fastest_precision_is_settled_and_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cell, profile = Cell("tiny-llava", "layerwise", .3, recovery="sft", fraction=.05), load_profile("quick")
    names = {}
    for able, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able, raising=False)
        assert experiment.precision_here() == precision == experiment.recovery_config(cell, profile).precision
        names[precision] = experiment.identity(cell, profile)["recovery"]["precision"]
    assert names == {"bf16": "bf16", "fp32": "fp32"}
