"""The search for a plan: budgets hold, recipes are never beaten down, files continue, bad input."""

import json
import math
import random
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from contract_cases import build
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mllm_compress.cli import app
from mllm_compress.importance.scores import LayerScores, WidthScores
from mllm_compress.pruning import apply_plan, plan_none, prune, search
from mllm_compress.pruning.allocation import COUNTED, UnitCosts
from mllm_compress.pruning.reconstruction import reconstruct
from mllm_compress.pruning.search import Candidate, HeldOut, SharedSums, Space

LAYERS, GROUPS, NEURONS = 6, 4, 24
flat = lambda value: (float(value),) * LAYERS
DEVICE = UnitCosts("latency", "s", 1.0, flat(1.0), flat(0.3), flat(0.05))
RUN = dict(minutes=5, generations=4, ridge=0.1)


@pytest.fixture(scope="module")
def model(tiny_lm):
    model = tiny_lm("llama", layers=LAYERS, groups=GROUPS, queries=1, neurons=NEURONS)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from its initial values, so that layers matter
        for p in model.model.layers.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (24, 16), generator=draw) for _ in range(8)]
    return [dict(input_ids=x, attention_mask=torch.ones_like(x), labels=x.clone()) for x in ids]


def scored(seed: int = 0, kind: str = "gauss_newton") -> list:
    draw = torch.Generator().manual_seed(seed)
    of = lambda n: {i: torch.rand(n, generator=draw) for i in range(LAYERS)}
    layers = LayerScores(torch.rand(LAYERS, generator=draw), "block_influence", {})
    return [WidthScores(of(GROUPS), of(NEURONS), kind, {}), layers]


def space_of(model, name: str, share: float, seed: int = 0, kind="gauss_newton") -> Space:
    costs = DEVICE if name == "latency" else COUNTED[name](model)
    return Space(model, scored(seed, kind)[0], scored(seed)[1], {name: share}, costs)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["latency", "bytes", "kv", "parameters"]),
    share=st.floats(0.5, 0.95),
    seed=st.integers(0, 5),
    kind=st.sampled_from(["gauss_newton", "taylor"]),
)
def test_no_candidate_exceeds_the_budget_or_leaves_a_unit_of_it(model, name, share, seed, kind):
    space, rng = space_of(model, name, share, seed, kind), random.Random(seed)
    candidates = space.recipes()
    assert len(candidates) > 1 and candidates[-1].moves == 0
    for _ in range(12):
        candidates += filter(None, [space.child(rng.choice(candidates), rng)])
    price, kind = getattr(space.costs, space.spent_on)[0], space.spent_on == "neurons"
    for candidate in candidates:
        cost = space.costs.total(space.plan(candidate))
        full = all(c[1 + kind] == (GROUPS, NEURONS)[kind] for c in candidate.counts)
        assert cost <= space.limit * (1 + 1e-9)
        assert full or cost + price > space.limit * (1 - 1e-9)


def test_a_refit_from_shared_sums_is_the_ridge_solution(model, batches):
    sums = SharedSums(model, batches[:6])
    slot, kept, inputs, targets = sums.parts.writers(2)[-1], (1, 4, 9, 16), [], []
    for (x, end, weight), later in zip(sums.rows(2), sums.ends[3]):
        written = (later - end).flatten(0, 1) * weight[:, None]
        inputs.append(x[slot.name])
        targets.append(x[slot.name] @ slot.module.weight.T + written)  # layer 3 is gone as well
    x, target = torch.cat(inputs)[:, list(kept)].double(), torch.cat(targets).double()
    ridge, dense = 0.1 * (x * x).sum(0).mean(), slot.module.weight.T[list(kept)].double()
    best = torch.linalg.solve(x.T @ x + ridge * torch.eye(4), x.T @ target + ridge * dense)
    weight = sums.refitted(2, slot, kept, 4)
    torch.testing.assert_close(weight.T.double(), best, rtol=1e-3, atol=1e-4)


def test_the_first_ranking_is_that_of_the_pruned_model(model, batches):
    space, held = space_of(model, "latency", 0.6), HeldOut(model, batches[6:])
    sums, rng = SharedSums(model, batches[:6]), random.Random(0)
    for candidate in filter(None, [space.child(space.recipes()[0], rng) for _ in range(3)]):
        plan = space.plan(candidate)
        small = sums.pruned(plan)
        with torch.no_grad():
            answers = [small(b["input_ids"]).logits[:, :-1] for b in batches[6:]]
        log_q = torch.cat([x.log_softmax(-1).flatten(0, 1) for x in answers])
        log_p = torch.cat([model(b["input_ids"]).logits[:, :-1].flatten(0, 1) for b in batches[6:]])
        log_p = log_p.detach().log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        assert held.step == 1 and held.divergence(small, plan) == pytest.approx(exact, rel=1e-3)
        assert held.divergence(small, plan) < held.divergence(apply_plan(model, plan), plan)
    kept = tuple((i, GROUPS, NEURONS) for i in range(LAYERS))
    whole = space.plan(Candidate(kept, "nothing removed"))
    assert held.divergence(sums.pruned(whole), whole) == pytest.approx(0, abs=1e-6)


def test_a_first_look_spans_small_batches_and_may_begin_without_answers(model, batches):
    silent = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
    held, plan = HeldOut(model, [silent, *batches[:3]]), plan_none(model)
    sizes = torch.tensor([*map(len, held.log_p)])[: held.look]
    assert sizes[:-1].sum() < 256 <= sizes.sum()
    assert held.divergence(model, plan, held.look) == pytest.approx(0, abs=1e-6)


def test_the_result_is_no_worse_than_any_recipe(model, batches):
    front = search(model, batches, {"latency": 0.6}, DEVICE, scores=scored(), **RUN)
    space, held = space_of(model, "latency", 0.6), HeldOut(model, batches[6:])
    refit = lambda plan: reconstruct(apply_plan(model, plan), model, batches[:6], plan, 0.1)
    full = lambda plan: held.divergence(refit(plan), plan)
    fixed = {c.origin: full(space.plan(c)) for c in space.recipes()}
    assert full(front.plan) <= min(fixed.values()) * (1 + 1e-6)
    assert front.frame.kl_refit[0] == pytest.approx(full(front.plan), rel=1e-4)
    assert DEVICE.total(front.plan) <= 0.6 * DEVICE.total(plan_none(model))
    assert front.plan.meta["achieved_budget"]["latency"] <= 0.6
    assert "the lowest of" in front.reason and front.reason in str(front)
    assert set(fixed) <= set(front.frame[front.frame.kl_refit.notna()].origin)


def test_an_interrupted_search_continues_and_comes_to_the_same_front(model, batches, tmp_path):
    about = dict(scores=scored(), file=tmp_path / "search.json", **RUN)
    first = search(model, batches, {"bytes": 0.7}, **about)
    record = json.loads(about["file"].read_text())
    half = dict(list(record["values"].items())[: len(record["values"]) // 2])
    about["file"].write_text(json.dumps(record | {"values": half}))  # interrupted
    again = search(model, batches, {"bytes": 0.7}, **about)
    shown = ["origin", "moves", "layers", "kl_look", "kl_held", "kl_refit"]
    assert again.frame[shown].round(5).equals(first.frame[shown].round(5))
    assert again.plan.layers == first.plan.layers and again.plan.neurons == first.plan.neurons
    done = about["file"].read_text()
    assert list(json.loads(done)["values"]) == list(record["values"])
    assert search(model, batches, {"bytes": 0.7}, **about).frame[shown].equals(again.frame[shown])
    assert about["file"].read_text() == done  # nothing was computed again
    with pytest.raises(ValueError, match="another model, data, budget"):
        search(model, batches, {"bytes": 0.6}, **about)
    for text in ("a diary\n", "[]", '{"values": 3}'):
        about["file"].write_text(text)
        with pytest.raises(ValueError, match="was not written by a search"):
            search(model, batches, {"bytes": 0.7}, **about)


MISTAKES = {
    "no time": (dict(minutes=0), "give a number above 0"),
    "words": (dict(minutes="long"), "give a number above 0"),
    "a moment": (dict(minutes=1e-6), "shorter than one candidate.*give minutes="),
    "out of reach": (dict(budget={"latency": 0.05}), "cannot be met: the least"),
    "out of reach by width": (
        dict(budget={"latency": 0.05}, scores=scored(kind="taylor")),
        "cannot be met: no fixed plan",
    ),
    "no scores": (dict(scores=scored()[:1] + ["seven"]), "give scores of layers, of heads"),
    "blocks": (dict(scores=[LayerScores([1.0], "x", {})]), "those of single layers"),
    "few tokens": (dict(batches=2), "calibration tokens are too few"),
    "one batch": (dict(batches=1), "holds one batch out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_clear_line(model, batches, name):
    options, says = MISTAKES[name]
    about = dict(budget={"latency": 0.6}, costs=DEVICE, scores=scored(), **RUN) | options
    few = [{k: v[:1] for k, v in b.items()} for b in batches[: about.pop("batches", 0)]]
    with pytest.raises(ValueError, match=says) as error:
        search(model, few or batches, **about)
    assert "\n" not in str(error.value)


def test_a_cache_budget_takes_layers_where_heads_must_stay():
    tokens = [{"input_ids": ids} for ids in torch.arange(640).reshape(2, 4, 80) % 60 + 3]
    plan = prune(build("gemma4_text", torch.float32), tokens, budget={"kv": 0.7})[1]
    assert plan.removed_layers and not plan.heads


def test_prune_searches_for_a_ratio_or_a_budget(model, batches):
    small, plan = prune(model, batches, ratio=0.3, search=RUN | dict(ridge=0.1))
    assert plan.achieved_ratio >= 0.3 and small.config.reconstructed["ridge"] is None
    found = plan.meta["search"]
    refitted = [row["kl_refit"] for row in found["front"] if row["kl_refit"] is not None]
    assert refitted[0] == min(refitted) and "Chosen" in found["reason"]
    assert len(found["front"]) == min(12, found["seen"]) and "In this time" not in found["reason"]
    for row in found["front"]:
        assert 0.6 < row["parameters"] <= 0.7 and math.isfinite(row["kl_look"])
    with_scores = prune(model, batches, scores=scored(), ratio=0.3, search=RUN, reconstruct=True)[1]
    assert with_scores.achieved_ratio >= 0.3 and with_scores.meta["search"]["front"]
    with pytest.raises(ValueError, match="after the refit"):
        prune(model, batches, ratio=0.3, search=RUN, reconstruct=False)


def test_a_short_search_refits_one_plan(model, batches, monkeypatch):
    clock = SimpleNamespace(perf_counter=count().__next__)  # a second per value
    monkeypatch.setitem(search.__globals__, "time", clock)
    monkeypatch.setitem(search.__globals__, "refit_seconds", lambda *_: 4 / 3)
    about = dict(scores=scored(), generations=4, ridge=0.1)
    run = lambda minutes: search(model, batches, {"latency": 0.6}, DEVICE, minutes, **about)
    front, more = run(2 / 60), run(20)
    assert front.frame.kl_refit.count() == 1 and "lowest of 1 refitted" in front.reason
    assert more.frame.kl_refit.count() > 1 and more.frame.moves.any()
    monkeypatch.setitem(prune.__globals__, "measure", None)  # as no scores are reached
    with pytest.raises(ValueError, match="shorter than one candidate"):
        prune(model, batches, ratio=0.3, search=dict(minutes=0.01))


def test_the_command_searches_and_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lambda line: CliRunner().invoke(app, f"prune smoke-llava {line}".split())
    done = run("-o small --samples 64 --json --ratio 0.3 --search minutes=0.5")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["requested_ratio"] == 0.3 <= found["achieved_ratio"]
    assert "lowest of" in found["search"]["reason"] and not list(tmp_path.glob(".small*"))
    for line, says in {
        "-o x --ratio 0.3 --search 5": "minutes=5",
        "-o x --layers 1 --search minutes=5": "leave --layers",
        "-o x --ratio 0.3 --search minutes=5 --protect 1,1": "chooses the layers",
        "-o x --ratio 0.3 --search minutes=5 --recipe paper": "after the refit",
        "-o x --ratio 0.3 --search minutes=0.00001 --samples 64": "shorter than one candidate",
    }.items():
        done = run(line)
        assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output
