"""Tokens per second in llama.cpp: dense, layerwise, uniform and blockwise, beside the ideal.

A pruned checkpoint is worth what it saves in the engine that people run. SmolLM2-135M is pruned at
15 to 60 % in three ways, exported by `export_model` and decoded by llama.cpp on this machine's CPU,
one token at a time at batch 1, which reads every weight once: bound by memory. The ideal speed-up
is the bytes of the dense file over those of the pruned one (weights read per token; the embedding
matrix is also the vocabulary projection here, so it is read too); 1 / (1 - ratio) stands beside it.

Speeds do not depend on which units go, so the plans use magnitude scores. Other programs run on the
machine: what counts is the time of the processor for a token (of one thread, waiting for memory
included, waiting for a turn not), files in turn, the median of all rounds. With --place FOLDER
files and times stay there, so that several short runs add up.

    python bench/engines.py [--quick] [--rounds 4] [--model smollm2-135m] [--dtypes f16,q4_0]

It needs node-llama-cpp 3.21.1: `tests/llama_cpp.py` says how to install it.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import pandas as pd
from machine import facts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from llama_cpp import engine_folder, run_engine  # noqa: E402

from mllm_compress import zoo  # noqa: E402
from mllm_compress.checkpoint.llama_cpp import write_gguf  # noqa: E402
from mllm_compress.importance.criteria import width_importance  # noqa: E402
from mllm_compress.importance.scores import LayerScores  # noqa: E402
from mllm_compress.pruning.plans import plan_layerwise, plan_widthwise  # noqa: E402
from mllm_compress.pruning.slicing import apply_plan  # noqa: E402
from mllm_compress.study.style import label_ends, line, look, page  # noqa: E402
from mllm_compress.utils.methods import GREY, Look  # noqa: E402
from mllm_compress.zoo.weight_files import PACKAGED  # noqa: E402

OUT = ROOT / "figures" / "bench"
RATIOS = (0.15, 0.30, 0.45, 0.60)
METHODS = ("layerwise", "uniform", "blockwise")
BLOCKWISE = replace(look("widthwise"), label="widthwise, blockwise")
LOOKS = dict(zip(METHODS, (look("layerwise"), look("uniform"), BLOCKWISE)))
DTYPES = ("f16", "q4_0")
IDEAL = Look("ideal 1 / (1 − ratio)", GREY, "_")


def big_model():
    "A Llama of random weights, so large that no cache holds it: 1.1 GiB in f16."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.float16).eval()


def make_plan(model, scores: dict, method: str, ratio: float):
    "A plan; blockwise keeps the first and the last layer whole, so its widths differ."
    if method == "layerwise":
        return plan_layerwise(model, scores["layers"], ratio=ratio)
    return plan_widthwise(model, scores["units"], ratio=ratio, shape=method)


def score(model) -> dict:
    "Magnitude scores: cheap, and good enough for a question about speed."
    import torch

    layers = torch.arange(model.config.num_hidden_layers, dtype=torch.float32)
    middle = (layers - len(layers) / 2).abs()  # the middle goes first
    units = width_importance(model, None, method="magnitude")
    return {"layers": LayerScores(middle, kind="random"), "units": units}


def cases(dtypes) -> list:
    "Method, ratio and type of every file."
    both = [("dense", 0.0)] + [(m, r) for m in METHODS for r in RATIOS]
    return [(method, ratio, dtype) for dtype in dtypes for method, ratio in both]


def files(model, place: Path, dtypes) -> list:
    "One file per case; rows that describe them."
    scores, rows = score(model), []
    for method, ratio, dtype in cases(dtypes):
        stem = place / f"{method}-{ratio}-{dtype}"
        if not stem.with_suffix(".json").exists():
            plan = None if method == "dense" else make_plan(model, scores, method, ratio)
            pruned = model if plan is None else apply_plan(model, plan)
            written = write_gguf(pruned, Path(f"{stem}.gguf"), dtype=dtype)
            row = dict(method=method, requested_ratio=ratio, dtype=dtype)
            row |= dict(achieved_ratio=plan.achieved_ratio if plan else 0.0)
            row |= {key: written[key] for key in ("architecture", "bytes")}
            Path(f"{stem}.json").write_text(json.dumps(row | {"times": []}))
        rows.append(stem)
    return rows


def measure(stems: list, tokens: int, rounds: int) -> list:
    "Time all files in turn, `rounds` times; rows with all times so far."
    decode = dict(prompt=8, tokens=tokens, repeats=2)
    for i in range(rounds):
        for stem in stems:
            record = Path(f"{stem}.json")
            (answer,) = run_engine([dict(model=f"{stem}.gguf", decode=decode)], timeout=600)
            row = json.loads(record.read_text())
            record.write_text(json.dumps(row | {"times": row["times"] + answer["seconds"]}))
        print(f"round {i + 1} of {rounds}", flush=True)
    return [json.loads(Path(f"{stem}.json").read_text()) for stem in stems]


def summarize(rows: list) -> pd.DataFrame:
    "Speeds beside the dense file of the same type."
    frame = pd.DataFrame(rows)
    frame["measurements"] = frame.times.map(len)
    for name, q in (("seconds", 0.5), ("seconds_low", 0.25), ("seconds_high", 0.75)):
        frame[name] = frame.times.map(lambda times: pd.Series(times).quantile(q))
    frame = frame.drop(columns="times")
    dense = frame[frame.method == "dense"].set_index("dtype")
    frame["tokens_per_second"] = 1 / frame.seconds
    frame["speedup"] = frame.dtype.map(dense.seconds) / frame.seconds
    frame["ideal"] = 1 / (1 - frame.achieved_ratio)
    frame["ideal_bytes"] = frame.dtype.map(dense.bytes) / frame.bytes
    frame["of_ideal"] = frame.speedup / frame.ideal
    return frame


def draw(frame: pd.DataFrame, path: Path, title: str) -> None:
    "Speed-up over ratio, a panel per type, each method beside the ideal."
    import matplotlib.pyplot as plt
    import numpy as np

    with page():
        fig, axes = plt.subplots(1, frame.dtype.nunique(), figsize=(9, 3.4), sharey=True)
        for ax, (dtype, part) in zip(np.atleast_1d(axes), frame.groupby("dtype", sort=False)):
            grid = np.linspace(0, part.achieved_ratio.max(), 50)
            ax.plot(grid, 1 / (1 - grid), color=GREY, linewidth=1)
            ends = {IDEAL: (grid[-1], 1 / (1 - grid[-1]))}
            for method, its in LOOKS.items():
                r = part[part.method == method]
                line(ax, [0, *r.achieved_ratio], [1, *r.speedup], its)
                low, high = (r.speedup * r.seconds / r[f"seconds_{k}"] for k in ("high", "low"))
                ax.vlines(r.achieved_ratio, low, high, color=its.color, linewidth=1)
                ends[its] = r.achieved_ratio.iloc[-1], r.speedup.iloc[-1]
            ax.set(
                xlabel="fraction of decoder parameters removed (achieved)",
                title=f"{title}, {dtype}",
                xticks=(0, *RATIOS),
            )
            label_ends(ax, ends)
        np.atleast_1d(axes)[0].set_ylabel("decode speed-up over dense")
        for end in (".png", ".pdf"):
            fig.savefig(path.with_suffix(end))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few tokens: checks the script")
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder, or big")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--place", type=Path, help="keep files and times here")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if engine_folder() is None:
        return print("nothing measured: node-llama-cpp is missing, see tests/llama_cpp.py")
    if args.model in PACKAGED and PACKAGED[args.model].missing:
        return print(f"nothing measured: {PACKAGED[args.model].missing}")
    matplotlib.use("Agg")
    tokens, rounds = (4, 1) if args.quick else (args.tokens, args.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        place, dtypes = args.place or Path(temporary), args.dtypes.split(",")
        place.mkdir(parents=True, exist_ok=True)
        missing = [c for c in cases(dtypes) if not (place / "{}-{}-{}.json".format(*c)).exists()]
        load = lambda: big_model() if args.model == "big" else zoo.load_model(args.model)[0]
        model = load() if missing else None
        stems = (
            files(model, place, dtypes)
            if missing
            else [place / "{}-{}-{}".format(*c) for c in cases(dtypes)]
        )
        del model
        rows = measure(stems, tokens, rounds)
    name = Path(args.model).name
    about = {"device": facts("cpu")["device"], "engine": "llama.cpp in node-llama-cpp 3.21.1"}
    frame = summarize(rows).assign(model=name, tokens=tokens, **about)
    stem = args.out / f"engines-{name}{'-quick' if args.quick else ''}"
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.5g")
    draw(frame, stem.with_suffix(".png"), name)
    stem.with_suffix(".txt").write_text(
        f"Speed-up of decoding in llama.cpp over the dense file of the same type ({name}, batch "
        f"1, 1 thread, {tokens} tokens after 8), in time of the processor: the median "
        f"(quartiles as bars) of {frame.measurements.min()} measurements each, files in "
        f"turn, because other programs ran on the machine. {about['device']}.\n",
        encoding="utf-8",
    )
    shown = ["dtype", "method", "achieved_ratio", "architecture", "tokens_per_second", "speedup"]
    print(frame[[*shown, "ideal", "ideal_bytes", "of_ideal"]].to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
