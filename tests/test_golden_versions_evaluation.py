"""Scorers, benchmarks and generation may change their results only with their versions."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from golden_versions import check_golden, check_no_stale
from test_benchmarks import root  # noqa: F401

from mllm_compress.evaluation.benchmarks import BENCHMARKS, load_questions
from mllm_compress.evaluation.generation import GENERATION_VERSION, answer_questions
from mllm_compress.evaluation.scorers import SCORERS
from mllm_compress.study import texts as _texts  # noqa: F401  (adds its benchmarks)
from mllm_compress.study.emoji import missing_emoji
from mllm_compress.utils.files import content_hash

COLORS = {"answer": "B", "options": ["red", "blue", "green"]}
YES, NO = {"answer": "yes", "options": []}, {"answer": "No", "options": []}
FLOAT = {"answer": "1.50", "answer_type": "float", "precision": 2.0, "options": []}
LIST = {"answer": "[1, 2]", "answer_type": "list", "precision": None, "options": []}
CHOICE = {"answer": "8/11", "answer_type": "text", "precision": None, "options": ["3/11", "8/11"]}
OPEN = {"answer": ["1,250", "nile"], "options": []}
DOCUMENT = {"answer": ["Invoice", "bill of sale"], "options": []}
TEXT, WORD = {"answer": "", "options": []}, {"answer": "otter", "options": []}
READ = ["40.0 5 10", "60.5 10 30", "3.25 0 1", "0.5 12 12"]  # loss, right tokens, tokens
LETTERS = ["B", "(B)", "b", "B. blue", "The answer is B.", "Blue.", "A red circle", "", "USA"]
WORDS = ["Yes.", "yes", "no", "No, there is not. Yes.", "Note", "y", "maybe", ""]
ANSWERS = {  # scorer -> (question, answers of a model)
    "exact": [({"answer": "Red", "options": []}, ["red", "Red.", "dark red", "re-d", ""])],
    "yes_no": [(YES, WORDS), (NO, WORDS)],
    "mme_pairs": [(YES, WORDS), (NO, WORDS)],
    "mme": [(YES, WORDS), (NO, WORDS)],
    "letter": [(COLORS, LETTERS)],
    "diagram": [(COLORS, LETTERS)],
    "mmmu": [
        (COLORS, LETTERS + ["(A) or rather (B)", "well, to my eyes it looks blue"]),
        (OPEN, ["The result is 1250.00", "so it is the Nile river", "about 12", "x = -2", ""]),
    ],
    "anls": [(DOCUMENT, ["INVOICE", "invoce", "Bill  of sale", "inv", "abcd", ""])],
    "mathvista": [
        (FLOAT, ["1.5", "It costs $1.499.", "1.49", "none"]),
        (LIST, ["[1, 2]", "it is [1, 2.0]", "[2]", ""]),
        (CHOICE, ["(B)", "8/11", "B. 8/11", "3/11", ""]),
    ],
    "next_token": [(TEXT, READ)],
    "perplexity": [(TEXT, READ)],
    "likelihood_choice": [(WORD, ["otter", "tern", "Otter"])],
}


def judged(scorer) -> pd.DataFrame:
    "Judgements of fixed answers, two of them about each image."
    name = next(n for n, row in SCORERS.items() if row is scorer)
    pairs = [(question, text) for question, texts in ANSWERS[name] for text in texts]
    pairs = pairs[: len(pairs) // 2 * 2]
    read = [scorer.judge(text, question) for question, text in pairs]
    return pd.DataFrame(
        {
            "id": range(len(pairs)),
            "group": [f"image {i // 2}" for i in range(len(pairs))],
            "subtask": np.where(np.arange(len(pairs)) < len(pairs) // 4 * 2, "count", "color"),
            "answer": [str(question["answer"]) for question, _ in pairs],
            "parsed": [r.parsed for r in read],
            "value": [r.value for r in read],
        }
    )


@pytest.mark.parametrize("name", SCORERS)
def test_scorers(name, update_golden):
    scorer = SCORERS[name]
    values = [[scorer.judge(t, question).value for t in texts] for question, texts in ANSWERS[name]]
    numbers = {"values": values, "score": scorer.combine(judged(scorer))}
    where = "SCORERS (nbs/library/evaluation/03_scorers.ipynb)"
    check_golden("scorer", name, scorer.version, numbers, update_golden, where)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks(name, root: Path, update_golden):  # noqa: F811
    benchmark = BENCHMARKS[name]
    if name.startswith("emoji") and (reason := missing_emoji()):
        pytest.skip(reason)
    content = [
        [q.id, q.prompt, q.answer, q.candidates, q.options, q.group, q.extra, len(q.images)]
        for q in load_questions(name, "test", 20, str(root))
    ]
    numbers = {
        "questions": content_hash(content),
        "first": content[0][1],
        "scorer": benchmark.scorer,
        "max_new_tokens": benchmark.max_new_tokens,
    }
    where = "BENCHMARKS (nbs/library/evaluation/01_benchmarks.ipynb)"
    check_golden("benchmark", name, benchmark.version, numbers, update_golden, where)


def test_generation(tiny_llava, update_golden):
    questions = [
        q for name in ("open", "composition") for q in load_questions(f"scenes/{name}", "test", 4)
    ]
    answers = answer_questions(*tiny_llava, questions, 4)
    numbers = {"answers": [a.text for a in answers], "candidates": [a.candidate for a in answers]}
    numbers["log_likelihoods"] = [a.log_likelihood for a in answers]
    where = "GENERATION_VERSION (nbs/library/evaluation/05_generation.ipynb)"
    check_golden("generation", "greedy", GENERATION_VERSION, numbers, update_golden, where)


def test_no_golden_value_is_stale(update_golden):
    check_no_stale("scorer", SCORERS, update_golden)
    check_no_stale("benchmark", BENCHMARKS, update_golden)
    check_no_stale("generation", ["greedy"], update_golden)
