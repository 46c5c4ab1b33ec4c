"""Golden numbers of the data and the smoke models: none changes without a new version."""

import numpy as np
import pytest
import torch

from mllm_compress.data import batches, calibration, scenes
from mllm_compress.utils.files import content_hash
from mllm_compress.zoo import tiny_models


def scene_numbers(split: str) -> list:
    "Objects and questions of three scenes, and the sum of each row of pixels."
    numbers = []
    for i in range(3):
        items = [[x.cell, x.shape, x.color, x.size, list(x.shift)] for x in scenes.scene(i, split)]
        asked = [
            [q["type"], q["question"], q["answer"], q["options"]] for q in scenes.ask(i, split)
        ]
        rows = np.asarray(scenes.image(i, split)).astype(int).sum((1, 2)).tolist()
        numbers.append([items, asked, rows])
    return numbers


def integers(batch: dict) -> dict:
    "The integer tensors of a batch as lists; pixels are floats and depend on the platform."
    return {k: v.int().tolist() for k, v in sorted(batch.items()) if not torch.is_floating_point(v)}


def batch_numbers(turns: str, **kwargs) -> dict:
    "One batch of three scenes."
    data = scenes.scene_data(n=3)
    collate = batches.Collator(tiny_models.tiny_processor("llava"), data, turns, **kwargs)
    return integers(collate([data[i] for i in range(3)]))


def calibration_numbers(design: str) -> list:
    "Two calibration batches of four questions, from twenty scenes."
    data = scenes.scene_data(n=20)
    processor = tiny_models.tiny_processor("llava")
    drawn = calibration.calibration_batches(data, processor, 8, 4, design=design)
    return [integers(batch) for batch in drawn]


def smoke_numbers(family: str) -> list:
    "Shape and first values of every weight, rounded to three decimals."
    weights = tiny_models.tiny_model(family, layers=4).state_dict()
    if family == "bunny":  # SigLIP's is a truncated normal, which torch 2.8 draws in another way
        del weights["model.vision_tower.embeddings.patch_embedding.weight"]
    return [
        [name, list(w.shape), (w.flatten()[:8] * 1000).round().int().tolist()]
        for name, w in weights.items()
    ]


DATA = (batches, "DATA_VERSION", 1, "nbs/library/data/03_batches.ipynb")
CALIBRATION = (calibration, "CALIBRATION_VERSION", 2, "nbs/library/data/04_calibration.ipynb")
SCENES = (scenes, "SCENES_VERSION", 1, "nbs/library/data/02_scenes.ipynb")
SMOKE = (tiny_models, "SMOKE_VERSION", 1, "nbs/library/zoo/03_tiny_models.ipynb")
blocks = lambda: batch_numbers("independent", block=40)
GOLDEN = {  # what: (where its version is, numbers, hash)
    "scenes of train": (SCENES, lambda: scene_numbers("train"), "302093830fa75b034c5d"),
    "scenes of validation": (SCENES, lambda: scene_numbers("validation"), "0d47e69ddd6cc4ebdf7d"),
    "scenes of test": (SCENES, lambda: scene_numbers("test"), "946351dc89f7687b0262"),
    "independent batches": (DATA, lambda: batch_numbers("independent"), "2c072c02bffe09f56b74"),
    "sequential batches": (DATA, lambda: batch_numbers("sequential"), "039505dea44659a2fbf4"),
    "batches in blocks": (DATA, blocks, "fbdaa723311bb6ee8054"),
    "calibration on first questions": (
        CALIBRATION,
        lambda: calibration_numbers("first"),
        "b2adbf41c969a81bb851",
    ),
    "stratified calibration": (
        CALIBRATION,
        lambda: calibration_numbers("stratified"),
        "cabde4ff8af7f59ac635",
    ),
    "smoke-llava": (SMOKE, lambda: smoke_numbers("llava"), "dac2d4502ac753d350f2"),
    "smoke-bunny": (SMOKE, lambda: smoke_numbers("bunny"), "dc6b6a7e962f7d68d051"),
}


@pytest.mark.parametrize("what", GOLDEN)
def test_numbers_move_only_with_their_version(what):
    (module, name, version, notebook), numbers, expected = GOLDEN[what]
    moved = (getattr(module, name), content_hash(numbers()))
    assert moved == (version, expected), (
        f"numbers of {what} moved: raise {name} in {notebook}, then update this golden value "
        f"to {moved}"
    )
