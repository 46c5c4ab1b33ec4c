"""Tables, figures and verdicts say what the numbers say."""

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as hypothesis
from nbformat.v4 import new_code_cell, new_notebook

from mllm_compress.study import style
from mllm_compress.study.claims import CLAIMS, check_fewer, places, recommended
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.figures import curves
from mllm_compress.study.notebooks import overridden
from mllm_compress.study.profiles import load_profile, profile_names, resolve_parameters
from mllm_compress.study.report import Report
from mllm_compress.study.statistics import Estimate, Verdict, basis_of, difference, summary
from mllm_compress.study.tables import Table, score_table, to_html, to_latex

FRAME = pd.DataFrame(
    {
        "model": ["a", "a", "b", "b"],
        "method": ["x_1", "y & z", "x_1", "y & z"],
        "AVG-%": [97.11, 97.14, 90.0, float("nan")],
    }
)
TABLE = Table(FRAME, "Kept, in %.", {"AVG-%": ["model"]}, once=("model",))


def test_what_rests_on_fewer_seeds_says_so():
    rows = pd.DataFrame({"seed": range(3), "status": "done", "model": "m", "benchmark": "b"})
    rows = rows.assign(n=100, pruning="layerwise", profile="p", recovery="none")
    rows = rows.assign(calibration_seed=0)
    lost, named = ["done", "done", "failed"], rows.assign(calibration_seed=rows.seed)
    trained, mixed = named.assign(recovery="sft"), ["none", "none", "sft"]
    n = "n = 100 questions per model"
    for frame, says in (
        (rows, f"{n}, 3 seeds, profile p"),
        (rows.assign(status=lost), f"{n}, 2 seeds, profile p; 1 cells FAILED"),
        (rows.assign(status="failed"), "no finished cells, profile p; 3 cells FAILED"),
        (rows[:1], f"{n}, 1 seed (intervals cover questions only), profile p"),
        (named, f"{n}, 3 seeds of calibration, profile p"),
        (trained, f"{n}, 3 seeds of calibration and training, profile p"),
        (trained.assign(recovery=mixed), f"{n}, 3 seeds of calibration, 1 of training, profile p"),
        (trained.assign(calibration_seed=0), f"{n}, 3 seeds of training, profile p"),
    ):
        assert str(basis_of(frame)) == says
    text = Verdict("A.", {"here": Estimate(2, 1, 3, 100, 3)}, basis_of(rows)).sentence()
    assert text.startswith("Supported: “A.” +2.0 [1.0, 3.0] points") and "3 seeds" in text
    once = Verdict("A.", {"there": Estimate(4, 3, 5, 100, 1)}, basis_of(rows)).sentence()
    assert "1 seed (intervals" in once and "; one seed decides nothing." in once
    assert "3 seeds" not in once and "decides" not in text  # of the difference, not the frame


def test_every_notation_escapes_marks_and_fits():
    assert TABLE.marked("AVG-%").tolist() == [True, True, False, False]  # read the same; no rival
    assert "y &amp; z" in to_html(TABLE) and "<b>97.1</b>" in to_html(TABLE)
    tex = to_latex(TABLE)
    parts = (r"x\_1", r"y \& z", r"\caption{Kept, in \%.}", r"\toprule", r"\textbf{97.1}", " & – ")
    assert not [part for part in parts if part not in tex]
    lines = Table(pd.DataFrame({"question": ["What is x^2?\nA. ~4\n  B. 5"]}), "Asked.", {})
    assert r"What is x\^{}2? A. \textasciitilde{}4 B. 5" in to_latex(lines)


@given_any(hypothesis.floats(0, 99), hypothesis.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_above_guessing_is_nothing_for_guessing_and_all_for_the_original(chance, share):
    scores = [chance, chance + share * (100 - chance), 100.0]
    rows = pd.DataFrame({"model": "smoke-llava", "pruning": "none", "avg_percent": scores})
    rows = rows.assign(requested_ratio=0.0, achieved_ratio=0.0, low=0.0, high=0.0)
    table = score_table(rows, load_profile("smoke"), guessed={"smoke-llava": chance})
    assert table["AVG-% above guessing"].tolist() == pytest.approx([0, 100 * share, 100], abs=1e-6)
    assert "AVG-% above guessing" not in score_table(rows, load_profile("smoke"))


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


def test_the_strongest_of_several_rivals_contradicts_at_a_stricter_level():
    "The best of five rivals is ahead by chance more often than one that was named before."
    barely = {"here": Estimate(-1.5, -2.9, -0.1, 100, 3)}
    assert Verdict("A.", barely, "", margin=1.0).word == "contradicted"
    assert Verdict("A.", barely, "", margin=1.0, rivals=5).word == "undecided"


def test_bounds_are_never_printed_as_a_zero_that_they_are_not():
    assert format(Estimate(-0.7, -1.34, -0.04, 9, 3), "+1") == "-0.70 [-1.34, -0.04]"
    assert format(Estimate(-0.04, -0.5, 0.4, 9, 3), "1") == "0.0 [-0.5, 0.4]"
    assert format(Estimate(0.2, 0.0, 0.4, 9, 3), "+1") == "+0.2 [0.0, 0.4]"


def test_files_are_the_same_twice_and_fonts_are_embedded(tmp_path, monkeypatch):
    ratios = pd.Series([0.15, 0.3] * 2)
    rows = pd.DataFrame({"model": "m", "pruning": ["layerwise"] * 2 + ["widthwise"] * 2})
    rows = rows.assign(achieved_ratio=ratios, avg_percent=100 - [80, 80, 50, 50] * ratios)
    rows = rows.assign(low=rows.avg_percent - 1, high=rows.avg_percent + 1)
    seen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        out = Report("99_demo", "smoke")
        out.figure(curves(rows, start=100, named=True)[0], "f", "A figure.")
        out.table(FRAME, "t", "A table.")
        out.verdict("A beats B.", {"here": Estimate(2, 1, 3, 9, 3)}, "n = 9")
        seen.append({p.name: p.read_bytes() for p in Path("runs/smoke/figures").iterdir()})
    assert seen[0] == seen[1] and len(seen[0]) == 6
    assert b"/FontFile2" in seen[0]["99_demo-f.pdf"] and b"/Type3" not in seen[0]["99_demo-f.pdf"]
    assert json.loads(seen[0]["99_demo-verdicts.json"])["verdict"]["word"] == "supported"
    assert [*pd.read_csv("runs/smoke/figures/99_demo-t.csv")["AVG-%"]][:2] == [97.11, 97.14]


def test_kinds_of_text_that_are_trained_on_are_told_apart():
    names = [f"text/{kind}" for kind in ("quotes", "glosses", "cloze", "quotes", "technical")]
    split = (out := Report("99_demo", "smol")).kinds(rows := pd.DataFrame({"benchmark": names}))
    assert [*split] == ["texts of the kinds trained on", "text/cloze", "text/technical"]
    assert [part.index.tolist() for part in split.values()] == [[0, 1, 3], [2], [4]]
    assert out.kinds(rows[:2]) == {} == Report("99_demo", "smoke").kinds(rows)


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


def test_a_notebook_with_overridden_parameters_leaves_the_figures_alone(checkout, capsys):
    Report("02_demo", "quick", given()).table(FRAME, "t", "A table.")
    before = (checkout / "runs/quick/figures/02_demo-t.tex").read_bytes()
    out = Report("02_demo", "quick", given(ratios=[0.3]))
    out.table(FRAME, "t", "Another table.")
    out.verdict("A beats B.", {}, "n = 9")
    assert "no results" in out.figure(style.panels(1)[0], "nothing", "No figure.").data
    fig, (ax,) = style.panels(1)
    ax.plot([0, 1])
    out.figure(fig, "f", "A figure.")
    assert (checkout / "runs/quick/figures/02_demo-t.tex").read_bytes() == before
    assert len(list((checkout / "runs/quick/figures").iterdir())) == 2
    (scratch,) = (checkout / "runs/scratch").iterdir()
    assert scratch == out.folder and scratch.name.startswith("02_demo-")
    assert len(list(scratch.iterdir())) == 6
    printed = f"Run with ratios=[0.3]: files are written to runs/scratch/{scratch.name}.\n"
    assert capsys.readouterr().out == printed


def test_what_a_profile_sets_for_a_notebook_is_no_override(checkout):
    own = replace(load_profile("quick"), notebooks={"02_demo": {"ratios": [0.6]}})
    assert resolve_parameters(own, "02_demo", ratios=[], fewer={}).ratios == [0.6]
    assert overridden("02_demo", given()) == {} and Report("02_demo", own, given()).folder == (
        checkout / "runs/quick/figures"
    )


# ---- what a profile says about single notebooks

OWN = {"ratios": [0.6], "objectives": ["sft"]}
QUICK = replace(load_profile("quick"), notebooks={"04_distillation": OWN})


def test_given_parameters_come_before_the_profile_of_the_notebook_and_that_before_the_profile():
    resolved = lambda **given: vars(resolve_parameters(QUICK, "04_distillation", **given))
    assert resolved(ratios=[], seeds=[], objectives=[]) == OWN | {"seeds": [0]}
    assert resolved(ratios=[0.3], objectives=[])["ratios"] == [0.3]
    other = resolve_parameters(QUICK, "05_data", ratios=[], fractions=[])
    assert other.fractions == QUICK.fractions


@pytest.mark.parametrize(
    "own, message",
    [
        ({"ratio": [0.6]}, "no parameter 'ratio' that a profile may set; it has ratios, seeds"),
        ({"ratios": 0.6}, "04_distillation, ratios must be of type list, not 0.6"),
        ({"seeds": True}, "must be of type list"),
    ],
)
def test_a_profile_cannot_set_what_a_notebook_does_not_have(own, message):
    profile = replace(QUICK, notebooks={"04_distillation": own})
    with pytest.raises(ValueError, match=message):
        resolve_parameters(profile, "04_distillation", ratios=[], seeds=[])


@pytest.mark.parametrize("name", profile_names())
def test_profiles_name_notebooks_that_exist(name):
    there = {p.stem for p in (Path(__file__).parent.parent / "nbs/study").glob("*.ipynb")}
    assert set(load_profile(name).notebooks) <= there


# ---- claims

LEVEL = np.linspace(0, 1, 400, endpoint=False)


def answered(worths: dict) -> pd.DataFrame:
    "A frame in which each cell is right on the easiest share of 400 questions."
    frame = pd.DataFrame([vars(cell) for cell in worths])
    units = [(LEVEL < worth) * 1.0 for worth in worths.values()]
    frame = frame.assign(requested_ratio=frame.ratio, achieved_ratio=frame.ratio, units=units)
    return frame.assign(status="done", benchmark="open", score=[100 * u.mean() for u in units])


ORIGINAL = {Experiment("m"): 1.0}


def seeded(worth, *given, **more) -> dict:  # experiment -> worth
    "An experiment with three seeds."
    return {Experiment("m", *given, seed=s, **more): worth for s in range(3)}


def trained(losses, worth, ratio=0.15, **more) -> dict:
    "A recovery after the pruning that is recommended at a ratio."
    return seeded(worth, recommended(ratio), ratio, recovery=losses, fraction=0.05, **more)


def rounded(effects: dict) -> dict:
    return {where: round(effect.value, 6) for where, effect in effects.items()}


def test_claims_say_what_made_up_results_hold():
    two = seeded(0.5, "layerwise", 0.3) | seeded(0.7, "widthwise", 0.3)
    assert rounded(CLAIMS[1].effects(answered(ORIGINAL | two))) == {"m at 0.30": 20}
    losses = ORIGINAL | trained("sft", 0.9) | trained("hidden_kd", 0.95)
    losses = answered(losses | trained("sft+hidden_kd", 0.925))
    assert rounded(CLAIMS[3].effects(losses)) == {"m at 0.15, over hidden_kd": -2.5}
    assert CLAIMS[4].effects(losses)["m at 0.15"].value == pytest.approx(-2.5)


def test_shares_are_paired_with_the_original():
    "The interval of a share of the original's score is that of a bootstrap over questions."
    rng = np.random.default_rng(0)
    whole = (rng.random(600) >= 0.4) * 1.0
    ours = whole * (rng.random(600) < 0.95)
    frame = answered(ORIGINAL | {Experiment("m", "layerwise", 0.3): 0.9})
    frame = frame.assign(units=[whole, ours], score=[100 * whole.mean(), 100 * ours.mean()])
    rows = summary(frame).set_index("pruning")
    assert tuple(rows.loc["none", ["avg_percent", "low", "high"]]) == (100, 100, 100)
    draws = (rng.integers(0, 600, 600) for _ in range(4000))
    low, high = np.quantile([100 * ours[k].mean() / whole[k].mean() for k in draws], [0.025, 0.975])
    row = rows.loc["layerwise"]
    assert row.avg_percent == pytest.approx(100 * ours.mean() / whole.mean()) and row.n == 600
    assert (row.high - row.low) / (high - low) == pytest.approx(1, abs=0.08)
    frame.at[1, "units"] = ours[:5]
    with pytest.raises(ValueError, match="evaluate both on the same"):
        summary(frame)


def test_a_failed_original_takes_only_its_own_model_with_it():
    kept = ORIGINAL | seeded(0.9, "layerwise", 0.15)
    frame = answered({replace(e, model=m): w for m in "mk" for e, w in kept.items()})
    lost = (frame.model == "k") & (frame.pruning == "none")
    frame.loc[lost, "status"] = "failed"
    rows = summary(frame).set_index(["model", "pruning"])
    assert rows.avg_percent["m", "layerwise"] == pytest.approx(90)
    assert np.isnan(rows.avg_percent["k", "layerwise"]) and rows.failed["k", "none"] == 1
    assert {m for m, _ in places(frame)} == {"m"}


def test_half_of_claim_5_is_undecided():
    "Layerwise at 30 % was compared, and nothing at 45 % or above; then both were."

    def verdict(*ratios):
        kept = ORIGINAL
        for r in ratios:
            scores = (0.9, 0.6) if r < 0.4 else (0.6, 0.9)
            for pruning, score in zip(("layerwise", "widthwise"), scores):
                kept = kept | seeded(score, pruning, r, recovery="sft+hidden_kd")
        return Verdict("A.", basis="", **CLAIMS[5].measure(answered(kept)))

    small, large, both = verdict(0.3), verdict(0.45), verdict(0.3, 0.45)
    assert [v.word for v in (small, large, both)] == ["undecided", "undecided", "supported"]
    assert (large.missing, both.missing) == ("30 % and below", "")
    assert "not tested: 45 % and above" in small.sentence()
    assert "45 % and above: supported" in both.sentence() and both.listed() not in both.sentence()
    assert verdict(0.38).effects == {}  # of these ratios the claim says nothing


def test_the_rival_is_the_one_that_is_least_surely_beaten():
    "The mean alone would name a rival that scatters, and hide one that is better beyond doubt."
    wild = trained("logits_kd", 0.99)
    wild[next(iter(wild))] = 0.80
    known = trained("sft+hidden_kd", 0.9) | trained("hidden_kd", 0.925)
    frame = answered(ORIGINAL | known | wild)
    ((where, effect),) = CLAIMS[3].effects(frame).items()
    assert CLAIMS[3].measure(frame)["rivals"] == 2
    assert where == "m at 0.15, over hidden_kd" and effect.high < 0  # wild: 2.7 better on average
    assert effect.value == pytest.approx(-2.5)


def test_only_shared_seeds_are_paired():
    worths = {("layerwise", 0): 0.1, ("layerwise", 1): 0.5, ("widthwise", 1): 0.7}
    worths = {Experiment("m", p, 0.3, seed=s): worth for (p, s), worth in worths.items()}
    frame = answered(ORIGINAL | worths)
    gap = difference(frame, "m", {"pruning": "widthwise"}, {"pruning": "layerwise"})
    assert gap.value == pytest.approx(20) and gap.seeds == 1
    assert CLAIMS[1].effects(frame[~((frame.seed == 1) & (frame.pruning == "layerwise"))]) == {}


def test_grids_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="fewer names .'dpo'., which is not compared"):
        check_fewer({"dpo": {}}, ["sft"])
    assert check_fewer({"sft": {"models": ["m"]}}, ["sft"], {"models": None})
    with pytest.raises(ValueError, match="layer.*layers"):
        check_fewer({"sft": {"ways": ["layer"]}}, ["sft"], {"ways": ["layers"]})
    with pytest.raises(ValueError, match="sft must hold ratios or seeds"):
        check_fewer({"sft": {"models": ["m"]}}, ["sft"])


def test_seeds_that_share_a_result_count_each_and_a_row_once(monkeypatch):
    monkeypatch.setattr("mllm_compress.study.report.name_of", lambda e, _: e.quantize)
    labels = dict.fromkeys(seeded(0.8, quantize="nf4"), "4 bits")
    frame = answered(ORIGINAL | dict.fromkeys(labels, 0.8)).assign(result=lambda f: f.quantize)
    rows = Report("99_demo", "smoke").labelled(pd.concat([frame, frame]), labels)
    counts = rows.groupby("importance").seed.agg(["size", "nunique"])
    assert counts.T.to_dict("list") == {"4 bits": [3, 3], "original": [1, 1]}
