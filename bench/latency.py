"""Decode latency of a pruned decoder against the dense one, beside the ideal 1 / (1 - ratio).

One token at batch 1 reads every weight once, so a decoder that does not fit a cache is bound by
memory, and removing a share of its weights should remove that share of the time. Does it? The rival
is the dense decoder, timed in turn with each pruned one so that both meet the same machine. Random
weights: speed does not depend on their values.

    python bench/latency.py [--quick] [--width 2048] [--layers 20] [--repeats 20]
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import transformers
from machine import facts
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_compress.cost.arithmetic import forward, shape_of_model, weight_bytes
from mllm_compress.cost.timing import time_call
from mllm_compress.importance.scores import LayerScores, WidthScores
from mllm_compress.pruning.plans import plan_layerwise, plan_widthwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.study.style import label_ends, line, look, page
from mllm_compress.utils.methods import GREY, Look

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
RATIOS = (0.15, 0.30, 0.45, 0.60)
METHODS = ("layerwise", "uniform width", "uniform width, rounded to 64")
LOOKS = dict(zip(METHODS, map(look, ("layerwise", "uniform", "rounded"))))
IDEAL = Look("ideal 1 / (1 − ratio)", GREY, "_")


def decoder(width: int, layers: int, device: str) -> LlamaForCausalLM:
    "A Llama of Vicuna's proportions (128 channels a head) with a vocabulary of 1,024."
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        vocab_size=1024,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        ).eval()


def make_plan(model, method: str, ratio: float):
    "A plan on random scores."
    shape, draw = shape_of_model(model), torch.Generator().manual_seed(0)
    if method == "layerwise":
        return plan_layerwise(
            model, LayerScores(torch.rand(len(shape), generator=draw), kind="random"), ratio=ratio
        )
    units = lambda counts: {i: torch.rand(n, generator=draw) for i, n in enumerate(counts)}
    scores = WidthScores(units(shape.groups), units(shape.neurons), kind="random")
    return plan_widthwise(
        model, scores, ratio=ratio, shape="uniform", round_to=64 if "64" in method else 1
    )


@torch.no_grad()
def decode_call(model, context: int):
    "A function that decodes one token after `context` cached ones."
    cache = forward(
        model, {"input_ids": torch.zeros(1, context, dtype=torch.long, device=model.device)}
    ).cache
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def call():
        forward(model, {"input_ids": token, "cache": cache})
        cache.crop(-1)

    return call


def compare(dense, pruned, context: int, repeats: int, warmup: int) -> dict:
    "Decode both in turn; milliseconds of each and the speed-up, pair by pair."
    calls = {"dense": decode_call(dense, context), "pruned": decode_call(pruned, context)}
    ms = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            ms[name] += [1e3 * time_call(call, 1, 0, dense.device).seconds[0]] * (turn >= warmup)
    ms["speedup"] = np.array(ms["dense"]) / np.array(ms["pruned"])
    unit = lambda name: name if name == "speedup" else f"{name}_ms"
    return {
        f"{unit(name)}_{label}": np.quantile(values, q)
        for name, values in ms.items()
        for label, q in (("median", 0.5), ("low", 0.25), ("high", 0.75))
    }


def draw(rows: pd.DataFrame, path: Path):
    "Speed-up over ratio, each method beside the ideal."
    import matplotlib.pyplot as plt

    with page():
        fig, ax = plt.subplots(figsize=(5.4, 3.4))
        grid, first = np.linspace(0, rows.achieved_ratio.max(), 50), rows.iloc[0]
        ax.plot(grid, 1 / (1 - grid), color=GREY, linewidth=1)
        ends = {IDEAL: (grid[-1], 1 / (1 - grid[-1]))}
        for method, its in LOOKS.items():
            r = rows[rows.method == method]
            line(ax, [0, *r.achieved_ratio], [1, *r.speedup_median], its)
            ax.vlines(r.achieved_ratio, r.speedup_low, r.speedup_high, color=its.color, linewidth=1)
            ends[its] = r.achieved_ratio.iloc[-1], r.speedup_median.iloc[-1]
        ax.set(
            xlabel="fraction of decoder parameters removed (achieved)",
            ylabel="decode speed-up over dense",
            title=f"One token at batch 1: {first['shape']}, {first['dtype']}",
            xticks=(0, *RATIOS),
        )
        label_ends(ax, ends)
        for end in (".png", ".pdf"):
            fig.savefig(path.with_suffix(end))
    path.with_suffix(".txt").write_text(
        f"Speed-up of decoding one token after {first.context} others, over the dense decoder "
        f"timed in turn: medians, and quartiles as bars, of n = {first.repeats} pairs "
        f"({first['shape']}, {first['dtype']}; rounded: widths in multiples of 64). "
        f"{first.device}, {first.threads} thread(s).\n",
        encoding="utf-8",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny shape and few repeats: checks the script, measures nothing",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--width", type=int, help="hidden size; default 4096 on a GPU, 2048 on a CPU"
    )
    parser.add_argument("--layers", type=int, default=20, help="20 make 15, 30, 45 and 60 %% exact")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    width, repeats, warmup = (
        (256, 3, 1)
        if args.quick
        else (args.width or (4096 if args.device == "cuda" else 2048), args.repeats, 3)
    )
    matplotlib.use("Agg")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)

    dense, rows = decoder(width, args.layers, args.device), []
    about = facts(args.device) | dict(
        dtype=str(dense.dtype).split(".")[-1],
        rival="dense decoder, same run, in turn",
        shape=f"{args.layers} layers of {width}, {weight_bytes(dense) / 2**30:.2f} GiB",
        context=args.context,
        repeats=repeats,
        warmup=warmup,
        quick=args.quick,
    )
    for method in METHODS:
        for ratio in RATIOS:
            plan = make_plan(dense, method, ratio)
            pruned = apply_plan(dense, plan)
            row = dict(
                method=method,
                requested_ratio=ratio,
                achieved_ratio=plan.achieved_ratio,
                ideal_speedup=1 / (1 - plan.achieved_ratio),
            )
            rows.append(row | compare(dense, pruned, args.context, repeats, warmup) | about)
            median, low, high = (rows[-1][f"speedup_{k}"] for k in ("median", "low", "high"))
            print(
                f"{method:<30}{ratio:.0%}  achieved {plan.achieved_ratio:.1%}  "
                f"ideal {rows[-1]['ideal_speedup']:.2f}x  "
                f"measured {median:.2f}x [{low:.2f}, {high:.2f}]",
                flush=True,
            )
            del pruned

    rows, name = pd.DataFrame(rows), "latency-quick" if args.quick else "latency"
    args.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.out / f"{name}.csv", index=False, float_format="%.5g")
    draw(rows, args.out / f"{name}.png")
    print(f"wrote {args.out / name}.csv, .png and .txt")


if __name__ == "__main__":
    main()
