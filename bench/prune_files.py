"""Peak memory of pruning a checkpoint: from file to file and in memory, each in its own process.

A Llama-like checkpoint with random weights is written, then pruned twice by 30 % of its decoder.
What is reported is the largest resident set of the process (VmHWM), beyond what the process has
after its imports. The goal for a checkpoint of 2 GiB is a peak below 1 GiB.

    python bench/prune_files.py [--gib 2] [--quick]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from machine import facts
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mllm_compress.zoo.tiny_models import tiny_processor
from mllm_compress.zoo.weight_files import write_weights

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
PEAK = """
import json, sys, time, torch
from transformers.utils import logging
from mllm_compress.checkpoint import save_pruned
from mllm_compress.checkpoint.from_files import prune_files
from mllm_compress.zoo.weight_files import open_files
from mllm_compress.importance.criteria import random_scores
from mllm_compress.pruning.plans import plan_widthwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model
logging.disable_progress_bar()
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
how, dense, out, before, start = *sys.argv[1:], peak(), time.perf_counter()
if how == "files":
    source = open_files(dense)
    plan = plan_widthwise(source.model, random_scores(source.model), ratio=.3, shape="uniform")
    prune_files(source, plan, out)
else:
    model, _ = load_model(dense)
    plan = plan_widthwise(model, random_scores(model), ratio=.3, shape="uniform")
    save_pruned(apply_plan(model, plan), plan, out)
seconds = time.perf_counter() - start
print(json.dumps({"before": before, "peak": peak(), "seconds": seconds}))
"""


def dense_checkpoint(folder: Path, gib: float) -> Path:
    "A decoder of about that many GiB in bfloat16, written shard by shard."
    width = 2048 if gib >= 1 else 512
    per_layer = 4 * width**2 + 3 * width * 4 * width
    layers = max(2, round(gib * 2**30 / 2 / per_layer))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=8000,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    shapes, generator = model.state_dict(), torch.Generator().manual_seed(0)

    def tensor(name):
        values = torch.rand(shapes[name].shape, generator=generator)
        return values.sub_(0.5).mul_(0.04).bfloat16()

    model.save_pretrained(folder, state_dict={})
    write_weights(folder, model, tensor, None, "1GB")
    tiny_processor("llava").tokenizer.save_pretrained(folder)
    return folder


def measure(how: str, dense: Path, out: Path) -> dict:
    "Peak memory and seconds of one pruning in a fresh process."
    command = [sys.executable, "-c", PEAK, how, str(dense), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=0.125, help="size of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="the smallest checkpoint")
    args, _ = parser.parse_known_args()
    gib, rows = 0.03 if args.quick else args.gib, []
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        dense = dense_checkpoint(Path(work, "dense"), gib)
        size = sum(p.stat().st_size for p in dense.glob("*.safetensors"))
        for how in ("files", "memory"):
            found = measure(how, dense, Path(work, how))
            extra = (found["peak"] - found["before"]) / 2**30
            row = {"how": how, "checkpoint_gib": size / 2**30, "peak_gib": found["peak"] / 2**30}
            rows.append(row | {"beyond_imports_gib": extra, "seconds": found["seconds"]})
        names = sorted(p.name for p in Path(work, "files").glob("*.safetensors"))
        for name in names:
            one, two = (Path(work, how, name).read_bytes() for how in ("files", "memory"))
            assert one == two, f"{name} differs"
    table = pd.DataFrame(rows).assign(**facts("cpu"))
    print(table[["how", "checkpoint_gib", "peak_gib", "beyond_imports_gib", "seconds"]].round(3))
    print(f"the same bytes in {', '.join(names)}")
    OUT.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUT / "prune_files.csv", index=False)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
