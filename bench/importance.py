"""Time and memory of scoring, against the straightforward implementations in the same run.

Three comparisons. Block influence as a function of two tensors, against the form that multiplies
all pairs of tokens and keeps the diagonal. Block influence in a scoring pass, against the same
forward pass without hooks. Taylor importance in all four orders, against the code that holds every
gradient (for the second-order terms: one more backward pass per sample, and squared gradients held
as well). Ours and the other run alternately, so that both have the same machine load; the ratio is
taken pair by pair. Memory is counted in separate runs: tensors alive at the peak (CPU) or bytes
allocated (GPU).

    python bench/importance.py [--quick] [--repeats 9] [--device cpu|cuda]
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import transformers
from machine import facts
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_compress.anatomy.families import anatomy
from mllm_compress.anatomy.streaming import PeakTensors
from mllm_compress.importance.influence import block_influence, cosine_change
from mllm_compress.importance.scores import evaluating
from mllm_compress.importance.taylor import ORDERS, output_gradients, summed_loss, taylor
from mllm_compress.study.style import page
from mllm_compress.utils.methods import BLUE, GREY

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
GOALS = {
    "function": (1 / 20, 1 / 4),
    "hooks": (1.03, None),
    "taylor": (1.05, 0.10),
}  # at most: time, extra memory, of the rival's
NAMES = {"function": "block influence of two tensors", "hooks": "block influence in a scoring pass"}


def seconds(call, device: str) -> float:
    "Wall time of one call."
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(call, device: str) -> int:
    "Most bytes alive during a call, beyond what was there before."
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with PeakTensors() as memory:
        call()
    return memory.peak


def in_turn(ours, rival, repeats: int, device: str) -> dict:
    "Time both alternately after a warm-up: quartiles of the times (ms) and of each pair's ratio."
    ours(), rival()
    times = np.array([(seconds(ours, device), seconds(rival, device)) for _ in range(repeats)])
    values = {
        "ours_ms": 1e3 * times[:, 0],
        "rival_ms": 1e3 * times[:, 1],
        "time_ratio": times[:, 0] / times[:, 1],
    }
    return {
        f"{name}_{label}": np.quantile(v, q)
        for name, v in values.items()
        for label, q in (("median", 0.5), ("low", 0.25), ("high", 0.75))
    }


def decoder(width: int, layers: int, device: str) -> LlamaForCausalLM:
    "A Llama of Vicuna's proportions with a small vocabulary."
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        vocab_size=1000,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device).eval()


def all_pairs(x, y):
    "Block influence as the original computes it."
    similarity = (x @ y.T) / (x.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True))
    return 1 - similarity.diagonal().nan_to_num(nan=0.5)


def function_row(tokens: int, hidden: int, repeats: int, device: str) -> dict:
    "Two tensors."
    x = torch.randn(tokens, hidden, device=device)
    y = x + torch.randn_like(x) / 3
    assert all_pairs(x, y).allclose(cosine_change(x, y), atol=1e-5)
    pair = (lambda: cosine_change(x, y)), (lambda: all_pairs(x, y))
    return (
        {"name": "function", "shape": f"{tokens} x {hidden}", "rival": "all pairs of tokens"}
        | in_turn(*pair, repeats, device)
        | {"ours_bytes": peak_bytes(pair[0], device), "rival_bytes": peak_bytes(pair[1], device)}
    )


def hooks_row(model, batch, repeats: int, device: str) -> dict:
    "A scoring pass."

    @torch.no_grad()
    def bare():
        with evaluating(model):
            model(**batch, use_cache=False, logits_to_keep=1)

    pair = (lambda: block_influence(model, [batch])), bare
    return (
        {"name": "hooks", "shape": shape(model, batch), "rival": "forward pass without hooks"}
        | in_turn(*pair, repeats, device)
        | {"ours_bytes": peak_bytes(pair[0], device), "rival_bytes": peak_bytes(pair[1], device)}
    )


def hold_all_gradients(model, batch, order: str) -> tuple:
    "Straightforward Taylor importance: (channel scores, bytes of the gradients that were held)."
    ids, curvature = batch["input_ids"], {}
    if ORDERS[order].curvature:
        for row in ids.split(1):
            model(input_ids=row, labels=row).loss.backward()
            for p in model.parameters():
                squared = p.grad * p.grad / len(ids)
                curvature[p] = curvature[p] + squared if p in curvature else squared
            model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    parts, scores = anatomy(model), {}
    for i in range(parts.num_layers):
        for slot in parts.linears(i):
            p = slot.module.weight
            scores[i, slot.name] = (
                ORDERS[order].formula(p.detach(), p.grad, curvature.get(p), 1 - slot.axis).abs()
            )
    held = sum(p.grad.nbytes for p in model.parameters()) + sum(
        c.nbytes for c in curvature.values()
    )
    model.zero_grad()
    return scores, held


def taylor_row(model, batch, order: str, repeats: int, device: str) -> dict:
    "One order. Memory is what comes on top of weights and activations."

    def without_scores():
        with output_gradients(anatomy(model), lambda *_: None):
            summed_loss(model, batch, batch["input_ids"]).backward()

    pair = (
        (lambda: taylor(model, [batch], order=order)),
        (lambda: hold_all_gradients(model, batch, order)),
    )
    scores, held = pair[1]()
    ours, down = pair[0](), scores[0, "down"].cpu()
    for other in ("gate", "up"):
        down = down + scores[0, other].cpu()
    assert ours.neurons[0].allclose(down, rtol=2e-3, atol=1e-9)
    extra = max(0, peak_bytes(pair[0], device) - peak_bytes(without_scores, device))
    return (
        {"name": f"taylor {order}", "shape": shape(model, batch), "rival": "all gradients held"}
        | in_turn(*pair, repeats, device)
        | {"ours_bytes": extra, "rival_bytes": held}
    )


def shape(model, batch) -> str:
    "Layers, width, batch."
    rows, tokens = batch["input_ids"].shape
    layers, hidden = len(model.model.layers), model.config.hidden_size
    return f"{layers} layers of {hidden}, batch {rows} x {tokens}"


def draw(rows: pd.DataFrame, path: Path):
    "Ours as a fraction of the rival's, time and memory, with the goals as ticks."
    import matplotlib.pyplot as plt

    with page():
        fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.9), sharey=True)
        y = np.arange(len(rows))[::-1]
        error = [
            rows.time_ratio_median - rows.time_ratio_low,
            rows.time_ratio_high - rows.time_ratio_median,
        ]
        axes[0].barh(
            y, rows.time_ratio_median, xerr=error, color=BLUE, height=0.6, error_kw={"lw": 1}
        )
        axes[1].barh(y, rows.memory_ratio, color=BLUE, height=0.6)
        for ax, value, most, goal in (
            (axes[0], rows.time_ratio_median, rows.time_ratio_high, rows.time_goal),
            (axes[1], rows.memory_ratio, rows.memory_ratio, rows.memory_goal),
        ):
            ax.scatter(goal, y, marker="|", s=260, color=GREY, label="goal: at most")
            for at, v, *ends in zip(y, value, most, goal):
                if v == v:
                    ax.annotate(
                        f"{v:.3f}",
                        (np.nanmax(ends), at),
                        xytext=(6, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
            ax.set(xlim=(0, max(1.3, 1.2 * np.nanmax(value))))
            ax.grid(axis="y", visible=False)
        axes[0].set(yticks=y, xlabel="time, fraction of the rival's", title="Time")
        axes[0].set_yticklabels(
            [f"{NAMES.get(n, n)}\nvs. {r}" for n, r in zip(rows.name, rows.rival)], fontsize=8
        )
        for at in y[rows.memory_ratio.isna()]:
            axes[1].text(
                0.02,
                at,
                "not compared: both hold one forward pass",
                va="center",
                fontsize=8,
                color=GREY,
            )
        axes[1].set(xlabel="extra memory, fraction of the rival's", title="Memory")
        axes[1].legend(frameon=False, fontsize=8, loc="lower right")
        for end in (".png", ".pdf"):
            fig.savefig(path.with_suffix(end), bbox_inches="tight")
    first = rows.iloc[0]
    path.with_suffix(".txt").write_text(
        "Scoring against the straightforward code, timed in turn: our time and our extra memory as "
        "fractions of the rival's; medians, and quartiles of the time as thin lines, "
        f"of n = {first.repeats} pairs. Grey: the goal. "
        f"{first.device}, {first.threads} thread(s), {first['dtype']}.\n",
        encoding="utf-8",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes and few repeats: checks the script, measures nothing",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    matplotlib.use("Agg")
    transformers.logging.set_verbosity_error()
    device, repeats = args.device, 2 if args.quick else args.repeats
    ids = lambda rows, tokens: {
        "input_ids": torch.randint(
            3, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0)
        ).to(device)
    }

    rows = [
        function_row(
            *((128, 512) if args.quick else (728, 4096)),
            repeats if args.quick else 2 * repeats,
            device,
        )
    ]
    wide = decoder(*((128, 2) if args.quick else (1024, 6)), device)
    rows.append(hooks_row(wide, ids(1, 64 if args.quick else 728), repeats, device))
    del wide
    deep, batch = (
        decoder(*((128, 4) if args.quick else (512, 16)), device),
        ids(*((2, 32) if args.quick else (4, 96))),
    )
    rows += [taylor_row(deep, batch, order, repeats, device) for order in ORDERS]

    about = facts(device) | dict(dtype="float32", repeats=repeats, quick=args.quick)
    goals = [GOALS[row["name"].split()[0]] for row in rows]
    rows = pd.DataFrame([row | about for row in rows])
    rows["memory_ratio"] = (rows.ours_bytes / rows.rival_bytes).where(
        [g[1] is not None for g in goals]
    )  # both hold one forward pass
    rows["time_goal"], rows["memory_goal"] = zip(
        *[(g[0], np.nan if g[1] is None else g[1]) for g in goals]
    )
    for _, r in rows.iterrows():
        time_ratio = f"{r.time_ratio_median:.3f} [{r.time_ratio_low:.3f}, {r.time_ratio_high:.3f}]"
        text = f"time {time_ratio} of the rival's (goal {r.time_goal:.2f})"
        if not np.isnan(r.memory_ratio):
            text += f", extra memory {r.memory_ratio:.3f} (goal {r.memory_goal:.2f})"
        print(f"{r['name']:<20}{r['shape']:<34} {text}")
    name = "importance-quick" if args.quick else "importance"
    args.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.out / f"{name}.csv", index=False, float_format="%.5g")
    draw(rows, args.out / f"{name}.png")
    print(f"wrote {name}.csv and {name}.png")


if __name__ == "__main__":
    main()
