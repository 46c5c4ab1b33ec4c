"""Intervals and tests against values known otherwise."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from mllm_compress.evaluation import intervals as S
from mllm_compress.study import statistics
from mllm_compress.study.statistics import WORDS, Estimate, Verdict, average, estimate, pooled


def units(values, strata="", names=None):
    names = range(len(values)) if names is None else names
    return pd.DataFrame({"unit": names, "stratum": strata, "worth": np.array(values, float)})


@given(st.integers(1, 2000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_wilson_solves_its_equation(n, share):
    right = round(n * share)
    for bound in S.wilson(right, n):
        if 0 < bound < 1:
            half = 1.959964 * np.sqrt(bound * (1 - bound) / n)
            assert abs(bound - right / n) == pytest.approx(half, rel=1e-4)
    assert S.wilson(right, n)[0] <= right / n <= S.wilson(right, n)[1]
    assert S.wilson(0, n)[0] == 0 and S.wilson(n, n)[1] == 1


def test_bootstrap_keeps_strata_apart():
    draws = S.bootstrap([1, 1, 1, 0], ["a", "a", "b", "b"])
    assert draws.min() == 1 and draws.max() == 2 and draws.mean() == pytest.approx(1.5, abs=0.05)


def test_interval_method_follows_the_kind_of_score():
    assert S.score_interval(units([1, 0, 1, 1]))[2] == "wilson"
    assert S.score_interval(units([1, 0, 0.25, 1]))[2] == "bootstrap"
    assert np.isnan(S.score_interval(units([0.25]))[:2]).all()
    assert S.score_interval(units([1, 0, 1, 1], ["a", "a", "b", "b"]), 200)[2] == "bootstrap"


def test_paired_difference_by_hand():
    gap = S.paired_difference(units([1] * 8 + [0, 1, 1]), units([0] * 8 + [1, 1, 1]))
    assert (gap.value, gap.p) == pytest.approx((100 * 7 / 11, 20 / 2**9))
    assert gap.test == "McNemar" and gap.n == 11
    assert gap.low < gap.value < gap.high
    soft = S.paired_difference(units([0.9, 0.8, 0.7] * 20), units([0.2, 0.3, 0.7] * 20))
    assert soft.test == "paired bootstrap" and (soft.p, soft.value) == pytest.approx((1 / 2000, 40))


def test_order_does_not_matter_and_other_questions_are_an_error():
    a, b = units([1, 0, 1], names=list("xyz")), units([1, 1, 0], names=list("zxy"))
    assert S.paired_difference(a, b).value == pytest.approx(0)
    with pytest.raises(ValueError, match="'w'"):
        S.paired_difference(a, units([1, 1, 0], names=list("wxy")))


def test_same_model_has_no_difference():
    gap = S.paired_difference(units([1, 0, 0.5]), units([1, 0, 0.5]))
    assert (gap.value, gap.low, gap.high, gap.p) == (0, 0, 0, 1)


def test_avg_percent_by_hand():
    ours = pd.DataFrame({"benchmark": ["a", "b"], "score": [40.0, 90.0]})
    dense = pd.DataFrame({"benchmark": ["b", "a"], "score": [90.0, 50.0]})
    assert S.avg_percent(ours, dense) == pytest.approx(90)
    with pytest.raises(ValueError, match="only one has b"):
        S.avg_percent(ours[:1], dense)
    assert S.avg_percent(ours, dense.assign(score=[90.0, 0.0])) == 100  # b alone


# ---- pooled variances, averages and verdicts, against simulation with known truth


def study_of(rng, truth, seeds=3, scatter=1.0, shared=0.5, models=("a", "b")):
    "Made-up differences at every setting; seeds and pictures are shared as in the study."
    images = [[f"{b}{k // 4}" for k in range(80)] for b in "xy"]  # four questions a picture
    out, hard, truths = {}, [rng.normal(0, 4, 20).repeat(4) for _ in images], np.zeros(4) + truth
    for m in models:
        common = rng.normal(0, scatter * shared**0.5, seeds)
        for k, level in enumerate(truths):
            own = rng.normal(0, scatter * (1 - shared) ** 0.5, seeds)
            shift = (level + common + own)[:, None]
            arrays = [shift + h + rng.normal(0, 6, 80) for h in hard]
            how = dict(seeds=range(seeds), model=m, ratio=0.15 * (k + 1))
            out[f"{m} at {k}"] = estimate([np.stack(list(a)) for a in arrays], images, **how)
    return out


@pytest.fixture(scope="module")
def simulated() -> dict:  # truth -> made-up studies
    rng = np.random.default_rng(0)
    return {truth: [study_of(rng, truth) for _ in range(150)] for truth in (0.0, 3.0)}


def test_the_interval_of_an_average_covers_the_truth(simulated):
    "Whatever settings share: pictures, and seeds of a model."
    found = [(average(s), truth) for truth, studies in simulated.items() for s in studies]
    assert 0.92 < np.mean([e.low < truth < e.high for e, truth in found]) < 0.995


def test_pooled_intervals_of_settings_cover_the_truth_and_are_narrower(simulated):
    width = lambda e: e.high - e.low
    pairs = [
        (s[w], e, truth)
        for truth, studies in simulated.items()
        for s in studies
        for w, e in pooled(s).items()
    ]
    assert 0.92 < np.mean([e.low < truth < e.high for _, e, truth in pairs]) < 0.99
    assert np.mean([width(e) for _, e, _ in pairs]) < np.mean([width(raw) for raw, *_ in pairs])


@pytest.mark.parametrize("truth, right", [(3.0, "supported"), (-3.0, "contradicted")])
def test_verdicts_find_what_is_true_and_err_rarely(truth, right):
    rng = np.random.default_rng(1)
    said = [Verdict("A.", study_of(rng, truth), "", margin=1.0).word for _ in range(60)]
    wrong = {"supported": "contradicted", "contradicted": "supported"}[right]
    assert said.count(right) > 30 and wrong not in said and "equivalent" not in said
    assert set(said) <= set(WORDS)


def test_no_difference_is_rarely_called_one_and_equivalence_is_found_with_enough_seeds():
    rng = np.random.default_rng(2)
    none = [Verdict("A.", study_of(rng, 0.0), "") for _ in range(100)]
    different = {"supported", "contradicted"}
    assert sum(v.word in different for v in none) <= 10
    assert sum(bool(different & set(v.words.values())) for v in none) <= 12  # any setting of eight
    many = dict(seeds=10, scatter=0.3, models=("a", "b"))
    close = [Verdict("A.", study_of(rng, 0.0, **many), "", margin=2.0).word for _ in range(40)]
    assert close.count("equivalent") > 25
    edge = [Verdict("A.", study_of(rng, 2.0, **many), "", margin=2.0).word for _ in range(100)]
    assert edge.count("equivalent") <= 10  # at the margin, two one-sided tests err in 5 %


def test_settings_that_contradict_are_counted_beside_the_average():
    rng = np.random.default_rng(3)
    good, bad = study_of(rng, 8.0, scatter=0.1), study_of(rng, -8.0, scatter=0.1)
    (where, contrary), *_ = bad.items()
    mixed = Verdict("A.", good | {where: contrary}, "", margin=1.0)
    assert mixed.average.low > 0 and mixed.word == "undecided"
    assert mixed.record()["counts"] == {"supported": 7, "contradicted": 1}
    assert "contradicted in 1 of 8 settings" in mixed.sentence()
    halves = dict([*list(good.items())[:4], *list(bad.items())[4:]])
    assert Verdict("A.", halves, "", margin=5.0).word == "undecided"


BOUNDS = (0, 1), (-1, 1), (-np.inf, np.inf)


@given(st.floats(0.01, 0.99), st.floats(0, 5), st.sampled_from(BOUNDS))
@settings(max_examples=60, deadline=None)
def test_intervals_stay_within_what_is_possible(share, half, bounds):
    floor, top = bounds
    value = share if np.isinf(top) else floor + share * (top - floor)
    e = Estimate(value, value - half, value + half, 9, 3, floor=floor, top=top).at(0.95)
    low, high = e.low, e.high
    assert floor <= low <= value <= high <= top
    if half < 0.01 and not np.isinf(top) and 0.1 < share < 0.9:
        assert high - low == pytest.approx(2 * half, rel=0.02)


def test_intervals_near_the_bound_cover_the_truth():
    "Where 99 of 100 answers are right, a symmetric interval would end above 100."
    rng, truth = np.random.default_rng(4), 97.0
    found = [
        estimate([100.0 * (rng.random((1, 400)) < truth / 100)], floor=0.0, top=100.0)
        for _ in range(600)
    ]
    assert all(e.high <= 100 for e in found)
    assert 0.93 < np.mean([e.low <= truth <= e.high for e in found]) < 0.98


def test_freedom_of_two_models_is_welchs_for_two_samples():
    rng = np.random.default_rng(7)
    a, b = rng.normal(0, 1, 6), rng.normal(0, 3, 9)
    both = {name: estimate([its[:, None]], model=name) for name, its in (("a", a), ("b", b))}
    freedom = statistics.average(both).freedom
    assert freedom == pytest.approx(ttest_ind(a, b, equal_var=False).df)


def test_the_interval_of_a_crossing_covers_the_true_ratio():
    "About 95 % where questions and seeds are shared; more where settings are independent."
    rng, truth = np.random.default_rng(5), [8.0, 2.0, -4.0, -10.0]  # zero at 0.35
    for shared, least in ((1.0, 0.92), (0.0, 0.94)):
        draws = [study_of(rng, truth, shared=shared, models="a") for _ in range(150)]
        found = np.array([statistics.crossings(pooled(made).values())[0] for made in draws])
        assert least < np.mean((found[:, 1] <= 0.35) & (found[:, 2] >= 0.35)) <= 1
        assert np.median(found[:, 0]) == pytest.approx(0.35, abs=0.01)
        assert np.mean(np.diff(found[:, 1:])[np.isfinite(found).all(1)]) < 0.15
        sides = [([*made.values()][:2], [*made.values()][2:]) for made in draws]
        grown = [statistics.change(*side) for side in sides]  # by -12
        assert least < np.mean([e.low <= -12 <= e.high for e in grown]) <= 1
        assert np.mean([e.value for e in grown]) == pytest.approx(-12, abs=0.3)
    assert statistics.crossings(study_of(rng, 9.0, models="a").values()) == []
