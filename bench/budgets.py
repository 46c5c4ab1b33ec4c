"""Quality against measured seconds and bytes: one ranking, searched plans, whole layers, the paper.

SmolLM2-135M in bfloat16 is pruned to several sizes six ways, none of them trained: *ours*, one
ranking by a budget of bytes; *searched* plans of the same bytes, and of the seconds that the whole
layers of that size leave, by a table of unit costs measured here; *layerwise* and *uniform* at
ratios, all refitted; and the *paper's* widthwise recipe, which has no refit because the paper
trains instead. Quality is the perplexity of held-out text of the calibration's kinds, and of a
*foreign* one, a manual. Cost is measured: seconds per decoded token of one stream on one thread,
in transformers and (float16, GGUF) in llama.cpp where node-llama-cpp is, and bytes of the LM
decoder. At batch 1 every weight is read once per token, so decoding is bound by memory.

The processor's time is what counts, models in turn, the median of all rounds. Every seed draws its
own calibration windows.

    python bench/budgets.py [--quick] [--seeds 0] [--windows 64] [--minutes 5] [--work FOLDER]

With --work, scores, searches and pruned models are kept there: a run that was cut off continues,
and a second run only measures.

It needs the package of SmolLM2 and the texts of profile smol (`make study PROFILE=smol`).
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from machine import facts, text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from llama_cpp import engine_folder, run_engine  # noqa: E402

from mllm_compress.anatomy.families import anatomy  # noqa: E402
from mllm_compress.anatomy.wrappers import CACHE_ARGUMENT  # noqa: E402
from mllm_compress.checkpoint.llama_cpp import write_gguf  # noqa: E402
from mllm_compress.checkpoint.loading import load_pruned  # noqa: E402
from mllm_compress.checkpoint.saving import save_pruned  # noqa: E402
from mllm_compress.cost.arithmetic import forward  # noqa: E402
from mllm_compress.cost.timing import unit_seconds  # noqa: E402
from mllm_compress.importance.criteria import measure  # noqa: E402
from mllm_compress.importance.scores import load_scores  # noqa: E402
from mllm_compress.pruning.allocation import COUNTED, load_costs  # noqa: E402
from mllm_compress.pruning.one_step import prune  # noqa: E402
from mllm_compress.pruning.plans import plan_layerwise, plan_none  # noqa: E402
from mllm_compress.pruning.pruning_plan import make_plan  # noqa: E402
from mllm_compress.study.style import label_ends, line, look, page  # noqa: E402
from mllm_compress.utils.methods import DASHED, GREEN, INDIGO, PINK, Look  # noqa: E402

OUT = ROOT / "figures" / "bench"
SHARES = (0.85, 0.7, 0.55)  # of the dense model's cost that stay; 1 - share is the ratio
LOOKS = {
    "ours, bytes": Look("ours, bytes", GREEN, "D"),
    "searched, bytes": Look("searched, bytes", INDIGO, "D", DASHED),
    "searched, seconds": Look("searched, seconds", INDIGO, "o"),
    "layerwise": look("layerwise"),
    "uniform": look("uniform"),
    "paper": Look("paper, widthwise", PINK, "X"),
}
CONTEXT = 64  # tokens in the cache


def kept(path: Path, load, make, save=lambda value, path: value.save(path)):
    "What an earlier run has left at a path, or what is made and saved there."
    if not path.exists():
        save(make(), path)
    return load(path)


def pruned(model, batches, scores: dict, way: str, share: float, costs, search: dict):
    "A model and its plan."
    units, paper, layers = (scores[k] for k in ("gauss_newton", "taylor", "block_influence"))
    by_layers = costs.total(plan_layerwise(model, layers, ratio=1 - share))
    seconds = dict(budget={"latency": by_layers / costs.total(plan_none(model))}, costs=costs)
    given, options = {
        "ours, bytes": (units, dict(budget={"bytes": share}, reconstruct=True)),
        "searched, bytes": ([layers, units], dict(budget={"bytes": share}, search=search)),
        "searched, seconds": ([layers, units], dict(seconds, search=search)),
        "layerwise": (layers, dict(ratio=1 - share, reconstruct=True)),
        "uniform": (units, dict(ratio=1 - share, shape="uniform", reconstruct=True)),
        "paper": (paper, dict(ratio=1 - share, shape="blockwise")),
    }[way]
    return prune(model, batches, scores=given, **dict(reconstruct="search" in options) | options)


def described(model) -> dict:
    "Bytes, KV cache and depth of a model."
    plan = make_plan(model)
    counted = {name: count(model).total(plan) for name, count in COUNTED.items()}
    return counted | {"layers": anatomy(model).num_layers}


# --- the clocks


@torch.inference_mode()
def decode_seconds(models: list, rounds: int, tokens: int) -> list:  # of lists, one per model
    "Processor seconds of decoded tokens, models in turn."
    ids = torch.randint(5, 9_000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    caches = [getattr(forward(m, {"input_ids": ids}), CACHE_ARGUMENT) for m in models]
    found = [[] for _ in models]
    for _ in range(rounds):
        for model, cache, times in zip(models, caches, found):
            for k in range(tokens + 1):
                start = time.process_time()
                forward(model, {"input_ids": ids[:, -1:], CACHE_ARGUMENT: cache})
                times += [time.process_time() - start] * (k > 0)  # the first one warms up
                cache.crop(-1)
    return found


def engine_seconds(models: list, place: Path, rounds: int, tokens: int) -> list:
    "Processor seconds per token in llama.cpp, files in turn; nothing where it is not there."
    if engine_folder() is None:
        return [[] for _ in models]
    files = [place / f"{k}.gguf" for k in range(len(models))]
    for model, file in zip(models, files):
        write_gguf(model, file, dtype="f16")
    found, decode = [[] for _ in files], dict(prompt=CONTEXT, tokens=tokens, repeats=1)
    for _ in range(rounds):
        for file, times in zip(files, found):
            (answer,) = run_engine([dict(model=str(file), decode=decode)], timeout=600)
            times += answer["seconds"]
    return found


def quartiles(name: str, times: list) -> dict:
    "The median and the quartiles of seconds, as columns."
    quantiles = {"": 0.5, "_low": 0.25, "_high": 0.75}
    return {f"{name}{end}": np.quantile(times, q) for end, q in quantiles.items() if len(times)}


# --- all of them


def beside_dense(rows: list) -> list:
    "Cost and perplexity over those of the dense model, the first row."
    names = ("perplexity", "foreign", "bytes", "kv", "seconds", "llama_cpp_seconds")
    for row in rows:
        row |= {f"{k}_over_dense": row[k] / rows[0][k] for k in names if k in row}
    return rows


def group_rows(models: dict, plans: dict, quality, rounds: int) -> list:
    "A row per model; those of one size are timed in turn, the dense one with them."
    with tempfile.TemporaryDirectory() as place:
        clocks = {
            "seconds": decode_seconds([*models.values()], rounds, tokens=10),
            "llama_cpp_seconds": engine_seconds([*models.values()], Path(place), rounds, tokens=24),
        }
    rows = []
    for k, (way, model) in enumerate(models.items()):
        row = dict(way=way, achieved_ratio=0.0) | quality(model) | described(model)
        if way in plans:
            row["achieved_ratio"] = plans[way].achieved_ratio
            row["seen"] = plans[way].meta.get("search", {}).get("seen")  # plans of a search
        for name, times in clocks.items():
            row |= quartiles(name, times[k])
        rows.append(row)
    return beside_dense(rows)


def groups(seed: int, shares, args, work: Path):  # of (share, name -> model, name -> plan)
    "The models of every size, for one draw of calibration windows."
    model, tokenizer = text.load()
    model = model.to(torch.bfloat16)
    batches = text.calibration(tokenizer, seed, args.windows)
    stem, table = work / f"{args.windows}-{seed}", lambda: unit_seconds(model, prompt)
    prompt = {"input_ids": torch.full((1, CONTEXT), 5)}
    costs = kept(work / "seconds.json", load_costs, table)
    kinds = {"gauss_newton": "widthwise", "taylor": "widthwise", "block_influence": "layerwise"}
    score = lambda name: lambda: measure(kinds[name], name, model, batches)
    scores = {name: kept(Path(f"{stem}-{name}"), load_scores, score(name)) for name in kinds}
    for share in shares:
        models, plans = {"dense": model}, {}
        for way in LOOKS:
            place = Path(f"{stem}-{share}-{way}".replace(", ", "-"))
            search = dict(minutes=args.minutes, file=Path(f"{place}.json"))
            make = partial(pruned, model, batches, scores, way, share, costs, search)
            load = lambda folder: load_pruned(folder)[::2]
            models[way], plans[way] = kept(
                place, load, make, lambda found, f: save_pruned(*found, f)
            )
            print(f"seed {seed}, {share:.0%}: {way}", flush=True)
        yield share, models, plans


AXES = {
    "seconds_over_dense": "decode seconds, transformers / dense",
    "llama_cpp_seconds_over_dense": "decode seconds, llama.cpp / dense",
    "bytes_over_dense": "bytes of the decoder / dense",
}


def draw(frame: pd.DataFrame, path: Path) -> None:
    "Perplexity over each cost, means over seeds."
    import matplotlib.pyplot as plt

    names = [name for name in AXES if name in frame]
    means = frame.groupby(["way", "share"], sort=False).mean(numeric_only=True).reset_index()
    with page():
        fig, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), sharey=True)
        for ax, name in zip(axes, names):
            ends = {}
            for way, its in LOOKS.items():
                part = means[means.way == way].sort_values(name, ascending=False)
                line(ax, [1, *part[name]], [1, *part.perplexity_over_dense], its)
                ends[its] = part[name].iloc[-1], part.perplexity_over_dense.iloc[-1]
            ax.set(xlabel=AXES[name], yscale="log")
            label_ends(ax, ends)
        for which in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
            which(plt.FormatStrFormatter("%g"))
        axes[0].set_ylabel("perplexity / dense (held-out text)")
        for end in (".png", ".pdf"):
            fig.savefig(path.with_suffix(end))


def caption(frame: pd.DataFrame) -> str:
    "What the figure shows, and under which conditions."
    first = frame.iloc[0]
    return (
        f"Perplexity of {first.windows_tested} held-out windows of {text.WINDOW} tokens over cost, "
        f"SmolLM2-135M (dense: {first.perplexity:.1f}), nothing trained; means over "
        f"{frame.seed.nunique()} draw(s) of {first.windows} calibration windows. Decode: one "
        f"stream, {first.threads} thread(s), {CONTEXT} tokens in the cache, {first['dtype']} in "
        f"transformers {first.transformers} and f16 in {first.engine}; processor time, models in "
        f"turn, medians of {first.rounds} rounds. {first.device}.\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size: checks the script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of cost that stay")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--tests", type=int, default=64, help="windows of held-out text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5, help="of each search")
    parser.add_argument("--work", type=Path, help="keeps what takes long")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if missing := text.missing():
        return print(f"nothing measured: {missing}")
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    shares, tests, rounds = args.shares, args.tests, args.rounds
    if args.quick:
        shares, tests, rounds, args.windows = shares[1:2], 4, 1, 24
    args.out.mkdir(parents=True, exist_ok=True)
    stem, rows = args.out / f"budgets{'-quick' if args.quick else ''}", []
    about = dict(model=text.NAME, dtype="bfloat16", windows=args.windows, windows_tested=tests)
    about |= dict(minutes=args.minutes)
    about |= dict(rounds=rounds, context=CONTEXT, engine="llama.cpp in node-llama-cpp 3.21.1")
    tokenizer = text.load()[1]
    kinds = {"perplexity": text.TEXTS, "foreign": text.FOREIGN}
    held_out = {name: text.held_out(tokenizer, texts) for name, texts in kinds.items()}
    quality = lambda model: {
        name: text.perplexity(model, tokenizer, data, tests) for name, data in held_out.items()
    }
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for share, models, plans in groups(seed, shares, args, work):
            found = group_rows(models, plans, quality, rounds)
            rows += [row | dict(share=share, seed=seed) for row in found]
            frame = pd.DataFrame(rows).assign(**about, **facts("cpu"))
            frame.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.5g")
            print(f"seed {seed}, {share:.0%} of the cost: measured", flush=True)
    draw(frame, stem.with_suffix(".png"))
    stem.with_suffix(".txt").write_text(caption(frame), encoding="utf-8")
    shown = [
        "way",
        "share",
        "seed",
        "achieved_ratio",
        "layers",
        "perplexity",
        "foreign",
        "seen",
        *AXES,
    ]
    print(frame[[c for c in shown if c in frame]].to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
