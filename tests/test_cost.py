"""Cost: the closed forms against the framework, on every family, pruned and real model."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from mllm_compress.anatomy.families import part_parameters
from mllm_compress.anatomy.wrappers import CACHE_ARGUMENT
from mllm_compress.cost import memory as gpu_memory
from mllm_compress.cost.arithmetic import (
    FORMS,
    closed_parameters,
    decoder_flops,
    example_inputs,
    forward,
    image_tokens,
    kv_bytes_per_token,
    shape_of_config,
    shape_of_model,
    vision_flops,
    weight_bytes,
)
from mllm_compress.cost.memory import peak_memory, recovery_memory
from mllm_compress.cost.report import CostReport, cost_report
from mllm_compress.cost.timing import latency, time_call
from mllm_compress.importance.scores import LayerScores, WidthScores
from mllm_compress.pruning.plans import plan_layerwise, plan_widthwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.zoo.releases import REAL_MODELS, real_config


def width_scores(model):
    shape, generator = shape_of_model(model), torch.Generator().manual_seed(0)
    draw = lambda counts: {i: torch.rand(n, generator=generator) for i, n in enumerate(counts)}
    return WidthScores(draw(shape.groups), draw(shape.neurons), kind="random", meta={})


@pytest.fixture(scope="module")
def giants():
    def build(name):
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                real_config(name), dtype=torch.float16, attn_implementation="eager"
            ).eval()

    return {name: build(name) for name in REAL_MODELS}


@pytest.mark.parametrize("family", [f for f in FORMS if not f.endswith("vl_text")])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_every_family(tiny_lm, family, tied):
    model = tiny_lm(family, groups=2, queries=3, hidden=36)
    if tied:
        model = type(model)(
            copy.deepcopy(model.config).__class__(
                **{**model.config.to_dict(), "tie_word_embeddings": True}
            )
        )
    shape = shape_of_model(model)
    assert shape == shape_of_config(model.config) and shape.tied == tied
    assert closed_parameters(model.config) == part_parameters(model)


@pytest.mark.parametrize(
    "flags",
    [dict(attention_bias=True), dict(mlp_bias=True), dict(attention_bias=True, mlp_bias=True)],
)
def test_llama_bias_flags(tiny_lm, flags):
    model = tiny_lm("llama", **flags)
    assert closed_parameters(model.config) == part_parameters(model)
    assert ("mlp" in shape_of_model(model).biases) == ("mlp_bias" in flags)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "phi3"])
def test_flops_of_a_blockwise_pruned_decoder(tiny_lm, family):
    dense = tiny_lm(family, groups=4, queries=1)
    dense.set_attn_implementation("eager")
    pruned = apply_plan(dense, plan_widthwise(dense, width_scores(dense), ratio=0.25))
    shape, ids = shape_of_model(pruned), torch.ones(2, 7, dtype=torch.long)
    assert len(set(shape.neurons)) > 1  # protected layers are wider
    assert closed_parameters(pruned.config, shape) == part_parameters(pruned)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = forward(pruned, {"input_ids": ids})
    assert counter.get_total_flops() == decoder_flops(shape, 7, batch=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(pruned, {"input_ids": ids[:, :1], CACHE_ARGUMENT: getattr(out, CACHE_ARGUMENT)})
    assert counter.get_total_flops() == decoder_flops(shape, 1, cached=7, batch=2)


def test_kv_bytes_follow_the_cache_after_pruning(tiny_llava):
    model, _ = tiny_llava
    pruned = apply_plan(model, plan_widthwise(model, width_scores(model), ratio=0.3))
    inputs = example_inputs(pruned, text_tokens=5)
    with torch.no_grad():
        cache = getattr(forward(pruned, inputs), CACHE_ARGUMENT)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert (
        held
        == kv_bytes_per_token(shape_of_model(pruned), itemsize=4) * inputs["input_ids"].shape[1]
    )
    assert kv_bytes_per_token(shape_of_model(pruned)) < kv_bytes_per_token(shape_of_model(model))


@pytest.mark.parametrize("which", ["tiny_llava", "tiny_bunny"])
def test_tiny_models(which, request):
    model = copy.deepcopy(request.getfixturevalue(which)[0])
    assert closed_parameters(model.config) == part_parameters(model)
    assert image_tokens(model.config) == model.config.image_seq_length
    model.set_attn_implementation("eager")
    inputs = example_inputs(model, text_tokens=6, batch=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(model, inputs)
    expected = sum(vision_flops(model.config, images=2).values()) + decoder_flops(
        shape_of_model(model), 6 + image_tokens(model.config), batch=2
    )
    assert counter.get_total_flops() == expected


def test_real_sizes_on_meta(giants):
    parts = {name: part_parameters(giant) for name, giant in giants.items()}
    assert parts == {name: closed_parameters(real_config(name)) for name in REAL_MODELS}
    assert parts["LLaVA-v1.5-7B"] == dict(
        vision=303_507_456, projector=20_979_712, lm=6_738_939_904
    )
    assert parts["Bunny-v1.0-3B"]["projector"] == 9_507_840
    assert [image_tokens(real_config(name)) for name in REAL_MODELS] == [576, 729, 256]


@pytest.mark.parametrize(
    "name, printed", [("LLaVA-v1.5-7B", [6.0, 5.0]), ("Bunny-v1.0-3B", [2.8, 2.4])]
)
def test_pruned_sizes_as_printed(giants, name, printed):
    giant, scores = giants[name], LayerScores(torch.rand(32), kind="random", meta={})
    for n_layers, billions in zip((5, 10), printed):
        pruned = apply_plan(giant, plan_layerwise(giant, scores, n_layers=n_layers))
        report = cost_report(pruned, memory=False)
        assert (
            report.value("parameters")
            == report.value("parameters", source="measured")
            == pytest.approx(billions * 1e9, abs=6e7)
        )


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
    run = lambda m: peak_memory(lambda: forward(m, example_inputs(m)), m.device)
    with torch.no_grad():
        assert run(model) == pytest.approx(run(copy.deepcopy(model).to("meta")), rel=0.02)


def test_recovery_memory_by_purpose(tiny_llava):
    model = copy.deepcopy(tiny_llava[0]).to("meta")
    projector = RecoveryConfig(train="projector", batch_size=2)
    needs = recovery_memory(model, projector, teacher=model)
    parts = part_parameters(model)
    assert (
        needs["weights"] == 4 * sum(parts.values()) and needs["optimizer"] == 8 * parts["projector"]
    )
    assert needs["teacher"] == 4 * (parts["projector"] + parts["lm"]) and needs["total"] == sum(
        needs[k] for k in ("weights", "teacher", "optimizer", "step")
    )
    step = lambda **kw: recovery_memory(
        model, RecoveryConfig(**{"train": "projector", "batch_size": 2} | kw)
    )["step"]
    assert (
        step(batch_size=4, passes=2) == step() < step(batch_size=4)
        and step(gradient_checkpointing=True) < step()
    )
    assert (
        recovery_memory(model, RecoveryConfig(train="projector+lm", lora={"r": 4}))["optimizer"]
        < recovery_memory(model, RecoveryConfig())["optimizer"]
        == 8 * (parts["projector"] + parts["lm"])
    )
    assert not any(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="meta device"):
        recovery_memory(tiny_llava[0], projector)


def test_latency_and_report(tiny_llava):
    model, processor = tiny_llava
    times = latency(model, example_inputs(model, text_tokens=3), repeats=3, warmup=1)
    assert [len(t.seconds) for t in times.values()] == [3, 3] and min(times["decode"].seconds) > 0
    report = cost_report(model, processor, latency=True, memory=True, repeats=2, warmup=1)
    frame = report.to_frame()
    assert report.value("latency median", "decode") > 0 and frame.attrs["device"] == "cpu"
    assert report.value("weights") == weight_bytes(model) == 4 * report.value("parameters")
    assert (
        "closed form = measured" in str(report)
        and report.value("peak beyond weights", "prefill") > 0
    )
    assert frame.groupby("source").size().to_dict()["closed form"] >= 10
    with pytest.raises(KeyError, match="no wattage"):
        report.value("wattage")


def test_decode_latency_leaves_the_context_as_it_was(tiny_lm):
    model, seen = tiny_lm("llama"), []
    inner = model.forward
    model.forward = lambda **kw: (
        seen.append(
            kw[CACHE_ARGUMENT].get_seq_length() if kw.get(CACHE_ARGUMENT) is not None else None
        ),
        inner(**kw),
    )[1]
    latency(model, {"input_ids": torch.ones(1, 6, dtype=torch.long)}, repeats=3, warmup=1)
    assert seen.count(6) == 4  # every decode call finds the prompt's six tokens


def test_time_call_counts_only_the_repeats():
    calls = []
    timing = time_call(lambda: calls.append(1), repeats=4, warmup=3)
    assert (
        len(calls) == 7 and len(timing.seconds) == 4 and timing.low <= timing.median <= timing.high
    )


def test_errors_say_what_to_do(giants):
    with pytest.raises(
        ValueError, match="LLaVA-v1.5-7B .*; Bunny-v1.0-3B .*; Mini-InternVL-Chat-4B"
    ):
        real_config("LLaVA-7B")
    with pytest.raises(ValueError, match="meta device"):
        cost_report(giants["Bunny-v1.0-3B"], latency=True)

    class Other:
        model_type, tie_word_embeddings = "mamba", False

        def get_text_config(self):
            return self

    with pytest.raises(ValueError, match="add a Form"):
        shape_of_config(Other())
    assert isinstance(cost_report(giants["Bunny-v1.0-3B"]), CostReport)


# GPU memory


def test_float32_for_what_is_trained_in_full():
    from mllm_compress.zoo.tiny_models import tiny_config

    half, whole = (
        gpu_memory.on_meta(tiny_config("llava", 2), dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    parts = part_parameters(half)
    extra = {
        kind: gpu_memory.float32_extra(half, gpu_memory.training_kind(kind))
        for kind in gpu_memory.KINDS
    }
    assert extra == {
        "projector": 8 * parts["projector"],
        "LoRA": 8 * parts["projector"],
        "full": 8 * (parts["projector"] + parts["lm"]),
    }
    assert gpu_memory.float32_extra(whole, gpu_memory.training_kind("full")) == 0


@pytest.mark.parametrize("pruning", ["layerwise", "widthwise"])
def test_real_models_pruned_on_meta_at_four_ratios(giants, pruning):
    from mllm_compress.anatomy.families import lm_parameters

    giant = giants["LLaVA-v1.5-7B"]
    for ratio in (0.15, 0.3, 0.45, 0.6):
        small = gpu_memory.pruned_on_meta(giant, pruning, ratio)
        assert 1 - lm_parameters(small) / lm_parameters(giant) == pytest.approx(ratio, abs=2e-3)
        assert closed_parameters(small.config, shape_of_model(small)) == part_parameters(small)


def test_operations_of_training_are_those_of_its_passes():
    config = real_config("LLaVA-v1.5-7B")
    ops = lambda ratio=0.0, **kw: gpu_memory.training_operations(
        config, RecoveryConfig(**{"losses": {"sft": 1.0}} | kw), ratio
    )
    seen, teacher = (
        sum(vision_flops(config).values()),
        ops(losses={"sft": 0.5, "hidden_kd": 0.5}) - ops(),
    )
    assert (
        ops() == 3 * teacher + seen
        and ops(gradient_checkpointing=True) == 4 * teacher + seen
        and ops(train="projector") == 2 * teacher + seen
    )
    assert (ops() - ops(0.3)) / 3 == pytest.approx(2 * (576 + 256) * 0.3 * 6_738_939_904)


def test_the_smallest_card():
    assert [gpu_memory.fits(x) for x in (21, 22.5, 38.5, 78, 79)] == [
        "24 GB",
        "40 GB",
        "80 GB",
        "80 GB",
        "2 x 80 GB, sharded",
    ]


def test_what_is_timed_has_the_size_of_what_was_scored():
    from dataclasses import replace

    import pandas as pd

    from mllm_compress.study.profiles import load_profile
    from mllm_compress.study.savings import asked_of, plan_like, quality_and_cost
    from mllm_compress.zoo.models import load_model

    setup, (model, _) = load_profile("quick"), load_model("smoke-llava")
    layers = plan_like(model, "layerwise", 0.3, setup, 8).achieved_ratio
    assert asked_of(model, "layerwise", 0.3, setup, 8) == 0.3
    assert asked_of(model, "widthwise", 0.3, setup, 8) == layers != 0.3
    to_request = replace(setup, width=replace(setup.width, aim="ratio"))
    assert asked_of(model, "widthwise", 0.3, to_request, 8) == 0.3

    sizes = pd.DataFrame(
        [("m", "dense", 0.0, 0.0, 100.0), ("m", "widthwise", 0.3, 0.3, 70.0)],
        columns=["model", "method", "requested", "achieved", "weights"],
    )
    pairs = pd.DataFrame([("m", "decode", "widthwise", 0.3, 2.0, 1.0)] * 3)
    pairs.columns = ["model", "phase", "method", "requested", "dense", "pruned"]
    scored = [(0.33, 99.0, "sft"), (0.301, 97.0, "none")]  # the better one is smaller
    rows = pd.DataFrame(scored, columns=["achieved_ratio", "avg_percent", "recovery"])
    rows = rows.assign(model="m", pruning="widthwise", requested_ratio=0.3)
    (point,) = quality_and_cost(rows, sizes, pairs).to_dict("records")
    assert point["AVG-%"] == 97.0 and point["time, %"] == 50.0 and point["bytes, %"] == 70.0
