"""Instruction data in the folders of LLaVA's mix-665k and Bunny's 695k."""

import json

import pytest
from PIL import Image

from mllm_compress.data import Collator, from_rows, load_json, scene_data, turns
from mllm_compress.data.scenes import mix
from mllm_compress.evaluation.benchmarks import own_benchmark


def conversation(*said):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]


def entry_of(id, image, *said, **more) -> dict:
    return {"id": id, **({"image": image} if image else more), "conversations": conversation(*said)}


# Entries as the two files have them: the marker before or after the question, several turns,
# text alone with a "model", ids that are numbers and that repeat.
BUS = ("<image>\nIs the bus red?", "yes")
LAYOUTS = {
    "llava_v1_5_mix665k": (
        "",
        [
            entry_of("000000033471", "coco/train2017/000000033471.jpg", *BUS, "Is it blue?", "no"),
            entry_of("n161313", "gqa/images/2354786.jpg", "Is it day?\n<image>", "yes"),
            entry_of("ocr", "ocr_vqa/images/1421539276.jpg", "<image>\nIs this a book?", "yes"),
            entry_of("text", "textvqa/train_images/011e7e.jpg", "<image>\nIs there a word?", "no"),
            entry_of(1, "vg/VG_100K/1.jpg", "<image>\nIs there a circle?", "yes", "Red?", "no"),
            entry_of(2, "vg/VG_100K_2/2.jpg", "<image>\nIs there a square?", "no"),
            entry_of("wgByO4Y_0", "", "Is one less than two?", "yes", model=""),
            entry_of("wgByO4Y_0", "", "Is two less than one?", "no", model=""),
        ],
    ),
    "bunny_695k": (
        "images",
        [
            entry_of("svit_1", "000000033471.jpg", *BUS),
            entry_of("wizard_7", "", "Is one less than two?", "yes"),
            entry_of("gqa_2", "gqa/2.jpg", "<image>\nIs it day?", "yes", "Is it night?", "no"),
        ],
    ),
}


def on_disk(folder, name):
    "The layout in a folder, with small pictures; its JSON file and where its image paths start."
    below, entries = LAYOUTS[name]
    for k, e in enumerate(e for e in entries if "image" in e):
        path = folder / below / e["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + k, 30), (10 * k, 0, 0)).save(path)
    (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder / f"{name}.json", folder / below


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("how", ["independent", "sequential"])
def test_real_layouts(tmp_path, tiny_llava, name, how):
    processor, entries = tiny_llava[1], LAYOUTS[name][1]
    data = load_json(*on_disk(tmp_path, name))
    assert len(data) == len(entries) and data.name == name
    batch = Collator(processor, data, how)([data[i] for i in range(len(data))])
    assert len(batch["pixel_values"]) == sum("image" in e for e in entries)
    has = (batch["input_ids"] == processor.image_token_id).any(1)
    assert has.tolist() == ["image" in e for e in entries]
    for row, sample in zip(batch["labels"], entries):
        text = processor.tokenizer.decode(row[row != -100], skip_special_tokens=True)
        assert text.split() == [answer for _, answer in turns(sample)]
    again = load_json(*on_disk(tmp_path, name))
    ids = lambda data: [e["id"] for e in data.fraction(0.5, 1).samples]
    assert ids(data) == ids(again) and data.hash == again.hash


def test_hashes_see_stored_pictures(tmp_path):
    entry, seen = entry_of(1, "a.png", "<image>\nWhich colour?", "red"), set()
    (tmp_path / "e.json").write_text(json.dumps([entry]))
    for colour in ("red", "blue", "red"):
        (picture := Image.new("RGB", (8, 8), colour)).save(tmp_path / "a.png")
        read = from_rows([entry | {"image": picture}]), load_json(tmp_path / "e.json")
        read += read[0].fraction(1.0), mix(read[1], scene_data("train", 1))
        seen |= {d.hash for d in read} | {own_benchmark(tmp_path / "e.json").name}
    assert len(seen) == 8
