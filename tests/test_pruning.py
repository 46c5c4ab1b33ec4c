"""Plans select what they should; applying them is exact for every family and kind of plan."""

import copy
import json

import pruning_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mllm_compress.anatomy.families import anatomy, lm_parameters
from mllm_compress.importance.scores import LayerScores, WidthScores
from mllm_compress.importance.taylor import taylor
from mllm_compress.pruning import PruningPlan, apply_plan, plan_layerwise, plan_widthwise, prune
from mllm_compress.pruning.plans import layers_for_ratio, plan_none
from mllm_compress.pruning.pruning_plan import make_plan
from mllm_compress.pruning.slicing import silence


@pytest.fixture(scope="module")
def llama():
    return cases.build("llama-4x1", num_hidden_layers=6)


# ---- the contract: every architecture, every kind of plan


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("name", cases.LMS + cases.MLLMS)
def test_contract(name, kind):
    model = cases.build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    plan, batch = cases.plan(model, kind), cases.inputs(model)
    small = apply_plan(model, plan)

    # exact: equal to the masked model, different from the full one
    pruned = cases.logits(small, batch)
    assert (pruned - cases.logits(silence(model, plan), batch)).abs().max() < 1e-9
    assert (pruned - cases.logits(model, batch)).abs().max() > 1e-3

    # the closed form is what was removed
    removed = 1 - lm_parameters(small) / lm_parameters(model)
    assert removed == pytest.approx(plan.achieved_ratio, abs=1e-12)

    # the cache agrees with its absence, also behind left padding
    assert torch.equal(cases.greedy(small, batch, True), cases.greedy(small, batch, False))

    # indices and counts say what the weights are
    parts, n = anatomy(small), len(plan.layers)
    assert [parts.attention(i).layer_idx for i in range(parts.num_layers)] == list(range(n))
    assert parts.text_config.num_hidden_layers == n
    assert len(getattr(parts.text_config, "layer_types", None) or plan.layers) == n
    for new, old in enumerate(plan.layers):
        size, sliced = plan.meta["sizes"][old], parts.attention(new).config
        heads = len(plan.heads.get(old, range(size["heads"])))
        neurons = len(plan.neurons.get(old, range(size["neurons"])))
        assert (parts.groups(new), parts.neurons(new)) == (heads, neurons)
        assert sliced.num_key_value_heads == heads
        assert sliced.num_attention_heads == heads * parts.queries_per_group(new)

    # the original is untouched and shares nothing
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.to_dict() == config
    pointers = lambda m: {p.data_ptr() for p in m.parameters()}
    assert not pointers(small) & pointers(model)


@pytest.mark.parametrize("name", ["llama-3x2", "phi3-3x2", "qwen2-3x2", "phi-4x1"])
def test_pruned_model_trains_copies_and_switches_attention(name):
    # eager masks of transformers overflow in float64
    model = cases.build(name, dtype=torch.float32)
    small = apply_plan(model, cases.plan(model, "blockwise"))
    batch = cases.inputs(model)
    expected = cases.logits(small, batch)
    assert torch.equal(cases.logits(copy.deepcopy(small), batch), expected)
    small.set_attn_implementation("eager")
    assert anatomy(small).attention(1).config._attn_implementation == "eager"
    assert torch.allclose(cases.logits(small, batch), expected, atol=1e-4)
    small.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "first,second", [("uniform", "blockwise"), ("blockwise", "layerwise"), ("layerwise", "uniform")]
)
def test_a_pruned_model_can_be_pruned_again(first, second):
    model = cases.build("qwen2-3x2")
    once = apply_plan(model, cases.plan(model, first))
    plan = cases.plan(once, second)
    twice, batch = apply_plan(once, plan), cases.inputs(model)
    expected = cases.logits(silence(once, plan), batch)
    assert (cases.logits(twice, batch) - expected).abs().max() < 1e-9
    left = lm_parameters(twice) / lm_parameters(once)
    assert left == pytest.approx(1 - plan.achieved_ratio, abs=1e-12)


def test_sliding_layers_keep_their_windows():
    model = cases.build("qwen2-3x2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    small = apply_plan(model, plan_layerwise(model, layers=[0]))
    assert small.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    batch = cases.inputs(model)
    assert torch.equal(cases.greedy(small, batch, True), cases.greedy(small, batch, False))


def test_tied_embeddings_stay_tied_and_count_once():
    model = cases.build("llama-4x1", tie_word_embeddings=True)
    small = apply_plan(model, plan_layerwise(model, layers=[1]))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert lm_parameters(small) == sum(p.numel() for p in small.parameters())


def test_copying_never_holds_what_is_thrown_away(llama):
    "The copy's new storage is the pruned model, plus at most one weight while it is sliced."
    plan = plan_layerwise(llama, layers=[0, 1, 2, 3])
    copied, deepcopy = [], torch.nn.Parameter.__deepcopy__

    def watch(self, memo):
        copied.append(self.numel())
        return deepcopy(self, memo)

    torch.nn.Parameter.__deepcopy__ = watch
    try:
        small = apply_plan(llama, plan)
    finally:
        torch.nn.Parameter.__deepcopy__ = deepcopy
    assert sum(copied) == sum(p.numel() for p in small.parameters())


# ---- golden: what the original implementation selects


@pytest.mark.parametrize("case", ["widthwise_llama", "widthwise_phi"])
def test_golden_widthwise(golden, case):
    model = AutoModelForCausalLM.from_pretrained(golden / case).eval()
    ids = load_file(golden / case / "calibration.safetensors")["input_ids"]
    for expected in json.loads((golden / case / "expected.json").read_text()):
        scores = taylor(model, [{"input_ids": ids}], order=expected["importance"], mode="reference")
        assert abs(scores.meta["loss"] - expected["loss"]) < 1e-5
        plan = plan_widthwise(
            model,
            scores,
            channel_ratio=expected["channel_ratio"],
            attention_layers=range(*expected["attention_layers"]),
            mlp_layers=range(*expected["mlp_layers"]),
        )
        removed = {
            str(i): {k: list(plan.removed(k, i)) for k in ("heads", "neurons")}
            for i in plan.layers
            if plan.removed("heads", i) or plan.removed("neurons", i)
        }
        assert removed == expected["removed"]
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert count(model) == expected["params_before"]
        assert count(apply_plan(model, plan)) == expected["params_after"]


def test_golden_layerwise(golden):
    expected = json.loads((golden / "layerwise_llava" / "expected.json").read_text())
    config = AutoConfig.from_pretrained(golden / "layerwise_llava")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    scores = LayerScores(expected["block_influence_sum"], "block_influence", {})
    plan = plan_layerwise(model, scores, n_layers=4)
    assert plan.meta["removal_order"] == expected["removed_4"]
    assert plan.removed_layers == tuple(sorted(expected["removed_4"]))


# ---- plans


def random_layers(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LayerScores(torch.rand(anatomy(model).num_layers, generator=generator), "random", {})


def test_layerwise_takes_the_nearest_count(llama):
    scores, one = random_layers(llama), plan_layerwise(llama, layers=[0]).achieved_ratio
    for ratio in [i / 50 for i in range(38)]:
        plan = plan_layerwise(llama, scores, ratio=ratio)
        n = len(plan.removed_layers)
        miss = lambda n: abs(n * one - ratio)
        assert miss(n) <= miss(n + 1) and miss(n) <= miss(n - 1) + 1e-12
        assert plan.achieved_ratio == pytest.approx(n * one) and plan.requested_ratio == ratio
        assert plan.removed_layers == tuple(sorted(scores.values.argsort()[:n].tolist()))
    assert layers_for_ratio(llama, 1.5 * one - 1e-9) == 1 and layers_for_ratio(llama, 0) == 0


def test_layerwise_lowest_contiguous_and_explicit(llama):
    blocks = LayerScores(torch.tensor([0.5, 0.4, 0.1, 0.3, 0.9]), "angular_distance", {"n": 2})
    assert plan_layerwise(llama, blocks, n_layers=2).removed_layers == (2, 3)
    one = plan_layerwise(llama, layers=[0]).achieved_ratio
    assert plan_layerwise(llama, blocks, ratio=2.2 * one).removed_layers == (2, 3)
    with pytest.raises(ValueError, match=r"blocks of 2 layers, but 3.*n=3"):
        plan_layerwise(llama, blocks, n_layers=3)
    assert plan_layerwise(llama, layers=[4, 1]).removed_layers == (1, 4)


@pytest.mark.parametrize("name", ["llama-4x1", "qwen2-3x2", "phi-4x1", "phi3-3x2"])
@pytest.mark.parametrize(
    "shape,round_to", [("blockwise", 1), ("uniform", 1), ("blockwise", 8), ("uniform", 8)]
)
def test_budget_is_hit_and_nested(name, shape, round_to):
    model = cases.build(name, intermediate_size=48)
    scores, previous = cases.width_scores(model), plan_none(model)
    size, total = previous.meta["sizes"][0], lm_parameters(model)
    per_layer = max(size["head_parameters"], round_to * size["neuron_parameters"])
    step = per_layer * (4 if shape == "uniform" else 1) / total
    for ratio in [i / 40 for i in range(14)]:
        plan = plan_widthwise(model, scores, ratio=ratio, shape=shape, round_to=round_to)
        assert abs(plan.achieved_ratio - ratio) <= step / 2 + 1e-12 and plan <= previous
        assert all(len(v) % round_to == 0 for v in plan.neurons.values())
        kept = lambda kind, i: len(getattr(plan, kind).get(i, range(size[kind])))
        counts = {(kept("heads", i), kept("neurons", i)) for i in plan.layers}
        assert shape == "blockwise" or len(counts) == 1
        if shape == "blockwise":
            assert not {0, 3} & (set(plan.heads) | set(plan.neurons))
        previous = plan


def test_lowest_scores_go_ties_by_index(llama):
    scores = WidthScores(
        {i: torch.tensor([0.2, 0.1, 0.1, 0.9]) for i in range(6)},
        {i: torch.arange(40).flip(0).float() for i in range(6)},
        "hand",
        {},
    )
    plan = plan_widthwise(llama, scores, channel_ratio=0.5, protect=(2, 1))
    assert set(plan.heads) == {2, 3, 4} and plan.removed("heads", 2) == (1, 2)
    assert plan.removed("neurons", 3) == tuple(range(20, 40)) and plan.removed("neurons", 0) == ()


def test_plan_survives_json(llama):
    layers = plan_layerwise(llama, random_layers(llama), ratio=0.25)
    plan = plan_widthwise(llama, cases.width_scores(llama), ratio=0.5, base=layers)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and isinstance(next(iter(again.heads)), int)
    with pytest.raises(TypeError, match="colour"):
        PruningPlan.from_json(json.dumps({**json.loads(plan.to_json()), "colour": 1}))
    with pytest.raises(AttributeError):
        plan.layers = ()


def test_a_plan_in_a_file_is_what_it_keeps(llama, tmp_path):
    plan = plan_widthwise(llama, cases.width_scores(llama), ratio=0.5, shape="uniform")
    text, path = json.loads(plan.to_json()), tmp_path / "plan.json"
    load = lambda **changed: path.write_text(json.dumps(text | changed)) and PruningPlan.load(path)
    assert load(achieved_ratio=0.9) == plan
    fewer = text["neurons"] | {"0": text["neurons"]["0"][:-1]}
    with pytest.raises(ValueError, match="its layers differ in width"):
        load(neurons=fewer)
    assert load(neurons=fewer, shape="blockwise").achieved_ratio > plan.achieved_ratio
    with pytest.raises(ValueError, match="holds no pruning plan .*float"):
        load(layers=[0, 1.5])


# ---- bad input

wide = plan_widthwise


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m, l, w: plan_layerwise(m, l, ratio=1.2), r"outside \[0, 0.95\)"),
        (lambda m, l, w: plan_layerwise(m, l, ratio=-0.1), r"outside \[0, 0.95\)"),
        (lambda m, l, w: plan_layerwise(m, l, ratio=0.94), r"most this plan can remove is 0\.\d+"),
        (lambda m, l, w: plan_layerwise(m, l), "exactly one of ratio, n_layers and layers"),
        (lambda m, l, w: plan_layerwise(m, l, ratio=0.1, n_layers=2), "exactly one"),
        (lambda m, l, w: plan_layerwise(m, ratio=0.1), "scores are needed"),
        (lambda m, l, w: plan_layerwise(m, l, n_layers=6), "n_layers must be in 0 … 5"),
        (lambda m, l, w: plan_layerwise(m, layers=[9]), "in 0 … 5"),
        (lambda m, l, w: plan_layerwise(m, layers=[1, 1]), "must be distinct"),
        (lambda m, l, w: wide(m, w, ratio=0.4, base=wide(m, w, ratio=0.1)), "a layerwise plan"),
        (lambda m, l, w: plan_layerwise(m, LayerScores(torch.ones(9), "", {}), 0.1), "9 scores do"),
        (lambda m, l, w: wide(m, w, ratio=0.9), r"plan can remove is 0\.\d+.*Protect fewer"),
        (lambda m, l, w: wide(m, w), "one of ratio, channel_ratio and budget"),
        (lambda m, l, w: wide(m, w, ratio=0.1, channel_ratio=0.1), "one of ratio, channel_ratio"),
        (lambda m, l, w: wide(m, w, None, 0.1, (1, 1), mlp_layers=[1]), "give one of them"),
        (lambda m, l, w: wide(m, w, channel_ratio=1.0), r"outside \[0, 1\)"),
        (lambda m, l, w: wide(m, w, ratio=0.1, mlp_layers=[1]), "belong to channel_ratio"),
        (lambda m, l, w: wide(m, w, channel_ratio=0.1, mlp_layers=[7]), "not all among 0-5"),
        (lambda m, l, w: wide(m, w, ratio=0.1, shape="round"), "blockwise, uniform"),
        (lambda m, l, w: wide(m, w, 0.1, shape="uniform", protect=(1, 1)), "every layer alike"),
        (lambda m, l, w: wide(m, w, ratio=0.1, protect=(3, 3)), "leaves none"),
        (lambda m, l, w: wide(m, w, ratio=0.1, round_to=0), "round_to"),
        (lambda m, l, w: wide(m, WidthScores({}, {}, "r", {}), ratio=0.1), "no scores for"),
        (lambda m, l, w: wide(m, w, 0.1, base=plan_layerwise(m, l, n_layers=3)), "base plan alone"),
        (
            lambda m, l, w: prune(m, ratio=0.4, scores=l, allocation="global"),
            "have no effect where",
        ),
        (lambda m, l, w: prune(m, ratio=0.4, scores=w, costs={}), "without a budget"),
        (lambda m, l, w: prune(m, ratio=0.4, scores=[l, w], layer_share=2), r"outside \[0, 1\]"),
        (lambda m, l, w: make_plan(m, layers=[0, 7]), "must lie in 0 … 5"),
        (lambda m, l, w: make_plan(m, heads={1: []}), "at least one must stay"),
        (lambda m, l, w: make_plan(m, layers=[0], heads={1: [0]}), "not kept"),
        (lambda m, l, w: make_plan(m, heads={1: [0, 0]}), "ascending and distinct"),
        (lambda m, l, w: make_plan(m, neurons={1: [40]}), "must lie in 0 … 39"),
    ],
)
def test_bad_requests_are_named(llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama, random_layers(llama), cases.width_scores(llama))


def test_a_plan_for_another_model_is_refused(llama):
    plan = plan_layerwise(llama, layers=[1])
    for other in (
        cases.build("llama-4x1"),
        cases.build("phi-4x1", num_hidden_layers=6),
        cases.build("llama-4x1", num_hidden_layers=6, intermediate_size=41),
    ):
        with pytest.raises(ValueError, match="made for llama with 6 layers"):
            apply_plan(other, plan)
