"""The parts of a model and the rows and columns of its units."""

import pruning_cases as cases
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mllm_compress.anatomy.families import anatomy


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
