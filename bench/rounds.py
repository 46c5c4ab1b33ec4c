"""Selecting units in one, two or three rounds: SmolLM2-135M after `prune`, nothing trained.

Four kinds of text for calibration, held-out text as in `bench/calibration.py` (of which the last
two are foreign to it). Rows that the table has are not run again.

    python bench/rounds.py [--ratios 0.3 0.45 0.6] [--rounds 1 2] [--seeds 0 1] [--tokens 8192]
"""

import argparse
import time
from itertools import product
from pathlib import Path

import calibration
import pandas as pd
from machine import facts, text

from mllm_compress import prune

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench" / "rounds.csv"


def rows(options, known: pd.DataFrame):
    "Yields a row for each seed, ratio and number of rounds; 0 rounds: the dense model."
    model, tokenizer = text.load()
    for seed in options.seeds:
        drawn = lambda k: calibration.windows(model, tokenizer, k, "test", options.windows, seed)
        held = {k: drawn(k) for k in calibration.TESTS}
        batches = calibration.batches_of(model, tokenizer, "four", options.tokens, seed)
        for ratio, rounds in [(0.0, 0), *product(options.ratios, options.rounds)]:
            about = dict(model=text.NAME, seed=seed, windows=options.windows)
            row = about | dict(tokens=options.tokens, ratio=ratio, rounds=rounds)
            if len(known) and (known[list(row)] == pd.Series(row)).all(axis=1).any():
                continue
            start, small, removed = time.process_time(), model, 0.0
            if rounds:
                small, plan = prune(model, batches, ratio, rounds=rounds)
                removed = plan.achieved_ratio
            spent = dict(removed=removed, cpu_s=round(time.process_time() - start, 1))
            yield row | calibration.judged(small, held) | spent | facts("cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.45, 0.6])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUT)
    calibration.run("rounds.py", rows, parser.parse_args())


if __name__ == "__main__":
    main()
