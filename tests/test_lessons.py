"""Every cell of every library notebook holds."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_lessons_of_the_library_notebooks_hold(tmp_path):
    """Every cell of every library notebook runs, with its assertions, in a copy of this checkout.

    Those in `nbs/start` are left to tests/test_guides.py, which runs them as a reader does.
    """
    pytest.importorskip("nbdev.test")
    checkout = shutil.copytree(
        ROOT,
        tmp_path / "checkout",
        ignore=shutil.ignore_patterns(".git", ".venv*", ".pytest_cache", "__pycache__", "runs"),
    )
    run = r"nbdev_test(timing=True, skip_folder_re='^[_.]|^start$')"
    code = f"from nbdev.test import nbdev_test; {run}"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as lessons:
        try:
            said, complaints = lessons.communicate(timeout=1800)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(lessons.pid, signal.SIGKILL)
    assert lessons.returncode == 0 and "Success." in said, complaints[-6000:]
