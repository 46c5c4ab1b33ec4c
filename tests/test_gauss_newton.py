"""Gauss-Newton saliency: a rival that masks units one token at a time, invariances, bad input."""

import copy
import sys

import pytest
import torch
from pruning_cases import build
from pruning_cases import inputs as two_prompts
from test_importance import close, padded

from mllm_compress.anatomy.families import anatomy
from mllm_compress.importance.gauss_newton import PRESERVED, gauss_newton

CASES = ["llama-4x1", "qwen2-3x2", "qwen3-3x2", "phi-4x1", "phi3-3x2", "gemma-3x2"]


def text_batch(rows=3, tokens=12, answers=4, vocab=64, seed=0):
    ids = torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(tokens) < tokens - answers, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def same(a, b):
    return close(a, b, rtol=0, atol=0)


def masked_states(model, batch, masks):
    "Final normed states with each unit of each token scaled by a mask of ones."
    parts, found, hooks = anatomy(model), [], []
    for (i, name), mask in masks.items():
        slot = next(s for s in parts.linears(i) if s.name == name)

        def scale(_, args, mask=mask, width=sum(slot.widths)):
            return (args[0] * mask.repeat_interleave(width, -1),)

        hooks.append(slot.module.register_forward_pre_hook(scale))
    hooks.append(parts.final_norm.register_forward_hook(lambda _, a, out: found.append(out)))
    model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    for hook in hooks:
        hook.remove()
    where = batch["labels"].roll(-1, 1) != -100
    where[:, -1] = False
    return found[0][where]


def mask_gradients(model, batch, of_states):
    "Gradient of a function of the states with respect to a mask on every unit and token."
    parts = anatomy(model)
    masks = {
        (i, s.name): torch.ones(
            *batch["input_ids"].shape, s.units, dtype=model.dtype, requires_grad=True
        )
        for i in range(parts.num_layers)
        for s in parts.writers(i)
    }
    value = of_states(masked_states(model, batch, masks))
    return dict(zip(masks, torch.autograd.grad(value, list(masks.values()))))


def naive(model, batch, of_states):
    "Squared gradients, summed over tokens, by (layer, kind)."
    kinds = {s.name: s.kind for s in anatomy(model).linears(0)}
    found = mask_gradients(model, batch, of_states)
    return {(i, kinds[n]): g.square().sum((0, 1)).float() for (i, n), g in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_squared_gradients_of_masks(case):
    model, batch = build(case), text_batch()
    targets = batch["labels"][batch["labels"] != -100]
    cross_entropy = torch.nn.functional.cross_entropy
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(12, model.config.hidden_size, generator=rng).double()
    rival = naive(model, batch, lambda f: (v * f).sum())
    ours = gauss_newton(model, [batch], of="states")
    for i, k in rival:
        assert getattr(ours, f"{k}s")[i].allclose(rival[i, k], rtol=1e-4)
    head = anatomy(model).lm_head
    rival = naive(model, batch, lambda f: cross_entropy(head(f), targets, reduction="sum"))
    ours = gauss_newton(model, [batch], of="labels")
    for i, k in rival:
        assert getattr(ours, f"{k}s")[i].allclose(rival[i, k], rtol=1e-4)


def test_draws_average_to_the_squared_jacobian():
    model, batch = build("qwen2-3x2"), text_batch(rows=1, answers=2)
    size = 2 * model.config.hidden_size
    rows = [naive(model, batch, lambda f, k=k: f.flatten()[k]) for k in range(size)]
    ours = gauss_newton(model, [batch], of="states", draws=400)
    for i, k in rows[0]:
        exact = sum(r[i, k] for r in rows)
        assert getattr(ours, f"{k}s")[i].allclose(exact, rtol=0.35)
        assert getattr(ours, f"{k}s")[i].sum().allclose(exact.sum(), rtol=0.1)


@pytest.mark.parametrize("of", PRESERVED)
def test_units_that_write_nothing_score_zero(of):
    model = build("phi3-3x2")
    with torch.no_grad():
        for slot in anatomy(model).writers(2):
            slot.module.weight[:, slot.index([1])] = 0
    scores = gauss_newton(model, [text_batch()], of=of)
    assert scores.heads[2][1] == 0 == scores.neurons[2][1]
    assert scores.heads[2][0] > 0 < scores.neurons[2][0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, batch = build("qwen2-3x2"), text_batch()
    longer = padded(batch, 3, side)
    if side == "left":
        longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for of in ("states", "labels"):
        a, b = gauss_newton(model, [batch], of=of), gauss_newton(model, [longer], of=of)
        assert close(a, b, rtol=1e-4)


def test_micro_batches_add_up_and_the_same_seed_gives_the_same_bits():
    model, batch = build("llama-4x1"), text_batch(rows=4)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    whole = gauss_newton(model, [batch], of="states", draws=2)
    assert close(whole, gauss_newton(model, rows, of="states", draws=2), rtol=1e-5)
    assert same(whole, gauss_newton(model, [batch], of="states", draws=2))
    assert not same(whole, gauss_newton(model, [batch], of="states", draws=2, seed=1))
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for mixed in ([empty, batch], [batch, empty]):
        assert gauss_newton(model, mixed).meta["of"] == "labels"
        assert close(whole, gauss_newton(model, mixed, of="states", draws=2), rtol=1e-5)
    labels = gauss_newton(model, [batch], of="labels")
    assert same(labels, gauss_newton(model, [batch], of="labels", seed=1))
    assert gauss_newton(model, [batch]).meta["of"] == "labels"  # where the loss is large


def test_the_mean_loss_decides_whatever_the_first_batch_says(monkeypatch):
    model, rows = build("llama-4x1"), [text_batch(rows=1, seed=seed) for seed in range(6)]
    rows.sort(key=lambda row: gauss_newton(model, [row]).meta["loss"])
    first, mean = (gauss_newton(model, part).meta["loss"] for part in (rows[:1], rows))
    module = sys.modules["mllm_compress.importance.gauss_newton"]
    monkeypatch.setattr(module, "CONFIDENT", (first + mean) / 2)  # the first row is confident
    assert gauss_newton(model, rows[:1]).meta["of"] == "states"
    assert same(gauss_newton(model, rows), gauss_newton(model, rows, of="labels"))


def test_recomputed_activations_give_the_same_scores():
    model, batch = build("phi-4x1"), text_batch()
    kw = dict(of="states", draws=2)
    assert close(
        gauss_newton(model, [batch], **kw), gauss_newton(model, [batch], recompute=True, **kw)
    )


def test_multimodal_models_and_half_precision(tiny_llava):
    model = copy.deepcopy(tiny_llava[0])
    batch = two_prompts(model)
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(24) < 21, -100)
    full = gauss_newton(model, [batch], of="states")
    assert full.meta["answer_tokens"] == 6 and full.meta["samples"] == 2
    half = gauss_newton(model.to(torch.bfloat16), [batch], of="states")
    pair = torch.stack([torch.cat([*s.neurons.values()]).log() for s in (full, half)])
    assert pair.corrcoef()[0, 1] > 0.98
    del batch["labels"]
    with pytest.raises(ValueError, match="labels"):
        gauss_newton(model, [batch])


def test_bad_input_says_what_to_do():
    model, batch = build("llama-4x1"), text_batch()
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for kw, batches, words in (
        (dict(of="answers"), [batch], "use one of auto, states, logits, labels"),
        (dict(draws=0), [batch], "at least one draw"),
        ({}, [], "no calibration batches"),
        ({}, batch, r"write \[batch\]"),
        ({}, [unlabelled], "Mark answers in `labels`"),
    ):
        with pytest.raises(ValueError, match=words):
            gauss_newton(model, batches, **kw)
    with torch.no_grad():
        anatomy(model).linears(0)[0].module.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN in the weights"):
        gauss_newton(model, [batch])
