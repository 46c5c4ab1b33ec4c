"""Whole experts of a mixture: their scores, their removal, and what is loaded afterwards."""

from unittest.mock import patch

import contract_cases as cases
import pytest
import torch
from commands import facts, run
from test_contract import files
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mllm_compress import prune
from mllm_compress.anatomy import anatomy, lm_parameters
from mllm_compress.anatomy.families import FAMILIES
from mllm_compress.cli.check import logits_of, noise_batch, reloaded
from mllm_compress.importance import load_scores, scoring_memory, width_importance
from mllm_compress.pruning import PruningPlan, apply_plan, plan_layerwise, plan_widthwise
from mllm_compress.pruning.allocation import parameter_costs
from mllm_compress.pruning.pruning_plan import compose_plans, make_plan

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "qwen3_next"]
MIXTURES += ["qwen3-vl-moe", "qwen3.5-moe", "glm4v-moe", "aria-moe", "deepseek_v3", "gpt_oss"]


def test_every_mixture_is_tried():
    rows = {cases.build(name).config.get_text_config().model_type for name in MIXTURES}
    assert rows == {name for name, row in FAMILIES.items() if row.experts}


def never_chosen(model, plan):
    "A context in which the router's logits of removed experts are -inf."
    parts, linear = anatomy(model), functional.linear
    gone = {
        id(parts.routed(i)[0].module.weight): list(plan.removed("experts", i)) for i in plan.experts
    }

    def routing(x, weight, bias=None):
        y = linear(x, weight, bias)
        y[..., gone.get(id(weight), [])] = -torch.inf
        return y

    return patch.object(functional, "linear", routing)


def test_layers_without_experts_keep_their_places(tmp_path):
    model = cases.build("qwen3_moe", torch.float32, mlp_only_layers=[3])
    small = apply_plan(model, plan_layerwise(model, layers=[0]))
    small.save_pretrained(tmp_path)
    loaded, batch = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), noise_batch(model)
    assert small.config.mlp_only_layers == [2] and small.num_experts == model.num_experts
    assert torch.equal(logits_of(loaded, batch), logits_of(small, batch))


@pytest.mark.parametrize("shape", ["uniform", "blockwise"])
@pytest.mark.parametrize("name", MIXTURES)
def test_removed_experts_are_never_chosen(name, shape, monkeypatch):
    monkeypatch.setattr("mllm_compress.cost.arithmetic.SIDE", 48)
    model = cases.build(name, torch.float32)
    batch, scores = noise_batch(model), width_importance(model, method="random")
    scores.heads.clear(), scores.neurons.clear()  # those of other units: they stay
    protect = None if shape == "uniform" else (3, 0)
    plan = plan_widthwise(model, scores, channel_ratio=0.25, shape=shape, protect=protect)
    small = apply_plan(model, plan)
    assert plan.experts and {len(kept) for kept in plan.experts.values()} == {3}
    assert not plan.heads and not plan.neurons and "3/4" in str(plan)
    with never_chosen(model, plan):
        masked = logits_of(model, batch)
    assert (logits_of(small, batch) - masked).abs().max() < 1e-5 * masked.abs().max()
    lost = sum(plan.meta["sizes"][i]["expert_parameters"] for i in plan.experts)
    assert lm_parameters(model) - lm_parameters(small) == lost
    assert plan.achieved_ratio == lost / lm_parameters(model)
    assert parameter_costs(model).total(plan) == lm_parameters(small)
    back, kind = reloaded(small, plan, batch)
    assert kind == ("stock" if shape == "uniform" else "own format")
    assert (logits_of(back, batch) - logits_of(small, batch)).abs().max() < 1e-6
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_scores_are_those_of_their_definitions():
    model = cases.build("qwen2_moe", torch.float32)
    wide, half = (scoring_memory(model, 9, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert wide == pytest.approx(2 * half, rel=0.02)
    ids = torch.randint(5, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    real = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    batch = {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}
    experts = anatomy(model).routed(2)[1].module
    mask, seen = torch.ones(24, 4, requires_grad=True), {}

    def forward(x, chosen, weights):
        gate, up = torch.einsum("th,enh->ten", x, experts.gate_up_proj).chunk(2, -1)
        y = torch.einsum("ten,ehn->teh", experts.act_fn(gate) * up, experts.down_proj)
        seen["share"] = torch.zeros(len(x), 4).scatter(1, chosen, weights)
        seen["norms"] = y.norm(dim=-1)
        return ((mask * seen["share"])[..., None] * y).sum(1)

    with patch.object(experts, "forward", forward):
        logits = model(ids, attention_mask=real).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        loss = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
        (slope,) = torch.autograd.grad(loss, mask)
    saliency = width_importance(model, [batch], "gauss_newton", of="labels")
    assert saliency.experts[2].allclose(slope.square().sum(0), rtol=1e-3)
    share = seen["share"] * real.flatten()[:, None]
    expected = (share * seen["norms"]).sum(0) / (share > 0).sum(0)
    reap = width_importance(model, [batch], "reap")
    assert reap.experts[2].allclose(expected, rtol=1e-4) and not reap.heads


def test_recipes_and_budgets_remove_experts(tmp_path):
    model = cases.build("mixtral", torch.float32)
    batches = [noise_batch(model, seed, batch=8) for seed in range(4)]
    small, plan = prune(model, batches, ratio=0.3, recipe="uniform")
    assert plan.experts and small.config.num_local_experts == len(plan.experts[0]) == 3
    width_importance(model, batches, "gauss_newton").save(tmp_path)
    again = load_scores(tmp_path)
    options = dict(budget={"parameters": 0.6}, allocation="global")
    plan = plan_widthwise(model, again, **options)
    assert all(len(kept) >= 2 for kept in plan.experts.values()) and plan.experts
    assert abs(1 - lm_parameters(apply_plan(model, plan)) / lm_parameters(model) - 0.4) < 0.05
    first = make_plan(model, experts={1: [0, 2, 3]})
    second = make_plan(apply_plan(model, first), experts={1: [1, 2]})
    assert compose_plans(first, second).experts == {1: (2, 3)}
    with pytest.raises(ValueError, match="experts of layer 1: at least 2 must stay"):
        make_plan(model, experts={1: [0]})


def test_what_has_no_experts():
    with pytest.raises(ValueError, match="reap scores the experts .* llama has none"):
        width_importance(llama := cases.build("llama"), [noise_batch(llama)], "reap")
    grouped = cases.build("glm4_moe", n_group=2, topk_group=1)
    assert anatomy(grouped).units("experts", 2) == 0  # groups must stay equal


def test_the_command_line_removes_experts(tmp_path):
    folder, small = files("mixtral", tmp_path), tmp_path / "small"
    options = ["--data", str(folder / "data.json"), "--samples", "4", "-o", str(small)]
    steps = ["prune", str(folder / "model"), "--ratio", "0.2", "--method", "reap", *options]
    for step in (steps, ["show", small]):
        run(*step)
    rows = facts("cost", small)["rows"]
    rows = {(r["quantity"], r["part"], r["source"]): r["value"] for r in rows}
    assert rows["parameters", "lm", "closed form"] == rows["parameters", "lm", "measured"]
    assert AutoModelForCausalLM.from_pretrained(small).config.num_local_experts == 3
