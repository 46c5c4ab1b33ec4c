"""The parts of a model and the rows and columns of its units."""

import copy

import pruning_cases as cases
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mllm_compress.anatomy.families import ATTENTION, FAMILIES, Family, Slot, anatomy, lm_parameters
from mllm_compress.importance.criteria import random_scores, width_importance
from mllm_compress.importance.influence import block_influence
from mllm_compress.pruning.plans import plan_layerwise, plan_widthwise
from mllm_compress.pruning.slicing import apply_plan


@pytest.mark.parametrize("name", cases.LMS + cases.MLLMS)
def test_a_head_is_its_rows_and_columns(name):
    "With the output columns of a unit at zero, noise on its input rows changes no logit."
    model = cases.build(name)
    parts, batch, generator = anatomy(model), cases.inputs(model), torch.Generator().manual_seed(0)
    for kind, unit in (("head", 1), ("neuron", 3)):
        slots = [s for s in parts.linears(2) if s.kind == kind]
        with torch.no_grad():
            before = cases.logits(model, batch)
            for slot in (s for s in slots if s.axis == 1):
                slot.module.weight[:, slot.index([unit])] = 0
            silenced = cases.logits(model, batch)
            for slot in (s for s in slots if s.axis == 0):
                rows = slot.index([unit])
                slot.module.weight[rows] += torch.randn(
                    len(rows), slot.module.in_features, generator=generator
                )
                if slot.module.bias is not None:
                    slot.module.bias[rows] += 1
        assert (before - silenced).abs().max() > 1e-6
        assert (cases.logits(model, batch) - silenced).abs().max() < 1e-9


def test_unknown_architecture_is_named_with_a_way_out():
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    with pytest.raises(ValueError, match="'gpt2'; known: llama, mistral.*FAMILIES"):
        anatomy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="no LM head"):
        anatomy(cases.build("llama-4x1").model)


@pytest.fixture
def starcoder2(monkeypatch, tiny_lm):
    "A model of a family that the package does not have, registered as one row."
    mlp = (Slot("fc1", "mlp.c_fc", 0, ("neuron",)), Slot("fc2", "mlp.c_proj", 1, ("neuron",)))
    family = Family("starcoder2", ATTENTION + mlp, "biases and a plain MLP")
    monkeypatch.setitem(FAMILIES, "starcoder2", family)
    return cases.random_weights(tiny_lm("starcoder2", residual_dropout=0.0)).double()


def set_units_to_zero(model, plan):
    "The columns of all units that a plan removes."
    for i in range(anatomy(model).num_layers):
        for slot in anatomy(model).writers(i):
            kept = (plan.heads if slot.kind == "head" else plan.neurons).get(i, range(slot.units))
            for unit in set(range(slot.units)) - set(kept):
                slot.module.weight.data[:, slot.index([unit])] = 0


def test_a_row_is_all_that_a_new_family_needs(starcoder2):
    ids = torch.arange(5, 23).view(2, 9)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    layers = block_influence(starcoder2, batches)
    assert len(layers.values) == 4 and (layers.values > 0).all()
    plan = plan_layerwise(starcoder2, layers, n_layers=1)
    assert len(anatomy(apply_plan(starcoder2, plan)).layers) == 3
    for scores in (random_scores(starcoder2), width_importance(starcoder2, batches)):
        plan = plan_widthwise(starcoder2, scores, ratio=0.25, protect=(0, 0))
        small = apply_plan(starcoder2, plan)
        removed = 1 - lm_parameters(small) / lm_parameters(starcoder2)
        assert removed == pytest.approx(plan.achieved_ratio) and removed > 0.1
        zeroed = copy.deepcopy(starcoder2)
        set_units_to_zero(zeroed, plan)
        with torch.no_grad():
            assert torch.allclose(zeroed(ids).logits, small(ids).logits, atol=1e-9)
