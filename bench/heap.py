"""A training and an evaluation with the heap of a worker, and with glibc's own settings.

tiny-llava is pruned widthwise at 60 %, its students are trained with SFT and hidden-state
distillation for one epoch on a small part of the generated scenes, and then answer questions. The
rival is the same in a process without the settings (`study.workers.HEAP`). Both have one thread;
pairs are run in turn, and what counts is the time of the processor.

    python bench/heap.py [--quick] [--pairs 3]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from machine import facts

from mllm_compress.study.workers import HEAP

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
RUN = """
import json, resource, sys, time, warnings

warnings.filterwarnings("ignore")
from mllm_compress import zoo
from mllm_compress.data import calibration_batches, small_data
from mllm_compress.evaluation import evaluate
from mllm_compress.pruning import prune
from mllm_compress.recovery import RecoveryConfig, recover

fraction, questions = json.loads(sys.argv[1])
teacher, processor = zoo.load_model("tiny-llava")
data = small_data("train", n=20_000)
batches = calibration_batches(data, processor, n=64)
pruned, plan = prune(teacher, batches, recipe="paper", ratio=0.6)
losses = {"sft": 0.5, "hidden_kd": 0.5}
config = RecoveryConfig(losses=losses, fraction=fraction, batch_size=32, lr=1e-3)
named, took = dict(processor=processor, plan=plan, progress=False), {}
start = time.process_time()
student = recover(pruned, teacher, data, config, **named).model
took["training"] = time.process_time() - start
names = ["scenes/open", "scenes/choice", "scenes/hallucination"]
evaluate(student, processor, names, limit=questions, batch_size=250)  # opens the pictures
start = time.process_time()
evaluate(student, processor, names, limit=questions, batch_size=250)
took["answers"] = time.process_time() - start
took["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(took))
"""


def once(settings: dict, size: list) -> dict:  # seconds of the processor, and peak memory
    "Train and answer in a new process with these settings of the heap."
    plain = {k: v for k, v in os.environ.items() if k not in HEAP} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(size)]
    done = subprocess.run(command, env=plain | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small pair; nothing is written")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args(argv)
    size, rows = [0.002, 20] if options.quick else [0.02, 500], []
    for pair in range(1 if options.quick else options.pairs):
        for way, settings in (("glibc's own", {}), ("heap of a worker", HEAP)):
            rows.append({"pair": pair, "way": way, **once(settings, size)})
    frame = pd.DataFrame(rows)
    first, second = (part.set_index("pair") for _, part in frame.groupby("way", sort=False))
    for kind in ("training", "answers"):
        ratios = (first[kind] / second[kind]).round(3).tolist()
        print(f"{kind}: glibc's own time over that with the heap of a worker, by pair: {ratios}")
    if not options.quick:
        frame.round(2).assign(**facts("cpu")).to_csv(OUT / "heap.csv", index=False)


if __name__ == "__main__":
    main()
