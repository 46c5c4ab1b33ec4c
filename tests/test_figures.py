"""What the study's notebooks choose to show follows the rules that they state."""

import ast
import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mllm_compress.study import guide, scoreboard
from mllm_compress.study.figures import forest
from mllm_compress.study.notebooks import parameters_of
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.statistics import SETTING, Estimate, Verdict
from mllm_compress.study.tables import beside_printed

STUDY = Path(__file__).parent.parent / "nbs/study"


NOTEBOOKS = sorted(STUDY.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_reports_see_the_parameters_as_they_were_given(path):
    "Every report gets globals(), and no cell before it gives a parameter another value."
    nb = nbformat.read(path, 4)
    parameters = set(parameters_of(nb))
    for module in (ast.parse(cell.source) for cell in nb.cells if cell.cell_type == "code"):
        for call in (n for n in ast.walk(module) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "Report":
                name, profile, values = map(ast.unparse, call.args)
                assert (name, profile, values) == (repr(path.stem), "profile", "globals()")
        for statement in module.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AnnAssign)):
                continue
            loops = [c.target for c in ast.walk(statement) if isinstance(c, ast.comprehension)]
            inside = {id(n) for target in loops for n in ast.walk(target)}
            names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            names = [n.id for n in names if isinstance(n.ctx, ast.Store) and id(n) not in inside]
            assert not set(names) & parameters, ast.unparse(statement)


def test_the_guide_compares_prunings_by_recoveries_tried_after_both(monkeypatch):
    "What only one pruning was given, the best of all here, says nothing about the other."
    behind = {
        0.05: Estimate(0.2, -0.3, 0.6, 100, 3),
        0.1: Estimate(0.8, -0.3, 1.9, 100, 3),
        1.0: Estimate(3.0, 2.0, 4.0, 100, 3),
        0.2: Estimate(3.0, 2.0, 4.0, 100, 1),
    }  # of layerwise, by fraction
    gap = lambda frame, model, best, setting: behind[setting["fraction"]]
    monkeypatch.setattr(guide.statistics, "difference", gap)
    agreement = lambda *given: guide.agreement(None, *given)

    def ranking(fraction, *more):
        rows = [
            ("layerwise", "hidden_kd", fraction, False),
            *more,
            ("widthwise", "sft", fraction, True),
            ("layerwise", "sft", fraction, True),
            ("layerwise", "none", 1.0, False),
        ]
        names = ["pruning", "recovery", "fraction", "rival"]
        table = pd.DataFrame(rows, columns=names).assign(model="m")
        return table.reindex(columns=[*SETTING, "rival"])

    assert [agreement(ranking(f), 0.3, f) for f in behind] == ["tied", "open", "behind", "open"]
    first = ranking(1.0, ("layerwise", "sft", 1.0, True))
    assert agreement(ranking(1.0), 0.6, 1.0) == agreement(first, 0.3, 1.0) == "same"
    assert agreement(ranking(1.0).query("not rival"), 0.3, 1.0) == "no rival"
    assert agreement(ranking(1.0), 0.6, 0.0) == "not studied"


def test_the_scoreboard_has_a_column_for_every_profile_with_verdicts(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").touch()
    (tmp_path / "figures/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    average = {"value": -7.0, "low": -11.4, "high": -2.6, "n": 7000, "seeds": 3}
    written = {"claim": "", "word": "contradicted", "average": average, "n": 7000, "seeds": 3}
    written |= {"counts": {"undecided": 3, "contradicted": 5}, "parts": {}, "agree": True}
    path = tmp_path / "figures/tiny/10_findings-verdicts.json"
    path.write_text(json.dumps({"claim-1": written}))
    mine = {1: Verdict("A.", {"here": Estimate(2, 1, 3, 100, 1)}, ""), 2: Verdict("B.", {}, "")}
    board = scoreboard.scoreboard(mine, "quick")
    assert list(board.tiny) == ["contradicted", "not tested"]
    assert list(board.quick) == ["undecided", "not tested"]
    assert board["tiny, effect"][0] == "-7.0 [-11.4, -2.6]"
    ends = {f"m at {r:.2f}": {"value": 9.0 - 20 * r} for r in (0.15, 0.3, 0.6)}
    words = dict(zip(ends, ("supported", "undecided", "contradicted")))
    apart = written | {"agree": False, "effects": ends, "words": words}
    assert scoreboard.shown_effect(apart) == "-3.0 ✗ (0.60); +6.0 ✓ (0.15)"
    halves = {"parts": {"30 % and below": {"word": "undecided", "average": {"value": -1.2}}}}
    assert scoreboard.shown_effect(apart | halves) == "-1.2 ? (≤30 %)"
    assert board["tiny, contradicted in"][0] == "5 of 8"
    assert board["tiny, questions x seeds"][0] == "7,000 x 3"
    ax = scoreboard.scoreboard_figure(board, "quick").axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()][1:] == ["profile\ntiny", "profile\nquick"]


def test_a_model_that_the_paper_has_not_measured_has_no_row_beside_it():
    row = {"requested_ratio": 0.3, "avg_percent": 80.0, "pruning": "layerwise"}
    table = "pruning_without_recovery"
    assert beside_printed(pd.DataFrame([row | {"model": "a"}]), load_profile("smol"), table).empty
    (printed,) = beside_printed(
        pd.DataFrame([row | {"model": "tiny-llava"}]), load_profile("tiny"), table
    ).printed
    assert printed == 69.18


@pytest.mark.filterwarnings("error:constrained_layout")
def test_panels_with_other_words_have_room():
    verdicts = {
        name: Verdict(name, {f"m at {r}": Estimate(x, x - 1, x + 1, 9, 3) for r in "12"}, "")
        for name, x in (("better", 5), ("worse", -5))
    }
    fig = forest(verdicts)
    fig.canvas.draw()
    assert min(ax.get_position().height for ax in fig.axes) > 0.15
