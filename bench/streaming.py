"""A model larger than the memory: scored, pruned and reconstructed from its files.

A LLaVA checkpoint with random weights in bfloat16 is written, used and removed. Every step runs in
a process of its own. Reported are the largest resident set of the process (VmHWM), also beyond what
it has after its imports, seconds, CPU seconds, and the bytes that it reads (rchar of /proc/self/io
beyond the imports; loading as a whole maps the files, which does not count). The default checkpoint
has half the width and a quarter of the layers of LLaVA-v1.5-7B (1.6 GiB); it is scored in memory as
well. `--model third` has ten of its layers at full width (4.9 GiB), so that peaks are those of the
whole model. `--model big` has its full size, takes 22 GiB of disk and most of an hour. Steps that
are measured again replace their rows; the others stay in the table.

    python bench/streaming.py [--model third] [--steps taylor prune] [--quick]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from machine import facts
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from mllm_compress.checkpoint import prune_files, reconstruct_files
from mllm_compress.importance.criteria import measure, random_scores
from mllm_compress.pruning.plans import plan_widthwise
from mllm_compress.zoo.releases import real_config
from mllm_compress.zoo.weight_files import auto_classes, open_files, write_weights

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
WIDTHS = {  # of the text config; the vision tower is that of LLaVA-v1.5-7B
    "big": {},
    "third": dict(num_hidden_layers=10),  # every layer has its full width
    "small": dict(hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, heads=16),
    "quick": dict(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, heads=4, vocab_size=8000
    ),
}
STEPS = {  # name -> (text tokens, pictures, rows, ratio)
    "prune": dict(ratio=0.3),
    "gauss_newton": dict(tokens=64, pictures=0, rows=1),
    "block influence": dict(tokens=64, pictures=1, rows=1),
    "taylor": dict(tokens=64, pictures=0, rows=1),
    "reconstruct": dict(tokens=512, pictures=0, rows=1, ratio=0.6),
}


def config_of(size: str):
    "LLaVA-v1.5-7B, or a smaller one of its kind."
    config, widths = real_config("LLaVA-v1.5-7B"), dict(WIDTHS[size])
    text = config.text_config
    if heads := widths.pop("heads", None):
        text.num_attention_heads = text.num_key_value_heads = heads
        text.head_dim = widths["hidden_size"] // heads
    for name, value in widths.items():
        setattr(text, name, value)
    config.image_token_id = min(config.image_token_id, text.vocab_size - 1)
    config.dtype = torch.bfloat16
    return config


def write_checkpoint(folder: Path, size: str) -> int:
    "Write a checkpoint with random weights, one tensor at a time; its bytes."
    config = config_of(size)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    shapes, generator = model.state_dict(), torch.Generator().manual_seed(0)
    block = torch.rand(2**22 - 1, generator=generator).sub_(0.5).mul_(0.07).bfloat16()

    def tensor(name):
        shape = shapes[name].shape
        if len(shape) == 1:  # norms and biases
            return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        begin = int(torch.randint(len(block), (), generator=generator))
        return block.repeat(2 + shape.numel() // len(block))[begin:][: shape.numel()].view(shape)

    model.save_pretrained(folder, state_dict={})
    write_weights(folder, model, tensor, None, "5GB")
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def batches_of(model, tokens: int, pictures: int, rows: int, count: int = 1) -> list:
    "Random prompts whose last quarter of text is the answer."
    config, generator = model.config, torch.Generator().manual_seed(0)
    found, side = [], config.vision_config.image_size
    for _ in range(count):
        ids = torch.randint(3, 7_000, (rows, tokens), generator=generator)
        labels = ids.masked_fill(torch.arange(tokens) < tokens * 3 // 4, -100)
        batch = {"input_ids": ids, "labels": labels}
        if pictures:
            marks = torch.full((rows, config.image_seq_length), config.image_token_id)
            batch = {
                "input_ids": torch.cat([marks, ids], 1),
                "labels": torch.cat([torch.full_like(marks, -100), labels], 1),
                "pixel_values": torch.randn(rows, 3, side, side, generator=generator),
            }
        found.append(batch)
    return found


def width_plan(model, ratio: float):
    "A plan that removes a random share of every layer."
    return plan_widthwise(model, random_scores(model), ratio=ratio, protect=(0, 0))


def refit_batches(model, ratio: float, tokens: int, **options) -> list:
    "As many prompts as the widest fit needs."
    widest = model.config.text_config.intermediate_size * (1 - ratio) * 1.1 + tokens
    return batches_of(model, tokens, **options, count=int(widest // tokens) + 1)


# --- one step, in a process of its own


def counters() -> dict:
    "Peak memory, bytes read, and CPU seconds of this process so far."
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    io = dict(line.split(":") for line in open("/proc/self/io"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = int(status["VmHWM"].split()[0]) * 1024
    return {"peak": peak, "read": int(io["rchar"]), "cpu_s": used.ru_utime + used.ru_stime}


def run_step(name: str, how: str, dense: Path, out: Path) -> None:
    "One step of the work."
    o = dict(STEPS[name])
    if name == "prune":
        source = open_files(dense)
        prune_files(source, width_plan(source.model, **o), out)
    elif name == "reconstruct":
        source, ratio = open_files(dense), o.pop("ratio")
        plan, batches = width_plan(source.model, ratio), refit_batches(source.model, ratio, **o)
        reconstruct_files(source, plan, batches, out, ridge=0.1)
    else:
        if how == "streamed":
            model = open_files(dense).model
        else:
            config = config_of("big")
            model = auto_classes(config)[0].from_pretrained(dense, dtype="auto").eval()
        kind = "layerwise" if name == "block influence" else "widthwise"
        measure(kind, name.replace(" ", "_"), model, batches_of(model, **o))


def step_in_process(name: str, how: str, dense: Path, out: Path) -> dict:
    "The counters of one step in a fresh process."
    command = [sys.executable, __file__, "--step", name, how, str(dense), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def step_main(name: str, how: str, dense: str, out: str) -> None:
    "Run a step and print its counters."
    logging.disable_progress_bar()
    torch.zeros(1).bfloat16() @ torch.zeros(1).bfloat16()
    before, start = counters(), time.perf_counter()
    run_step(name, how, Path(dense), Path(out))
    seconds, after = time.perf_counter() - start, counters()
    found = {"seconds": seconds, "peak": after["peak"], "before": before["peak"]}
    print(json.dumps(found | {k: after[k] - before[k] for k in ("read", "cpu_s")}))


# --- all of them


def measured_rows(size: str, steps: list, work: Path):
    "A row per step and way to run it."
    dense = work / "dense"
    checkpoint = write_checkpoint(dense, size)
    for name in steps:
        ways = ["streamed"]
        if size not in ("big", "third") and name not in ("prune", "reconstruct"):
            ways.append("in memory")
        for how in ways:
            found, gib = step_in_process(name, how, dense, work / "out"), 2**30
            row = dict(model=size, step=name, how=how, checkpoint_gib=checkpoint / gib)
            row |= dict(peak_gib=found["peak"] / gib)
            row |= dict(beyond_imports_gib=(found["peak"] - found["before"]) / gib)
            row |= dict(read_gib=found["read"] / gib if how == "streamed" else None)
            row |= dict(seconds=found["seconds"])
            row |= dict(cpu_s=found["cpu_s"], **STEPS[name])
            yield row
            shutil.rmtree(work / "out", ignore_errors=True)


def kept_rows(path: Path, steps: list) -> list:
    "Rows of earlier runs, without those of the steps that are measured now."
    found = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["step"])
    return found[~found.step.isin(steps)].to_dict("records")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["small", "third", "big"], default="small")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--quick", action="store_true", help="a checkpoint of half a GiB")
    parser.add_argument("--folder", type=Path, help="on a disk with room; default: temporary")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.step:
        return step_main(*args.step)
    size = "quick" if args.quick else args.model
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        needed = {"big": 24, "third": 10, "small": 4, "quick": 2}[size] * 2**30
        if (free := shutil.disk_usage(work).free) < needed:
            raise SystemExit(
                f"{needed >> 30} GiB of disk are needed, {free >> 30} are free: --folder"
            )
        path = args.out / f"streaming-{size}.csv"
        rows = kept_rows(path, args.steps)
        for row in measured_rows(size, args.steps, Path(work)):
            rows.append(row | facts("cpu"))
            print(
                {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )
            table = pd.DataFrame(rows)
            args.out.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
