"""Cost: the closed forms against the framework, on every family, pruned and real model."""

import copy

import contract_cases as cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_compress.anatomy.families import part_parameters
from mllm_compress.anatomy.wrappers import CACHE_ARGUMENT
from mllm_compress.cost import arithmetic
from mllm_compress.cost.arithmetic import closed_parameters, example_inputs, forward
from mllm_compress.cost.memory import KINDS, peak_memory, recovery_memory, sample_operations
from mllm_compress.cost.report import cost_report
from mllm_compress.cost.timing import latency
from mllm_compress.importance.criteria import random_scores
from mllm_compress.pruning.plans import plan_widthwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.zoo.models import load_model
from mllm_compress.zoo.releases import REAL_MODELS, real_config


def operations_of(model, inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(model, inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_llama_bias_flags(tiny_lm, flag):
    model = tiny_lm("llama", **{flag: True})
    assert closed_parameters(model.config) == part_parameters(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "phi3"])
def test_flops_of_a_blockwise_pruned_decoder(tiny_lm, family):
    dense = tiny_lm(family, groups=4, queries=1)
    dense.set_attn_implementation("eager")
    pruned = apply_plan(dense, plan_widthwise(dense, random_scores(dense), ratio=0.25))
    shape, ids = arithmetic.shape_of_model(pruned), torch.ones(2, 7, dtype=torch.long)
    assert len(set(shape.neurons)) > 1  # protected layers are wider
    assert closed_parameters(pruned.config, shape) == part_parameters(pruned)
    assert operations_of(pruned, {"input_ids": ids}) == arithmetic.decoder_flops(shape, 7, batch=2)
    with torch.no_grad():
        cache = getattr(forward(pruned, {"input_ids": ids}), CACHE_ARGUMENT)
    step = {"input_ids": ids[:, :1], CACHE_ARGUMENT: cache}
    assert operations_of(pruned, step) == arithmetic.decoder_flops(shape, 1, cached=7, batch=2)


@pytest.mark.parametrize("window", [None, 4])
def test_kv_bytes_follow_the_cache_after_pruning(tiny_llava, window):
    model = cases.build("mistral", torch.float32, sliding_window=4) if window else tiny_llava[0]
    pruned = apply_plan(model, plan_widthwise(model, random_scores(model), ratio=0.3))
    inputs = example_inputs(pruned, text_tokens=5)
    with torch.no_grad():
        cache = getattr(forward(pruned, inputs), CACHE_ARGUMENT)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == cost_report(pruned, text_tokens=5).value("KV cache of prompt")


def test_real_sizes_on_meta():
    giants = {name: arithmetic.without_weights(real_config(name)) for name in REAL_MODELS}
    parts = {name: part_parameters(giant) for name, giant in giants.items()}
    assert parts == {name: closed_parameters(real_config(name)) for name in REAL_MODELS}
    sizes = dict(vision=303_507_456, projector=20_979_712, lm=6_738_939_904)
    assert parts["LLaVA-v1.5-7B"] == sizes
    assert parts["Bunny-v1.0-3B"]["projector"] == 9_507_840
    assert [arithmetic.image_tokens(real_config(name)) for name in REAL_MODELS] == [576, 729, 256]


def test_peak_memory_of_known_cases():
    a = torch.rand(100, 100)
    assert peak_memory(lambda: (a @ a) @ a) == 2 * a.nbytes
    assert peak_memory(lambda: a.view(-1)[:5]) == 0

    def chain():
        h = a
        for _ in range(5):
            h = torch.relu(h)  # two alive at a time
        return h

    assert peak_memory(chain) == 2 * a.nbytes
    w = a.clone().requires_grad_()
    kept = peak_memory(lambda: torch.sigmoid(torch.sigmoid(torch.sigmoid(w))).sum())
    assert kept == 3 * a.nbytes + 4  # autograd keeps every activation


def test_peak_memory_is_the_same_on_meta(tiny_llava):
    model = copy.deepcopy(tiny_llava[0])
    model.set_attn_implementation("eager")
    peaks = []
    for m in (model, copy.deepcopy(model).to("meta")):
        inputs = example_inputs(m)
        with torch.no_grad():
            peaks.append(peak_memory(lambda: forward(m, inputs), m.device))  # noqa: B023
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_recovery_memory_by_purpose(tiny_llava):
    model = copy.deepcopy(tiny_llava[0]).to("meta")
    projector, parts = RecoveryConfig(train="projector", batch_size=2), part_parameters(model)
    needs = recovery_memory(model, projector, teacher=model)
    assert needs["weights"] == 4 * sum(parts.values())
    assert needs["optimizer"] == 8 * parts["projector"] and needs["float32"] == 0
    assert needs["teacher"] == 4 * (parts["projector"] + parts["lm"])
    assert needs["total"] == sum(n for name, n in needs.items() if name != "total")

    def step(**options):
        config = RecoveryConfig(**{"train": "projector", "batch_size": 2} | options)
        return recovery_memory(model, config)["step"]

    assert step(batch_size=4, passes=2) == step() < step(batch_size=4)
    assert step(gradient_checkpointing=True) < step()
    optimizer = lambda **options: recovery_memory(model, RecoveryConfig(**options))["optimizer"]
    assert optimizer(lora={"r": 4}) < optimizer() == 8 * (parts["projector"] + parts["lm"])
    assert not any(p.grad is not None for p in model.parameters())
    assert recovery_memory(tiny_llava[0], projector)["optimizer"] == needs["optimizer"]


def test_float32_for_what_is_trained_in_full():
    half = arithmetic.without_weights(load_model("smoke-llava")[0].config)
    projector, lm = (part_parameters(half)[part] for part in ("projector", "lm"))
    extra = {kind: recovery_memory(half, config)["float32"] for kind, config in KINDS.items()}
    assert [*extra.values()] == [8 * projector, 8 * projector, 8 * (projector + lm)]


def test_latency_and_report(tiny_llava):
    model, processor = tiny_llava
    times = latency(model, example_inputs(model, text_tokens=3), repeats=3, warmup=1)
    assert [len(t.seconds) for t in times.values()] == [3, 3]
    report = cost_report(model, processor, latency=True, memory=True, repeats=2, warmup=1)
    frame = report.to_frame()
    assert report.value("latency median", "decode") > 0 and frame.attrs["device"] == "cpu"
    assert report.value("weights") == arithmetic.weight_bytes(model)
    assert report.value("weights") == 4 * report.value("parameters")
    assert "closed form = measured" in str(report)
    assert report.value("peak beyond weights", "prefill") > 0
    with pytest.raises(KeyError, match="no wattage"):
        report.value("wattage")


def test_decode_latency_leaves_the_context_as_it_was(tiny_lm):
    model, contexts = tiny_lm("llama"), []
    inner = model.forward

    def spying(**inputs):
        cache = inputs.get(CACHE_ARGUMENT)
        contexts.append(None if cache is None else cache.get_seq_length())
        return inner(**inputs)

    model.forward = spying
    latency(model, {"input_ids": torch.ones(1, 6, dtype=torch.long)}, repeats=3, warmup=1)
    assert contexts.count(6) == 4  # every decode call finds the prompt's six tokens
    window = cases.build("mistral", torch.float32, sliding_window=4)  # which cannot take one back
    latency(window, {"input_ids": torch.ones(1, 6, dtype=torch.long)}, repeats=1, warmup=1)


def test_operations_of_training_are_those_of_its_passes():
    config = real_config("LLaVA-v1.5-7B")
    seen = sum(arithmetic.picture_cost(config).operations.values())

    def operations(ratio=0.0, **options):
        recovery = RecoveryConfig(**{"losses": {"sft": 1.0}} | options)
        return sample_operations(config, ratio, recovery, text_tokens=256)

    teacher = operations(losses={"sft": 0.5, "hidden_kd": 0.5}) - operations()
    assert operations() == 3 * teacher + seen
    assert operations(gradient_checkpointing=True) == 4 * teacher + seen
    assert operations(train="projector") == 2 * teacher + seen
    removed = 2 * (576 + 256) * 0.3 * 6_738_939_904
    assert (operations() - operations(0.3)) / 3 == pytest.approx(removed)


def test_what_is_timed_has_the_size_of_what_was_scored():
    from dataclasses import replace

    import pandas as pd

    from mllm_compress.study.profiles import load_profile
    from mllm_compress.study.savings import plan_like, quality_and_cost

    setup, (model, _) = load_profile("quick"), load_model("smoke-llava")
    to_request = replace(setup, width=replace(setup.width, aim="ratio"))
    plan = lambda method, ratio, aim: plan_like(model, method, ratio, aim, 8)
    layers = plan("layerwise", 0.3, setup).achieved_ratio
    assert plan("widthwise", 0.3, setup) == plan("widthwise", layers, to_request)
    assert layers != 0.3 and plan("widthwise", 0.3, setup) != plan("widthwise", 0.3, to_request)

    sizes = pd.DataFrame(
        [("m", "dense", 0.0, 0.0, 100.0), ("m", "widthwise", 0.3, 0.3, 70.0)],
        columns=["model", "method", "requested", "achieved", "weights (MiB)"],
    )
    pairs = pd.DataFrame([("m", "decode", "widthwise", 0.3, 2.0, 1.0)] * 3)
    pairs.columns = ["model", "phase", "method", "requested", "dense", "pruned"]
    scored = [(0.33, 99.0, "sft"), (0.301, 97.0, "none")]  # the better one is smaller
    rows = pd.DataFrame(scored, columns=["achieved_ratio", "avg_percent", "recovery"])
    rows = rows.assign(model="m", pruning="widthwise", requested_ratio=0.3)
    (point,) = quality_and_cost(rows, sizes, pairs).to_dict("records")
    assert point["AVG-%"] == 97.0 and point["time, %"] == 50.0 and point["bytes, %"] == 70.0
