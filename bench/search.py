"""A searched plan beside the recipes, at equal parameters and at equal seconds per token.

SmolLM2-135M in float32, one draw of calibration windows for everything, nothing trained. Two
budgets: 70 % of the parameters, and the seconds per decoded token that removing 30 % of the
parameters as whole layers leaves (by a table of unit costs, measured here). Each plan is refitted
on all calibration windows, so the held-out part of a search is no advantage and no loss. Quality
is perplexity and KL to the dense model on windows of the calibration's kinds that nothing was
fitted to, and on a manual, a kind of text that calibration does not have.

    python bench/search.py [--quick] [--minutes 5] [--windows 64] [--seed 0] [--work FOLDER]

With --work, scores, tables and searches are kept there, and a run that was cut off continues.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from machine import facts, text
from torch.nn.functional import cross_entropy, kl_div

from mllm_compress.anatomy.families import anatomy
from mllm_compress.cost.timing import unit_seconds
from mllm_compress.data.calibration import calibration_batches
from mllm_compress.importance.criteria import measure
from mllm_compress.importance.scores import load_scores
from mllm_compress.importance.taylor import answer_states
from mllm_compress.pruning.allocation import load_costs, parameter_costs
from mllm_compress.pruning.plans import plan_layerwise, plan_none, plan_widthwise
from mllm_compress.pruning.reconstruction import reconstruct
from mllm_compress.pruning.search import search
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.study.texts import text_data

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
KINDS = {"same": text.TEXTS, "foreign": ("technical",)}  # of held-out text
RATIO = 0.3


def test_batches(tokenizer, windows: int) -> dict:  # kind -> batches
    "Held-out windows of each kind."
    return {
        kind: calibration_batches(
            text_data(names, "test", tokenizer, text.WINDOW),
            tokenizer,
            n=windows,
            batch_size=8,
            max_length=text.WINDOW,
        )
        for kind, names in KINDS.items()
    }


@torch.inference_mode()
def final_states(model, batches: list) -> list:  # of (states, tokens that they predict)
    "Normed final states of every predicted token."
    return [answer_states(anatomy(model), batch, batch["labels"]) for batch in batches]


@torch.inference_mode()
def quality(model, dense, batches: list, reference: list) -> dict:
    "Perplexity, and mean KL from the dense model, over all predicted tokens."
    sums = torch.zeros(3, dtype=torch.float64)  # loss, KL, tokens
    pairs = zip(final_states(model, batches), reference)
    for (states, targets), (dense_states, _) in pairs:
        parts = (x.split(256) for x in (states, dense_states, targets))
        for ours, theirs, labels in zip(*parts):
            q = anatomy(model).logits(ours).log_softmax(-1)
            p = anatomy(dense).logits(theirs).log_softmax(-1)
            loss = cross_entropy(q, labels, reduction="sum")
            kl = kl_div(q, p, reduction="sum", log_target=True)
            sums += torch.tensor([loss.item(), kl.item(), len(labels)])
    return {"perplexity": math.exp(sums[0] / sums[2]), "kl": (sums[1] / sums[2]).item()}


def kept(path: Path, load, make):
    "What a file of an earlier run holds, or what is made and saved there."
    if not path.exists():
        make().save(path)
    return load(path)


def recipes(model, layers, units, budget: dict, costs) -> dict:  # name -> (plan, its origin)
    "The fixed plans of a budget, and what a search calls them."
    share, order = next(iter(budget.values())), dict(allocation="global")
    order |= dict(budget=budget, costs=costs)
    dense, n = costs.total(plan_none(model)), 0
    while costs.total(by_layers := plan_layerwise(model, layers, n_layers=n)) > share * dense:
        n += 1
    half, by = plan_layerwise(model, layers, n_layers=round(n / 2)), units.kind
    recommended = plan_widthwise(model, units, **order)
    half = plan_widthwise(model, units, base=half, **order)
    return {
        "recommended": (recommended, f"one ranking by {by}"),
        "whole layers": (by_layers, f"{n} whole layers"),
        "half by layers": (half, f"{round(n / 2)} layers, then {by} over all"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few windows: checks the script")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--tests", type=int, default=16, help="windows of each kind of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", nargs="+", default=["parameters", "latency"])
    parser.add_argument("--work", type=Path, help="keeps what takes long")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if missing := text.missing():
        return print(f"nothing measured: {missing}")
    torch.set_num_threads(1)
    windows, tests = (24, 2) if args.quick else (args.windows, args.tests)
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = text.load()
    batches = text.calibration(tokenizer, args.seed, windows)
    score = lambda kind, method: lambda: measure(kind, method, model, batches)
    scores = {
        name: kept(work / f"{name}-{windows}-{args.seed}", load_scores, score(kind, name))
        for kind, name in (("layerwise", "block_influence"), ("widthwise", "gauss_newton"))
    }
    layers, units = scores.values()
    prompt = {"input_ids": torch.full((1, 64), 5)}
    seconds = kept(work / "seconds.json", load_costs, lambda: unit_seconds(model, prompt))
    tables = {"parameters": parameter_costs(model), "latency": seconds}
    whole = plan_layerwise(model, layers, ratio=RATIO)
    shares = {"parameters": 1 - RATIO}
    shares["latency"] = seconds.total(whole) / seconds.total(plan_none(model))
    held_out = {
        kind: (tested, final_states(model, tested))
        for kind, tested in test_batches(tokenizer, tests).items()
    }
    rows = []

    def add(small, plan, method: str, **more) -> None:
        row = dict(method=method, layers=len(plan.layers), removed=plan.achieved_ratio)
        row["seconds_share"] = seconds.total(plan) / seconds.total(plan_none(model))
        for kind, (tested, reference) in held_out.items():
            found = quality(small, model, tested, reference)
            row |= {f"{k}_{kind}": v for k, v in found.items()}
        rows.append(row | more)
        about = dict(model=text.NAME, dtype="float32", windows=windows, window=text.WINDOW)
        about |= dict(windows_tested=tests, seed=args.seed, minutes=args.minutes)
        frame = pd.DataFrame(rows).assign(**about, **facts("cpu"))
        stem = "search-quick" if args.quick else "search"
        frame.to_csv(args.out / f"{stem}.csv", index=False, float_format="%.5g")
        print(rows[-1], flush=True)

    add(model, plan_none(model), "dense", budget="none")
    for name in args.budgets:
        budget, costs = {name: shares[name]}, tables[name]
        plans = recipes(model, layers, units, budget, costs)
        file = work / f"{name}.json"
        about = dict(scores=[units, layers], file=file, minutes=args.minutes)
        front = search(model, batches, budget, costs, **about)
        found = front.plan.meta["search"]
        print(front, flush=True)
        recipe = front.frame[front.frame.moves == 0].set_index("origin")
        plans = {
            k: (plan, origin, recipe.kl_look.get(origin)) for k, (plan, origin) in plans.items()
        }
        plans["searched"] = (front.plan, found["front"][0]["origin"], front.frame.kl_look[0])
        for method, (plan, origin, look) in plans.items():
            start = time.process_time()
            small = reconstruct(apply_plan(model, plan), model, batches, plan, inplace=True)
            clock = dict(refit_seconds=time.process_time() - start, kl_look=look)
            if method == "searched":
                clock |= dict(search_seconds=found["seconds"], seen=found["seen"])
            add(small, plan, method, budget=f"{name} {shares[name]:.3f}", origin=origin, **clock)


if __name__ == "__main__":
    main()
