"""The models of profile gpu, trained on this machine's GPU, with the seconds that each took.

`python bench/gpu_models.py FOLDER` writes FOLDER/gpu-llava and FOLDER/gpu-bunny (default:
runs/gpu-models); a model that is there is not trained again. Then MLLM_COMPRESS_MODELS=FOLDER
mllm-compress study --profile gpu finds them. Without a GPU nothing is done."""

import sys
import time
from pathlib import Path

import torch

from mllm_compress.data import small_data
from mllm_compress.recovery import RecoveryConfig, recover
from mllm_compress.zoo import load_model
from mllm_compress.zoo.tiny_models import tiny_model, tiny_processor

SIZES = {
    "llava": {"layers": 32, "hidden_size": 768, "head_dim": 96},
    "bunny": {"layers": 14, "hidden_size": 768, "intermediate_size": 3072},
}
CONFIG = RecoveryConfig(losses={"sft": 1.0}, batch_size=64, epochs=4, lr=3e-4, precision="bf16")


def train_model(family: str, folder: Path, data, config=CONFIG, device="cuda", sizes=SIZES):
    "Train a model from scratch, except for its vision tower, and save it; returns its history."
    model, processor = tiny_model(family, **sizes[family]), tiny_processor(family)
    trained, _ = load_model(f"tiny-{family}")
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    result = recover(model.to(device), None, data, config, processor=processor, device=device)
    result.model.cpu().save_pretrained(folder)
    processor.save_pretrained(folder)
    return result.history


def main(folder: Path) -> None:
    if not torch.cuda.is_available():
        print("No GPU here (torch.cuda.is_available() is False): nothing is trained.")
        return
    for family in SIZES:
        if (folder / f"gpu-{family}" / "config.json").exists():
            continue
        begun = time.perf_counter()
        history = train_model(family, folder / f"gpu-{family}", small_data("train", 40_000))
        seconds = time.perf_counter() - begun
        print(f"gpu-{family}: {seconds:.0f} s, last loss {history.loss.iloc[-1]:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpu-models"))
