"""Criteria, prunings, reconstructions: their numbers change only with the version in their row."""

import pytest
import torch
from golden_versions import check_golden, check_no_stale
from pruning_cases import build, inputs, width_scores

from mllm_compress.anatomy.families import anatomy
from mllm_compress.importance.criteria import CRITERIA, measure
from mllm_compress.importance.scores import LayerScores
from mllm_compress.pruning.plans import PRUNINGS
from mllm_compress.pruning.reconstruction import RECONSTRUCTIONS, reconstructed
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.study.alternatives import SCRATCH_VERSION, STARTS, from_scratch

CRITERIA_AT = "CRITERIA (nbs/library/importance/05_criteria.ipynb)"
PRUNINGS_AT = "PRUNINGS (nbs/library/pruning/04_plans.ipynb)"
RECONSTRUCTIONS_AT = "RECONSTRUCTIONS (nbs/library/pruning/06_reconstruction.ipynb)"
MODELS = {"layerwise": ("tiny-llava", "phi-4x1"), "widthwise": ("tiny-llava", "qwen2-3x2")}
OPTIONS = {"angular_distance": {"n": 2}}  # of criteria that need one


def name_of(key) -> str:
    return " ".join(key)


def calibration(model):
    "Two prompts; the last four tokens are supervised."
    batch = inputs(model)
    ids = batch["input_ids"]
    positions = torch.arange(ids.shape[1])
    return [batch | {"labels": ids.masked_fill(positions < ids.shape[1] - 4, -100)}]


def few(values) -> list:
    "At most eight values, evenly spaced."
    return values[:: max(1, len(values) // 8)][:8].tolist()


def numbers_of_scores(scores) -> dict:
    if isinstance(scores, LayerScores):
        return {"values": scores.values.tolist()}
    return {
        kind: {str(i): few(values) for i, values in getattr(scores, kind).items()}
        for kind in ("heads", "neurons")
    }


DENSE = [key for key, row in CRITERIA.items() if not row.mixtures]


@pytest.mark.parametrize("key", DENSE, ids=name_of)
def test_criterion(key, update_golden):
    prunes, name = key
    values = {}
    for model_name in MODELS[prunes]:
        model = build(model_name)  # float64, so that rounding is not what is compared
        scores = measure(prunes, name, model, calibration(model), seed=1, **OPTIONS.get(name, {}))
        values[model_name] = numbers_of_scores(scores)
    table_name = name_of(key) if name == "random" else name  # both prunings have a random
    check_golden("criterion", table_name, CRITERIA[key].version, values, update_golden, CRITERIA_AT)


def layer_scores(model):
    layers = model.config.get_text_config().num_hidden_layers
    values = torch.rand(layers, generator=torch.Generator().manual_seed(2))
    return LayerScores(values, "random")


@pytest.mark.parametrize("name", PRUNINGS)
def test_pruning(name, update_golden):
    "Kept indices at several ratios, in both shapes; 40 neurons per layer."
    numbers = {}
    for model_name in ("llama-4x1", "phi3-3x2"):
        model = build(model_name, num_hidden_layers=6)
        scores = {"layerwise": layer_scores, "widthwise": width_scores}.get(name, lambda m: None)
        for ratio in (0.1, 0.3, 0.45) if name != "none" else (0.0,):
            for shape in ("blockwise", "uniform"):
                plan = PRUNINGS[name].function(model, scores(model), ratio, None, shape)
                numbers[f"{model_name} {shape} {ratio}"] = {
                    "layers": plan.layers,
                    "heads": plan.heads,
                    "neurons": plan.neurons,
                    "achieved": plan.achieved_ratio,
                }
    check_golden("pruning", name, PRUNINGS[name].version, numbers, update_golden, PRUNINGS_AT)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_reconstruction(name, update_golden):
    "Logits after both prunings, sequential and parallel blocks, with biases and without."
    numbers, rng = {}, torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(3, 64, (8, 40), generator=rng)}]
    for model_name in ("qwen2-3x2", "phi-4x1"):
        model = build(model_name)
        for pruning, scores in (("layerwise", layer_scores), ("widthwise", width_scores)):
            plan = PRUNINGS[pruning].function(model, scores(model), 0.3, None, "blockwise")
            before = apply_plan(model, plan)
            after = reconstructed(name, before, model, batches, plan)
            with torch.no_grad():
                found, plain = (m(**batches[0]).logits for m in (after, before))
            same = torch.equal(found, plain)
            idle = {"bias": "layerwise", "linear_map": "widthwise"}  # nothing to do there
            assert same == (name == "none" or idle.get(name) == pruning)
            numbers[f"{model_name} {pruning}"] = few(found[0, -1])
    check_golden(
        "reconstruction",
        name,
        RECONSTRUCTIONS[name].version,
        numbers,
        update_golden,
        RECONSTRUCTIONS_AT,
    )


@pytest.mark.parametrize("name", STARTS)
def test_start(name, update_golden):
    "A few weights of where training starts."
    model = build("phi-4x1")
    made = from_scratch(model, 3) if name == "scratch" else model
    layer = anatomy(made).layers[1]
    numbers = [few(p.detach().flatten()) for p in list(layer.parameters())[:4]]
    where = "SCRATCH_VERSION (nbs/library/study/10_alternatives.ipynb)"
    check_golden("start", name, SCRATCH_VERSION, numbers, update_golden, where)


def test_no_golden_value_is_stale(update_golden):
    names = [name_of(key) if key[1] == "random" else key[1] for key in DENSE]
    assert len(set(names)) == len(names)
    check_no_stale("criterion", names, update_golden)
    check_no_stale("pruning", PRUNINGS, update_golden)
    check_no_stale("reconstruction", RECONSTRUCTIONS, update_golden)
