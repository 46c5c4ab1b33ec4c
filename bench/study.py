"""Wall time of experiments that share stages, through the study and one by one.

The experiments are a sample of the grid of profile `tiny` with one model, in about the grid's
proportions: dense, pruned without training (a quarter), recovered on 1 % of the data (a tenth) and
on 5 % (the rest), with three objectives and both prunings. Through the study they share one process
(imports, model, images, questions), the training data, importance scores, the teacher's outputs and
the dense evaluation. The rival computes each experiment in a new process with an empty store,
together with the dense model that its AVG-% is relative to. Both run one process at a time with
one thread, and the same code for a stage, so the ratio is what sharing gains. A third run has one
worker per core, the default of the study. Experiments on 10, 50 or 100 % of the data are left out:
they would take hours.

CPU seconds are measured beside wall seconds; compare those on a machine that others use.

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

from mllm_compress.study import runs as study
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.style import page

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
GOAL = 0.5  # of the rival's time
RUN = """
import json, sys
from mllm_compress import study
experiments = [study.Experiment(**given) for given in json.loads(sys.argv[1])]
study.run(experiments, "bench.yaml", sys.argv[2])
"""


def sample(quick: bool) -> tuple:  # (experiments, profile)
    "The experiments, and the profile that they are computed with."
    profile = load_profile("smoke" if quick else "tiny")
    model, (least, some) = profile.models[0], (0.5, 1.0) if quick else profile.fractions[:2]
    mild = Experiment(model, "layerwise", 0.3)
    layers = Experiment(model, "layerwise", 0.45)
    neurons = Experiment(model, "widthwise", 0.45)
    trained = [
        (mild, "sft+hidden_kd", least),
        (mild, "sft", some),
        (mild, "hidden_kd", some),
        (mild, "sft+hidden_kd", some),
        (layers, "sft+hidden_kd", some),
        (neurons, "sft", some),
        (neurons, "sft+hidden_kd", some),
    ]
    experiments = [Experiment(model), mild, layers, neurons]
    experiments += [replace(e, recovery=losses, fraction=part) for e, losses, part in trained]
    return experiments, replace(profile, name="bench", notebooks={}, workers=0)


def used() -> float:
    "CPU seconds of the processes that have ended."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def timed(experiments: list, profile, executor: str = "inline") -> tuple:
    "Experiments in a new process with an empty store: (wall seconds, CPU seconds, load, frame)."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench.yaml").write_text(yaml.safe_dump(asdict(profile)), encoding="utf-8")
        given = json.dumps([asdict(e) for e in experiments])
        before, start = used(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", RUN, given, executor],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        wall, cpu, load = time.perf_counter() - start, used() - before, os.getloadavg()[0]
        here = os.getcwd()
        os.chdir(folder)
        frame = study.run(experiments, profile, "inline", quiet=True)  # all is in the store
        os.chdir(here)
    return wall, cpu, load, frame


def summary(experiments: list, alone: list, ours: tuple, spread: tuple) -> pd.DataFrame:
    "One row per way of computing the experiments."
    together = (sum(r[0] for r in alone), sum(r[1] for r in alone), max(r[2] for r in alone))
    ways = {
        "each on its own": together,
        "through the study": ours[:3],
        "and a worker per core": spread[:3],
    }
    rows = [[way, len(experiments), *times] for way, times in ways.items()]
    table = pd.DataFrame(rows, columns=["way", "experiments", "wall_s", "cpu_s", "load"])
    for unit in ("wall", "cpu"):
        table[f"{unit}_ratio"] = table[f"{unit}_s"] / table[f"{unit}_s"].iloc[0]
    return table


def check_equal(ours, alone: list, spread) -> None:
    "RuntimeError where sharing stages changed a result."
    rival = [f[(f.pruning != "none") | (len(f) == len(alone[0]))] for f in alone]
    scores = ours.score.tolist()
    others = (pd.concat(rival).score.tolist(), spread.score.tolist())
    if not (ours.status == "done").all() or any(scores != other for other in others):
        raise RuntimeError("Sharing stages changed a result, or an experiment failed.")


def main(quick: bool) -> None:
    "Measure, check that all ways score the same, write figures/bench/study.csv, .png and .pdf."
    experiments, profile = sample(quick)
    ours = timed(experiments, profile)
    alone = [timed(list(dict.fromkeys([experiments[0], e])), profile) for e in experiments]
    spread = timed(experiments, profile, "local")
    check_equal(ours[-1], [frame for *_, frame in alone], spread[-1])
    table = summary(experiments, alone, ours, spread)
    table = table.assign(**facts("cpu"), profile="smoke" if quick else "tiny")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    judged = lambda ratio: f"{ratio:.3f}, {'met' if ratio <= GOAL else 'MISSED'}"
    print(
        f"goal: at most {GOAL} of the wall time of experiments on their own: "
        f"{judged(table.wall_ratio.iloc[1])}; with a worker per core "
        f"{judged(table.wall_ratio.iloc[2])}. In CPU time: {judged(table.cpu_ratio.iloc[1])}. "
        f"Equal scores: yes, {len(ours[-1])} rows."
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

    first, colors = table.iloc[0], ["#777777", "#0072B2", "#56B4E9"]
    with page():
        fig, axes = plt.subplots(1, 2, figsize=(7.2, 2), sharey=True)
        for ax, unit, title in zip(axes, ("wall", "cpu"), ("wall", "CPU")):
            seconds, ratios = table[f"{unit}_s"], table[f"{unit}_ratio"]
            bars = ax.barh(table.way, seconds, color=colors)
            labels = [f"{s:.0f} s ({r:.2f})" for s, r in zip(seconds, ratios)]
            ax.bar_label(bars, labels, padding=3)
            title = f"{title} seconds of {first.experiments} experiments"
            ax.set(title=title, xlim=(0, 1.5 * seconds.max()))
            ax.grid(axis="y", visible=False)
        axes[0].invert_yaxis()
        for end in (".png", ".pdf"):
            fig.savefig(path.with_suffix(end), dpi=150, bbox_inches="tight")
    path.with_suffix(".txt").write_text(
        f"Seconds of {first.experiments} experiments of profile {first.profile}, in brackets as a "
        "share of those of each experiment in a process of its own with an empty store; n = 1 run "
        f"of each way. {first.device}, one thread a process, load of the machine "
        f"{table.load.min():.1f} to {table.load.max():.1f}.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="random models; writes nothing")
    main(parser.parse_args().quick)
