"""Tables, figures and verdicts say what the numbers say."""

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mllm_compress.study import style
from mllm_compress.study.claims import (
    AT_EQUAL_SIZE,
    CLAIMS,
    holes,
    places,
    recommended,
    split_grid,
)
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.figures import retained_over_ratio
from mllm_compress.study.notebooks import output_folder, overridden
from mllm_compress.study.profiles import load_profile, profile_names, resolve_parameters
from mllm_compress.study.report import Report
from mllm_compress.study.statistics import (
    COLORS,
    DEFINITIONS,
    SIGNS,
    WORDS,
    Estimate,
    Verdict,
    basis_of,
    difference,
)
from mllm_compress.study.tables import Table, to_html, to_latex, to_markdown

FRAME = pd.DataFrame(
    {
        "model": ["a", "a", "b", "b"],
        "method": ["x_1", "y & z", "x_1", "y & z"],
        "AVG-%": [97.11, 97.14, 90.0, float("nan")],
    }
)
TABLE = Table(FRAME, "Kept, in %.", {"AVG-%": ["model"]}, once=("model",))


def test_what_rests_on_fewer_seeds_says_so():
    rows = pd.DataFrame(
        [
            {
                "status": "done",
                "model": "m",
                "benchmark": "b",
                "n": 100,
                "pruning": "layerwise",
                "seed": s,
                "profile": "p",
            }
            for s in range(3)
        ]
    )
    assert str(basis_of(rows)) == "n = 100 questions per model, 3 seeds, profile p"
    assert (
        str(basis_of(rows.assign(status=["done", "done", "failed"])))
        == "n = 100 questions per model, 2 seeds, profile p; 1 cells FAILED"
    )
    assert (
        str(basis_of(rows.assign(status="failed")))
        == "no finished cells, profile p; 3 cells FAILED"
    )
    assert (
        str(basis_of(rows[rows.seed == 0]))
        == "n = 100 questions per model, 1 seed (intervals cover questions only), profile p"
    )
    named = rows.assign(calibration_seed=rows.seed, recovery="none")
    assert "3 seeds of calibration, profile p" in str(basis_of(named))
    trained = named.assign(recovery="sft")
    assert "3 seeds of calibration and training, profile p" in str(basis_of(trained))
    partly = trained.assign(recovery=["none", "none", "sft"])
    assert "3 seeds of calibration, 1 of training, profile p" in str(basis_of(partly))
    assert "3 seeds of training" in str(basis_of(trained.assign(calibration_seed=0)))
    text = Verdict("A.", {"here": Estimate(2, 1, 3, 100, 3)}, basis_of(rows)).sentence()
    assert text.startswith("Supported: “A.” +2.0 [1.0, 3.0] points") and "3 seeds" in text
    once = Verdict("A.", {"there": Estimate(4, 3, 5, 100, 1)}, basis_of(rows)).sentence()
    assert (
        "1 seed (intervals" in once and "3 seeds" not in once
    )  # the frame has three, the difference one


def test_every_notation_escapes_marks_and_fits():
    assert TABLE.marked("AVG-%").tolist() == [True, True, False, False]  # read the same; no rival
    assert to_markdown(TABLE).count("**") == 4
    assert "y &amp; z" in to_html(TABLE) and "<b>97.1</b>" in to_html(TABLE)
    tex = to_latex(TABLE)
    for part in (
        r"x\_1",
        r"y \& z",
        r"\caption{Kept, in \%.}",
        r"\toprule",
        r"\textbf{97.1}",
        " & -- ",
    ):
        assert part in tex, part
    wide = pd.DataFrame({"claim": ["x " * 30], "kept": [97.1], "word": ["holds"]})
    tex = to_latex(Table(wide, "Claims.", {}))
    assert r"\begin{tabular}{>{\raggedright\arraybackslash}p{4.5cm}rl}" in tex
    assert r"\begin{adjustbox}{max width=\linewidth, max totalheight=.85\textheight}" in tex
    lines = Table(pd.DataFrame({"question": ["What is x^2?\nA. ~4\n  B. 5"]}), "Asked.", {})
    assert "| What is x^2? A. ~4 B. 5 |" in to_markdown(lines)
    assert r"What is x\^{}2? A. \textasciitilde{}4 B. 5" in to_latex(lines)


@pytest.mark.parametrize(
    "bounds, word, margin",
    [
        ((0.1, 4), "supported", 1.0),
        ((-4, -0.1), "contradicted", 1.0),
        ((-1, 3), "undecided", 1.0),
        ((-3, 1), "undecided", 1.0),
        ((0.1, 0.9), "equivalent", 1.0),
        ((-0.9, 0.5), "equivalent", 1.0),
        ((0.1, 0.9), "supported", None),
        ((-0.9, 0.5), "undecided", None),
    ],
)
def test_verdict_follows_the_interval(bounds, word, margin):
    e = Estimate(sum(bounds) / 2, *bounds, 100, 3)
    v = Verdict("A beats B.", {"here": e}, "n = 100", margin=margin)
    assert v.word == word and v.sentence().startswith(word.capitalize())
    assert v.sentence().count("[") == 1 and "n = 100" in v.sentence()
    once = Verdict("A beats B.", {"here": replace(e, seeds=1)}, "n = 100", margin=margin)
    assert once.word == "undecided" and once.words == {"here": "undecided"}
    assert Verdict("A beats B.", {}, "").word == "not tested"


def test_two_models_that_score_zero_are_not_compared():
    "They would count as equivalent, and pull the average towards zero."
    ahead, zeros = Estimate(2, 1, 3, 100, 3), Estimate(0, 0, 0, 100, 3, empty=True)
    v = Verdict("A.", {"at 0.3": ahead, "at 0.6": zeros}, "n = 100", margin=1.0)
    assert v.average.value == 2 and v.word == "supported" and v.words == {"at 0.3": "supported"}
    assert "supported in 1, not tested in 1 of 2 settings" in v.sentence()
    assert Verdict("A.", {"at 0.6": zeros}, "n = 100", margin=1.0).word == "not tested"


def test_every_word_is_defined_and_has_a_sign_and_a_colour():
    assert set(WORDS) == set(DEFINITIONS) == set(SIGNS) == set(COLORS) and len(WORDS) == 5
    assert len(set(SIGNS.values())) == 5 and all("\n" not in d for d in DEFINITIONS.values())


def test_the_strongest_of_several_rivals_contradicts_at_a_stricter_level():
    "The best of five rivals is ahead by chance more often than one that was named before."
    barely = {"here": Estimate(-1.5, -2.9, -0.1, 100, 3)}
    assert Verdict("A.", barely, "", margin=1.0).word == "contradicted"
    assert Verdict("A.", barely, "", margin=1.0, rivals=5).word == "undecided"


def test_the_larger_profile_stands_beside_the_direction(checkout):
    claim, effects = "A beats B.", {"here": Estimate(2, 1, 3, 100, 3)}
    Report("02_demo", "tiny", given(profile="tiny")).verdict(claim, effects, "n = 100")
    said = Report("02_demo", "quick", given()).verdict(claim, effects, "n = 100")
    assert said.sentence().endswith("Profile tiny: supported (+2.0).")
    written = json.loads((checkout / "runs/quick/figures/02_demo-verdicts.json").read_text())
    assert (
        "tiny" not in written["verdict"]["sentence"]
    )  # files depend on the results of their profile only
    other = Report("02_demo", "quick", given()).verdict("B beats A.", effects, "n = 100")
    assert "tiny" not in other.sentence()


def test_bounds_are_never_printed_as_a_zero_that_they_are_not():
    assert format(Estimate(-0.7, -1.34, -0.04, 9, 3), "+1") == "-0.70 [-1.34, -0.04]"
    assert (
        format(Estimate(-0.04, -0.5, 0.4, 9, 3), "1") == "0.0 [-0.5, 0.4]"
        and format(Estimate(0.2, 0.0, 0.4, 9, 3), "+1") == "+0.2 [0.0, 0.4]"
    )


def test_files_are_the_same_twice_and_fonts_are_embedded(tmp_path, monkeypatch):
    rows = pd.DataFrame(
        [
            ("m", p, r, 100 - f * r, 99 - f * r, 101 - f * r)
            for p, f in (("layerwise", 80), ("widthwise", 50))
            for r in (0.15, 0.3)
        ],
        columns="model pruning achieved_ratio avg_percent low high".split(),
    )
    seen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        out = Report("99_demo", "smoke")
        out.figure(retained_over_ratio(rows, "pruning")[0], "f", "A figure.")
        out.table(FRAME, "t", "A table.")
        out.verdict("A beats B.", {"here": Estimate(2, 1, 3, 9, 3)}, "n = 9")
        seen.append(
            {p.name: p.read_bytes() for p in (tmp_path / name / "runs/smoke/figures").iterdir()}
        )
    assert seen[0] == seen[1] and len(seen[0]) == 7
    assert b"/FontFile2" in seen[0]["99_demo-f.pdf"] and b"/Type3" not in seen[0]["99_demo-f.pdf"]
    assert json.loads(seen[0]["99_demo-verdicts.json"])["verdict"]["word"] == "supported"
    assert pd.read_csv(tmp_path / "one/runs/smoke/figures/99_demo-t.csv")["AVG-%"].tolist()[:2] == [
        97.11,
        97.14,
    ]


def test_a_line_without_numbers_is_left_out():
    rows = pd.DataFrame(
        {
            "model": "m",
            "pruning": "layerwise",
            "achieved_ratio": [0.15, 0.3],
            "avg_percent": float("nan"),
            "low": float("nan"),
            "high": float("nan"),
        }
    )
    fig, (ax,) = retained_over_ratio(rows, "pruning")
    assert not ax.texts


# ---- overridden parameters

PARAMETERS = """profile: str = "quick"  # models, data and budgets
ratios: list = []  # empty: the profile's
fewer: dict = {}  # of a smaller grid"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout with one study notebook."
    (tmp_path / "nbs/study").mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    cell = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nb = new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(nb, tmp_path / "nbs/study/02_demo.ipynb")
    monkeypatch.chdir(tmp_path / "nbs/study")
    return tmp_path


def given(**values) -> dict:
    "What globals() is in a notebook."
    return {"profile": "quick", "ratios": [], "fewer": {}, "pd": pd} | values


def test_a_maintainer_publishes(checkout, monkeypatch):
    monkeypatch.setenv("MLLM_COMPRESS_PUBLISH", "1")
    assert Report("02_demo", "quick", given()).folder == checkout / "figures/quick"


@pytest.mark.parametrize("profile", ["quick", "tiny", "smoke"])
def test_a_notebook_with_its_own_parameters_writes_to_the_folder_of_its_profile(
    checkout, profile, capsys
):
    out = Report("02_demo", profile, given(profile=profile))
    out.table(FRAME, "t", "A table.")
    assert (checkout / "runs" / profile / "figures/02_demo-t.csv").exists()
    assert not (checkout / "figures").exists() and capsys.readouterr().out == ""


def test_a_notebook_with_overridden_parameters_leaves_the_figures_alone(checkout, capsys):
    Report("02_demo", "quick", given()).table(FRAME, "t", "A table.")
    before = (checkout / "runs/quick/figures/02_demo-t.md").read_bytes()
    out = Report("02_demo", "quick", given(ratios=[0.3]))
    out.table(FRAME, "t", "Another table.")
    out.verdict("A beats B.", {}, "n = 9")
    out.figure(style.panels(1)[0], "f", "A figure.")
    assert (checkout / "runs/quick/figures/02_demo-t.md").read_bytes() == before
    assert len(list((checkout / "runs/quick/figures").iterdir())) == 3
    (scratch,) = (checkout / "runs/scratch").iterdir()
    assert scratch == out.folder and scratch.name.startswith("02_demo-")
    assert len(list(scratch.iterdir())) == 7
    printed = f"Run with ratios=[0.3]: files are written to runs/scratch/{scratch.name}.\n"
    assert capsys.readouterr().out == printed


def test_each_combination_of_overrides_and_profile_has_its_own_folder(checkout):
    runs = [({"ratios": [0.3]}, "quick"), ({"ratios": [0.6]}, "quick"), ({"ratios": [0.3]}, "tiny")]
    runs.append(({"fewer": {0.05: {"seeds": [0]}, "sft": {}}}, "quick"))
    folders = [output_folder("02_demo", profile, changed) for changed, profile in runs]
    assert len(set(folders)) == 4
    assert folders == [output_folder("02_demo", profile, changed) for changed, profile in runs]


def test_what_a_profile_sets_for_a_notebook_is_no_override(checkout):
    own = replace(load_profile("quick"), notebooks={"02_demo": {"ratios": [0.6]}})
    assert resolve_parameters(own, "02_demo", ratios=[], fewer={}).ratios == [0.6]
    assert overridden("02_demo", given()) == {} and Report("02_demo", own, given()).folder == (
        checkout / "runs/quick/figures"
    )


def test_raw_papermill_with_a_given_parameter_writes_to_scratch(checkout):
    "papermill writes the value into a cell of its own, which the notebook cannot see."
    path = checkout / "nbs/study/02_demo.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells.append(
        new_code_cell(
            "from mllm_compress.study.report import Report\n"
            'print(Report("02_demo", profile, globals()).folder)'
        )
    )
    nbformat.write(nb, path)
    for values, folder in (({}, "runs/quick/figures"), ({"ratios": [0.3]}, "runs/scratch")):
        how = dict(cwd=str(path.parent), progress_bar=False, kernel_name="python3")
        done = papermill.execute_notebook(str(path), None, values, **how)
        shown = [o.text for o in done.cells[-1].outputs if o.name == "stdout"]
        assert folder in "".join(shown)


# ---- what a profile says about single notebooks

QUICK = replace(
    load_profile("quick"), notebooks={"04_distillation": {"ratios": [0.6], "objectives": ["sft"]}}
)


def test_given_parameters_come_before_the_profile_of_the_notebook_and_that_before_the_profile():
    assert vars(
        resolve_parameters(QUICK, "04_distillation", ratios=[], seeds=[], objectives=[])
    ) == {"ratios": [0.6], "seeds": [0], "objectives": ["sft"]}
    assert resolve_parameters(QUICK, "04_distillation", ratios=[0.3], objectives=[]).ratios == [0.3]
    assert (
        resolve_parameters(QUICK, "05_data", ratios=[], fractions=[]).fractions == QUICK.fractions
    )


@pytest.mark.parametrize(
    "own, message",
    [
        (
            {"ratio": [0.6]},
            "04_distillation has no parameter 'ratio' that a profile may set; it has ratios, seeds",
        ),
        ({"ratios": 0.6}, "04_distillation, ratios must be of type list, not 0.6"),
        ({"seeds": True}, "must be of type list"),
    ],
)
def test_a_profile_cannot_set_what_a_notebook_does_not_have(own, message):
    with pytest.raises(ValueError, match=message):
        resolve_parameters(
            replace(QUICK, notebooks={"04_distillation": own}),
            "04_distillation",
            ratios=[],
            seeds=[],
        )


@pytest.mark.parametrize("name", profile_names())
def test_profiles_name_notebooks_that_exist(name):
    there = {p.stem for p in (Path(__file__).parent.parent / "nbs/study").glob("*.ipynb")}
    assert set(load_profile(name).notebooks) <= there


# ---- claims

LEVEL = np.linspace(0, 1, 400, endpoint=False)


def answered(worths: dict) -> pd.DataFrame:
    "A frame in which each cell is right on the easiest share of 400 questions."
    rows = [
        vars(c)
        | {
            "requested_ratio": c.ratio,
            "achieved_ratio": c.ratio,
            "status": "done",
            "benchmark": "open",
            "score": 100 * (LEVEL < w).mean(),
            "units": (LEVEL < w) * 1.0,
        }
        for c, w in worths.items()
    ]
    return pd.DataFrame(rows)


def trained(losses, worth, ratio=0.15, seeds=(0, 1, 2), **more):
    return {
        Experiment(
            "m", recommended(ratio), ratio, recovery=losses, fraction=0.05, seed=s, **more
        ): worth
        for s in seeds
    }


def test_claims_say_what_made_up_results_hold():
    two = answered(
        {Experiment("m"): 1.0}
        | {
            Experiment("m", p, 0.3, seed=s): w
            for p, w in (("layerwise", 0.5), ("widthwise", 0.7))
            for s in range(3)
        }
    )
    assert CLAIMS[1].effects(two)["m at 0.30"].value == pytest.approx(20)
    losses = answered(
        {Experiment("m"): 1.0}
        | trained("sft", 0.9)
        | trained("hidden_kd", 0.95)
        | trained("sft+hidden_kd", 0.925)
    )
    ((where, effect),) = CLAIMS[3].effects(losses).items()
    assert where == "m at 0.15, over hidden_kd" and effect.value == pytest.approx(-2.5)
    assert CLAIMS[4].effects(losses)["m at 0.15"].value == pytest.approx(-2.5)
    parts = answered(
        {Experiment("m"): 1.0}
        | trained("sft", 0.9)
        | trained("sft", 0.895, train="projector")
        | trained("sft", 0.9, 0.45)
        | trained("sft", 0.5, 0.45, train="projector")
    )
    assert {w: round(e.value, 6) for w, e in CLAIMS[2].effects(parts).items()} == {
        "m at 0.15, over projector + LM less 1 point": 0.5
    }  # half a point worse, one granted; 0.45 is not small
    both = pd.concat(
        [parts, answered({Experiment("m", "layerwise", 0.15, seed=s): 0.8 for s in range(3)})]
    )
    assert {w: round(e.value, 6) for w, e in CLAIMS[2].effects(both).items()} == {
        "m at 0.15, over projector + LM less 1 point": 0.5
    }  # 9.5 more than no training is the surer half
    useless = pd.concat(
        [parts, answered({Experiment("m", "layerwise", 0.15, seed=s): 0.92 for s in range(3)})]
    )
    assert {w: round(e.value, 6) for w, e in CLAIMS[2].effects(useless).items()} == {
        "m at 0.15, over no training": -2.5
    }  # within a point, but worse than before


def test_a_failed_original_takes_only_its_own_model_with_it():
    from mllm_compress.study.statistics import summary

    frame = answered(
        {Experiment("m"): 1.0, Experiment("k"): 1.0}
        | {Experiment(m, "layerwise", 0.15, seed=s): 0.9 for m in "mk" for s in range(3)}
    )
    lost = (frame.model == "k") & (frame.pruning == "none")
    frame.loc[lost, "status"] = "failed"
    rows = summary(frame).set_index(["model", "pruning"])
    assert (
        rows.avg_percent["m", "layerwise"] == pytest.approx(90)
        and np.isnan(rows.avg_percent["k", "layerwise"])
        and rows.failed["k", "none"] == 1
    )
    assert {m for m, _ in places(frame)} == {"m"}


def test_sizes_that_differ_are_named():
    cells = {Experiment("m"): 1.0} | {
        Experiment("m", p, 0.45, recovery="sft+hidden_kd", seed=s): 0.9
        for p in ("layerwise", "widthwise")
        for s in range(3)
    }
    frame = answered(cells)
    frame.loc[frame.pruning == "layerwise", "achieved_ratio"] = 0.412
    assert list(CLAIMS[5].effects(frame)) == ["m at 0.45 (removed 0.450 v. 0.412)"]
    between = answered(
        {Experiment("m"): 1.0}
        | {
            Experiment("m", p, 0.38, recovery="sft+hidden_kd", seed=s): 0.9
            for p in ("layerwise", "widthwise")
            for s in range(3)
        }
    )
    assert CLAIMS[5].effects(between) == {}  # of ratios between 30 and 45 % the claim says nothing


def test_half_of_claim_5_is_undecided():
    "Layerwise at 30 % was compared, and nothing at 45 % or above; then both were."

    def cells(*ratios):
        return {Experiment("m"): 1.0} | {
            Experiment("m", p, r, recovery="sft+hidden_kd", seed=s): kept
            for r in ratios
            for p, kept in zip(("layerwise", "widthwise"), (0.9, 0.6) if r < 0.4 else (0.6, 0.9))
            for s in range(3)
        }

    verdicts = {}
    for ratios in ((0.3,), (0.45,), (0.3, 0.45)):
        frame, claim = answered(cells(*ratios)), CLAIMS[5]
        verdicts[ratios] = Verdict(claim.text, basis="", **claim.measure(frame))
    assert [v.word for v in verdicts.values()] == ["undecided", "undecided", "supported"]
    assert "not tested: 45 % and above" in verdicts[0.3,].sentence()
    assert "not tested: 30 % and below" in verdicts[0.45,].sentence()
    assert "not tested" not in verdicts[0.3, 0.45].sentence()


@pytest.mark.parametrize("recovery, claim", [("none", 1), ("sft+hidden_kd", 5)])
def test_prunings_are_compared_at_equal_size(recovery, claim):
    "Retained scores depend on the achieved ratio; widthwise pruning has five points more."
    removed = {
        ("layerwise", 0.3): 0.33,
        ("layerwise", 0.38): 0.36,
        ("layerwise", 0.45): 0.41,
        ("layerwise", 0.6): 0.58,
        ("widthwise", 0.3): 0.30,
        ("widthwise", 0.33): 0.331,
        ("widthwise", 0.36): 0.36,
        ("widthwise", 0.41): 0.4125,
        ("widthwise", 0.6): 0.60,
    }
    cells = {
        Experiment("m", p, r, recovery=recovery, seed=s): size
        for (p, r), size in removed.items()
        for s in range(3)
    }
    frame = answered(
        {Experiment("m"): 1.0}
        | {c: 1 - size + 0.05 * (c.pruning == "widthwise") for c, size in cells.items()}
    )
    frame["achieved_ratio"] = [0, *cells.values()]
    found = AT_EQUAL_SIZE[claim].effects(frame)
    expected = (
        {"m, 0.330 removed": 5, "m, 0.360 removed": 5, "m, 0.410 removed": 5}
        if claim == 1
        else {"m, 0.330 removed": -5, "m, 0.410 removed": 5}
    )  # 0.38 is a ratio that claim 5 leaves out
    assert set(found) == set(expected)  # nothing of widthwise is near 0.58
    for where, e in found.items():
        assert e.value == pytest.approx(expected[where], abs=0.5) and e.seeds == 3
    assert AT_EQUAL_SIZE[6 - claim].effects(frame) == {}


def test_a_rival_without_a_shared_seed_is_no_rival():
    lucky = {Experiment("m", "layerwise", 0.15, recovery="logits_kd", seed=7): 1.0}
    frame = answered(
        {Experiment("m"): 1.0} | trained("sft", 0.9) | trained("sft+hidden_kd", 0.925) | lucky
    )
    assert list(CLAIMS[3].effects(frame)) == ["m at 0.15, over sft"]


def test_a_rival_at_fewer_places_is_no_rival_but_counts_where_it_ran():
    "It would leave the other places untested; the strongest at 0.15 is the new one."
    both = trained("sft", 0.9) | trained("sft+hidden_kd", 0.925)
    both |= {replace(e, ratio=0.3): a for e, a in both.items()}
    frame = answered({Experiment("m"): 1.0} | both | trained("logits_kd", 0.95))
    assert list(CLAIMS[3].effects(frame)) == ["m at 0.15, over sft", "m at 0.30, over sft"]
    assert CLAIMS[3].measure(frame)["rivals"] == 1
    here = frame[frame.requested_ratio.isin([0.0, 0.15])]
    ((where, effect),) = CLAIMS[3].effects(here).items()
    assert where == "m at 0.15, over logits_kd" and effect.value == pytest.approx(-2.5)
    assert CLAIMS[3].measure(here)["rivals"] == 2


def test_the_rival_is_the_one_that_is_least_surely_beaten():
    "The mean alone would name a rival that scatters, and hide one that is better beyond doubt."
    wild = {
        Experiment("m", "layerwise", 0.15, recovery="logits_kd", fraction=0.05, seed=s): w
        for s, w in enumerate((0.80, 0.99, 0.99))
    }
    frame = answered(
        {Experiment("m"): 1.0} | trained("sft+hidden_kd", 0.9) | trained("hidden_kd", 0.925) | wild
    )
    ((where, effect),) = CLAIMS[3].effects(frame).items()
    assert (
        where == "m at 0.15, over hidden_kd"
        and effect.high < 0
        and effect.value == pytest.approx(-2.5)
    )  # the wild one is better by 2.7 in the mean


def test_only_shared_seeds_are_paired():
    frame = answered(
        {
            Experiment("m"): 1.0,
            Experiment("m", "layerwise", 0.3, seed=0): 0.1,
            Experiment("m", "layerwise", 0.3, seed=1): 0.5,
            Experiment("m", "widthwise", 0.3, seed=1): 0.7,
        }
    )
    first, second = {"pruning": "widthwise"}, {"pruning": "layerwise"}
    assert (
        difference(frame, "m", first, second).value == pytest.approx(20)
        and difference(frame, "m", first, second).seeds == 1
    )
    assert CLAIMS[1].effects(frame[~((frame.seed == 1) & (frame.pruning == "layerwise"))]) == {}


def test_what_a_grid_leaves_out_is_named():
    run, left_out = split_grid(
        ["sft", "kd"], [0.3, 0.6], [0, 1], {"kd": {"ratios": [0.6], "seeds": [1]}}
    )
    assert (
        run == [("sft", 0.3, 0), ("sft", 0.3, 1), ("sft", 0.6, 0), ("sft", 0.6, 1), ("kd", 0.6, 1)]
        and holes(run, left_out) == "kd at 0.30, 0.60 (seeds 0)"
    )
    with pytest.raises(ValueError, match="fewer names .'dpo'., which is not compared"):
        split_grid(["sft"], [0.3], [0], {"dpo": {}})
    own = {"sft": {"models": ["m"]}}
    assert split_grid(["sft"], [0.3], [0], own, also=("models",)) == ([("sft", 0.3, 0)], [])
    with pytest.raises(ValueError, match="sft must hold ratios or seeds"):
        split_grid(["sft"], [0.3], [0], own)


def test_names_keep_apart_where_another_panel_widens_the_scale():
    "The panels share one scale; two lines that end close together are named one above the other."
    point = lambda model, pruning, kept, ratio=0.6: {
        "model": model,
        "pruning": pruning,
        "achieved_ratio": ratio,
        "avg_percent": kept,
        "low": kept - 1,
        "high": kept + 1,
    }
    rows = pd.DataFrame(
        [
            point("a", "layerwise", 96.2),
            point("a", "widthwise", 96.5),
            point("b", "layerwise", 40.0),
            point("b", "widthwise", 98.0),
        ]
        + [point(m, p, 99.0, 0.3) for m in "ab" for p in ("layerwise", "widthwise")]
    )
    fig, (ax, _) = retained_over_ratio(rows, "pruning")
    fig.canvas.draw()
    low, high = ax.get_ylim()
    heights = [t.xy[1] for t in ax.texts]
    assert abs(heights[0] - heights[1]) >= 0.07 * (high - low)
