"""The small world: scenes, the vocabulary of tiny models, and learning rates."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from mllm_compress.data import scenes
from mllm_compress.evaluation.benchmarks import scene_questions
from mllm_compress.study.profiles import load_profile, rate_of

ROOT = Path(__file__).parents[1]


def test_scenes_are_deterministic_and_splits_do_not_meet():
    again, pixels = scenes.scene.__wrapped__, scenes.image.__wrapped__  # not from the cache
    assert scenes.scene(5, "test") == again(5, "test") and scenes.ask(5) == scenes.ask(5)
    assert scenes.image(3).tobytes() == pixels(3).tobytes() != pixels(3, "test").tobytes()
    train = {scenes.scene(i) for i in range(3000)}
    for split in ("validation", "test"):
        assert not train & {scenes.scene(i, split) for i in range(1500)}


def check(q, items):
    "Answer a question from the scene by an independent reading of its words."
    words = q["question"].split(" A. ")[0].rstrip("?").replace("?", "").split()
    attributes = dict(color=scenes.COLORS, shape=scenes.SHAPES, size=scenes.SIZES)
    plurals = ("circles", "squares", "triangles", "crosses")
    singular = dict(zip(plurals, ("circle", "square", "triangle", "cross")))
    words = [singular.get(w, w) for w in words]
    of = lambda w: next((k for k, v in attributes.items() if w in v), None)
    fits = lambda it, ws: all(getattr(it, of(w)) == w for w in ws if of(w))
    if words[:2] == ["are", "all"]:
        subject, rule = (words[2:3], words[-1:])
        return "yes" if all(fits(it, rule) for it in items if fits(it, subject)) else "no"
    if words[:3] == ["are", "there", "more"]:
        cut = words.index("than")
        a, b = (sum(fits(it, ws) for it in items) for ws in (words[3:cut], words[cut:]))
        return "yes" if a > b else "no"
    if "there" in words or "contain" in words or words[:3] == ["can", "you", "see"]:
        return "yes" if any(fits(it, words) for it in items) else "no"
    if words[:2] == ["is", "the"]:
        subject = words[2:-1] if words[-2] != "a" else words[2:-2]
        its = [it for it in items if fits(it, subject)]
        return "yes" if its and all(fits(it, words[-1:]) for it in its) else "no"
    if "common" in words:
        values = [getattr(it, "color" if "color" in words else "shape") for it in items]
        return max(set(values), key=values.count)
    if words[:3] == ["which", "of", "these"]:
        return [o for o in q["options"] if any(fits(it, o.split()) for it in items)]
    asked = next(w for w in words if w in attributes)
    found = [it for it in items if fits(it, [w for w in words if w != asked])]
    assert len(found) == 1, (q, items)
    return getattr(found[0], asked)


def test_every_answer_follows_from_its_scene():
    seen = set()
    for i in range(400):
        items = scenes.scene(i, "test")
        for q in scenes.ask(i, "test"):
            right, seen = check(q, items), seen | {q["type"]}
            if q["options"]:
                assert q["answer"] in "ABC" and len(set(q["options"])) == 3
                right = right[0] if isinstance(right, list) else right
                assert q["options"][ord(q["answer"]) - ord("A")] == right, q
            else:
                assert q["answer"] == right, (q, items)
    assert seen == set(scenes.KINDS)


def test_pairs_hold_one_yes_and_one_no():
    for kind in scenes.PAIRED:
        got = scene_questions(kind, "test", 101)
        assert len(got) == 102
        for a, b in zip(got[::2], got[1::2]):
            assert a.group == b.group and {a.answer, b.answer} == {"yes", "no"}


def test_guessing_without_the_picture_is_chance():
    asked = lambda split, n: pd.DataFrame([q for i in range(n) for q in scenes.ask(i, split)])
    train, test = asked("train", 4000), asked("test", 800)
    guess = train.groupby("question").answer.agg(lambda answers: answers.mode()[0])
    blind = (test.question.map(guess) == test.answer).groupby(test.type).mean()
    limits = {"open": 0.28, "hallucination": 0.56, "perception": 0.56, "cognition": 0.58}
    assert all(blind[kind] < limit for kind, limit in limits.items()), blind
    assert blind["choice"] < 0.4 and blind["composition"] < 0.41, blind


@pytest.mark.parametrize("profile", ["quick", "tiny"])
def test_learning_rates_are_those_that_validation_chose(profile):
    file = ROOT / "figures/tiny/00_learning_rates-rates.csv"  # quick has the same models and rates
    used = {
        f"{train}/{losses}": rate
        for train, rates in load_profile(profile).learning_rates.items()
        for losses, rate in rates.items()
        if train != "reconstructed"  # not searched
    }
    found = list(csv.DictReader(file.open()))
    assert set(used) == {r["objective"] for r in found} and len(used) == 10
    for r in found:
        here, ratio = float(r["chosen"]), float(r["ratio"])
        both = {rate_of(used[r["objective"]], p, ratio) for p in ("layerwise", "widthwise")}
        assert float(r["rate in use"]) == here and both == {here}
        assert float(r["points lost by it"]) <= 1
        assert r["interior"] == "yes" or here != float(r["best rate"])
