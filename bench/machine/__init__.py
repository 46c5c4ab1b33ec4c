"""What a benchmark ran on, for its tables. A folder, so that `make bench` does not run it."""

import platform
from pathlib import Path

import torch
import transformers


def device_name(device: str) -> str:
    "The processor or the GPU."
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(device: str) -> dict:
    "Device, threads and versions."
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
