"""What the study's notebooks choose to show follows the rules that they state."""

import ast
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from mllm_compress.reporting.notebooks import parameters_of

STUDY = Path(__file__).parent.parent / "nbs/study"


def defined_in(notebook: str, *names, **space) -> dict:
    "Functions and constants of a study notebook, from the cells that define them and nothing else."
    starts = tuple(
        f"{how}{name}{end}" for name in names for how, end in (("def ", "("), ("", " ="))
    )
    for cell in nbformat.read(STUDY / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type != "code":
            continue
        for block in cell.source.split("\n\n\n"):
            if block.startswith(starts):
                exec(block, space)
    return space


def code_of(path: Path) -> list:  # of ast.Module, one per code cell
    "The code cells of a notebook."
    cells = nbformat.read(path, 4).cells
    return [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]


NOTEBOOKS = sorted(STUDY.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_text_shows_the_name_of_a_variable_in_braces(path):
    "A caption whose f was forgotten ends in a literal {basis}."
    for module in code_of(path):
        inside = {id(v) for n in ast.walk(module) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert id(node) in inside or not re.search(r"\{[a-z_]+\}", node.value), node.value


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_reports_see_the_parameters_as_they_were_given(path):
    "Every report gets globals(), and no cell before it gives a parameter another value."
    parameters = set(parameters_of(nbformat.read(path, 4)))
    for module in code_of(path):
        calls = [n for n in ast.walk(module) if isinstance(n, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id == "Report":
                name, profile, values = map(ast.unparse, call.args)
                assert (name, profile, values) == (repr(path.stem), "profile", "globals()")
        for statement in module.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AnnAssign)):
                continue
            own = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            comprehended = {
                id(n)
                for c in ast.walk(statement)
                if isinstance(c, ast.comprehension)
                for n in ast.walk(c.target)
            }
            stored = {
                n.id for n in own if isinstance(n.ctx, ast.Store) and id(n) not in comprehended
            }
            assert not stored & parameters, ast.unparse(statement)


def test_examples_are_one_of_each_kind_and_the_first_lost_at_each_ratio():
    questions = pd.MultiIndex.from_tuples(
        [("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "2"), ("c", "1"), ("c", "2")],
        names=["benchmark", "id"],
    )
    right = pd.DataFrame(
        {
            ("original", ""): [1, 0, 1, 1, 1, 1, 1],
            (0.3, "pruned"): [0] * 7,
            (0.3, "recovered"): [0, 0, 1, 0, 0, 1, 1],
            (0.6, "pruned"): [0] * 7,
            (0.6, "recovered"): [0] * 7,
        },
        index=questions,
    ).astype(bool)
    choose = defined_in("07_qualitative", "FIRST", "choose", shown=[0.3, 0.6], pd=pd)["choose"]
    assert choose(right) == {
        ("a", "1"): "one of its kind",
        ("b", "2"): "one of its kind",
        ("c", "1"): "one of its kind",  # the third of two is the first
        ("b", "1"): "first lost at 30%",  # a-1 was lost too, but is shown already
        ("a", "3"): "first lost at 60%",
    }  # a-2 was never right


def test_answers_are_marked_by_a_sign_not_by_colour():
    text_of = defined_in("07_qualitative", "MARK", "text_of", textwrap=__import__("textwrap"))[
        "text_of"
    ]
    assert (
        text_of("red", True) == "red"
        and text_of("red", False) == "red ×"
        and text_of("", False) == "(nothing) ×"
    )
    assert text_of("a b c d e f g", True, 8) == "a b c d…"


def test_the_guide_compares_prunings_by_recoveries_tried_after_both():
    "What only one pruning was given, the best of all here, says nothing about the other."
    from types import SimpleNamespace

    from mllm_compress.reporting import advice, claims
    from mllm_compress.reporting.effects import Estimate

    behind = {
        0.05: Estimate(0.2, -0.3, 0.6, 100, 3),
        0.1: Estimate(0.8, -0.3, 1.9, 100, 3),
        1.0: Estimate(3.0, 2.0, 4.0, 100, 3),
    }  # of layerwise, by fraction
    effects = SimpleNamespace(
        SETTING=["model", "pruning", "fraction"],
        difference=lambda frame, model, best, setting: behind[setting["fraction"]],
    )
    guide = defined_in(
        "08_guide",
        "setting",
        "tried_after_both",
        "agreement",
        "compared_on",
        pd=pd,
        effects=effects,
        advice=advice,
        MARGIN=claims.MARGIN,
        frame=None,
    )
    agreement, compared_on = guide["agreement"], guide["compared_on"]

    def found(fraction, *more):
        rows = [
            ("layerwise", "hidden_kd", fraction, False),
            *more,
            ("widthwise", "sft", fraction, True),
            ("layerwise", "sft", fraction, True),
            ("layerwise", "none", 1.0, False),
        ]
        return pd.DataFrame(rows, columns=["pruning", "recovery", "fraction", "rival"]).assign(
            model="m"
        )

    assert [agreement(found(f), "layerwise", True) for f in behind] == ["tied", "open", "behind"]
    assert (
        agreement(found(1.0), "widthwise", True)
        == agreement(found(1.0, ("layerwise", "sft", 1.0, True)), "layerwise", True)
        == "same"
    )
    assert (
        agreement(found(1.0).query("not rival"), "layerwise", True) == "no rival"
        and agreement(found(1.0), "random", True)
        == agreement(found(1.0), "widthwise", False)
        == "not studied"
    )
    assert (
        compared_on(found(0.05), 1.0) == 0.05
        and compared_on(found(0.05).query("not rival"), 1.0) == 1.0
        and compared_on(found(0.05), 0) == 0
    )  # a larger budget rests on the comparison of a smaller one


def test_the_guide_counts_a_comparison_once():
    "However many budgets rest on it."
    guide = nbformat.read(STUDY.parent.parent / "figures/tiny/08_guide.ipynb", 4)
    said = next(
        o.text
        for c in guide.cells
        for o in c.get("outputs", [])
        if "After both prunings the same recovery" in o.get("text", "")
    )
    table = pd.read_csv(STUDY.parent.parent / "figures/tiny/08_guide-decisions.csv").ffill()
    told = (
        table["paper's pruning"]
        .str.extract(r"^(\w+(?: \w+)?)(?: \((\d+%)\))?$")
        .set_axis(["word", "on"], axis=1)
    )
    on = told.on.fillna(table.budget.str.replace(" % of the data", "%"))
    once = told.assign(on=on, model=table.model, ratio=table["to remove"])[
        ~told.word.isin(["no rival", "not studied"])
    ].drop_duplicates(["model", "ratio", "on"])
    assert f"tried in {len(once)} places" in said and all(
        f"{word} in {n}" in said for word, n in once.word.value_counts().items()
    )


def test_saved_time_is_not_moved_by_an_outlier():
    from mllm_compress.reporting import effects

    saved = defined_in("09_cost", "saved", np=np, pd=pd, effects=effects)["saved"]
    pairs = pd.DataFrame({"dense": [1.0] * 9, "pruned": [0.5] * 8 + [50.0]})
    e = saved(pairs, ideal=4.0)  # of three quarters, half
    assert [round(v, 9) for v in (e.value, e.low, e.high)] == [round(200 / 3, 9)] * 3 and (
        e.n,
        e.seeds,
    ) == (9, 0)
