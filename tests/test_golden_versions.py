"""The check of golden numbers itself: a number that moves needs a new version of its row."""

import golden_versions
import pytest


def test_moved_numbers_need_a_new_version(tmp_path, monkeypatch):
    monkeypatch.setattr(golden_versions, "FOLDER", tmp_path)
    row = lambda *at: ("criterion", "taylor", at[1], {"v": [at[0], 2.0]}, at[2], "TABLE")
    check = lambda *at: golden_versions.check_golden(*row(*at))
    stale = lambda update: golden_versions.check_no_stale("criterion", [], update)
    refuses = lambda says: pytest.raises(AssertionError, match=says)
    with refuses("no golden value yet. Run .*--update-golden"):
        check(1.0, 1, False)
    check(1.0, 1, True)
    check(1.0 + 5e-5, 1, False)
    for update in (False, True):
        with refuses("its version is still 1"):
            check(1.001, 1, update)
    with refuses("is of version 1. Run"):
        check(1.001, 2, False)
    check(1.001, 2, True)
    with refuses("no longer exist: taylor"):
        stale(False)
    assert [stale(update) for update in (True, False)] == [None, None]
