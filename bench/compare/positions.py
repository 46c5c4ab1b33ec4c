"""Does it help to compare student and teacher at the answers only? Not part of `make bench`.

A small paired experiment: the two tiny models lose 5 of 12 layers by block influence and are
recovered with SFT + hidden-state distillation, `positions="answer"` and `positions="all"` from the
same start, on the same samples in the same order, and answer the same questions about *validation*
scenes. The default runs at the study's learning rate, which was tuned for it; the original's rule
may choose the better of that rate and twice that rate, on these same questions. So the comparison
favours the original. An interval is a bootstrap over questions, seeds side by side.

    python bench/compare/positions.py [--fraction 0.01] [--seeds 2] [--limit 150]
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from mllm_compress.data import calibration_batches, small_data
from mllm_compress.evaluation.intervals import paired_difference
from mllm_compress.evaluation.scoring import evaluate
from mllm_compress.importance.influence import block_influence
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.recovery.training import recover
from mllm_compress.zoo.models import load_model

OUT = Path(__file__).resolve().parents[2] / "figures" / "bench"
KINDS = ("open", "hallucination", "perception", "cognition", "choice", "composition")
RUNS = (("answer", 1e-3), ("all", 1e-3), ("all", 2e-3))


def scored(model, processor, seed: int, limit: int) -> pd.DataFrame:
    "The score of every question."
    _, found = evaluate(
        model,
        processor,
        [f"scenes/{kind}" for kind in KINDS],
        limit,
        split="validation",
        return_predictions=True,
    )
    return pd.DataFrame(
        {"unit": [f"{seed}/{i}" for i in found.id], "stratum": "", "worth": found.value}
    )


def compare(name: str, data, fraction: float, seeds: int, limit: int) -> list:
    "One row per run: its score, and how far the default is ahead of it."
    teacher, processor = load_model(name)
    plan = plan_layerwise(
        teacher, block_influence(teacher, calibration_batches(data, processor)), n_layers=5
    )
    worth = {run: [] for run in RUNS}
    for seed in range(seeds):
        for positions, lr in RUNS:
            config = RecoveryConfig(
                fraction=fraction,
                seed=seed,
                lr=lr,
                positions=positions,
                batch_size=32,
                precision="bf16",
            )
            result = recover(
                apply_plan(teacher, plan),
                teacher,
                data,
                config,
                processor,
                plan,
                device="cpu",
                progress=False,
            )
            worth[positions, lr].append(scored(result.model, processor, seed, limit))
            print(
                name,
                seed,
                positions,
                lr,
                f"{100 * worth[positions, lr][-1].worth.mean():.1f}",
                f"{result.seconds:.0f} s",
                flush=True,
            )
    worth, rows = {run: pd.concat(found) for run, found in worth.items()}, []
    for (positions, lr), found in worth.items():
        ahead = paired_difference(worth[RUNS[0]], found)
        rows.append(
            dict(
                model=name,
                positions=positions,
                lr=lr,
                score=100 * found.worth.mean(),
                default_ahead=ahead.value,
                low=ahead.low,
                high=ahead.high,
                answers=len(found),
                questions=len(found) // seeds,
                seeds=seeds,
                fraction=fraction,
                samples=result.samples,
                achieved_ratio=plan.achieved_ratio,
                calibration=64,
                split="validation",
                precision="bf16",
                torch=torch.__version__,
            )
        )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fraction", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=150, help="questions of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = small_data()
    frame = pd.DataFrame(
        [
            row
            for name in ("tiny-llava", "tiny-bunny")
            for row in compare(name, data, args.fraction, args.seeds, args.limit)
        ]
    )
    OUT.mkdir(parents=True, exist_ok=True)
    frame.to_csv(OUT / "recovery-positions.csv", index=False)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
