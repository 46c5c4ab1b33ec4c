"""Rounded weights: the arithmetic of bitsandbytes, bytes in closed form, and keys of their own."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from mllm_compress.anatomy.families import lm_parameters
from mllm_compress.importance.criteria import random_scores
from mllm_compress.pruning import apply_plan, plan_widthwise
from mllm_compress.pruning.pruning_plan import layer_sizes, make_plan
from mllm_compress.study import alternatives, stages, store
from mllm_compress.study.experiments import Experiment, describe, method_of
from mllm_compress.study.profiles import load_profile

LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantize"
)
DRAW = torch.Generator().manual_seed(0)


@LIBRARY
def test_four_bits_are_those_of_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for shape in ((50, 96), (7, 200), (1, 30)):
        w = torch.randn(shape, generator=DRAW)
        column = w.flatten()[:, None]  # its CPU kernel reads other scales for some widths
        expected = dequantize_4bit(*quantize_4bit(column, quant_type="nf4", blocksize=64))
        assert torch.equal(alternatives.rounded_blocks(w), expected.view(shape))


@LIBRARY
def test_eight_bits_are_those_of_bitsandbytes():
    from bitsandbytes.functional import int8_vectorwise_quant

    w = torch.randn(50, 96, generator=DRAW).half()
    whole, scale, _ = int8_vectorwise_quant(w)
    gap = (whole.float() * scale[:, None] / 127 - alternatives.rounded_rows(w.float())).abs()
    assert (gap < 1e-5).float().mean() > 0.999  # a tie may be alternatives.rounded the other way


def test_every_weight_takes_the_nearest_level():
    w = torch.randn(3, 50, generator=DRAW)
    found = alternatives.rounded_blocks(w).flatten()
    for k in range(0, w.numel(), 64):
        block, its = w.flatten()[k : k + 64], found[k : k + 64]
        values = torch.tensor(alternatives.NF4) * block.abs().max()
        nearest = (block[:, None] - values).abs().min(1).values
        torch.testing.assert_close((its - block).abs(), nearest)


def test_rounding_changes_linear_maps_of_the_decoder_only(tiny_llava):
    model, _ = tiny_llava
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, inside = (
        alternatives.rounded(model, "nf4"),
        {id(m.weight) for m in alternatives.matrices(model)},
    )
    names = {n for n, p in model.named_parameters() if id(p) in inside}
    after = dict(small.named_parameters())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, after[n])} == names
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert alternatives.rounded(model, "none") is model


def test_bytes_follow_the_plan(tiny_llava):
    model, _ = tiny_llava
    small = apply_plan(model, make_plan(model, layers=[0, 1, 3], neurons={0: range(100)}))
    assert alternatives.stored_bytes(small) == 2 * lm_parameters(small)
    inside = sum(m.weight.numel() for m in alternatives.matrices(small))
    rows = sum(m.weight.shape[0] for m in alternatives.matrices(small))
    others = 2 * (lm_parameters(small) - inside)
    assert alternatives.stored_bytes(small, "int8") == others + inside + 4 * rows
    blocks = sum(-(-m.weight.numel() // 64) for m in alternatives.matrices(small))
    assert alternatives.stored_bytes(small, "nf4") == others + inside // 2 + 4 * blocks


@pytest.mark.parametrize("how", ["none", *alternatives.QUANTIZERS])
def test_a_ratio_fits_into_its_bytes(tiny_llava, how):
    model, limit = tiny_llava[0], 0.7 * alternatives.stored_bytes(tiny_llava[0], how)
    ratio = alternatives.ratio_within(model, how, limit)
    plan = plan_widthwise(model, random_scores(model), ratio=ratio)
    found = alternatives.stored_bytes(apply_plan(model, plan), how)
    assert found <= 1.02 * limit
    assert found == pytest.approx(
        alternatives.stored_bytes(model, how, plan.achieved_ratio), rel=0.01
    )
    layer = layer_sizes(model)[0].parameters / lm_parameters(model)
    steps = (
        alternatives.ratio_within(model, how, 0.9 * alternatives.stored_bytes(model, how), "layers")
        / layer
    )
    assert steps == pytest.approx(round(steps), abs=0.01) and steps >= 1 - 0.01


def test_rounding_is_named():
    eight = Experiment("smoke-llava", "widthwise", 0.3, quantize="int8")
    assert method_of(eight) == "taylor + int8"
    assert describe(Experiment("m", quantize="nf4")) == "m, dense, nf4, seed 0"


def test_the_student_is_rounded_after_its_refit(tmp_path):
    smoke, results = load_profile("smoke"), store.Store(tmp_path)
    how = dict(importance="gauss_newton", allocation="global", reconstruct="stream")
    whole = Experiment("smoke-llava", "widthwise", 0.3, **how, calibration="stratified 64")
    first = stages.student_of(whole, smoke, results, "cpu")
    found = stages.student_of(replace(whole, quantize="nf4"), smoke, results, "cpu")
    pairs = zip(alternatives.rounded(first, "nf4").parameters(), found.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
