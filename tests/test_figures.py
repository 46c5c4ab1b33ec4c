"""What the study's notebooks choose to show follows the rules that they state."""
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

STUDY = Path(__file__).parent.parent / "nbs/study"


def defined_in(notebook: str, *names, **space) -> dict:
    "Functions and constants of a study notebook, from the cells that define them and nothing else."
    starts = tuple(f"{how}{name}{end}" for name in names for how, end in (("def ", "("), ("", " =")))
    for cell in nbformat.read(STUDY / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        for block in cell.source.split("\n\n\n"):
            if block.startswith(starts): exec(block, space)
    return space


def test_examples_are_one_of_each_kind_and_the_first_lost_at_each_ratio():
    questions = pd.MultiIndex.from_tuples([("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "2"), ("c", "1"), ("c", "2")], names=["benchmark", "id"])
    right = pd.DataFrame({("original", ""): [1, 0, 1, 1, 1, 1, 1], (.3, "pruned"): [0] * 7, (.3, "recovered"): [0, 0, 1, 0, 0, 1, 1],
                          (.6, "pruned"): [0] * 7, (.6, "recovered"): [0] * 7}, index=questions).astype(bool)
    choose = defined_in("07_qualitative", "FIRST", "choose", shown=[.3, .6], pd=pd)["choose"]
    assert choose(right) == {("a", "1"): "one of its kind", ("b", "2"): "one of its kind", ("c", "1"): "one of its kind",  # the third of two is the first
                             ("b", "1"): "first lost at 30%",  # a-1 was lost too, but is shown already
                             ("a", "3"): "first lost at 60%"}  # a-2 was never right


def test_answers_are_marked_by_a_sign_not_by_colour():
    text_of = defined_in("07_qualitative", "MARK", "text_of", textwrap=__import__("textwrap"))["text_of"]
    assert text_of("red", True) == "red" and text_of("red", False) == "red ×" and text_of("", False) == "(nothing) ×"
    assert text_of("a b c d e f g", True, 8) == "a b c d…"


def test_the_guide_says_how_the_papers_choice_did():
    agreement = defined_in("08_guide", "agreement", pd=pd)["agreement"]
    found = pd.DataFrame([("layerwise", "sft", True, False), ("widthwise", "sft", True, False), ("random", "sft", False, True), ("bad", "sft", False, False), ("untrained", "none", False, False)],
                         columns=["pruning", "recovery", "tied", "open"])
    assert [agreement(found, p, True) for p in ("layerwise", "widthwise", "random", "bad", "untrained")] == ["same", "tied", "open", "behind", "not studied"]
    assert agreement(found[found.pruning == "layerwise"], "layerwise", True) == agreement(found.iloc[[0, 4]], "layerwise", True) == "no rival"


def test_saved_time_is_not_moved_by_an_outlier():
    from mllm_compress import effects
    saved = defined_in("09_cost", "saved", np=np, pd=pd, effects=effects)["saved"]
    pairs = pd.DataFrame({"dense": [1.] * 9, "pruned": [.5] * 8 + [50.]})
    e = saved(pairs, ideal=4.0)  # of three quarters, half
    assert [round(v, 9) for v in (e.value, e.low, e.high)] == [round(200 / 3, 9)] * 3 and (e.n, e.seeds) == (9, 0)
