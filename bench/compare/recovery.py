"""Does recovery lose anything? Not part of `make bench`: twenty-five minutes of one core.

SmolLM2-135M on text and the same model with eyes on drawings lose 30 % of their decoder, are
refitted, and are trained on 20 thousand tokens or 400 pictures: as before (the last state at the
rate of the table, on all data) and with a tenth held out (the best state, the start included). Data
are labels, the dense model's own (it continues the same texts, answers the same questions), or half
of each at the same size. Scores are of test data: text in the domain (quotes, glosses) and of a
domain that nothing was trained on (a manual); drawings by a vendor that no model has seen.

    python bench/compare/recovery.py [--only smol eyes] [--starts runs/bench] [--questions 100]

A start takes three minutes and is kept; a row that the table has is not computed again.
"""

import argparse
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import transformers

from mllm_compress import checkpoint
from mllm_compress.data.instructions import InstructionData
from mllm_compress.data.self_data import own_data
from mllm_compress.evaluation.scoring import evaluate
from mllm_compress.recovery import recover
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile, training_data
from mllm_compress.study.stages import plan_of, recovery_config, start_of, teacher_of
from mllm_compress.study.store import Store, unpack

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "figures" / "bench" / "recovery-quality.csv"
MODELS = {"smol": "smollm2-135m", "eyes": "smollm2-eyes"}
DOMAIN = {
    "smol": ["perplexity/quotes", "perplexity/glosses"],
    "eyes": ["emoji/name", "emoji/kind", "emoji/yes-no", "emoji/count"],
}
FOREIGN = {"smol": ["perplexity/technical"], "eyes": []}
BOTH = "sft+hidden_kd"
RUNS = {  # name of the profile -> (data, objective, state that is returned, rate)
    "smol": [
        ("labels", BOTH, "last", None),
        ("labels", BOTH, "best", None),
        ("self", BOTH, "best", None),
        ("both", BOTH, "best", None),
        ("self", "logits_kd", "best", None),
        ("labels", BOTH, "best", "search"),
    ],
    "eyes": [
        ("labels", "hidden_kd", "last", None),
        ("labels", "hidden_kd", "best", "search"),
        ("self", BOTH, "best", None),
        ("labels", BOTH, "best", None),
        ("both", BOTH, "best", None),
        ("labels", "hidden_kd", "best", None),
    ],
}


def started(name: str, folder: Path) -> tuple:  # (experiment, profile, student, plan)
    "The pruned and refitted model, from its folder or made."
    profile, results = load_profile(name), Store(folder / f"store-{name}")
    e = Experiment(MODELS[name], "widthwise", 0.3, "gauss_newton", allocation="global")
    e = replace(e, reconstruct="stream", recovery="hidden_kd", fraction=0.05)
    if not (folder / name).exists():
        unpack(ROOT / "figures" / name / "results.zip", results)
        small, plan = start_of(e, profile, results, "cpu"), plan_of(e, profile, results)
        processor = teacher_of(e.model, profile)[1]
        checkpoint.save_pruned(small, plan, folder / name, processor=processor)
    student, _, plan = checkpoint.load_pruned(folder / name)
    return e, profile, student, plan


def halves(labels: InstructionData, own: InstructionData) -> InstructionData:
    "Every other entry with the labels, the rest the model's own."
    answered = {e["id"]: e for e in own.samples}
    mixed = [answered.get(e["id"], e) if i % 2 else e for i, e in enumerate(labels.samples)]
    return InstructionData(mixed, labels.image_root, labels.images, "both")


def scores(name: str, model, processor, questions: int) -> dict:
    "Right answers in % or perplexities, by benchmark."
    limit = questions if name == "eyes" else questions // 4
    rows = evaluate(model, processor, DOMAIN[name] + FOREIGN[name], limit, batch_size=16)
    values = rows.score if name == "eyes" else 100 / rows.score  # which is 100 / perplexity
    return dict(zip(rows.benchmark, values.round(2)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--starts", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--runs", type=int, default=None, help="only the first so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"seed": 0, "questions": options.questions, "threads": 1, "device": "CPU"}
    machine |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in options.only:
        e, profile, student, plan = started(name, options.starts)
        teacher, processor = teacher_of(e.model, profile)
        labels, made = training_data(profile.training).fraction(e.fraction, 0), {}
        score = partial(scores, name, processor=processor, questions=options.questions)

        def add(row: dict, path: Path = OUT) -> None:
            rows = pd.DataFrame([{"model": e.model} | row])
            rows = pd.concat([pd.read_csv(path), rows]) if path.exists() else rows
            rows.to_csv(path, index=False)
            print(pd.Series(row).dropna().to_string(), flush=True)

        def known(row: dict) -> bool:
            rows, row = pd.read_csv(OUT) if OUT.exists() else None, {"model": e.model} | row
            if rows is None or not set(row) <= set(rows):
                return False
            return (rows[list(row)] == list(row.values())).all(axis=1).any()

        for which, model in (("dense", teacher), ("untrained", student)):
            if not known(key := {"data": "none", "state": which}):
                add(key | score(model) | machine)
        for data, objective, state, rate in RUNS[name][: options.runs]:
            key = dict(data=data, objective=objective, state=state, lr_from=rate or "table")
            if known(key):
                continue
            if data != "labels" and not made:
                began = time.process_time()
                length = 16 if name == "eyes" else 128
                made["self"] = own_data(
                    teacher, processor, labels, length=length, max_length=128, batch_size=32
                )
                made["both"] = halves(labels, made["self"])
                print(f"own data: {time.process_time() - began:.0f} CPU s", flush=True)
            config = recovery_config(replace(e, recovery=objective), profile)
            held_out = 0.1 if state == "best" else 0.0
            config = replace(config, fraction=1.0, held_out=held_out, lr=rate)
            samples = made.get(data, labels)
            began = time.process_time()
            result = recover(
                student, teacher, samples, config, processor, plan, device="cpu", progress=False
            )
            print(result, result.looks, result.search, sep="\n", flush=True)
            spent = {"samples": result.samples, "lr": result.lr, "best_step": result.best_step}
            spent |= {"steps": int(result.history.step.iloc[-1])}
            spent |= {"cpu_seconds": round(time.process_time() - began)}
            if result.search is not None:
                spent["search_steps"] = int(result.search.steps.sum())
            for look in [] if result.looks is None else result.looks.to_dict("records"):
                add(key | look, OUT.with_name("recovery-looks.csv"))
            add(key | spent | score(result.model) | machine)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
