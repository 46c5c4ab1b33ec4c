"""Wall time of cells that share work, through the study, against the same cells on their own.

The cells are a sample of the `tiny` grid with one model, in about the grid's proportions: dense, pruned without training (a
quarter), recovered on 1 % of the data (a tenth) and on 5 % (the rest), by three objectives, after both prunings. What the study
shares between them: one process (its imports, the model, the images and questions), the training data, scores over ratios, the
teacher's targets over objectives, ratios and prunings, and the dense evaluation. The rival computes each cell in a new process
with an empty store, with the dense model that its AVG-% is relative to. Both use one process at a time with one thread and the
same code for a cell, so that the ratio is what sharing gains; a third run has a worker for each core, as the study does by
default. Cells of 10, 50 or 100 % of the data are left out, to take minutes instead of hours.

CPU seconds are measured beside wall seconds: on a machine that others use, they are the ones to compare.

    python bench/study.py [--quick]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from machine import facts

from mllm_compress.reporting.style import page
from mllm_compress.study import runs as study
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
GOAL = 0.5  # of the rival's time
RUN = "import json, sys; from mllm_compress.study import runs as study; from mllm_compress.study.experiments import Experiment; study.run([Experiment(**c) for c in json.loads(sys.argv[1])], 'bench.yaml', sys.argv[2])"


def sample(quick: bool) -> tuple:  # (cells, profile)
    "The cells, and the profile that they are computed with."
    profile = load_profile("smoke" if quick else "tiny")
    model, (least, some) = profile.models[0], (0.5, 1.0) if quick else profile.fractions[:2]
    mild, layers, neurons = (
        Experiment(model, "layerwise", 0.3),
        Experiment(model, "layerwise", 0.45),
        Experiment(model, "widthwise", 0.45),
    )
    trained = [
        (mild, "sft+hidden_kd", least),
        *((mild, losses, some) for losses in ("sft", "hidden_kd", "sft+hidden_kd")),
        (layers, "sft+hidden_kd", some),
        (neurons, "sft", some),
        (neurons, "sft+hidden_kd", some),
    ]
    cells = [Experiment(model), mild, layers, neurons] + [
        replace(cell, recovery=losses, fraction=part) for cell, losses, part in trained
    ]
    return cells, replace(profile, name="bench", notebooks={}, workers=0)


def timed(
    cells: list, profile, executor: str = "inline"
) -> tuple:  # (wall seconds, CPU seconds, load of the machine, scores)
    "Compute cells in a new process, in a new checkout with an empty store."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench.yaml").write_text(yaml.safe_dump(asdict(profile)), encoding="utf-8")
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", RUN, json.dumps([asdict(c) for c in cells]), executor],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        wall, after, load = (
            time.perf_counter() - start,
            resource.getrusage(resource.RUSAGE_CHILDREN),
            os.getloadavg()[0],
        )
        here = os.getcwd()
        os.chdir(folder)
        frame = study.run(cells, profile, "inline", quiet=True)  # all of it is in the store
        os.chdir(here)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, load, frame


def main(quick: bool) -> None:
    "Measure, check that both ways score the same, write figures/bench/study.csv, .png and .pdf."
    cells, profile = sample(quick)
    wall, cpu, load, ours = timed(cells, profile)
    alone = [timed(list(dict.fromkeys([cells[0], c])), profile) for c in cells]
    spread = timed(cells, profile, "local")
    rival = pd.concat(
        [
            frame[(frame.pruning != "none") | (len(frame) == len(alone[0][-1]))]
            for *_, frame in alone
        ],
        ignore_index=True,
    )
    assert (ours.status == "done").all() and ours.score.tolist() == rival.score.tolist() == spread[
        -1
    ].score.tolist(), "sharing work changed a result"
    table = pd.DataFrame(
        [
            {
                "way": "each on its own",
                "cells": len(cells),
                "wall_s": sum(w for w, *_ in alone),
                "cpu_s": sum(c for _, c, *_ in alone),
                "load": max(l for *_, l, _ in alone),
            },
            {
                "way": "through the study",
                "cells": len(cells),
                "wall_s": wall,
                "cpu_s": cpu,
                "load": load,
            },
            {
                "way": "and a worker per core",
                "cells": len(cells),
                "wall_s": spread[0],
                "cpu_s": spread[1],
                "load": spread[2],
            },
        ]
    )
    for unit in ("wall", "cpu"):
        table[f"{unit}_ratio"] = table[f"{unit}_s"] / table[f"{unit}_s"].iloc[0]
    table = table.assign(**facts("cpu"), profile="smoke" if quick else "tiny")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    judged = lambda ratio: f"{ratio:.3f}, {'met' if ratio <= GOAL else 'MISSED'}"
    print(
        f"goal: at most {GOAL} of the wall time of cells on their own: {judged(table.wall_ratio.iloc[1])}; with a worker per core {judged(table.wall_ratio.iloc[2])}. "
        f"In CPU time: {judged(table.cpu_ratio.iloc[1])}. Equal scores: yes, {len(ours)} rows."
    )
    if quick:
        return
    OUT.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUT / "study.csv", index=False, float_format="%.4g")
    draw(table, OUT / "study.png")


def draw(table: pd.DataFrame, path: Path) -> None:
    "A bar for each way, in both units of time."
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with page():
        fig, axes = plt.subplots(1, 2, figsize=(7.2, 2), sharey=True)
        for ax, unit in zip(axes, ("wall", "cpu")):
            bars = ax.barh(table.way, table[f"{unit}_s"], color=["#777777", "#0072B2", "#56B4E9"])
            ax.bar_label(
                bars,
                [
                    f"{s:.0f} s ({r:.2f})"
                    for s, r in zip(table[f"{unit}_s"], table[f"{unit}_ratio"])
                ],
                padding=3,
            )
            ax.set(
                title=f"{unit.replace('cpu', 'CPU')} seconds of {table.cells.iloc[0]} cells",
                xlim=(0, 1.5 * table[f"{unit}_s"].max()),
            )
            ax.grid(axis="y", visible=False)
        axes[0].invert_yaxis()
        for end in (".png", ".pdf"):
            fig.savefig(path.with_suffix(end), dpi=150, bbox_inches="tight")
    first = table.iloc[0]
    path.with_suffix(".txt").write_text(
        f"Seconds of {first.cells} cells of profile {first.profile}, in brackets as a share of those of each cell in a process of its own with an empty store; n = 1 run of each way. "
        f"{first.device}, one thread a process, load of the machine {table.load.min():.1f} to {table.load.max():.1f}.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="random models, seconds; writes nothing"
    )
    main(parser.parse_args().quick)
