"""A redraw of profile quick with forked processes, and with processes that import everything anew.

All notebooks but 09_cost, which measures this machine, are drawn from stored results by
`mllm-compress study`, as after a change of the code that draws. The rival is the same command with
MLLM_COMPRESS_FORK=0. Both draw in a copy of the checkout, with two workers; pairs are run in turn.
Wall seconds are those of the whole command, with its own imports.

    python bench/drawing.py [--quick] [--pairs 3]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from machine import facts

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "figures" / "bench"
STUDY = [sys.executable, "-m", "mllm_compress", "study", "--profile", "quick"]
WAYS = {"new processes": "0", "forked": "1"}


def prepare(folder: Path) -> None:
    "A copy of what the study reads, with the results of profile quick in its store."
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs")
    shutil.copytree(ROOT / "figures", folder / "figures")
    results = folder / "figures" / "quick" / "results.zip"
    run([*STUDY, "--reuse", str(results), "--dry-run"], folder)


def run(command: list, folder: Path, **env) -> float:  # seconds
    "The wall time of a command, which must succeed."
    started = time.perf_counter()
    here = {"MLLM_COMPRESS_CHECKOUT": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | here | env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return time.perf_counter() - started


def redraw(folder: Path, names: list, way: str) -> float:  # seconds
    "Draw these notebooks, none of which is there."
    for name in names:
        (folder / "figures" / "quick" / f"{name}.ipynb").unlink(missing_ok=True)
    only = [part for name in names for part in ("--only", name)]
    return run([*STUDY, *only, "--workers", "2"], folder, MLLM_COMPRESS_FORK=WAYS[way])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two notebooks; nothing is written")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args(argv)
    names = sorted(p.stem for p in (ROOT / "nbs" / "study").glob("*.ipynb"))
    names = [name for name in names if not name.startswith("00") and name != "09_cost"]
    names, rows = names[:2] if options.quick else names, []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for pair in range(1 if options.quick else options.pairs):
            for way in WAYS:
                seconds = redraw(Path(folder), names, way)
                rows.append({"pair": pair, "way": way, "notebooks": len(names), "seconds": seconds})
    frame = pd.DataFrame(rows)
    rival, ours = (part.set_index("pair").seconds for _, part in frame.groupby("way", sort=False))
    print(frame.round(1).to_string(index=False))
    print(f"new processes over forked ones, by pair: {(rival / ours).round(2).tolist()}")
    if not options.quick:
        frame.round(2).assign(**facts("cpu")).to_csv(OUT / "drawing.csv", index=False)


if __name__ == "__main__":
    main()
