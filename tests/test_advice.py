"""Advice follows from results by rules: what fits, what retains most, ties, and heavy losses."""

import shutil

import numpy as np
import pandas as pd
import pytest

from mllm_compress.study import advice, store
from mllm_compress.study import runs as study
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.statistics import difference, setting_of
from mllm_compress.study.store import results_of


def made(
    pruning="none",
    ratio=0.0,
    worth=1.0,
    recovery="none",
    fraction=1.0,
    train="projector+lm",
    model="tiny-llava",
    n=400,
    achieved=None,
):
    "A row as `study.run` gives it: n questions, of which the first `worth` were right."
    return {
        "model": model,
        "pruning": pruning,
        "ratio": ratio,
        "requested_ratio": ratio,
        "achieved_ratio": achieved or ratio,
        "importance": "x",
        "recovery": recovery,
        "train": train,
        "fraction": fraction,
        "epochs": 0,
        "calibration": "default",
        "seed": 0,
        "status": "done",
        "error": "",
        "profile": "p",
        "benchmark": "b",
        "score": 100 * worth,
        "n": n,
        "units": np.arange(n) < n * worth,
    }


def thrice(rows: list) -> list:
    "The same with three seeds; the original has one."
    return [row | {"seed": s} for row in rows for s in range(1 if row["pruning"] == "none" else 3)]


RESULTS = [
    made(),
    made("layerwise", 0.15, 0.94),
    made("widthwise", 0.15, 0.97),
    made("layerwise", 0.3, 0.7, achieved=0.333),
    made("widthwise", 0.3, 0.9),
    made("layerwise", 0.3, 0.99, "sft", 1.0),
    made("layerwise", 0.3, 0.9875, "sft", 0.05),
    made("layerwise", 0.3, 0.985, "sft", 0.05, "projector"),
    made("widthwise", 0.6, 0.6),
    made("widthwise", 0.6, 0.78, "sft", 0.05),
]


@pytest.fixture
def ask(monkeypatch):
    "Advice from made-up results."

    def asking(model="tiny-llava", rows=RESULTS, **kw):
        monkeypatch.setattr(advice, "evidence", lambda profile: pd.DataFrame(rows))
        return advice.advise(model, **kw)

    return asking


@pytest.mark.parametrize(
    "question, setting",
    [
        (dict(ratio=0.3, training=False), ("widthwise", "none", 1.0)),
        (dict(ratio=0.3, data=0.05), ("layerwise", "sft", 0.05)),
        (dict(ratio=0.3, data=1.0), ("layerwise", "sft", 1.0)),
        (dict(ratio=0.3, data=0.01), ("widthwise", "none", 1.0)),
        (dict(ratio=0.15), ("widthwise", "none", 1.0)),
        (dict(ratio=0.45), ("widthwise", "sft", 0.05)),  # the next larger step is 0.6
    ],
)
def test_the_setting_that_kept_most_of_what_fits(ask, question, setting):
    given = ask(**question).setting
    assert (given["pruning"], given["recovery"], given["fraction"]) == setting


def test_ties_are_said_and_the_cheapest_is_named(ask):
    given = ask(
        rows=thrice(
            [
                made(n=4000)
                if r["pruning"] == "none"
                else r | {"n": 4000, "units": np.arange(4000) < 40 * r["score"]}
                for r in RESULTS
            ]
        ),
        ratio=0.3,
        data=1.0,
    )
    assert list(given.rows.tied) == [True, True, True, False, False] and not given.rows.open.any()
    assert (
        "points less, a tie)" in given.text
        and "the cheapest: prune layerwise (x) at ratio 0.30 (achieved 0.300), "
        "then train projector with sft on 5 %"
        in given.text
    )
    assert given.rows.behind.round(6).tolist() == [0, 0.25, 0.5, 9, 29]
    assert "tie" not in ask(ratio=0.6).text


def test_a_tie_must_be_shown(ask):
    "Half a point behind on few questions may be more than a point; with one seed nobody knows."
    few = ask(rows=thrice(RESULTS), ratio=0.3, data=1.0)
    assert list(few.rows.tied) == [True, True, False, False, False] and list(few.rows.open) == [
        False,
        False,
        True,
        False,
        False,
    ]  # 0.5 [-0.2, 1.2]
    once = ask(ratio=0.3, data=1.0)
    assert (
        "tie" not in once.text
        and "It rests on one seed" in once.text
        and "It rests on one seed" not in few.text
    )
    assert "(n = 400 questions per model, 3 seeds, profile p)" in few.text


def test_a_pruning_that_was_tried_alone_says_so(ask):
    "SFT on 5 % of the data was tried after one pruning only; without training both were."
    trained, untrained = ask(ratio=0.3, data=0.05), ask(ratio=0.3, training=False)
    rival = {(r.recovery, r.pruning): r.rival for r in trained.rows.itertuples()}
    assert rival == {
        ("none", "layerwise"): True,
        ("none", "widthwise"): True,
        ("sft", "layerwise"): False,
    }
    said = "The other pruning was not tried with this recovery"
    assert said in trained.text and said not in untrained.text
    both = ask(rows=RESULTS + [made("widthwise", 0.3, 0.9, "sft", 0.05)], ratio=0.3, data=0.05)
    assert said not in both.text and both.rows.rival.sum() == 4


def test_each_pruning_answers_with_its_own_step():
    frame = pd.DataFrame(
        [
            made(p, r, 0.9, achieved=a)
            for p, r, a in (
                ("layerwise", 0.3, 0.333),
                ("layerwise", 0.45, 0.412),
                ("widthwise", 0.3, 0.3),
                ("widthwise", 0.45, 0.45),
            )
        ]
    )
    steps = lambda ratio: dict(
        zip((near := advice.nearby(frame, ratio)).pruning, near.achieved_ratio)
    )
    assert steps(0.37) == {
        "layerwise": 0.333,
        "widthwise": 0.45,
    }  # within five points, and else the next larger
    assert steps(0.375) == {"layerwise": 0.412, "widthwise": 0.45} and steps(0.44) == {
        "layerwise": 0.412,
        "widthwise": 0.45,
    }
    assert steps(0.48) == {"widthwise": 0.45} and steps(0.2) == {
        "layerwise": 0.333,
        "widthwise": 0.3,
    }


def test_the_cheapest_needs_no_teacher_and_is_always_shown():
    rows = pd.DataFrame(
        [
            {"recovery": r, "train": t, "fraction": f, "epochs": 0, "tied": True}
            for r, t, f in [("sft+hidden_kd", "projector+lm", 0.05)] * 9
            + [
                ("hidden_kd", "projector+lm", 0.05),
                ("sft", "projector+lm", 0.05),
                ("sft", "projector+lm", 0.1),
            ]
        ]
    )
    assert advice.cheapest(rows).name == 10 and list(advice.shown(rows).index) == [*range(8), 10]


def test_who_is_far_behind_with_a_wide_interval_is_not_offered_as_cheap(ask):
    seeds = lambda rows: [row | {"seed": s} for s, row in enumerate(rows)]
    noisy = [
        made(),
        *seeds([made("layerwise", 0.3, 0.95, "sft", 0.05)] * 3),
        *seeds([made("widthwise", 0.3, w) for w in (0.5, 0.9, 0.97)]),
    ]
    given = ask(rows=noisy, ratio=0.3)
    assert given.rows.tied.tolist() == [True, False] and given.rows.open.tolist() == [False, True]
    assert (
        "keeps 16.0 [" in given.text
        and "not shown to be more than 1 point" in given.text
        and "tie" not in given.text
        and "cheapest" not in given.text
    )


def test_what_was_measured_blockwise_says_so_wherever_it_is_named(ask):
    best, next_best = (
        ask(ratio=0.3, training=False).text,
        ask(
            rows=[made(), made("layerwise", 0.3, 0.9), made("widthwise", 0.3, 0.8)], ratio=0.3
        ).text,
    )
    assert (
        "prune widthwise, blockwise (x)" in best and "was not measured" in best
    )  # the shape that is loaded without this package
    assert (
        "Next best: prune widthwise, blockwise (x)" in next_best
        and "was not measured" not in next_best
    )


def test_cautions(ask):
    assert "heavy loss" in ask(ratio=0.6).text and "heavy loss" not in ask(ratio=0.3).text
    assert "next larger step" in ask(ratio=0.45).text
    assert "No training on 1% of the data or less was studied" in ask(ratio=0.3, data=0.01).text
    assert "removes a little less than requested (30.0%)" in ask(ratio=0.33, training=False).text
    fine = [made(), made("widthwise", 0.6, 0.95)]
    assert (
        "advises against pruning" in ask(ratio=0.64, rows=fine).text
        and "advises against pruning" not in ask(ratio=0.6, rows=fine).text
    )


@pytest.mark.parametrize(
    "question, says",
    [
        (
            dict(ratio=0.8),
            "(?s)Nothing was studied within 0.05 of ratio 0.8.*"
            "0.15, 0.30, 0.33, 0.60.*smaller model",
        ),
        (dict(ratio=0.0), "outside"),
        (dict(ratio=0.3, data=5), "fraction of the training data"),
    ],
)
def test_what_cannot_be_answered_is_an_error(ask, question, says):
    with pytest.raises(ValueError, match=says):
        ask(**question)


def test_printed_numbers_stand_beside_and_carry_the_papers_name(ask):
    assert (
        "The paper reports for LLaVA-v1.5-7B at ratio 0.30: layerwise with sft+hidden_kd "
        "on all of its data kept 96.4 %." in ask(ratio=0.3).text
    )
    assert "widthwise without recovery kept 79.9 %" in ask(ratio=0.3, training=False).text


def test_an_unknown_model_gets_what_was_studied(ask):
    both = RESULTS + [made(model="tiny-bunny"), made("widthwise", 0.3, 0.9, model="tiny-bunny")]
    given = ask("their/own", rows=both, ratio=0.3)
    assert (
        given.text.startswith("their/own was not studied.")
        and "they disagree" in given.text
        and set(given.rows.model) == {"tiny-llava", "tiny-bunny"}
    )
    alike = ask("liuhaotian/llava-v1.5-7b", rows=both, ratio=0.3)
    assert set(alike.rows.model) == {"tiny-llava"} and "disagree" not in alike.text


def test_evidence_is_what_the_store_holds_beside_its_original(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = load_profile("smoke")
    with pytest.raises(ValueError, match="run mllm-compress study --profile smoke first"):
        advice.evidence(setup)
    assert not (tmp_path / "runs").exists()
    pruned = [Experiment(m, "layerwise", 0.45) for m in ("smoke-llava", "smoke-bunny")]
    study.run([Experiment("smoke-llava"), *pruned], setup, executor="inline", quiet=True)
    assert advice.studied(setup) == sorted([Experiment("smoke-llava"), *pruned])
    assert set(advice.evidence(setup).model) == {
        "smoke-llava"
    }  # the other's original was never asked


def test_without_runs_the_evidence_is_what_ships_with_the_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    setup, pruned = load_profile("smoke"), Experiment("smoke-llava", "layerwise", 0.45)
    study.run([Experiment("smoke-llava"), pruned], setup, executor="inline", quiet=True)
    computed, results = advice.evidence(setup), results_of(setup)
    (tmp_path / "figures/smoke").mkdir(parents=True)
    keys = {stage: results.keys(stage) for stage in store.STAGES}
    store.pack(results, keys, tmp_path / "figures/smoke/results.zip")
    shutil.rmtree(tmp_path / "runs")
    pd.testing.assert_frame_equal(advice.evidence(setup), computed)
    assert not (tmp_path / "runs").exists()
    left = advice.advise("smoke-llava", 0.45, profile="smoke", training=False)
    assert "prune layerwise" in left.text
    monkeypatch.setattr(advice, "missing_inputs", lambda profile: ["model smoke: not here"])
    monkeypatch.setattr(advice, "studied", lambda profile, results=None: [])
    with pytest.raises(ValueError, match="to advise from: model smoke: not here"):
        advice.evidence(setup)


def test_advice_names_a_larger_ratio_that_kept_more():
    better = made("widthwise", 0.6, 0.9) | {"importance": "y"}
    rows = [made(), made("widthwise", 0.3, 0.8), better]
    frame = pd.DataFrame(rows)
    text = advice.answer(frame, "tiny-llava", 0.3, 0.05, True, "quick").text
    assert "Removing 60% kept more (90.0 %)" in text and "not studied at 30%" in text
    assert "kept more" not in advice.answer(frame, "tiny-llava", 0.6, 0.05, True, "quick").text
    both = pd.DataFrame([*rows[:2], better | {"importance": "x"}])  # the recipe was studied here
    assert "kept more" not in advice.answer(both, "tiny-llava", 0.3, 0.05, True, "quick").text


def test_the_distances_are_those_of_the_paired_differences():
    "The ranking takes its rows from groups; `difference` looks each setting up."
    rng, rows = np.random.default_rng(0), []
    answers = lambda share: (rng.random(400) < share) * 1.0
    for row in RESULTS:
        if row["requested_ratio"] in (0.0, 0.3):
            seeds = [0] if row["pruning"] == "none" else [0, 1, 2]
            seeds = seeds[1:] if row["train"] == "projector" else seeds  # one seed is missing
            rows += [row | {"seed": s, "units": answers(row["score"] / 100)} for s in seeds]
    frame = pd.DataFrame([row | {"images": [f"i{k // 2}" for k in range(400)]} for row in rows])
    found = advice.ranked(frame, "tiny-llava", 0.3, data=1.0)
    assert len(found) == 5 and found.avg_percent.is_monotonic_decreasing
    settings = [dict(row[setting_of(found)].drop("model")) for _, row in found.iterrows()]
    for (_, row), setting in zip(found.iterrows(), settings):
        gap = difference(frame, "tiny-llava", settings[0], setting)
        assert (row.behind, row.behind_low, row.behind_high) == (gap.value, gap.low, gap.high)
        best, mine = (
            {
                r["seed"]: 100 * r["units"].mean() / rows[0]["units"].mean()
                for r in rows
                if all(r[k] == v for k, v in one.items())
            }
            for one in (settings[0], setting)
        )
        known = np.mean([best[seed] - mine[seed] for seed in set(best) & set(mine)])
        assert abs(row.behind - known) < 1e-9
