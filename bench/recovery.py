"""Student steps per second of SFT + hidden-state distillation, against the plain loop.

The plain loop is the original implementation's: student and teacher both go from pixels to logits
over the whole vocabulary at every position, in every step. Ours is what `recover` does: image
features and the teacher's states that were computed once, short rows that share their prefix, the
last layer and the vocabulary only at answers, and on a CPU passes of eight samples. Same samples,
same weights, same optimiser, one step of each in turn, so that both meet the same machine; on a
CPU one thread, and seconds of processor time, so that other jobs on the machine count less.

Three shapes: the two tiny models of the study (12 layers, students of 8), and a tenth of
LLaVA-v1.5-7B at its own widths: 3 of 32 decoder layers (students of 2), 2 of 24 tower layers,
3,072 of 32,064 words, images of 576 tokens, LoRA of rank 128. In so few layers a saving in the last
one would count ten times too much, so it is switched off there.

"first run" is a run of one epoch that has to compute the teacher's outputs as well: a step plus the
batch's share of that pass.

    python bench/recovery.py [--quick] [--shape tiny-llava|tiny-bunny|7b] [--repeats 9]
                             [--memory SHAPE MODE]
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from machine import facts
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm_compress.anatomy.families import anatomy
from mllm_compress.data.batches import Collator
from mllm_compress.data.scenes import scene_data
from mllm_compress.importance.scores import LayerScores
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.recovery import states
from mllm_compress.recovery.config import RecoveryConfig
from mllm_compress.recovery.losses import answer_positions, batch_counts
from mllm_compress.recovery.states import decoder_states, image_features, use_attention
from mllm_compress.recovery.steps import (
    Student,
    attention_for,
    block_size,
    passes_per_step,
    trainable_copy,
)
from mllm_compress.study.style import page
from mllm_compress.zoo.tiny_models import tiny_model, tiny_processor

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
LOSSES = {"sft": 0.5, "hidden_kd": 0.5}
MODES = {
    "plain fp32": "#777777",
    "ours fp32": "#56B4E9",
    "plain bf16": "#777777",
    "ours bf16": "#0072B2",
}


def tiny_setting(family: str, quick: bool, device: str):
    "Teacher, a config, and what makes batches: packed questions about generated scenes."
    teacher, data = (
        tiny_model(family, 4 if quick else 12).to(device),
        scene_data("train", 8 if quick else 32),
    )

    def batches(passes, block):
        collate = Collator(tiny_processor(family), data, block=block)
        return [
            collate([data[int(i)] for i in part])
            for part in np.array_split(range(len(data)), passes)
        ]

    return teacher, RecoveryConfig(losses=LOSSES, batch_size=32), batches


def wide_setting(quick: bool, device: str):
    "The same for a tenth of LLaVA-v1.5-7B, one image and one answer a row."
    width = 512 if quick else 4096
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=3,
        num_attention_heads=width // 128,
        vocab_size=3072,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=3000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    with torch.device(device):
        teacher = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 2_999, (1 if device == "cpu" else 8, 5 + 576 + 115))
    ids[:, 5:581] = 3000
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 60, -100)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(len(ids), 3, 336, 336),
    }
    return (
        teacher,
        RecoveryConfig(
            losses=LOSSES,
            turns="sequential",
            batch_size=len(ids),
            lora={"r": 128, "lora_alpha": 256},
        ),
        lambda passes, block: [batch],
    )


FOUR = ("plain fp32", "ours fp32", "plain bf16", "ours bf16")
SETTINGS = {
    "tiny-llava": (partial(tiny_setting, "llava"), FOUR),
    "tiny-bunny": (partial(tiny_setting, "bunny"), FOUR),
    "7b": (wide_setting, ("plain bf16", "ours bf16")),
}


def plain_step(student, teacher, batch) -> torch.Tensor:
    "The original's step: everything, everywhere, in both models; losses at the same positions."
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        target = teacher(**inputs, output_hidden_states=True)
    output = student(**inputs, output_hidden_states=True)
    where, _ = answer_positions(batch["labels"])
    sft = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten()
    )
    return 0.5 * sft + 0.5 * F.mse_loss(
        output.hidden_states[-1][where].float(), target.hidden_states[-1][where].float()
    )


def our_outputs(teacher, batch) -> tuple:
    "What the one pass over the data finds for this batch."
    features = image_features(teacher, batch["pixel_values"].to(teacher.dtype))
    where, _ = answer_positions(batch["labels"])
    with torch.no_grad():
        return features, {
            "teacher_hidden": decoder_states(anatomy(teacher), batch, features, ("final",), where)[
                "final"
            ][where]
        }


class Loop:
    "One way to train: a step of it, in seconds."

    def __init__(self, mode: str, teacher, student, config, batches, device: str):
        self.ours, self.device, self.teacher = mode.startswith("ours"), device, teacher
        autocast = (
            mode.endswith("bf16") and teacher.dtype == torch.float32
        )  # weights in bf16 need none
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=autocast)
        config = replace(config, precision="bf16" if autocast else "fp32")
        model = trainable_copy(student, config)
        self.module = Student(model, LOSSES) if self.ours else model
        self.inner = anatomy(model.get_base_model() if config.lora else model).model
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad], lr=1e-5, fused=True
        )
        self.name = attention_for(config, device) if self.ours else None
        made = (
            batches(passes_per_step(config, config.batch_size, device, 1), block_size(config))
            if self.ours
            else batches(1, None)
        )
        self.parts = [
            {
                k: v.to(device, teacher.dtype if v.is_floating_point() else v.dtype)
                for k, v in batch.items()
            }
            for batch in made
        ]
        self.counts = sum(batch_counts(batch["labels"]) for batch in self.parts)

    def prepare(self) -> float:
        "Seconds to compute the teacher's outputs for this batch, once."
        started = self.now()
        with use_attention(self.teacher, self.name), self.autocast():
            self.outputs = (
                [our_outputs(self.teacher, batch) for batch in self.parts] if self.ours else []
            )
        return self.now() - started

    def losses(self):
        "The loss of each pass."
        if not self.ours:
            yield plain_step(self.module, self.teacher, self.parts[0])
        for batch, found in zip(self.parts, self.outputs):
            yield (
                self.module(
                    {k: v for k, v in batch.items() if k != "pixel_values"}, *found, self.counts
                ).sum()
                * 0.5
            )

    def step(self) -> float:
        "Seconds of a step: forward, backward, optimiser."
        started, self.loss = self.now(), 0.0
        with use_attention(self.inner, self.name), self.autocast():
            for loss in self.losses():
                with torch.autocast(self.device, enabled=False):
                    loss.backward()
                self.loss += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.now() - started

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def loops(shape: str, modes, quick: bool, device: str) -> dict:
    "The ways to train, on the same weights and samples."
    setting, _ = SETTINGS[shape]
    teacher, config, batches = setting(quick, device)
    layers = len(anatomy(teacher).layers)
    student = apply_plan(
        teacher,
        plan_layerwise(
            teacher,
            LayerScores(torch.arange(layers, 0, -1.0), kind="random"),
            n_layers=max(1, layers // 3),
        ),
    )
    if shape == "7b":
        states.last_layer_at = lambda parts, where: contextlib.nullcontext()
    return {mode: Loop(mode, teacher, student, config, batches, device) for mode in modes}


def measure(shape: str, quick: bool, repeats: int, device: str) -> list:
    "One row per mode: seconds a step, in turn with the others, and peak memory in its own process."
    made = loops(shape, SETTINGS[shape][1], quick, device)
    ahead = {mode: [loop.prepare() for _ in range(3)] for mode, loop in made.items()}
    seconds = {mode: [] for mode in made}
    for turn in range(1 + repeats):  # one to warm up
        for mode, loop in made.items():
            seconds[mode] += [loop.step()] * (turn >= 1)
    losses = [loop.loss for loop in made.values()]
    if max(losses) - min(losses) > 0.05 * max(losses):
        raise RuntimeError(f"the loops do not train alike: {losses}")
    rows = []
    for mode, values in seconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        rival, first = (
            np.array(seconds["plain " + mode.split()[1]]),
            np.array(values) + np.median(ahead[mode]),
        )
        full = np.array(seconds["plain fp32"]) if "plain fp32" in seconds else rival
        quartiles = dict(
            zip(
                ("speedup_low", "speedup", "speedup_high"),
                np.quantile(rival / np.array(values), (0.25, 0.5, 0.75)),
            )
        )
        rows.append(
            dict(
                shape=shape,
                mode=mode,
                seconds_median=median,
                seconds_low=low,
                seconds_high=high,
                steps_per_second=1 / median,
                target_seconds=np.median(ahead[mode]),
                **quartiles,
                speedup_first_run=np.median(rival / first),
                speedup_over_plain_fp32=np.median(full / np.array(values))
                if "plain fp32" in seconds
                else np.nan,
                repeats=repeats,
                loss=made[mode].loss,
                peak_memory_mb=memory(shape, mode, quick, device),
            )
        )
    return rows


def memory(shape: str, mode: str, quick: bool, device: str) -> float:
    "Peak memory, in MB, of a process that only runs this mode."
    command = [
        sys.executable,
        __file__,
        "--memory",
        shape,
        mode,
        "--device",
        device,
        *(["--quick"] if quick else []),
    ]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def peak(shape: str, mode: str, quick: bool, device: str):
    "Run a mode for two steps and print the peak."
    loop = loops(shape, [mode], quick, device)[mode]
    loop.prepare()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loop.step()
    print(torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_resident())


def peak_resident() -> float:
    "Peak resident memory of this process in MB."
    # Linux passes a parent's ru_maxrss on to its children, so VmHWM is read there
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def draw(rows: pd.DataFrame, path: Path):
    "Steps per second and memory, plain beside ours."
    import matplotlib.pyplot as plt

    with page():
        fig, axes = plt.subplots(
            1, rows["shape"].nunique(), figsize=(2.5 * rows["shape"].nunique(), 2.8), squeeze=False
        )
        for ax, (shape, part) in zip(axes[0], rows.groupby("shape", sort=False)):
            ax.bar(
                part["mode"],
                part.steps_per_second,
                color=[MODES[m] for m in part["mode"]],
                width=0.6,
                yerr=[
                    part.steps_per_second - 1 / part.seconds_high,
                    1 / part.seconds_low - part.steps_per_second,
                ],
            )
            for x, row in enumerate(part.itertuples()):
                first = "" if row.mode.startswith("plain") else f"\n({row.speedup_first_run:.1f}×)"
                ax.annotate(
                    f"{row.speedup:.1f}×{first}\n{row.peak_memory_mb / 1024:.1f} GB",
                    (x, 1 / row.seconds_low),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
            ax.set(
                title="a tenth of a 7B model" if shape == "7b" else shape,
                ylim=(0, 1.4 / part.seconds_low.min()),
            )
            ax.set_xticks(
                range(len(part)), [m.replace(" ", "\n") for m in part["mode"]], fontsize=8
            )
            ax.grid(axis="x", visible=False)
        axes[0, 0].set_ylabel("student steps per second")
        for end in ("png", "pdf"):
            fig.savefig(path.with_suffix(f".{end}"), bbox_inches="tight")
    steps, first = " or ".join(str(n) for n in rows.repeats.unique()), rows.iloc[0]
    path.with_suffix(".txt").write_text(
        "Student steps per second, timed in turn: medians, and quartiles as thin lines, "
        f"of n = {steps} steps. Above each bar: speed-up over the plain loop of the same precision "
        "(in brackets: when the teacher's outputs are computed too), and peak memory. "
        f"{first.device}, {first.threads} thread(s), {first.clock}.\n",
        encoding="utf-8",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and two repeats: does it run?"
    )
    parser.add_argument("--shape", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=2, metavar=("SHAPE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.memory:
        return peak(*args.memory, args.quick, args.device)
    matplotlib.use("Agg")
    rows = []
    repeats = {
        shape: 2
        if args.quick
        else min(args.repeats, 3)
        if shape == "7b" and args.device == "cpu"
        else args.repeats
        for shape in SETTINGS
    }
    for shape in SETTINGS if args.shape == "all" else [args.shape]:
        rows += measure(shape, args.quick, repeats[shape], args.device)
    frame = pd.DataFrame(rows).assign(
        **facts(args.device),
        cores=os.cpu_count(),
        load_average=round(os.getloadavg()[1], 1),
        clock="processor seconds" if args.device == "cpu" else "seconds",
        quick=args.quick,
    )
    OUT.mkdir(parents=True, exist_ok=True)
    name = "recovery-quick" if args.quick else "recovery"
    frame.to_csv(OUT / f"{name}.csv", index=False)
    draw(frame, OUT / f"{name}.png")
    print(
        frame[
            [
                "shape",
                "mode",
                "steps_per_second",
                "speedup",
                "speedup_first_run",
                "speedup_over_plain_fp32",
                "peak_memory_mb",
                "load_average",
            ]
        ].to_string(index=False)
    )


if __name__ == "__main__":
    main()
