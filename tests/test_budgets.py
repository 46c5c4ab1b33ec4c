"""Plans for a budget of seconds, bytes or KV cache: met, nested, and refused where impossible."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mllm_compress.anatomy.families import anatomy, lm_parameters
from mllm_compress.cli import app
from mllm_compress.cost.report import cost_report
from mllm_compress.cost.timing import fitted
from mllm_compress.data import calibration_batches, small_data
from mllm_compress.importance.scores import WidthScores
from mllm_compress.pruning import PruningPlan, apply_plan, plan_none, plan_widthwise, prune
from mllm_compress.pruning.allocation import (
    UnitCosts,
    cache_costs,
    load_costs,
    plan_global,
    pooled_rates,
    weight_costs,
)

LAYERS, GROUPS, NEURONS = 6, 4, 48
flat = lambda value: (float(value),) * LAYERS


@pytest.fixture(scope="module")
def model(tiny_lm):
    return tiny_lm("llama", layers=LAYERS, groups=GROUPS, queries=2, neurons=NEURONS)


def saliency(seed: int = 0) -> WidthScores:
    draw = torch.Generator().manual_seed(seed)
    of = lambda n: {i: torch.rand(n, generator=draw) ** 3 for i in range(LAYERS)}
    return WidthScores(of(GROUPS), of(NEURONS), "gauss_newton", {})


def device(fixed=1.0, layer=1.0, head=0.5, neuron=0.05) -> UnitCosts:
    return UnitCosts("latency", "s", fixed, flat(layer), flat(head), flat(neuron))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["latency", "bytes", "kv"]),
    share=st.floats(0.3, 0.95),
    seed=st.integers(0, 5),
    layer=st.floats(0, 20),
)
def test_a_budget_is_met_within_one_step(model, name, share, seed, layer):
    costs = device(fixed=0.1, layer=layer) if name == "latency" else None
    try:
        plan = plan_global(model, saliency(seed), budget={name: share}, costs=costs)
    except ValueError as error:
        assert "cannot be met" in str(error)
        return
    table = costs or {"bytes": weight_costs, "kv": cache_costs}[name](model)
    dense, small = table.total(plan_none(model)), table.total(plan)
    # the largest step: a layer that is left with one head and eight neurons
    step = table.layers[0] + table.heads[0] + NEURONS * table.neurons[0]
    assert abs(small - share * dense) <= max(step, table.heads[0]) / 2 + 1e-9
    assert plan.meta["achieved_budget"][name] == pytest.approx(small / dense)


@settings(max_examples=25, deadline=None)
@given(
    shares=st.tuples(st.floats(0.4, 0.9), st.floats(0.4, 0.9)),
    seed=st.integers(0, 5),
    layer=st.floats(0, 20),
)
def test_a_tighter_budget_keeps_a_part_of_a_wider_one(model, shares, seed, layer):
    costs, scores = device(fixed=0.0, layer=layer), saliency(seed)
    tight, wide = (
        plan_global(model, scores, budget={"latency": s}, costs=costs) for s in sorted(shares)
    )
    assert tight <= wide


def test_costs_are_those_of_the_pruned_model(model):
    for name, table in (("bytes", weight_costs), ("kv", cache_costs)):
        plan = plan_global(model, saliency(), budget={name: 0.6})
        small = apply_plan(model, plan)
        assert table(small).total(plan_none(small)) == table(model).total(plan)
    assert weight_costs(small).total(plan_none(small)) == 4 * lm_parameters(small)
    of_cache = cost_report(small).value("KV cache per token")
    assert cache_costs(small).total(plan_none(small)) == of_cache


def test_a_cache_budget_takes_heads_and_layers_only(model):
    plan = plan_global(model, saliency(), budget={"kv": 0.5})
    assert plan.heads and not plan.neurons
    assert sum(len(plan.heads.get(i, range(GROUPS))) for i in plan.layers) == LAYERS * GROUPS / 2
    fewest = plan_global(model, saliency(), budget={"kv": 1.2 / (LAYERS * GROUPS)})
    assert len(fewest.layers) == 1 and not fewest.neurons


def test_overhead_decides_between_depth_and_width(model):
    thin = plan_global(model, saliency(), budget={"latency": 0.6}, costs=device(layer=0))
    deep = plan_global(model, saliency(), budget={"latency": 0.6}, costs=device(layer=1e3))
    assert len(thin.layers) == LAYERS and thin.neurons
    assert len(deep.layers) in (3, 4) and deep.method.startswith("layerwise")


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_pooled_rates_are_the_slopes_of_a_convex_hull(steps):
    rates = pooled_rates(steps)
    assert all(a <= b + 1e-9 for a, b in zip(rates, rates[1:]))
    lost = sum(rate * saved for rate, (_, saved) in zip(rates, steps))
    assert lost == pytest.approx(sum(s for s, _ in steps), abs=1e-6)


def test_one_layer_of_each_kind_stays(tiny_lm):
    model = tiny_lm("llama", layers=2, groups=GROUPS, queries=2, neurons=NEURONS)
    scores = saliency()
    two = lambda kind: {i: getattr(scores, kind)[i] for i in range(2)}
    scores = WidthScores(two("heads"), two("neurons"), "gauss_newton", {})
    with pytest.raises(ValueError, match=r"latency=0\.1 cannot be met: the least .* 0\.\d+") as e:
        costs = UnitCosts("latency", "s", 0.0, (1.0,) * 2, (0.0,) * 2, (0.0,) * 2)
        plan_global(model, scores, budget={"latency": 0.1}, costs=costs)
    assert "Ask for 0.500 or more" in str(e.value)
    other = replace(costs, meta={"parameters": 7})
    with pytest.raises(ValueError, match="of latency, 2 layers and 7 parameters; the budget"):
        plan_global(model, scores, budget={"latency": 0.6}, costs=other)


def test_the_depth_with_the_smallest_divergence_is_taken(tiny_llava):
    model, processor = tiny_llava
    batches = calibration_batches(small_data("train"), processor, n=64)
    costs = UnitCosts("latency", "s", 0.0, (1.0,) * 4, (0.01,) * 4, (0.001,) * 4)
    small, plan = prune(model, batches, budget={"latency": 0.6}, costs=costs)
    tried = plan.meta["search"]["front"]
    assert tried[0]["kl_refit"] <= tried[1]["kl_refit"]
    assert len(plan.layers) == tried[0]["layers"] == len(anatomy(small).layers)
    assert PruningPlan.from_json(plan.to_json()).meta["budget"] == {"latency": 0.6}


def test_a_fit_has_no_negative_seconds():
    counts = torch.tensor([[1.0, 4, 8, 64], [1, 4, 4, 64], [1, 4, 8, 32], [1, 2, 4, 32]]).numpy()
    found, _ = fitted(counts, counts @ [1e-3, 1e-4, 0, 1e-7] * [1, 1.01, 0.99, 1])
    assert (found >= 0).all()


MISTAKES = {
    "two budgets": (dict(budget={"kv": 0.5, "bytes": 0.5}), "give one of latency, bytes, kv"),
    "unknown": (dict(budget={"ram": 0.5}), "use one of latency, bytes, kv"),
    "above one": (dict(budget={"kv": 1.5}), "between 0 and 1"),
    "text": (dict(budget={"kv": "half"}), "between 0 and 1"),
    "no table": (dict(budget={"latency": 0.5}), "unit_seconds"),
    "another table": (dict(budget={"kv": 0.5}, costs=device()), "of latency, 6 layers"),
    "a ratio too": (dict(budget={"kv": 0.5}, ratio=0.3), "give one of"),
    "equal shares": (dict(budget={"kv": 0.5}, allocation="layer"), "allocation='global'"),
    "standardized": (dict(budget={"kv": 0.5}, allocation="standardized"), "allocation='global'"),
    "uniform": (dict(budget={"kv": 0.5}, shape="uniform"), "blockwise"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_their_cure(model, name):
    options, says = MISTAKES[name]
    with pytest.raises(ValueError, match=says):
        plan_widthwise(model, saliency(), **{"allocation": "global", **options})


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lambda line: CliRunner().invoke(app, line.split())
    assert run("cost smoke-llava --units costs.json").exit_code == 0
    assert len(load_costs("costs.json").layers) == 4
    table = json.loads((tmp_path / "costs.json").read_text())
    table |= dict(fixed=0.0, layers=[1.0] * 4, heads=[0.01] * 4, neurons=[1e-4] * 4)
    (tmp_path / "costs.json").write_text(json.dumps(table))
    for budget in ("latency=0.6 --costs costs.json", "bytes=0.7", "kv=0.5"):
        name, share = budget.split()[0].split("=")
        result = run(f"prune smoke-llava -o {name} --samples 64 --json --budget {budget}")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["budget"] == {name: float(share)}
        assert found["achieved_budget"][name] == pytest.approx(float(share), abs=0.15)
    assert len(PruningPlan.load("latency/pruning_plan.json").layers) < 4
    assert not PruningPlan.load("kv/pruning_plan.json").neurons
    assert run("score smoke-llava -o s --method gauss_newton --samples 8").exit_code == 0
    stored = run("prune smoke-llava -o stored --scores s --budget bytes=0.7")
    assert stored.exit_code == 0, stored.output
