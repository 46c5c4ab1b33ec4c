"""Scores: golden cases, independent re-implementations, invariances, frugality, bad input."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mllm_compress.anatomy.families import anatomy
from mllm_compress.importance import (
    LayerScores,
    WidthScores,
    angular_distance,
    block_influence,
    load_scores,
    scoring_memory,
    width_importance,
)
from mllm_compress.importance.criteria import magnitude
from mllm_compress.importance.taylor import ORDERS, taylor

FAMILIES = ["llama", "qwen2", "phi", "phi3"]


def text_batch(rows=3, tokens=12, vocab=64, seed=0):
    ids = torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_batch(model, rows=2, words=8, answers=3, seed=0):
    "16 image tokens, some words, the last of which are supervised."
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 60, (rows, words), generator=generator)
    ids = torch.cat([torch.full((rows, 16), model.config.image_token_id), text], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 64, 64, generator=generator),
        "labels": ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - answers, -100),
    }


def padded(batch, extra, side):
    pad = (extra, 0) if side == "left" else (0, extra)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        k: torch.nn.functional.pad(v, pad, value=fill[k]) if k in fill else v
        for k, v in batch.items()
    }


def rows_of(batch):
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]


def close(a, b, **kw):
    return all(
        a.heads[i].allclose(b.heads[i], **kw) and a.neurons[i].allclose(b.neurons[i], **kw)
        for i in a.heads
    )


def by_autograd(model, batch, labels, order, share=1, sample_share=1):
    "Ma et al. 2023 with all gradients held, and one backward pass per sample for the curvature."
    model = copy.deepcopy(model).eval().requires_grad_(True)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    curvature = {}
    for b in range(len(labels)):
        model.zero_grad()
        one = {k: v[b : b + 1] for k, v in inputs.items()}
        model(**one, labels=labels[b : b + 1]).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                curvature[name] = curvature.get(name, 0) + p.grad**2 / len(labels)
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    curvature = {id(p): curvature[n] for n, p in model.named_parameters() if n in curvature}
    parts, heads, neurons = anatomy(model), {}, {}
    for i in range(parts.num_layers):
        heads[i], neurons[i] = torch.zeros(parts.groups(i)), torch.zeros(parts.neurons(i))
        for slot in parts.linears(i):
            w = slot.module.weight.detach()
            first = share * w * slot.module.weight.grad
            second = sample_share * w * w * curvature[id(slot.module.weight)]
            salience = {
                "vectorize": first,
                "param_first": first,
                "param_second": second,
                "param_mix": first - 0.5 * second,
            }[order]
            salience = salience if order == "vectorize" else salience.abs()
            channel = salience.sum(1 - slot.axis).abs()
            into = heads[i] if slot.kind == "head" else neurons[i]
            for u in range(len(into)):
                into[u] += channel[slot.index([u])].sum()
    return WidthScores(heads, neurons, "autograd", {"loss": float(loss)})


# --- golden cases -------------------------------------------------------------------------------


def test_reference_block_influence_is_the_original(golden):
    folder = golden / "layerwise_llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    tensors = load_file(folder / "calibration.safetensors")
    expected = json.loads((folder / "expected.json").read_text())
    rows = lambda tensor, dims: tensor.reshape(-1, *tensor.shape[-dims:])
    samples = [
        {k: rows(tensors[f"{i}.{k}"], d) for k, d in (("input_ids", 1), ("pixel_values", 3))}
        for i in range(expected["n_samples"])
    ]
    scores = block_influence(model, samples, mode="reference")
    assert scores.values.allclose(torch.tensor(expected["block_influence_sum"]), rtol=1e-5)
    assert scores.values.argsort()[:4].tolist() == expected["removed_4"] == [8, 11, 10, 9]


# --- Taylor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
def test_taylor_equals_autograd_in_every_family_with_grouped_queries(tiny_lm, family, order):
    model, batch = tiny_lm(family, layers=2), text_batch()
    labels = batch["input_ids"].clone()
    labels[0, :5], labels[1, :9] = -100, -100  # samples of different weight
    ours = taylor(model, [batch | {"labels": labels}], order=order, mode="reference")
    theirs = by_autograd(model, batch, labels, order)
    assert close(ours, theirs, rtol=1e-3, atol=1e-9)
    assert abs(ours.meta["loss"] - theirs.meta["loss"]) < 1e-5
    apart = taylor(model, rows_of(batch | {"labels": labels}), order=order)
    assert abs(apart.meta["loss"] - theirs.meta["loss"]) < 1e-5
    assert close(apart, theirs, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("fixture", ["tiny_llava", "tiny_bunny"])
@pytest.mark.parametrize("order", ["param_first", "param_mix"])
def test_taylor_equals_autograd_inside_an_mllm(request, fixture, order):
    model = request.getfixturevalue(fixture)[0]
    batch = image_batch(model)
    theirs = by_autograd(model, batch, batch["labels"], order)
    for batches in ([batch], rows_of(batch)):
        ours = taylor(model, batches, order=order)
        assert close(ours, theirs, rtol=1e-3, atol=1e-9), len(batches)


@pytest.mark.parametrize("order", ORDERS)
def test_scores_do_not_depend_on_the_batch_size(tiny_llava, order):
    model = tiny_llava[0]
    a, b = image_batch(model, rows=2), image_batch(model, rows=1, words=5, answers=1, seed=1)
    late = padded({k: v for k, v in b.items()}, 3, "right")
    whole = taylor(model, [{k: torch.cat([a[k], late[k]]) for k in a}], order=order)
    parted = taylor(model, [a, b], order=order)
    assert abs(whole.meta["loss"] - parted.meta["loss"]) < 1e-5
    assert close(whole, parted, rtol=1e-3, atol=1e-9)
    joined = [{k: torch.cat([a[k], late[k]]) for k in a}]
    once = taylor(model, joined, order=order, mode="reference")
    assert close(once, whole, rtol=1e-3, atol=1e-9)


def test_states_of_a_large_calibration_go_to_files(tiny_llava, monkeypatch):
    model, files = tiny_llava[0], []
    batches = [image_batch(model, seed=seed) for seed in range(2)]
    in_memory = taylor(model, batches)
    monkeypatch.setattr("mllm_compress.importance.scores.free_memory", lambda device: 0)
    monkeypatch.setattr("mllm_compress.importance.scores.check_disk", lambda *a: files.append(a))
    assert close(taylor(model, batches), in_memory, rtol=0, atol=0) and len(files) == 1


def test_scoring_touches_nothing(tiny_llava):
    model = copy.deepcopy(tiny_llava[0]).train()
    model.model.vision_tower.eval().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def flags():
        hooks = lambda m: len(m._forward_hooks) + len(m._forward_pre_hooks)
        modules = [(m.training, hooks(m), "forward" in m.__dict__) for m in model.modules()]
        return modules, [p.requires_grad for p in model.parameters()]

    flags_before, batch = flags(), image_batch(model)
    taylor(model, [batch], recompute=True)
    block_influence(model, [batch])
    angular_distance(model, [batch], 2)
    for method in ("activation", "gauss_newton"):
        width_importance(model, [batch], method)
    with pytest.raises(ValueError):
        taylor(model, [batch | {"pixel_values": batch["pixel_values"] * float("nan")}])
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert flags() == flags_before and all(p.grad is None for p in model.parameters())


# --- block influence ----------------------------------------------------------------------------


def from_hidden_states(model, batch):
    "All states held, for comparison: [layers + 1] tensors before the final norm."
    states, parts = {}, anatomy(model)
    hook = parts.final_norm.register_forward_hook(lambda _, args, out: states.update(last=args[0]))
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    hook.remove()
    return [*out.hidden_states[: parts.num_layers], states["last"]]


@pytest.mark.parametrize("fixture", ["tiny_llava", "tiny_bunny"])
def test_block_influence_is_the_mean_over_tokens_then_samples(request, fixture):
    model = request.getfixturevalue(fixture)[0]
    long, short = image_batch(model, rows=1, words=20), image_batch(model, rows=1, words=4, seed=1)
    expected = torch.zeros(4)
    for batch in (long, short):
        h = from_hidden_states(model, batch)
        change = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(h, h[1:])]
        expected += torch.stack(change) / 2
    assert block_influence(model, [long, short]).values.allclose(expected, atol=1e-5)
    together = {k: torch.cat([long[k], padded(short, 16, "right")[k]]) for k in long}
    assert block_influence(model, [together]).values.allclose(expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_noticed(tiny_lm, family, side):
    model, batch = tiny_lm(family), text_batch()
    more = padded(batch, 7, side)
    if side == "left":
        more["position_ids"] = (more["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for score in (
        lambda b: block_influence(model, [b]).values,
        lambda b: angular_distance(model, [b], 2).values,
        lambda b: width_importance(model, [b], "activation").neurons[1],
        lambda b: taylor(model, [b]).neurons[1],
    ):
        assert score(more).allclose(score(batch), rtol=1e-3, atol=1e-6)


def test_angular_distance_is_the_mean_angle(tiny_lm):
    model, batch = tiny_lm("mistral"), text_batch()
    h = from_hidden_states(model, batch)
    cosine = torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in zip(h, h[3:])])
    angle = torch.arccos(cosine) / torch.pi
    assert angular_distance(model, [batch], 3).values.allclose(angle.mean((1, 2)), atol=1e-4)
    for same in (batch, padded(batch, 4, "right")):
        last = angular_distance(model, [same], 3, tokens="last").values
        assert last.allclose(angle[..., -1].mean(1), atol=1e-4)


# --- baselines and files ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_baselines(tiny_lm, family):
    model, batch = tiny_lm(family), text_batch()
    parts, sizes = anatomy(model), magnitude(model, p=1)
    for i in (0, 3):
        for u in range(parts.groups(i)):
            total = sum(
                s.module.weight.abs().index_select(s.axis, s.index([u])).sum()
                for s in parts.linears(i)
                if s.kind == "head"
            )
            assert sizes.heads[i][u].allclose(total, rtol=1e-4)
    outputs = {}
    for s in parts.writers(2):
        s.module.register_forward_pre_hook(lambda _, a, k=s.kind: outputs.update({k: a[0].clone()}))
    scores = width_importance(model, [batch], "activation")
    squares = {kind: x.square() for kind, x in outputs.items()}
    squares["head"] = squares["head"].unflatten(-1, (2, -1)).sum(-1)
    assert scores.neurons[2].allclose(squares["neuron"].mean((0, 1)).sqrt(), rtol=1e-4)
    assert scores.heads[2].allclose(squares["head"].mean((0, 1)).sqrt(), rtol=1e-4)
    random = [width_importance(model, method="random", seed=s) for s in (3, 3, 4)]
    assert close(random[0], random[1]) and not close(random[0], random[2])


# --- bad input ----------------------------------------------------------------------------------

B = text_batch()
masked = lambda mask: B | {"attention_mask": mask}
NO_LABELS = B | {"labels": torch.full_like(B["input_ids"], -100)}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: taylor(m, []), "no calibration batches"),
        (lambda m: block_influence(m, iter(())), "no calibration batches"),
        (lambda m: block_influence(m, B), r"write \[batch\]"),
        (lambda m: taylor(m, None), "list of dicts"),
        (lambda m: taylor(m, [{"pixel_values": B["input_ids"]}]), "no input_ids"),
        (lambda m: taylor(m, [{"input_ids": [[1, 2]]}]), "no input_ids as a tensor"),
        (lambda m: taylor(m, [{"input_ids": torch.zeros(0, 4, dtype=torch.long)}]), "not empty"),
        (lambda m: taylor(m, [B | {"labels": B["input_ids"][:, :5]}]), "labels is"),
        (lambda m: block_influence(m, [masked(torch.ones(3, 1, 12, 12))]), "attention_mask is"),
        (lambda m: taylor(m, [NO_LABELS]), "no answer token"),
        (lambda m: taylor(m, [B], order="third"), "param_first, param_second, param_mix"),
        (lambda m: taylor(m, [B], mode="exact"), "default, reference"),
        (lambda m: block_influence(m, [B], mode="sum"), "default, reference"),
        (lambda m: block_influence(m, [masked(0 * B["input_ids"])]), "is all padding"),
        (lambda m: taylor(m, [B, text_batch(2, 9)], mode="reference"), "one length"),
        (lambda m: angular_distance(m, [B], 0), "1 to 4 layers"),
        (lambda m: angular_distance(m, [B], 5), "1 to 4 layers"),
        (lambda m: angular_distance(m, [B], 2, tokens="first"), "all, last"),
        (lambda m: width_importance(m, [B], "fisher"), "taylor, magnitude, activation, random"),
        (lambda m: width_importance(m, [B], "random", order="param_mix"), "no option 'order'"),
        (lambda m: magnitude(m, p=0), "power above 0"),
        (lambda m: scoring_memory(m, method="magnitude"), "taylor, block_influence"),
        (lambda m: LayerScores([1.0, float("inf")], "x"), "not finite"),
        (lambda m: LayerScores([], "x"), "list of numbers"),
        (lambda m: load_scores("nowhere"), "no scores in nowhere"),
    ],
)
def test_bad_input_is_named(tiny_lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_lm("llama"))


def test_an_mllm_needs_labels_and_a_nan_is_found(tiny_llava, tiny_lm):
    model = tiny_llava[0]
    batch = image_batch(model)
    with pytest.raises(ValueError, match="no labels"):
        taylor(model, [{k: v for k, v in batch.items() if k != "labels"}])
    broken = copy.deepcopy(tiny_lm("llama"))
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="calibration loss is nan"):
        taylor(broken, [text_batch()])
    with pytest.raises(ValueError, match="block_influence: the scores at"):
        block_influence(broken, [text_batch()])
