"""What calibration must cover: SmolLM2-135M after pruning, by tokens and kinds of text.

Nothing is trained. Windows of 128 tokens without padding, as many of each kind; scores by
Gauss-Newton on at most `--scores` tokens of them, one ranking over all layers, and the refit on
all. Two texts are foreign to all calibration sets: an installation manual and licences.

    python bench/calibration.py [--ratio 0.3] [--tokens 4096 16384] [--windows 16] [--seed 0]
"""

import argparse
import inspect
import math
import random
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import pandas as pd
import torch
from machine import facts, text

from mllm_compress.importance.gauss_newton import gauss_newton
from mllm_compress.pruning import apply_plan, plan_widthwise, reconstruct
from mllm_compress.study.texts import documents

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench" / "calibration.csv"
SETS = {
    1: ("quotes",),
    2: ("quotes", "docstrings"),
    4: ("quotes", "glosses", "docstrings", "reference"),
}
TESTS = ("quotes", "docstrings", "technical", "licences")  # the last two in no set
LICENCES = Path("/usr/share/common-licenses")


def docstrings() -> list:
    "Docstrings of packages that this one needs, each once."
    import numpy
    import scipy.optimize
    import scipy.signal
    import scipy.stats

    packages = (numpy, scipy.stats, scipy.optimize, scipy.signal, torch, torch.nn, pd.DataFrame)
    found = {}
    for package in packages:
        for name in dir(package):
            doc = inspect.getdoc(getattr(package, name, None)) or ""
            found |= {doc: None} if len(doc) > 200 else {}
    return list(found)


def texts(kind: str, part: str) -> list:
    "The texts of a kind for calibration or for the test; every tenth docstring is for the test."
    if kind in ("quotes", "glosses"):
        parts = ("test",) if part == "test" else ("calibration", "train")
        return [d.text for p in parts for d in documents(kind, p)]
    if kind == "technical":
        return [d.text for d in documents(kind, "test")]
    if kind == "licences":
        files = [p for p in sorted(LICENCES.iterdir()) if not p.is_symlink()]
        return [t for p in files for t in p.read_text(errors="ignore").split("\n\n\n")]
    if kind == "reference":
        return list(topics.values())
    return [d for k, d in enumerate(docstrings()) if (k % 10 == 0) == (part == "test")]


def windows(tokenizer, kind: str, part: str, count: int, seed: int) -> torch.Tensor:
    "[count, 128] tokens of shuffled texts, one behind the other."
    drawn, ids = texts(kind, part), []
    random.Random(seed).shuffle(drawn)
    for one in drawn:
        ids += tokenizer(one + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * text.WINDOW:
            return torch.tensor(ids[: count * text.WINDOW]).view(count, text.WINDOW)
    raise SystemExit(f"{kind} has {len(ids)} tokens, {count * text.WINDOW} are asked for.")


@torch.no_grad()
def perplexity(model, held: torch.Tensor) -> float:
    total = 0.0
    for part in held.split(8):
        logits = model(part, use_cache=False).logits[:, :-1].flatten(0, 1)
        target = part[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
    return math.exp(total / held[:, 1:].numel())


def rows(options):
    "Yields a row for the dense model, and one for each set and number of tokens."
    model, tokenizer = text.load()
    held = {k: windows(tokenizer, k, "test", options.windows, options.seed) for k in TESTS}
    judged = lambda m: {f"perplexity_{k}": round(perplexity(m, w), 2) for k, w in held.items()}
    about = dict(model=text.NAME, seed=options.seed, windows=options.windows, **facts("cpu"))
    yield about | dict(kinds=0, tokens=0) | judged(model)
    for tokens in options.tokens:
        for kinds, names in SETS.items():
            each = tokens // text.WINDOW // kinds
            drawn = [windows(tokenizer, k, "calibration", each, options.seed) for k in names]
            mixed = torch.stack(drawn, 1).flatten(0, 1)
            batches = [{"input_ids": b, "labels": b} for b in mixed.split(8)]
            start = time.process_time()
            few = batches[: max(1, options.scores // (8 * text.WINDOW))]
            scores = gauss_newton(model, few)
            scored = time.process_time()
            plan = plan_widthwise(model, scores, ratio=options.ratio, allocation="global")
            small = reconstruct(apply_plan(model, plan), model, batches, plan, inplace=True)
            spent = dict(score_cpu_s=scored - start, refit_cpu_s=time.process_time() - scored)
            row = about | dict(kinds=kinds, names="+".join(names), tokens=tokens)
            row |= dict(score_tokens=len(few) * 8 * text.WINDOW, ratio=plan.achieved_ratio)
            yield row | judged(small) | {k: round(v, 1) for k, v in spent.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--scores", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options, table = parser.parse_args(), []
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if missing := text.missing() or ("" if LICENCES.is_dir() else str(LICENCES)):
        print(f"bench/calibration.py: skipped, {missing}")
        return
    for row in rows(options):
        table.append(row)
        print({k: v for k, v in row.items() if k.startswith(("kinds", "tokens", "perp", "refit"))})
        pd.DataFrame(table).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
