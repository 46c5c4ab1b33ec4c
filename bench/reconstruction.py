"""Pruning without training: what each part keeps, and the time and memory of the refit.

Two tables. Quality: AVG-% of the shipped models after pruning, for score x allocation x
reconstruction, with nothing trained; calibration is a draw of images with all of their questions.
Cost: the fits of output projections against the straightforward form in the same run, which keeps
the activations of all layers of both models and calls numpy's least squares.

A third table, with `--only smollm2`: a pretrained language model, SmolLM2-135M, perplexity on
three texts of which the last is of a domain that calibration does not have.

    python bench/reconstruction.py [--quick] [--seeds 0 1] [--models tiny-llava] [--only cost]
    python bench/reconstruction.py --only smollm2 [--ratios 0.3 0.45] [--windows 64]
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from machine import facts

from mllm_compress.anatomy.families import anatomy
from mllm_compress.anatomy.streaming import PeakTensors
from mllm_compress.data.batches import Collator
from mllm_compress.data.instructions import InstructionData
from mllm_compress.data.scenes import small_data
from mllm_compress.evaluation.intervals import avg_percent
from mllm_compress.evaluation.scoring import evaluate
from mllm_compress.importance.gauss_newton import gauss_newton
from mllm_compress.importance.influence import block_influence
from mllm_compress.importance.taylor import taylor
from mllm_compress.pruning.allocation import plan_global
from mllm_compress.pruning.plans import plan_layerwise, plan_widthwise
from mllm_compress.pruning.reconstruction import reconstruct
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
SCORES = {
    "taylor": taylor,
    "gauss_newton": gauss_newton,
    "block_influence": block_influence,
}
PLANS = {  # name -> (score, how the budget is allocated)
    "Taylor, same share per layer": (
        "taylor",
        lambda m, s, ratio: plan_widthwise(m, s, ratio=ratio),
    ),
    "Gauss-Newton, global": ("gauss_newton", plan_global),
    "Gauss-Newton, uniform widths": (
        "gauss_newton",
        lambda m, s, ratio: plan_widthwise(m, s, ratio=ratio, shape="uniform"),
    ),
    "block influence, layers": (
        "block_influence",
        lambda m, s, ratio: plan_layerwise(m, s, ratio=ratio),
    ),
}


def questions_apart(entry: dict) -> list:
    "One entry per question, each with the image."
    talk, rows = entry["conversations"], []
    for k in range(0, len(talk), 2):
        ask = talk[k]["value"] if k == 0 else "<image>\n" + talk[k]["value"]
        rows.append(entry | {"conversations": [talk[k] | {"value": ask}, talk[k + 1]]})
    return rows


def calibration(processor, n: int, seed: int, first_only: bool = False, batch_size: int = 64):
    "A draw of images with all of their questions (or the first of each), a question a row."
    data = small_data("train")
    drawn = np.random.default_rng(seed).permutation(len(data))[:n]
    rows = [
        r for i in drawn for r in questions_apart(data.samples[int(i)])[: 1 if first_only else None]
    ]
    apart = InstructionData(rows, data.image_root, data.images)
    collate = Collator(processor, apart, turns="sequential")
    return [
        collate([apart[i] for i in range(s, min(s + batch_size, len(apart)))])
        for s in range(0, len(apart), batch_size)
    ]


def quality_rows(name: str, ratios: list, seeds: list, limit: int, images: int):
    "AVG-% of every plan, before and after reconstruction."
    model, processor = load_model(name)
    scored = lambda m: evaluate(m, processor, limit=limit)
    dense = scored(model)
    for seed in seeds:
        batches, scores, spent = calibration(processor, images, seed), {}, {}
        for score, function in SCORES.items():
            start = time.process_time()
            scores[score] = function(model, batches)
            spent[score] = time.process_time() - start
        for ratio in ratios:
            for label, (score, planner) in PLANS.items():
                try:
                    plan = planner(model, scores[score], ratio=ratio)
                except ValueError as error:
                    print(f"{name} {ratio:.0%} {label}: {error}", flush=True)
                    continue
                small, start = apply_plan(model, plan), time.process_time()
                fitted, report = reconstruct(small, model, batches, plan, return_report=True)
                refit = time.process_time() - start
                about = dict(model=name, ratio=ratio, achieved=plan.achieved_ratio, plan=label)
                about |= dict(seed=seed, images=images, tokens=report.tokens[0], questions=limit)
                for refitted, m, cpu in ((False, small, 0.0), (True, fitted, refit)):
                    percent = avg_percent(scored(m), dense)
                    row = dict(reconstructed=refitted, avg_percent=percent)
                    yield about | row | dict(cpu_s=spent[score] + cpu)


# --- the straightforward form


def trace(model, batches) -> dict:
    "All states, inputs and outputs of the output projections of every layer."
    parts, kept, hooks = anatomy(model), {}, []
    note = lambda key, x: kept.setdefault(key, []).append(x[mask])
    for i, layer in enumerate(parts.layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, a, i=i: note((i, "state"), a[0])))
        for s in (s for s in parts.linears(i) if s.axis == 1):

            def see(_, args, output, key=(i, s.name)):
                note((*key, "in"), args[0])
                note((*key, "out"), output)

            hooks.append(s.module.register_forward_hook(see))
    end = parts.num_layers
    hooks.append(
        parts.final_norm.register_forward_pre_hook(lambda _, a: note((end, "state"), a[0]))
    )
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].bool()
            known = {k: v for k, v in batch.items() if k != "labels"}
            model(**known, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {k: torch.cat(v) for k, v in kept.items()}


def straightforward(small, dense, batches, plan, ridge: float):
    "All activations kept, every fit by numpy's lstsq with rows added for the ridge; no biases."
    small, full = copy.deepcopy(small), trace(dense, batches)
    parts = anatomy(small)
    first, second = (s.name for s in parts.family.slots if s.axis == 1)
    for j, (i, end) in enumerate(zip(plan.layers, [*plan.layers[1:], plan.num_layers])):
        for name in (first, second):
            now = trace(small, batches)
            base = now[j, "state"] + (now[j, first, "out"] if name == second else 0)
            middle = full[i, "state"] + full[i, first, "out"]
            target = full[end, "state"] if name == second else middle
            module = next(s.module for s in parts.linears(j) if s.name == name)
            w = target.square().mean(-1, keepdim=True).rsqrt()
            x, r = now[j, name, "in"] * w, (target - base) * w
            root = (ridge * x.square().sum() / x.shape[1]).sqrt()
            x = torch.cat([x, root * torch.eye(x.shape[1])]).double()
            r = torch.cat([r, root * module.weight.detach().T]).double()
            found = np.linalg.lstsq(x.numpy(), r.numpy(), rcond=None)[0]
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(found.T))
    return small


def cost_row(name: str, images: int, ratio: float) -> dict:
    "CPU seconds and peak bytes of both forms, and how far apart their weights are."
    model, processor = load_model(name)
    batches = calibration(processor, images, 0)
    plan = plan_global(model, gauss_newton(model, batches), ratio)
    small, values, results = apply_plan(model, plan), {}, []
    forms = {
        "ours": lambda: reconstruct(small, model, batches, plan, 0.1, norm=False, inputs=False),
        "rival": lambda: straightforward(small, model, batches, plan, 0.1),
    }
    for form, call in forms.items():
        start = time.process_time()
        results.append(call())
        values[f"{form}_cpu_s"] = time.process_time() - start
        with PeakTensors() as memory:
            call()
        values[f"{form}_bytes"] = memory.peak
    ours, rival = (torch.cat([p.flatten() for p in m.parameters()]) for m in results)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    away = ((ours - rival).norm() / rival.norm()).item()
    return dict(model=name, images=images, tokens=tokens, ratio=ratio, difference=away) | values


# --- a pretrained language model


LM_PLANS = {  # name -> (score, options of plan_widthwise, reconstruct)
    "paper: Taylor, same share": ("taylor", {}, False),
    "the same, reconstructed": ("taylor", {}, True),
    "Fisher, one budget": ("gauss_newton", {"allocation": "global"}, False),
    "Fisher, one budget, reconstructed": ("gauss_newton", {"allocation": "global"}, True),
    "Fisher, equal widths, reconstructed": ("gauss_newton", {"shape": "uniform"}, True),
}


def windows_of(tokenizer, names: tuple, part: str, n: int, batch_size: int = 8) -> list:
    "Batches of windows of 128 tokens of text."
    from mllm_compress.study.texts import text_data

    data = text_data(names, part, tokenizer, window=128)
    collate = Collator(tokenizer, data, turns="sequential", max_length=128)
    rows = [data[i] for i in range(min(n, len(data)))]
    return [collate(rows[k : k + batch_size]) for k in range(0, len(rows), batch_size)]


@torch.inference_mode()
def perplexity(model, batches: list) -> float:
    "Of the supervised tokens of all batches."
    from mllm_compress.evaluation.generation import entry_losses

    parts = [entry_losses(model, batch) for batch in batches]
    return float(np.exp(sum(p[0].sum() for p in parts) / sum(p[1].sum() for p in parts)))


def smollm2_rows(ratios: list, windows: int, tested: int):
    "Perplexity of every plan on every text, nothing trained."
    model, tokenizer = load_model("smollm2-135m")
    model = model.float().eval()
    batches = windows_of(tokenizer, ("glosses", "quotes"), "train", windows)
    texts = {
        n: windows_of(tokenizer, (n,), "test", tested) for n in ("quotes", "glosses", "technical")
    }
    score = lambda m: {name: perplexity(m, found) for name, found in texts.items()}
    about = dict(model="smollm2-135m", windows=windows, tested=tested, seed=0)
    yield (
        about | dict(ratio=0.0, achieved=0.0, plan="dense", cpu_s=0.0, lost_sinks="") | score(model)
    )
    scores, spent = {}, {}
    for name in ("taylor", "gauss_newton"):
        start = time.process_time()
        scores[name] = SCORES[name](model, batches)
        spent[name] = time.process_time() - start
    for ratio in ratios:
        for label, (name, options, refit) in LM_PLANS.items():
            plan = plan_widthwise(model, scores[name], ratio=ratio, **options)
            small, start, said = apply_plan(model, plan), time.process_time(), ""
            if refit:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    small = reconstruct(small, model, batches, plan, inplace=True)
                said = "; ".join(str(w.message).split(":")[0] for w in caught)
            cpu = spent[name] + time.process_time() - start
            row = dict(ratio=ratio, achieved=plan.achieved_ratio, plan=label, cpu_s=cpu)
            yield about | row | dict(lost_sinks=said) | score(small)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images and questions")
    parser.add_argument("--models", nargs="+", default=["tiny-llava", "tiny-bunny"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.45, 0.6, 0.75])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", choices=["quality", "cost", "smollm2"])
    parser.add_argument("--windows", type=int, default=64, help="of calibration text")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    end = "-quick" if args.quick else ""
    images, limit = (8, 10) if args.quick else (64, 300)
    if args.only == "smollm2":
        path, rows = args.out / f"reconstruction-smollm2{end}.csv", []
        for row in smollm2_rows([r for r in args.ratios if r < 0.5], args.windows, 32):
            rows.append(row | facts("cpu"))
            print(
                {k: row[k] for k in ("ratio", "plan", "quotes", "glosses", "technical")}, flush=True
            )
            pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")
        return
    if args.only != "quality":
        rows = [cost_row("tiny-llava", n, 0.6) for n in ([8] if args.quick else [16, 64])]
        frame = pd.DataFrame([row | facts("cpu") for row in rows])
        frame.to_csv(args.out / f"reconstruction-cost{end}.csv", index=False, float_format="%.5g")
        print(frame.iloc[:, :9].to_string())
    if args.only != "cost":
        rows, path = [], args.out / f"reconstruction{end}.csv"
        models, ratios = args.models, args.ratios
        if args.quick:
            models, ratios = models[:1], ratios[1:2]
        for name in models:
            for row in quality_rows(name, ratios, args.seeds, limit, images):
                rows.append(row)
                pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")
        frame = pd.DataFrame(rows)
        keys = ["plan", "reconstructed", "model", "ratio"]
        print(frame.groupby(keys, sort=False).avg_percent.mean().unstack([2, 3]).round(1))


if __name__ == "__main__":
    main()
