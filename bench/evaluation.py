"""Questions per second of the batched engine against one-by-one `generate`, on the small suite.

The rival is what a first script does: for each question the processor, then `model.generate` with
its KV cache. Both answer the same questions, and their answers must be equal. Three engines are
timed in turn with it: at batch 1, at the default batch, and again on images seen before, as when a
study evaluates its next model.

    python bench/evaluation.py [--quick] [--models tiny-llava tiny-bunny] [--questions 200]
                               [--rival 60] [--repeats 5]
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from machine import facts

from mllm_compress import zoo
from mllm_compress.evaluation import generation as features
from mllm_compress.evaluation.benchmarks import SMALL_SUITE, benchmark, load_questions
from mllm_compress.evaluation.generation import answer_questions
from mllm_compress.study.style import page

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
LOOKS = {
    "one by one": ("#777777", "o"),
    "engine, batch 1": ("#56B4E9", "v"),
    "engine": ("#0072B2", "s"),
    "engine, images seen": ("#D55E00", "D"),
}


def one_by_one(model, processor, questions, tokens: int) -> list:
    "One question at a time through `generate`."
    answers = []
    for q in questions:
        content = [{"type": "image"}, {"type": "text", "text": q.prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=q.images[0], return_tensors="pt").to(model.device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        answers.append(
            processor.tokenizer.decode(
                out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
        )
    return answers


def engine(
    model, processor, questions, tokens: int, batch_size: int = 256, seen: bool = False
) -> list:
    "Ours; unless images were seen, the cache starts empty."
    if not seen:
        features.FEATURES.clear()
    return [a.text for a in answer_questions(model, processor, questions, tokens, batch_size)]


def measure(name: str, per_kind: int, rival: int, repeats: int, device: str) -> pd.DataFrame:
    "Questions per second of every way, in turn, `repeats` times."
    model, processor = zoo.load_model(name, device=device)
    questions = [q for kind in SMALL_SUITE for q in load_questions(kind, "test", per_kind)]
    tokens = benchmark(SMALL_SUITE[0]).max_new_tokens
    some = questions[:: max(len(questions) // rival, 1)]
    ways = {
        "one by one": lambda: one_by_one(model, processor, some, tokens),
        "engine, batch 1": lambda: engine(model, processor, some, tokens, 1),
        "engine": lambda: engine(model, processor, questions, tokens),
        "engine, images seen": lambda: engine(model, processor, questions, tokens, seen=True),
    }
    rows = []
    for turn in range(-1, repeats):  # the first turn warms up
        answers = {}
        for way, call in ways.items():
            start = time.perf_counter()
            answers[way] = call()
            n = len(answers[way])
            if turn >= 0:
                rows.append(
                    {
                        "model": name,
                        "way": way,
                        "repeat": turn,
                        "questions": n,
                        "per_second": n / (time.perf_counter() - start),
                    }
                )
        same = (
            answers["one by one"]
            == answers["engine, batch 1"]
            == answers["engine"][:: max(len(questions) // rival, 1)]
        )
        if not same:
            raise SystemExit(f"{name}: the answers of the ways differ")
    return pd.DataFrame(rows)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    "Median and quartiles of the speed, and of its ratio to the rival in the same turn."
    rival = rows[rows.way == "one by one"].set_index(["model", "repeat"]).per_second
    rows = rows.assign(
        speedup=rows.per_second / rival.loc[list(zip(rows.model, rows.repeat))].to_numpy()
    )
    found = (
        rows.groupby(["model", "way"], sort=False)[["per_second", "speedup"]]
        .quantile([0.25, 0.5, 0.75])
        .unstack()
    )
    found.columns = [
        f"{what}_{dict(zip((0.25, 0.5, 0.75), ('low', 'median', 'high')))[q]}"
        for what, q in found.columns
    ]
    return found.join(
        rows.groupby(["model", "way"], sort=False).agg(
            questions=("questions", "first"), repeats=("repeat", "nunique")
        )
    ).reset_index()


def draw(rows: pd.DataFrame, path: Path):
    "Questions per second of each way, a row per model."
    import matplotlib.pyplot as plt

    with page():
        fig, ax = plt.subplots(figsize=(5.6, 0.5 + 0.35 * len(rows)))
        labels = [f"{r.model}: {r.way}" for r in rows.itertuples()]
        for y, r in enumerate(rows.itertuples()):
            color, marker = LOOKS[r.way]
            ax.plot([r.per_second_low, r.per_second_high], [y, y], color=color, linewidth=2)
            ax.plot(r.per_second_median, y, marker, color=color)
            ax.annotate(
                f"{r.per_second_median:,.0f}/s, {r.speedup_median:.1f}×",
                (r.per_second_high, y),
                xytext=(6, -3),
                textcoords="offset points",
                fontsize=8.5,
            )
        ax.set(
            yticks=range(len(rows)), yticklabels=labels, xscale="log", xlabel="questions per second"
        )
        ax.margins(x=0.25, y=0.15)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        fig.savefig(path.with_suffix(".png"), dpi=200, bbox_inches="tight")
        fig.savefig(path.with_suffix(".pdf"), bbox_inches="tight")
        plt.close(fig)
    first = rows.iloc[0]
    path.with_suffix(".txt").write_text(
        "Questions per second on the small suite, and how many times the speed of one-by-one "
        "generate, timed in turn: medians, and quartiles as bars, of "
        f"n = {first.repeats} turns of {rows.questions.min():,} to {rows.questions.max():,} "
        "questions; the factor is the median of those within turns, not the quotient of two "
        f"medians. {first.device}, {first.threads} thread(s).\n",
        encoding="utf-8",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="random models of 4 layers, few questions: a check that it runs",
    )
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--questions", type=int, default=200, help="of each of the seven kinds")
    parser.add_argument("--rival", type=int, default=60, help="questions for the slow ways")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    if a.quick:
        a.models, a.questions, a.rival, a.repeats = a.models or ["smoke-llava"], 12, 12, 2
    matplotlib.use("Agg")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = summarise(
        pd.concat(
            [
                measure(m, a.questions, a.rival, a.repeats, device)
                for m in a.models or ["tiny-llava", "tiny-bunny"]
            ]
        )
    )
    rows = rows.assign(**facts(device))
    a.out.mkdir(parents=True, exist_ok=True)
    name = "evaluation-quick" if a.quick else "evaluation"
    rows.to_csv(a.out / f"{name}.csv", index=False, float_format="%.4g")
    draw(rows, a.out / name)
    print(
        rows[
            [
                "model",
                "way",
                "questions",
                "per_second_median",
                "speedup_low",
                "speedup_median",
                "speedup_high",
            ]
        ]
        .round(1)
        .to_string(index=False)
    )


if __name__ == "__main__":
    main()
