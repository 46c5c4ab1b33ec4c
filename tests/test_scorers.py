"""Every branch of every scorer, on answers judged by hand."""

import numpy as np
import pandas as pd
import pytest

from mllm_compress.evaluation import scorers
from mllm_compress.evaluation import scorers as judges
from mllm_compress.evaluation.scorers import SCORERS


def value(scorer, text, compat=None, **question):
    return SCORERS[scorer].read(text, {"options": []} | question, compat).value


def parsed(scorer, text, **question):
    return SCORERS[scorer].read(text, {"options": []} | question).parsed


@pytest.mark.parametrize(
    "text, right",
    [("red", 1), ("Red.", 1), (" RED ", 1), ("red .", 1), ("dark red", 0), ("", 0), ("re", 0)],
)
def test_exact(text, right):
    assert value("exact", text, answer="Red") == right


@pytest.mark.parametrize(
    "text, read",
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("no", "no"),
        ("No", "no"),
        ("There is not.", "no"),
        ("no, but yes", "no"),
        ("Yes. No.", "yes"),
        ('"Yes"', "yes"),
        ("maybe", None),
        ("", None),
        (".", None),
        ("nothing", None),
    ],
)
def test_yes_no_reads_the_first_sentence(text, read):
    assert judges.read_yes_no(text) == read
    assert value("yes_no", text, answer="Yes") == (read == "yes")


@pytest.mark.parametrize(
    "text, read",
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("Not at all", "no"),
        (" no", "no"),
        ("The answer is yes", None),
        ("", None),
    ],
)
def test_mme_reads_four_characters(text, read):
    assert parsed("mme", text, answer="No") == read


@pytest.mark.parametrize(
    "text, read",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("B:", "B"),
        ("(B) blue, because", "B"),
        ("B. blue", "B"),
        ("B) blue", "B"),
        ("The answer is B.", "B"),
        ("answer: (B)", "B"),
        ("Answer is option B", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("A red circle", None),
        ("b", None),
        ("F", None),
        ("The answer is F", None),
        ("", None),
        ("green or blue", None),
    ],
)
def test_letter(text, read):
    options = ["red", "blue", "green"]
    assert judges.read_letter(text, options) == read
    assert value("letter", text, answer="B", options=options) == (read == "B")


def test_letters_beyond_e_and_equal_options():
    assert judges.read_letter("(H)", list("stuvwxyz")) == "H"
    assert judges.read_letter("x", ["x", "x"]) is None  # names two options


@pytest.mark.parametrize(
    "text, read",
    [
        ("(A)", "A"),
        ("(A) or (C)", "C"),
        ("I say B", "B"),
        ("B or A", "A"),
        ("A.", "A"),
        ("'C'", "C"),
        ("The answer is A.B", "B"),
        ("USA", None),
        ("it could well be a green thing", "C"),
        ("first red and then rather the blue", "B"),
        ("blue", None),
        ("", None),
    ],
)
def test_mmmu_letter(text, read):
    options = ["red", "blue", "green"]
    assert judges.read_mmmu_letter(text, options) == read
    assert value("mmmu", text, answer="C", options=options) == (read == "C")


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("12", "12", 1),
        ("12.004", "12", 1),
        ("the sum is 1,250", "1250", 1),
        ("so x = 3e2", "300", 1),
        ("it is about 0.5", "0.50", 1),
        ("13", "12", 0),
        ("The capital is Paris.", "paris", 1),
        ("London", "Paris", 0),
        ("because\nthe result is 7", ["6", "7"], 1),
        ("b", "b", 1),
        ("abc", "b", 0),
        ("", "12", 0),
        ("is ?", "12", 0),
    ],
)
def test_mmmu_open(text, answer, right):
    assert value("mmmu", text, answer=answer) == right


def test_mmmu_open_unparseable_is_silence():
    assert parsed("mmmu", " ", answer="1") is None and parsed("mmmu", "7", answer="1") == "7.0"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Invoice", 1),
        ("INVOICE", 1),
        ("in voice", 7 / 8),
        ("invoce", 6 / 7),
        ("bill  of   sale", 1),
        ("bill of", 0.5833333),
        ("abcd", 0),
        ("", 0),
    ],
)
def test_anls(text, expected):
    assert value("anls", text, answer=["invoice", "bill of sale"]) == pytest.approx(
        expected, abs=1e-6
    )


def test_anls_at_exactly_one_half_is_zero_and_one_half_in_the_harness():
    assert value("anls", "ab", answer=["abcd"]) == 0
    assert value("anls", "ab", "lmms-eval", answer=["abcd"]) == 0.5
    assert value("anls", "abc ", "lmms-eval", answer=["abcd"]) == 0.75


@pytest.mark.parametrize(
    "text, kind, precision, answer, right",
    [
        ("14", "integer", None, "14", 1),
        ("The number is 14.", "integer", None, "14", 1),
        ("14.7", "integer", None, "14", 1),
        ("1,400", "integer", 0.0, "1400", 1),
        ("-3", "integer", None, "-3", 1),
        ("none", "integer", None, "14", 0),
        ("0.6", "float", 1.0, "0.6", 1),
        ("0.60", "float", 1.0, "0.6", 1),
        ("0.64", "float", 1.0, "0.6", 1),
        ("0.66", "float", 1.0, "0.6", 0),
        ("1.45", "float", 2.0, "1.45", 1),
        ("", "float", 2.0, "1.45", 0),
        ("[2007, 2008]", "list", None, "[2007, 2008]", 1),
        ("years [2007,2008].", "list", None, "[2007, 2008]", 1),
        ("2007 and 2008", "list", None, "[2007, 2008]", 0),
        ("[a, b]", "list", None, "[1, 2]", 0),
        ("[2008, 2007]", "list", None, "[2007, 2008]", 0),
        ("Blue.", "text", None, "blue", 1),
        ("red", "text", None, "blue", 0),
        ("", "text", None, "blue", 0),
    ],
)
def test_mathvista_free_answers(text, kind, precision, answer, right):
    assert value("mathvista", text, answer=answer, answer_type=kind, precision=precision) == right


@pytest.mark.parametrize(
    "text, right", [("B", 1), ("(B) 8/11", 1), ("8/11", 1), ("A", 0), ("8/12", 0)]
)
def test_mathvista_choices(text, right):
    question = {
        "answer": "8/11",
        "answer_type": "text",
        "precision": None,
        "options": ["3/11", "8/11", "6/11"],
    }
    assert value("mathvista", text, **question) == right
    if text == "8/12":
        assert (
            value("mathvista", text, "lmms-eval", **question) == 1
        )  # the harness takes the most similar


@pytest.mark.parametrize(
    "scorer, text, question, official, harness",
    [
        ("yes_no", "Yes.", {"answer": "yes"}, 1, 0),
        ("yes_no", "yes", {"answer": "yes"}, 1, 1),
        ("mme", "y", {"answer": "Yes"}, 0, 1),
        ("mme", "No.", {"answer": "no"}, 1, 1),
        ("mme", "x", {"answer": "no"}, 0, 0),
        ("letter", "(B)", {"answer": "B", "options": ["a", "b"]}, 1, 0),
        ("letter", "B. b", {"answer": "B", "options": ["a", "b"]}, 1, 1),
        ("diagram", "(B)", {"answer": "B", "options": ["a", "b"]}, 1, 1),
        ("diagram", "B. b", {"answer": "B", "options": ["a", "b"]}, 1, 1),
        ("mmmu", "?", {"answer": "B", "options": ["u", "v", "w", "x"]}, 0, 0.25),
        ("mmmu", "made in USA", {"answer": "A", "options": ["u", "v"]}, 0, 1),
        ("mmmu", "12", {"answer": "12", "options": []}, 1, 1),
        ("exact", "t-shirt", {"answer": "tshirt"}, 0, 1),
        ("mathvista", "0.6", {"answer": "0.6", "answer_type": "float", "precision": 1.0}, 1, 0),
        ("mathvista", "14", {"answer": "14", "answer_type": "integer", "precision": None}, 1, 1),
        (
            "mathvista",
            "It is 14",
            {"answer": "14", "answer_type": "integer", "precision": None},
            1,
            0,
        ),
        (
            "mathvista",
            "[1,2]",
            {"answer": "[1, 2]", "answer_type": "list", "precision": None},
            1,
            0,
        ),
    ],
)
def test_harness_readings(scorer, text, question, official, harness):
    assert value(scorer, text, **question) == official
    assert value(scorer, text, "lmms-eval", **question) == harness


def test_unknown_compat_is_named():
    with pytest.raises(ValueError, match="lmms-eval"):
        value("exact", "red", "vlmeval", answer="red")


def frame(values, groups, subtask=None):
    f = pd.DataFrame({"id": range(len(values)), "value": np.array(values, float), "group": groups})
    return f if subtask is None else f.assign(subtask=subtask)


def test_pairs_by_hand():
    f = frame([1, 1, 1, 0, 0, 0], ["a", "a", "b", "b", "c", "c"])
    assert scorers.paired_score(f) == pytest.approx(
        {"score": (50 + 100 / 3) / 2, "acc": 50, "acc_plus": 100 / 3}
    )


def test_mme_is_a_sum_over_subtasks():
    f = frame([1, 1, 1, 0, 1, 1], ["a", "a", "b", "b", "c", "c"], ["count"] * 4 + ["OCR"] * 2)
    assert scorers.mme_score(f)["score"] == pytest.approx(75 + 50 + 100 + 100)


def test_a_group_that_is_no_pair_is_named():
    with pytest.raises(ValueError, match="'b' has 1"):
        scorers.pair_worth(frame([1, 1, 1], ["a", "a", "b"]))


def test_scores_are_sums_of_mean_worth():
    mme = frame([1, 1, 1, 0, 1, 1], ["a", "a", "b", "b", "c", "c"], ["count"] * 4 + ["OCR"] * 2)
    for name, f in {"mme": mme, "mme_pairs": mme.drop(columns="subtask"), "exact": mme}.items():
        scorer = SCORERS[name]
        total = scorer.scale * scorer.worth(f).groupby("stratum").worth.mean().sum()
        assert scorer.combine(f)["score"] == pytest.approx(total)


def test_f1_of_yes_by_hand():
    f = pd.DataFrame(
        {
            "parsed": ["yes", "yes", "no", None],
            "answer": ["yes", "no", "yes", "no"],
            "value": [1.0, 0, 0, 0],
        }
    )
    assert scorers.yes_no_score(f) == {"score": 25, "f1": 50, "yes_rate": 50}
