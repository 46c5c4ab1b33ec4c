"""Allocation and reconstruction: naive rivals, properties, every family, bad input."""

import copy

import numpy as np
import pytest
import torch
from pruning_cases import build, width_scores

from mllm_compress.anatomy.families import anatomy, lm_parameters
from mllm_compress.importance.scores import WidthScores
from mllm_compress.pruning import reconstruction
from mllm_compress.pruning.allocation import plan_global
from mllm_compress.pruning.plans import plan_layerwise, plan_none, plan_widthwise
from mllm_compress.pruning.pruning_plan import layer_sizes, make_plan
from mllm_compress.pruning.reconstruction import reconstruct
from mllm_compress.pruning.slicing import apply_plan, silence

CASES = ["llama-4x1", "qwen2-3x2", "qwen3-3x2", "phi-4x1", "phi3-3x2", "gemma-3x2"]
ALL_CASES = [*CASES, "gemma3_text-3x2"]  # the last with norms that switch channels off


def random_model(case):
    "A random model of a family; norms behind the projections of Gemma 3 (1 + w) get zeros."
    model = build(case)
    with torch.no_grad():
        for layer in anatomy(model).layers if case.startswith("gemma3") else ():
            layer.post_attention_layernorm.weight[[0, 7]] = -1.0
            layer.post_feedforward_layernorm.weight[[7, 20]] = -1.0
            layer.post_feedforward_layernorm.weight[21] = -0.99  # nearly off
    return model


def text_batches(rows=6, tokens=40, count=2, vocab=64):
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, vocab, (rows, tokens), generator=rng) for _ in range(count)]
    masks = [torch.ones_like(x) for x in ids]
    masks[0][0, -5:] = 0
    return [{"input_ids": x, "attention_mask": m} for x, m in zip(ids, masks)]


@torch.no_grad()
def logits(model, batches):
    return torch.cat([model(**b).logits[b["attention_mask"].bool()] for b in batches])


def projections(model):
    parts = anatomy(model)
    return {(i, s.name): s.module for i in range(parts.num_layers) for s in parts.linears(i)}


def test_the_final_norm_is_fitted_alike_with_padding_on_the_left():
    model, plain = random_model(CASES[0]), text_batches()
    padded = [{k: torch.nn.functional.pad(v, (8, 0)) for k, v in b.items()} for b in plain]
    small = apply_plan(model, plan := plan_layerwise(model, layers=[1]))
    fit = lambda batches: anatomy(reconstruct(small, model, batches, plan, ridge=0.1)).final_norm
    torch.testing.assert_close(fit(plain).weight, fit(padded).weight, atol=1e-4, rtol=1e-4)


# --- a rival with full forward passes, all activations, and numpy's least squares


def naive_trace(model, batches):
    "Layer inputs (the last: input of the final norm), inputs and outputs of the projections."
    parts, states, ins, outs, hooks = anatomy(model), {}, {}, {}, []
    flat = lambda x: x[mask].double().numpy()
    add = lambda d, k, v: d.setdefault(k, []).append(v)
    for i, layer in enumerate(parts.layers):
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, a, kw, i=i: add(states, i, flat(a[0] if a else kw["hidden_states"])),
                with_kwargs=True,
            )
        )
    end = parts.num_layers
    last = lambda _, a: add(states, end, flat(a[0]))
    hooks.append(parts.final_norm.register_forward_pre_hook(last))
    for key, module in projections(model).items():

        def keep(_, args, output, key=key):
            add(ins, key, flat(args[0]))
            add(outs, key, flat(output))

        hooks.append(module.register_forward_hook(keep))
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [{k: np.concatenate(v) for k, v in d.items()} for d in (states, ins, outs)]


def naive_fit(x, target, base, modules, ridge, state=None):
    "Weighted ridge regression towards the present weights, as an augmented lstsq problem."
    w = 1 / np.sqrt(((target if state is None else state) ** 2).mean(1))
    w0 = np.concatenate([m.weight.detach().double().numpy() for m in modules], 1)
    bias = state is None and any(m.bias is not None for m in modules)
    r = target - base
    mx, mr = np.zeros(x.shape[1]), np.zeros(r.shape[1])
    if bias:
        mx, mr = ((w**2)[:, None] * x).sum(0), ((w**2)[:, None] * r).sum(0)
        mx, mr = mx / (w**2).sum(), mr / (w**2).sum()
    a, b = (x - mx) * w[:, None], (r - mr) * w[:, None]
    m = (a**2).sum() / a.shape[1]
    a = np.concatenate([a, np.sqrt(ridge * m) * np.eye(a.shape[1])])
    b = np.concatenate([b, np.sqrt(ridge * m) * w0.T])
    solution = np.linalg.lstsq(a, b, rcond=None)[0].T
    at = 0
    with torch.no_grad():
        for module in modules:
            module.weight.copy_(torch.tensor(solution[:, at : at + module.in_features]))
            at += module.in_features
        if bias:
            rest = sum(m.bias.double().numpy() for m in modules[:-1])
            modules[-1].bias.copy_(torch.tensor(mr - solution @ mx - rest))


def naive_reconstruct(small, dense, batches, plan, ridge, inputs=True):
    small = copy.deepcopy(small)
    parts, (states, reads, outs) = anatomy(small), naive_trace(dense, batches)
    names = [s.name for s in parts.family.slots if s.axis == 1]
    parallel = parts.family.name == "phi"
    for j, (i, end) in enumerate(zip(plan.layers, [*plan.layers[1:], plan.num_layers])):
        for stage in [names] if parallel else [names[:1], names[1:]]:
            now, ins, _ = naive_trace(small, batches)
            kinds = {s.kind for s in parts.writers(j) if s.name in stage}
            readers = [s.name for s in parts.linears(j) if s.axis == 0 and s.kind in kinds]
            for n in readers * inputs:
                module, state = projections(small)[j, n], reads[i, n]
                wanted = state @ module.weight.detach().double().numpy().T
                naive_fit(ins[j, n], wanted, 0, [module], ridge, state)
            now, ins, written = naive_trace(small, batches)
            base = now[j] if stage[0] == names[0] else now[j] + written[j, names[0]]
            last = stage[-1] == names[-1]
            target = states[end] if last else states[i] + outs[i, names[0]]
            x = np.concatenate([ins[j, n] for n in stage], 1)
            naive_fit(x, target, base, [projections(small)[j, n] for n in stage], ridge)
    return small


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_least_squares_on_all_activations(case, inputs):
    model, batches = build(case), text_batches()
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    small = apply_plan(model, plan)
    ours = reconstruct(small, model, batches, plan, ridge=0.1, inputs=inputs)
    rival = naive_reconstruct(small, model, batches, plan, 0.1, inputs)
    for key, module in projections(ours).items():
        other = projections(rival)[key]
        assert module.weight.allclose(other.weight, rtol=1e-6, atol=1e-8)
        assert module.bias is None or module.bias.allclose(other.bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["llama-4x1", "phi-4x1"])
@pytest.mark.parametrize("gone", [[0], [1, 2], [3]])
def test_removed_layers_are_aimed_beyond(case, gone):
    model, batches = build(case), text_batches()
    plan = plan_layerwise(model, layers=gone)
    small = apply_plan(model, plan)
    options = dict(ridge=0.1, norm=False, return_report=True)
    ours, report = reconstruct(small, model, batches, plan, **options)
    rival = naive_reconstruct(small, model, batches, plan, 0.1)
    assert logits(ours, batches).allclose(logits(rival, batches), rtol=1e-5, atol=1e-7)
    assert sorted(set(report.layer)) == list(plan.layers)


# --- properties


@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("ridge", [0.0, 0.1, None])
def test_without_removal_the_weights_come_back(case, ridge):
    model, batches = random_model(case), text_batches(rows=12)
    same = reconstruct(model, model, batches, plan_none(model), ridge=ridge)
    assert logits(same, batches).allclose(logits(model, batches), rtol=1e-5, atol=1e-6)
    for key, module in projections(same).items() if case in CASES else ():  # norms in float32
        assert module.weight.allclose(projections(model)[key].weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ALL_CASES)
def test_units_that_write_nothing_can_go_without_a_trace(case):
    model = random_model(case)
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    model = silence(model, plan)
    batches = text_batches()
    small = reconstruct(apply_plan(model, plan), model, batches, plan)
    assert logits(small, batches).allclose(logits(model, batches), rtol=1e-5, atol=1e-6)


def with_copies(model):
    "The last head group and half of the neurons of every layer become copies of others."
    parts = anatomy(model)
    layers = range(parts.num_layers)
    for slot in (slot for i in layers for slot in parts.linears(i) if slot.axis == 0):
        half = slot.units // 2
        for unit in range(half, slot.units) if slot.kind == "neuron" else [slot.units - 1]:
            rows = slot.index([unit])
            other = slot.index([unit - half if slot.kind == "neuron" else 0])
            for p in (p for p in (slot.module.weight, slot.module.bias) if p is not None):
                p.data[rows] = p.data[other]
    heads = {i: range(parts.groups(i) - 1) for i in layers}
    neurons = {i: range(parts.neurons(i) // 2) for i in layers}
    return model, make_plan(model, heads=heads, neurons=neurons)


@pytest.mark.parametrize("case", ALL_CASES)
def test_copies_are_recovered_exactly(case):
    "The dense layer is linear in what stays: least squares must find it."
    model, plan = with_copies(random_model(case))
    batches, small = text_batches(), apply_plan(model, plan)
    fitted = reconstruct(small, model, batches, plan, ridge=0.0)
    dense = logits(model, batches)
    assert not logits(small, batches).allclose(dense, rtol=1e-2)
    assert logits(fitted, batches).allclose(dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ALL_CASES)
def test_errors_fall_and_outputs_come_nearer(case):
    model, batches = random_model(case), text_batches(rows=12)
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    small = apply_plan(model, plan)
    fitted, report = reconstruct(small, model, batches, plan, return_report=True)
    assert (report.after <= report.before + 1e-6).all()
    assert case not in CASES or (report.held_out < 1).all()  # a norm makes small errors large
    distance = lambda m: (logits(m, batches) - logits(model, batches)).norm()
    assert distance(fitted) < distance(small)


def test_nothing_else_moves_and_the_same_call_gives_the_same_bits():
    model, batches = build("phi-4x1"), text_batches()
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    small = apply_plan(model, plan)
    states = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    first, second = (reconstruct(small, model, batches, plan) for _ in range(2))
    for m, before in zip((model, small), states):
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    changed = {k for k, v in first.state_dict().items() if not torch.equal(v, states[1][k])}
    moved = {".".join(k.split(".")[-2:]) for k in changed}
    names = ("dense", "fc2", "final_layernorm", "q_proj", "k_proj", "v_proj", "fc1")
    assert moved == {f"{n}.weight" for n in names} | {"fc2.bias", "final_layernorm.bias"}
    alone = reconstruct(small, model, batches, plan, norm=False).model.final_layernorm
    assert torch.equal(alone.weight, small.model.final_layernorm.weight)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert reconstruct(small, model, batches, plan, inplace=True) is small
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_in_float32(dtype):
    model, batches = build("llama-4x1", dtype=torch.float32), text_batches()
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    full = reconstruct(apply_plan(model, plan), model, batches, plan, ridge=0.1)
    model = copy.deepcopy(model).to(dtype)
    half = reconstruct(apply_plan(model, plan), model, batches, plan, ridge=0.1)
    for one, other in zip(projections(half).values(), projections(full).values()):
        assert one.weight.dtype == dtype
        assert (one.weight.float() - other.weight).norm() < 0.1 * other.weight.norm()


def test_attention_sinks_do_not_take_over():
    "One position a thousand times longer than the others must not decide the fit."
    model, batches = build("llama-4x1"), text_batches()
    with torch.no_grad():
        anatomy(model).embed_tokens.weight[3] *= 1000
    for batch in batches:
        batch["input_ids"][:, 0] = 3
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    _, report = reconstruct(apply_plan(model, plan), model, batches, plan, return_report=True)
    writes = report[report.projection.isin(["o", "down"])]
    assert (writes.after < writes.before).mean() > 0.7


def test_removing_what_writes_a_sink_is_reported():
    "Neuron 7 of layer 1 fires on token 3 and writes a state far longer than all others."
    model, batches = build("llama-4x1"), text_batches()
    parts = anatomy(model)
    with torch.no_grad():
        direction = parts.embed_tokens.weight[3] / parts.embed_tokens.weight[3].norm()
        parts.embed_tokens.weight[3] *= 30
        for slot in parts.linears(1):
            if slot.kind == "neuron" and slot.axis == 0:
                slot.module.weight[7] = 5 * direction
            elif slot.kind == "neuron":
                slot.module.weight[:, 7] = 300.0
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 3] = 4
        batch["input_ids"][:, 0] = 3
    with pytest.warns(UserWarning, match="sinks are lost from layer 1"):
        rest = make_plan(model, neurons={1: [u for u in range(40) if u != 7]})
        reconstruct(apply_plan(model, rest), model, batches, rest, ridge=1.0)


@pytest.mark.parametrize("case", ["llama-4x1", "phi-4x1", "gemma3_text-3x2"])
def test_parts_of_rows_and_states_in_files_change_nothing(case, monkeypatch):
    model, batches = random_model(case), text_batches(rows=12)
    batches[0]["attention_mask"][:, -5:] = 0
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    small, how = apply_plan(model, plan), dict(ridge=0.1, return_report=True)
    together = reconstruct(small, model, batches, plan, **how)
    monkeypatch.setattr(reconstruction, "ROWS", 1)
    monkeypatch.setattr(reconstruction.scores, "free_memory", lambda device: 0)
    apart = reconstruct(small, model, batches, plan, **how)
    assert (together[1].tokens == apart[1].tokens).all() and together[1].tokens[0] == 900
    for a, b in zip(together[0].parameters(), apart[0].parameters()):
        assert a.allclose(b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama-4x1", "cohere-4x1"])  # the second subtracts the mean
def test_the_norm_is_fitted_by_regression_of_each_channel(name):
    model, batches = build(name), text_batches()
    batches = [b | {"labels": torch.full_like(b["input_ids"], -100)} for b in batches]
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    fit = lambda norm: reconstruct(apply_plan(model, plan), model, batches, plan, 0.1, norm)

    def normed(m):
        found = []
        hook = anatomy(m).final_norm.register_forward_hook(lambda _, a, out: found.append(out))
        logits(m, [{k: v for k, v in b.items() if k != "labels"} for b in batches])
        hook.remove()
        return torch.cat([f[b["attention_mask"].bool()] for f, b in zip(found, batches)])

    f, g = normed(fit(False)).detach(), normed(model).detach()
    gain = (f * g).sum(0) / f.square().sum(0)
    assert normed(fit(True)).allclose(f * gain, rtol=1e-4, atol=1e-5)


# --- bad input


def test_bad_input_says_what_to_do():
    model, batches = build("llama-4x1"), text_batches()
    plan = plan_widthwise(model, width_scores(model), ratio=0.25)
    small = apply_plan(model, plan)
    other, few = build("qwen2-3x2"), [{"input_ids": torch.arange(3, 33)[None]}]
    for args, kw, words in (
        ((small, model, [], plan), {}, "no calibration batches"),
        ((small, model, few, plan), {}, "more than 72 tokens are needed"),
        ((small, other, batches, plan), {}, "this plan was made for"),
        ((model, model, batches, plan), {}, "does not describe this model"),
        ((small, model, batches, plan), dict(ridge=-1), "at least 0"),
        ((small, model, text_batches(rows=2, count=1), plan), {}, "at least 4 samples"),
    ):
        with pytest.raises(ValueError, match=words):
            reconstruct(*args, **kw)
    done = reconstruct(small, model, batches, plan)
    with pytest.raises(ValueError, match="already reconstructed"):
        reconstruct(done, model, batches, plan)
    alike = [{k: v[:1].repeat(6, 1) for k, v in batches[1].items()}]
    with pytest.raises(ValueError, match="singular"):
        reconstruct(small, model, alike, plan, ridge=0.0)
    with torch.no_grad():
        small.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        reconstruct(small, model, batches, plan)


# --- allocation


def global_reference(model, scores, ratio, standardize=False):
    "Units one at a time, cheapest first, in plain loops; stops as near the target as it can."
    sizes, total, removed = layer_sizes(model), lm_parameters(model), 0
    units = []
    for i, s in enumerate(sizes):
        kinds = ("heads", s.head_parameters, 1), ("neurons", s.neuron_parameters, 8)
        for kind, price, floor in kinds:
            values = getattr(scores, kind)[i].tolist()
            cheapest = sorted(range(len(values)), key=lambda u: (values[u], u))
            worth = deviations(values) if standardize else [v / price for v in values]
            units += [(worth[u], i, kind, u, price) for u in cheapest[: len(values) - floor]]
    gone = set()
    for _, i, kind, u, price in sorted(units):
        if abs(removed + price - ratio * total) >= abs(removed - ratio * total):
            break
        gone.add((kind, i, u))
        removed += price
    return gone, removed / total


@pytest.mark.parametrize("case", ["llama-4x1", "phi3-3x2", "tiny-bunny"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.45])
@pytest.mark.parametrize("standardize", [False, True])
def test_rankings_equal_plain_loops(case, ratio, standardize):
    scores = width_scores(model := build(case))
    gone, achieved = global_reference(model, scores, ratio, standardize)
    plan = plan_global(model, scores, ratio, allocation="standardized" if standardize else "global")
    cut = {(k, i, u) for k in ("heads", "neurons") for i in plan.layers for u in plan.removed(k, i)}
    assert cut == gone and plan.achieved_ratio == pytest.approx(achieved)
    small = apply_plan(model, plan)
    assert 1 - lm_parameters(small) / lm_parameters(model) == pytest.approx(achieved)


def deviations(values):
    "How many standard deviations below or above the mean."
    v = np.array(values)
    return ((v - v.mean()) / v.std()).tolist() if v.std() > 0 else [0.0] * len(v)


def test_floors_rounding_nesting_and_scale():
    scores = width_scores(model := build("qwen2-3x2"))
    plans = [plan_global(model, scores, r) for r in (0.1, 0.3, 0.5)]
    assert plans[1] <= plans[0] and plans[2] <= plans[1]
    times = lambda scores, factor: {i: v * factor for i, v in scores.items()}
    low = WidthScores(times(scores.heads, 1e-9), scores.neurons, "x", {})
    assert all(len(v) == 1 for v in plan_global(model, low, 0.6).heads.values())
    flat = WidthScores(scores.heads, times(scores.neurons, 1e-9), "x", {})
    assert all(len(v) == 8 for v in plan_global(model, flat, 0.5).neurons.values())
    rounded = plan_global(model, scores, 0.3, round_to=16)
    assert all(len(v) % 16 == 0 for v in rounded.neurons.values())
    assert abs(rounded.achieved_ratio - 0.3) < 0.02
    scaled = WidthScores(times(scores.heads, 7.0), times(scores.neurons, 7.0), "x", {})
    assert plan_global(model, scaled, 0.3).neurons == plans[1].neurons


def test_global_allocation_refuses_bad_input():
    scores = width_scores(model := build("llama-4x1"))
    for args, kw, words in (
        ((model, scores, 1.2), {}, "outside"),
        ((model, scores, 0.94), {}, "cannot be reached"),
        ((build("qwen2-3x2"), scores, 0.3), {}, "score this model itself"),
        ((model, scores, 0.3), dict(round_to=0), "round_to must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            plan_global(*args, **kw)
