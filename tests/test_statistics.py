"""Intervals and tests against values known otherwise."""

from math import comb

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_compress.evaluation import intervals as S


def units(values, strata="", names=None):
    return pd.DataFrame(
        {
            "unit": range(len(values)) if names is None else names,
            "stratum": strata,
            "worth": np.array(values, float),
        }
    )


@given(st.integers(1, 2000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_wilson_solves_its_equation(n, share):
    right = round(n * share)
    for bound in S.wilson(right, n):
        if 0 < bound < 1:
            assert abs(bound - right / n) == pytest.approx(
                1.959964 * np.sqrt(bound * (1 - bound) / n), rel=1e-4
            )
    assert S.wilson(right, n)[0] <= right / n <= S.wilson(right, n)[1]


def test_wilson_ends_and_nothing_asked():
    assert S.wilson(0, 5)[0] == 0 and S.wilson(5, 5)[1] == 1 and S.wilson(0, 0) == (0, 1)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_a_binomial_tail(a, b):
    tail = sum(comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
    assert S.mcnemar(a, b) == pytest.approx(min(1, 2 * tail)) == S.mcnemar(b, a)


def test_bootstrap_has_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(2, 3, 400)
    draws = S.bootstrap(values, replicates=4000)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.02) and draws.std() == pytest.approx(
        values.std() / 20, rel=0.05
    )


def test_bootstrap_keeps_strata_apart():
    draws = S.bootstrap([1, 1, 1, 0], ["a", "a", "b", "b"])
    assert draws.min() == 1 and draws.max() == 2 and draws.mean() == pytest.approx(1.5, abs=0.05)


def test_interval_method_follows_the_kind_of_score():
    assert S.score_interval(units([1, 0, 1, 1]))[2] == "wilson"
    assert S.score_interval(units([1, 0, 0.25, 1]))[2] == "bootstrap"
    assert S.score_interval(units([1, 0, 1, 1], ["a", "a", "b", "b"]), 200)[2] == "bootstrap"


def test_paired_difference_by_hand():
    gap = S.paired_difference(units([1] * 8 + [0, 1, 1]), units([0] * 8 + [1, 1, 1]))
    assert (
        gap.value == pytest.approx(100 * 7 / 11)
        and gap.p == pytest.approx(20 / 2**9)
        and gap.test == "McNemar"
        and gap.n == 11
    )
    assert gap.low < gap.value < gap.high
    soft = S.paired_difference(units([0.9, 0.8, 0.7] * 20), units([0.2, 0.3, 0.7] * 20))
    assert (
        soft.test == "paired bootstrap"
        and soft.p == pytest.approx(1 / 2000)
        and soft.value == pytest.approx(40)
    )


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


def test_avg_percent_interval_is_paired():
    right = np.random.default_rng(1).random(500) < 0.8
    same = S.avg_percent_interval({"a": units(right)}, {"a": units(right)})
    assert same == pytest.approx((100, 100, 100))
    value, low, high = S.avg_percent_interval(
        {"a": units(right & (np.arange(500) % 10 > 0))}, {"a": units(right)}
    )
    assert low < value < high < 100 and high - low < 6
