"""The check of golden numbers itself: what it accepts, what it refuses, and what it says."""

import json

import pytest
from golden_versions import check_golden, check_no_stale

WHERE = "CRITERIA (nbs/library/importance/05_criteria.ipynb)"
NUMBERS = {"values": [0.123456789, 2.0], "kept": [0, 3]}


def check(tmp_path, numbers, version=1, update=False, name="taylor"):
    check_golden("criterion", name, version, numbers, update, WHERE, tmp_path)


@pytest.fixture
def stored(tmp_path):
    check(tmp_path, NUMBERS, update=True)
    return tmp_path


def test_equal_numbers_pass(stored):
    check(stored, NUMBERS)
    check(stored, {"kept": (0, 3), "values": [0.123456789 * (1 + 5e-5), 2]})
    check(stored, {"kept": (0, 3), "values": [0.123456789 + 1.5e-5, 2.0]})  # 1e-5 of the largest
    assert json.loads((stored / "criterion.json").read_text())["taylor"]["version"] == 1


@pytest.mark.parametrize(
    "numbers",
    [
        NUMBERS | {"values": [0.123456789 * 1.001, 2.0]},
        NUMBERS | {"kept": [0, 2]},
        NUMBERS | {"kept": [0, 3, 4]},
        {"values": NUMBERS["values"]},
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_moved_numbers_need_a_new_version(stored, numbers, update):
    with pytest.raises(AssertionError) as error:
        check(stored, numbers, update=update)
    assert (
        "criterion taylor: its numbers moved but its version is still 1. If the change is intended,"
        f" raise `version` in its row of {WHERE} and run `python -m pytest "
        "tests/test_golden_versions.py --update-golden`."
    ) in str(error.value)
    with pytest.raises(AssertionError, match="is of version 1. Run"):
        check(stored, numbers, version=2)
    check(stored, numbers, version=2, update=True)
    check(stored, numbers, version=2)


def test_a_new_row_needs_a_golden_value_and_an_old_one_goes(stored):
    with pytest.raises(AssertionError, match="no golden value yet. Run .*--update-golden"):
        check(stored, NUMBERS, name="magnitude")
    check(stored, NUMBERS, name="magnitude", update=True)
    check_no_stale("criterion", ["taylor", "magnitude"], False, stored)
    with pytest.raises(AssertionError, match="no longer exist: taylor"):
        check_no_stale("criterion", ["magnitude"], False, stored)
    check_no_stale("criterion", ["magnitude"], True, stored)
    assert set(json.loads((stored / "criterion.json").read_text())) == {"magnitude"}
