"""What calibration must cover: SmolLM2-135M after pruning, by tokens and kinds of text.

Nothing is trained. Windows of 128 tokens without padding, as many of each kind; scores by
Gauss-Newton on the first of them, one ranking over all layers, and the refit on all that `--refit`
asks for; `--of` says what the scores preserve. Two texts are foreign to all calibration sets: an
installation manual and licences. `own` is what the model writes with nothing before it. Rows that
the table has are not run again.

    python bench/calibration.py [--sets four] [--refit 4096 16384] [--scores 4096] [--seed 0]
"""

import argparse
import inspect
import math
import random
import time
import warnings
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

import pandas as pd
import torch
from machine import facts, text

from mllm_compress.data.self_data import own_data
from mllm_compress.importance.gauss_newton import PRESERVED, gauss_newton
from mllm_compress.pruning import apply_plan, plan_widthwise, reconstruct
from mllm_compress.study.texts import documents

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench" / "calibration.csv"
WHAT = ("calibration", "score_tokens", "refit_tokens")  # differs between rows
SETS = {
    "one": ("quotes",),
    "two": ("quotes", "docstrings"),
    "four": ("quotes", "glosses", "docstrings", "reference"),
    "own": ("own",),
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


def windows(model, tokenizer, kind: str, part: str, count: int, seed: int) -> torch.Tensor:
    "[count, 128] tokens of shuffled texts, one behind the other."
    if kind == "own":
        wanted = dict(tokens=2 * count * text.WINDOW, length=text.WINDOW, batch_size=64, seed=seed)
        drawn = [e["text"] for e in own_data(model, tokenizer, **wanted).samples]
    else:
        drawn = texts(kind, part)
        random.Random(seed).shuffle(drawn)
    ids = []
    for one in drawn:
        ids += tokenizer(one + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * text.WINDOW:
            return torch.tensor(ids[: count * text.WINDOW]).view(count, text.WINDOW)
    raise SystemExit(f"{kind} has {len(ids)} tokens, {count * text.WINDOW} are asked for.")


@torch.no_grad()
def judged(model, held: dict) -> dict:  # kind -> [windows, tokens]
    "Perplexity, and the share of tokens that are the most likely ones (%), of each kind."
    row = {}
    for kind, tokens in held.items():
        loss, right = 0.0, 0
        for part in tokens.split(8):
            logits = model(part, use_cache=False).logits[:, :-1].flatten(0, 1)
            target = part[:, 1:].flatten()
            loss += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            right += (logits.argmax(-1) == target).sum().item()
        count = tokens[:, 1:].numel()
        row[f"perplexity_{kind}"] = round(math.exp(loss / count), 2)
        row[f"right_{kind}"] = round(100 * right / count, 2)
    return row


def batches_of(model, tokenizer, name: str, tokens: int, seed: int) -> list:
    "Calibration batches of a set, with as many windows of each of its kinds, in turn."
    each = tokens // text.WINDOW // len(SETS[name])
    drawn = [windows(model, tokenizer, k, "calibration", each, seed) for k in SETS[name]]
    return [{"input_ids": b, "labels": b} for b in torch.stack(drawn, 1).flatten(0, 1).split(8)]


def rows(options, known: pd.DataFrame):
    "Yields a row for the dense model, and one for each set and pair of numbers of tokens."
    model, tokenizer = text.load()
    drawn = lambda k: windows(model, tokenizer, k, "test", options.windows, options.seed)
    held = {k: drawn(k) for k in TESTS}
    about = {k: getattr(options, k) for k in ("seed", "windows", "ratio", "of")}
    about = {"model": text.NAME} | about
    most = max(*options.scores, *options.refit)
    many = product(options.sets, options.scores, options.refit)
    batches, scored = {}, {}  # by set, and by set and tokens of the scores
    for name, score_tokens, tokens in [("dense", 0, 0), *many]:
        row = about | dict(zip(WHAT, (name, score_tokens, tokens)))
        if len(known) and (known[list(row)] == pd.Series(row)).all(axis=1).any():
            continue
        small, spent = model, {}
        if name != "dense":
            if name not in batches:
                batches[name] = batches_of(model, tokenizer, name, most, options.seed)
            some = lambda n: batches[name][: n // (8 * text.WINDOW)]
            start = time.process_time()
            if (name, score_tokens) not in scored:
                scores = gauss_newton(model, some(score_tokens), of=options.of)
                scored[name, score_tokens] = scores, time.process_time() - start
            (scores, seconds), start = scored[name, score_tokens], time.process_time()
            plan = plan_widthwise(model, scores, ratio=options.ratio, allocation="global")
            pruned = apply_plan(model, plan)
            small = reconstruct(pruned, model, some(tokens), plan, inplace=True)
            spent = dict(score_cpu_s=seconds, refit_cpu_s=time.process_time() - start)
        yield row | judged(small, held) | {k: round(v, 1) for k, v in spent.items()} | facts("cpu")


def run(script: str, rows, options) -> None:
    "Write the table of some rows, after each of them, where this machine has what they need."
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if missing := text.missing() or ("" if LICENCES.is_dir() else str(LICENCES)):
        print(f"bench/{script}: skipped, {missing}")
        return
    table = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame()
    for row in rows(options, table):
        print({k: v for k, v in row.items() if not k.startswith(("right", "model"))}, flush=True)
        table = pd.concat([table, pd.DataFrame([row])])
        table.to_csv(options.out, index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--refit", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--scores", type=int, nargs="+", default=[4096])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default="labels", choices=list(PRESERVED))
    parser.add_argument("--out", type=Path, default=OUT)
    run("calibration.py", rows, parser.parse_args())


if __name__ == "__main__":
    main()
