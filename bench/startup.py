"""Seconds of the processor until a command that needs no tensor has ended, beside `import torch`.

Commands and import are run in turn, each in a process of its own.

    python bench/startup.py [--pairs 5]
"""

import argparse
import resource
import statistics
import subprocess
import sys

RIVAL = ["-c", "import torch"]
COMMANDS = ("--help", "prune --help", "models", "show gone", "advise --model m --ratio 0.3")


def seconds(arguments: list) -> float:
    "What a Python process with these arguments takes."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pairs", type=int, default=5)
parser.add_argument("--quick", action="store_true", help="one pair")
options = parser.parse_args()
for command in COMMANDS:
    pairs = range(1 if options.quick else options.pairs)
    timed = [(seconds(["-m", "mllm_compress", *command.split()]), seconds(RIVAL)) for _ in pairs]
    ours, torch = map(statistics.median, zip(*timed))
    print(f"{command:<30} {ours:5.2f} s, import torch {torch:5.2f} s, ratio {ours / torch:.2f}")
