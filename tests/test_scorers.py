"""Every branch of every scorer, on answers judged by hand."""

import pandas as pd
import pytest

from mllm_compress.evaluation.scorers import SCORERS, mme_score, pair_worth

COLORS = ["red", "blue", "green"]
CHOICE = {"answer": "8/11", "answer_type": "text", "precision": None}
CHOICE |= {"options": ["3/11", "8/11", "6/11"]}


def number(answer: str, kind: str, precision=None) -> dict:
    return {"answer": answer, "answer_type": kind, "precision": precision}


# scorer, question, what is read or how much it is worth -> texts
READ = [
    (
        "yes_no",
        {"answer": "Yes"},
        {
            "yes": ["yes", "Yes.", "Yes, there is a dog.", "Yes. No.", '"Yes"'],
            "no": ["no", "No", "There is not.", "no, but yes"],
            None: ["maybe", "", ".", "nothing"],
        },
    ),
    (
        "mme",
        {"answer": "No"},
        {
            "yes": ["Yes", "yes, it is"],
            "no": ["No.", "Not at all", " no"],
            None: ["The answer is yes", ""],
        },
    ),
    (
        "letter",
        {"answer": "B", "options": COLORS},
        {
            "B": ["B", "(B)", "B.", "B)", "B:", "(B) blue, because", "B. blue", "B) blue", "blue"]
            + ["The answer is B.", "answer: (B)", "Answer is option B", "Blue."],
            None: ["A red circle", "b", "F", "The answer is F", "", "green or blue"],
        },
    ),
    ("letter", {"answer": "H", "options": [*"stuvwxyz"] * 4}, {"H": ["(H)"], None: ["32"]}),
    ("letter", {"answer": "A", "options": ["x", "x", ""]}, {None: ["x", ""]}),  # two options, none
    (
        "mmmu",
        {"answer": "C", "options": COLORS},
        {
            "A": ["(A)", "B or A", "A."],
            "B": ["I say B", "The answer is A.B", "first red and then rather the blue"],
            "C": ["(A) or (C)", "'C'", "it could well be a green thing"],
            None: ["USA", "blue", ""],
        },
    ),
    ("mmmu", {"answer": "1"}, {None: [" "], "7.0": ["7"]}),  # only silence is unparseable
]
WORTH = [
    ("exact", {"answer": "Red."}, {1: ["red", "RED."], 0: ["", "."]}),
    ("exact", {"answer": "Red"}, {1: ["red", "Red.", " RED ", "red ."], 0: ["dark red", "", "re"]}),
    ("mmmu", {"answer": "12"}, {1: ["12", "12.004"], 0: ["13", "", "is ?"]}),
    ("mmmu", {"answer": "1250"}, {1: ["the sum is 1,250"]}),
    ("mmmu", {"answer": "300"}, {1: ["so x = 3e2"]}),
    ("mmmu", {"answer": "0.50"}, {1: ["it is about 0.5"]}),
    ("mmmu", {"answer": "paris"}, {1: ["The capital is Paris."], 0: ["London"]}),
    ("mmmu", {"answer": ["6", "7"]}, {1: ["because\nthe result is 7"]}),
    ("mmmu", {"answer": "b"}, {1: ["b"], 0: ["abc"]}),
    (
        "anls",
        {"answer": ["invoice", "bill of sale"]},
        {
            1: ["Invoice", "INVOICE", "bill  of   sale"],
            7 / 8: ["in voice"],
            6 / 7: ["invoce"],
            7 / 12: ["bill of"],
            0: ["abcd", ""],
        },
    ),
    ("anls", {"answer": ["abcd"]}, {0: ["ab"]}),  # exactly one half
    ("mathvista", number("14", "integer"), {1: ["14", "The number is 14.", "14.7"], 0: ["none"]}),
    ("mathvista", number("1400", "integer", 0.0), {1: ["1,400"]}),
    ("mathvista", number("-3", "integer"), {1: ["-3"], 0: ["1e999"]}),
    ("mathvista", number("0.6", "float", 1.0), {1: ["0.6", "0.60", "0.64"], 0: ["0.66"]}),
    ("mathvista", number("1.45", "float", 2.0), {1: ["1.45"], 0: [""]}),
    (
        "mathvista",
        number("[2007, 2008]", "list"),
        {1: ["[2007, 2008]", "years [2007,2008]."], 0: ["2007 and 2008", "[2008, 2007]"]},
    ),
    ("mathvista", number("[1, 2]", "list"), {0: ["[a, b]", f"[{10**400}]"]}),
    ("mathvista", number("blue", "text"), {1: ["Blue."], 0: ["red", ""]}),
    ("mathvista", CHOICE, {1: ["B", "(B) 8/11", "8/11"], 0: ["A", "8/12"]}),
]


@pytest.mark.parametrize("scorer, question, texts", READ)
def test_what_is_read(scorer, question, texts):
    for expected, several in texts.items():
        for text in several:
            judgement = SCORERS[scorer].judge(text, {"options": []} | question)
            assert judgement.parsed == expected, text
            right = expected is not None and expected.lower() == question["answer"].lower()
            assert expected == "7.0" or judgement.value == right, text


@pytest.mark.parametrize("scorer, question, texts", WORTH)
def test_what_it_is_worth(scorer, question, texts):
    for expected, several in texts.items():
        for text in several:
            value = SCORERS[scorer].judge(text, {"options": []} | question).value
            assert value == pytest.approx(expected, abs=1e-6), text


def frame(values, groups, subtasks=None):
    columns = {"id": list(map(str, range(len(values)))), "group": groups, "value": values}
    columns |= {"parsed": "yes", "answer": "yes"}
    return pd.DataFrame(columns | ({} if subtasks is None else {"subtask": subtasks}))


def test_scores_are_sums_of_mean_worth():
    mme = frame([1, 1, 1, 0, 1, 1], ["a", "a", "b", "b", "c", "c"], ["count"] * 4 + ["OCR"] * 2)
    assert mme_score(mme)["score"] == pytest.approx(75 + 50 + 100 + 100)
    for name, f in {"mme": mme, "mme_pairs": mme.drop(columns="subtask"), "exact": mme}.items():
        scorer = SCORERS[name]
        total = scorer.scale * scorer.worth(f).groupby("stratum").worth.mean().sum()
        assert scorer.combine(f)["score"] == pytest.approx(total)
    with pytest.raises(ValueError, match="'b' has 1"):
        pair_worth(frame([1, 1, 1], ["a", "a", "b"]))


def test_f1_of_yes_by_hand():
    read = {"parsed": ["yes", "yes", "no", None], "answer": ["yes", "no", "yes", "no"]}
    combined = SCORERS["yes_no"].combine(pd.DataFrame(read | {"value": [1.0, 0, 0, 0]}))
    assert combined == {"score": 25, "f1": 50, "yes_rate": 50}
