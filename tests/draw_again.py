"""Run the notebooks of a committed profile again on its results, in a process beside the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURED = ("00_", "09_")  # learning rates are searched by hand; times are another machine's
RETELL = """
import contextlib, io, os, sys
import nbformat, torch
from IPython.core.interactiveshell import InteractiveShell
torch.set_num_threads(1)
profile, names = sys.argv[1], sys.argv[2:]
for name in names:
    shell, quiet = InteractiveShell(), io.StringIO()
    for cell in nbformat.read(f"{name}.ipynb", 4).cells:
        if cell.cell_type != "code":
            continue
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            done = shell.run_cell(cell.source)
        if not done.success:
            sys.exit(f"{name}: {cell.source}" + os.linesep + quiet.getvalue()[-3000:])
        if "parameters" in cell.metadata.get("tags", []):
            shell.user_ns["profile"] = profile
"""


def fetched_inputs(name: str) -> bool:
    "Whether a profile needs texts or pictures, which are fetched and not part of the package."
    from mllm_compress.study.profiles import load_profile

    return any(b.startswith(("text/", "emoji/")) for b in load_profile(name).evaluation.benchmarks)


def begin(folder: Path, checkout: Path) -> subprocess.Popen:
    "Start the notebooks of a folder of figures on its results; None where results are missing."
    import nbformat

    from mllm_compress.study import stages, store
    from mllm_compress.study.notebooks import experiments_of
    from mllm_compress.study.profiles import load_profile

    (checkout / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", checkout)
    shutil.copytree(ROOT / "nbs/study", checkout / "nbs/study")
    others = [p for p in ROOT.glob("figures/*/10_findings-claim-*.json") if p.parent != folder]
    rates = ROOT.glob("figures/*/00_learning_rates-rates.csv")
    for path in (*others, *rates):  # the scoreboard's other columns, and the rates in use
        (checkout / "figures" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, checkout / "figures" / path.parent.name)
    (checkout / "figures/bench").mkdir(parents=True)
    shutil.copy(ROOT / "figures/bench/budgets.csv", checkout / "figures/bench")
    names = [p.stem for p in sorted(folder.glob("[0-9]*.ipynb")) if not p.stem.startswith(MEASURED)]
    setup, there = load_profile(folder.name), store.Store(checkout / "runs" / folder.name)
    store.unpack(folder / "results.zip", there)
    for name in names:
        nb = nbformat.read(ROOT / f"nbs/study/{name}.ipynb", 4)
        for experiment in experiments_of(nb, {"profile": folder.name}):
            if stages.missing_stages(experiment, setup, there)["score"]:
                return None
    with (checkout / "errors").open("w") as errors:  # why it failed
        return subprocess.Popen(
            [sys.executable, "-c", RETELL, folder.name, *names],
            cwd=checkout / "nbs/study",
            env=os.environ | {"MPLBACKEND": "agg"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
