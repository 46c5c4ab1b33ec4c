"""Golden numbers per row of a table of methods: they may change only with the row's version."""

import json
import math
import os
from pathlib import Path

from mllm_compress.utils.files import write_atomically

FOLDER = Path(__file__).parent / "golden" / "versions"
RTOL = 1e-4  # CPUs differ in the order of their sums


def check_golden(
    table: str,  # what a row is, such as "criterion"; names the golden file
    name: str,  # of the row
    version: int,  # of the row
    numbers,  # what the method computes: nested dicts and lists of floats, integers and words
    update: bool,  # the fixture update_golden: --update-golden was given
    where: str,  # the table to edit: "CRITERIA (nbs/library/importance/05_criteria.ipynb)"
) -> None:
    "Fail if a row's numbers changed and its version did not, or if the golden value is missing."
    path = FOLDER / f"{table}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    numbers, old = json.loads(json.dumps(_rounded(numbers))), stored.get(name)
    change = None if old is None else first_difference(old["numbers"], numbers)
    command = f"`python -m pytest {_test_file()} --update-golden`"
    if old is not None and old["version"] == version and change:
        raise AssertionError(
            f"{table} {name}: its numbers moved but its version is still {version}. If the change "
            f"is intended, raise `version` in its row of {where} and run {command}.\n{change}"
        )
    if update and (old is None or old["version"] != version):  # other rows keep their digits
        stored[name] = {"version": version, "numbers": numbers}
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _text(stored))
    elif old is None:
        raise AssertionError(f"{table} {name}: it has no golden value yet. Run {command}.")
    elif old["version"] != version:
        raise AssertionError(
            f"{table} {name}: its version is {version} in {where}, but its golden value is of "
            f"version {old['version']}. Run {command}."
        )


def check_no_stale(table: str, names, update: bool) -> None:
    "Fail if the golden file has values of rows that no longer exist; --update-golden removes them."
    path = FOLDER / f"{table}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stale = sorted(set(stored) - set(names))
    if stale and update:
        write_atomically(path, _text({k: v for k, v in stored.items() if k not in stale}))
    elif stale:
        raise AssertionError(
            f"{path.name} has golden values of rows that no longer exist: {', '.join(stale)}. "
            f"Run `python -m pytest {_test_file()} --update-golden`."
        )


def first_difference(old, new, at: str = "", scale: float = 0.0) -> str | None:
    """Where two nested values differ first: floats by more than the tolerance, all else at all.

    A sum of terms of both signs may be far smaller than its terms, which its rounding follows.
    The numbers of one list are sums of the same kind, so the largest tells how large terms are.
    """
    if isinstance(old, dict) and isinstance(new, dict) and set(old) == set(new):
        parts = ((old[k], new[k], f"{at}.{k}".lstrip(".")) for k in old)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        scale = max((abs(v) for v in old if isinstance(v, float)), default=0.0)
        parts = ((a, b, f"{at}[{i}]", scale) for i, (a, b) in enumerate(zip(old, new)))
    else:
        floats = {type(old), type(new)} <= {int, float} and float in (type(old), type(new))
        near = lambda: math.isclose(old, new, rel_tol=RTOL, abs_tol=max(1e-9, RTOL / 10 * scale))
        same = near() if floats else old == new
        return None if same else f"First difference at {at or 'the value'}: {old} stored, {new} now"
    return next((found for part in parts if (found := first_difference(*part))), None)


def _rounded(value):
    "Floats to six significant digits, at any depth."
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _text(stored: dict) -> str:
    "One row per line."
    rows = [f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(stored.items())]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _test_file() -> str:
    "The test file that runs now, relative to the checkout."
    return os.environ.get("PYTEST_CURRENT_TEST", "tests").split("::")[0]
