"""Entries with several images: from the file to training batches, cached features and answers."""

import json
from pathlib import Path

import pytest
import torch
from commands import facts, run
from PIL import Image

from mllm_compress.data import instructions, scenes, self_data
from mllm_compress.data.batches import Collator
from mllm_compress.data.calibration import calibration_batches, one_question
from mllm_compress.data.instructions import from_rows, load_json, read_entry
from mllm_compress.evaluation.benchmarks import BENCHMARKS, own_benchmark
from mllm_compress.evaluation.generation import answer_questions
from mllm_compress.recovery.states import compute_teacher_outputs, image_features

MARK = "<image>"


def said(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


FRONT = {
    "id": "front",
    "source": ["a list"],
    "image": ["0.png", "1.png"],
    "conversations": said(f"{MARK}\n{MARK}\nis there a circle?", "yes", "is there a square?", "no"),
}
AMID = {
    "id": "amid",
    "image": ["1.png", "2.png", "0.png"],
    "conversations": said(
        f"is the circle in {MARK} like {MARK}?", "no", f"{MARK}\nis it red?", "yes"
    ),
}
ONE = {"id": "one", "image": "2.png", "conversations": said(f"{MARK}\nis it red?", "no")}
NONE = {"id": "none", "conversations": said("is one less than two?", "yes")}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for k in range(3):
        scenes.image(k, "train").save(folder / f"{k}.png")
    (folder / "mine.json").write_text(json.dumps([FRONT, AMID, ONE, NONE]))
    return folder


@pytest.fixture(scope="module")
def mine(shop):
    return load_json(shop / "mine.json", shop)


def native(processor, text, folder, names):
    "What the native processor makes of a text and its pictures."
    pictures = [Image.open(folder / name).convert("RGB") for name in names]
    return processor(text=text, images=pictures, return_tensors="pt")


def test_all_forms_of_several_images_are_one():
    listed = [{"type": "image", "path": name} for name in ("0.png", "1.png")]
    text = {"type": "text", "text": "same?"}
    answer = {"role": "assistant", "content": "no"}
    forms = [
        {"images": ["0.png", "1.png"], "question": f"{MARK}\n{MARK}\nsame?", "answer": "no"},
        {"image": ["0.png", "1.png"], "conversations": said(f"{MARK} {MARK} same?", "no")},
        {"messages": [{"role": "user", "content": [*listed, text]}, answer]},
        {
            "images": ["0.png", "1.png"],
            "messages": [{"role": "user", "content": [{"type": "image"}] * 2 + [text]}, answer],
        },
    ]
    for form in forms:
        entry = read_entry(form, 0)
        assert entry["image"] == ["0.png", "1.png"] and read_entry(entry, 0) == entry
        assert instructions.turns(entry) == [("same?", "no")]
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": [*listed, text]}
    entry = read_entry({"messages": [system, user, answer]}, 0)
    assert entry["system"] == "Be brief." and instructions.turns(entry) == [("same?", "no")]
    amid = {"messages": [{"role": "user", "content": [listed[0], text, listed[1]]}, answer]}
    assert instructions.turns(read_entry(amid, 0))[0][0] == f"{MARK}\nsame?\n{MARK}"


def test_a_batch_is_what_the_native_processor_makes(shop, mine, tiny_llava):
    model, processor = tiny_llava
    collate = Collator(processor, mine, turns="sequential")
    texts = [
        f"USER: {MARK}\n{MARK}\nis there a circle? ASSISTANT: yes</s>"
        "USER: is there a square? ASSISTANT: no</s>",
        f"USER: is the circle in {MARK} like {MARK}? ASSISTANT: no</s>"
        f"USER: {MARK}\nis it red? ASSISTANT: yes</s>",
    ]
    for number, text in enumerate(texts):
        entry, batch = mine.samples[number], collate([mine[number]])
        inputs = native(processor, text, shop, entry["image"])
        assert torch.equal(batch["input_ids"], inputs["input_ids"])
        assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
        answers = batch["labels"][batch["labels"] != -100]
        assert processor.tokenizer.decode(answers).split() == [
            word for _, answer in instructions.turns(entry) for word in (answer, "</s>")
        ]
    batch = collate([mine[i] for i in range(4)])
    assert len(batch["pixel_values"]) == 2 + 3 + 1
    assert torch.isfinite(model(**batch).loss)


@torch.no_grad()
def test_packed_questions_share_all_their_pictures(mine, tiny_llava):
    model, processor = tiny_llava
    packed = Collator(processor, mine)([mine[i] for i in range(4)])
    alone = [
        FRONT | {"conversations": said(f"{MARK}{MARK}{q}", a)} for q, a in instructions.turns(FRONT)
    ]
    apart = instructions.InstructionData([*alone, AMID, ONE, NONE], mine.image_root)
    single = Collator(processor, apart, turns="sequential")([apart[i] for i in range(5)])
    logits = [
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["labels"] != -100]
        for batch in (packed, single)
    ]
    assert torch.allclose(*logits, atol=1e-4) and len(logits[0]) > 8


def test_calibration_uses_the_pictures_of_the_first_question(mine, tiny_llava):
    batches = calibration_batches(mine, tiny_llava[1], n=4, batch_size=4, design="first")
    assert len(batches[0]["pixel_values"]) == 2 + 2 + 1  # AMID's third belongs to a later question


def test_a_later_question_keeps_the_pictures_up_to_it():
    said = ["<image> is red?", "yes", "and <image>?", "no", "both?", "no"]
    talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    entry = {"id": "1", "image": ["a.png", "b.png"], "conversations": talk}
    one = one_question(entry | {"image": ["x/a.png", "x/b.png"]}, 1)
    assert one["image"] == ["x/a.png", "x/b.png"]
    assert one["conversations"][0]["value"] == "<image>\nand <image>?"
    assert one_question(entry, 0)["image"] == ["a.png"]
    assert one_question(entry, 2)["conversations"][0]["value"] == "<image>\n<image>\nboth?"


def test_no_picture_is_lost_where_a_model_answers_nothing(mine, tiny_llava, monkeypatch):
    tokenizer = tiny_llava[1].tokenizer
    yes, said = tokenizer("yes", add_special_tokens=False)["input_ids"], tokenizer.decode
    some = lambda m, p, begun, *_: [yes * ("circle" not in said(ids)) for ids, _ in begun]
    monkeypatch.setattr(self_data, "written", some)
    own = self_data.own_data(*tiny_llava, mine)
    assert [e["conversations"][0]["value"].count(MARK) for e in own.samples] == [0, 3, 1, 0]
    assert [len(own.pictures(i)) for i in range(4)] == [2, 3, 1, 0]
    monkeypatch.setattr(self_data, "written", lambda m, p, begun, *_: [yes] * len(begun))
    asked = [t["value"] for e in (FRONT, AMID, ONE, NONE) for t in e["conversations"][::2]]
    whole = self_data.own_data(*tiny_llava, mine).samples
    assert [t["value"] for e in whole for t in e["conversations"][::2]] == asked


def test_cached_features_are_those_of_each_image(mine, tiny_llava):
    model, processor = tiny_llava
    outputs = compute_teacher_outputs(model, mine, Collator(processor, mine), chunk=2)
    assert [len(pictures) for pictures in outputs.features] == [2, 3, 1, 0]
    batch = Collator(processor, mine)([mine[i] for i in (1, 3, 0)])
    direct = image_features(model, batch["pixel_values"])
    assert torch.allclose(outputs.batch_features([1, 3, 0]), direct, atol=1e-5)


def test_answers_are_those_of_generate(shop, tiny_llava):
    model, processor = tiny_llava
    row = own_benchmark(shop / "mine.json")
    questions = row.load()
    assert own_benchmark(shop / "mine.json", max_new_tokens=2).name != row.name
    BENCHMARKS.pop(row.name)
    assert [len(q.images) for q in questions] == [2, 2, 2, 1, 1, 0]
    assert questions[3].images[0].data == (shop / "0.png").read_bytes()
    prompts = {
        0: (f"USER: {MARK}\n{MARK}\nis there a circle? ASSISTANT:", ["0.png", "1.png"]),
        2: (f"USER: is the circle in {MARK} like {MARK}? ASSISTANT:", ["1.png", "2.png"]),
    }
    answers = answer_questions(model, processor, questions, max_new_tokens=6)
    for place, (text, names) in prompts.items():
        inputs = native(processor, text, shop, names)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        wanted = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answers[place].text == wanted


def test_rows_with_several_pictures():
    pictures = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    data = from_rows([{key: pictures, "messages": chat} for key in ("images", "image")])
    for i in range(2):
        assert [p.getpixel((0, 0)) for p in data.pictures(i)] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match="2 images and 0"):
        from_rows([{"images": pictures, "question": "same?", "answer": "no"}])


def test_the_pictures_of_an_entry_share_one_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(instructions, "LONGEST_SIDE", 100)
    for name in "abcd":
        Image.new("RGB", (120, 80)).save(tmp_path / f"{name}.png")
    four = {"images": [f"{n}.png" for n in "abcd"], "question": MARK * 4 + "same?", "answer": "no"}
    (tmp_path / "data.json").write_text(json.dumps([four, {**four, "images": "a.png"}]))
    with pytest.raises(ValueError, match="1 image and 4"):
        load_json(tmp_path / "data.json", tmp_path)
    (tmp_path / "data.json").write_text(json.dumps([four]))
    sizes = [p.size for p in load_json(tmp_path / "data.json", tmp_path).pictures(0)]
    assert all(max(size) <= 50 for size in sizes) and len(sizes) == 4


def test_the_whole_path(shop, tiny_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in tiny_llava:
        part.save_pretrained("llava")

    data = ("--data", shop / "mine.json", "--image-root", shop)
    run("score", "llava", "-o", "scores", "--method", "taylor", *data)
    run("prune", "llava", "-o", "small", "--scores", "scores", "--ratio", 0.2)
    for turns in ("independent", "sequential"):
        Path("run.yaml").write_text(f"turns: {turns}\n")
        out = ("-o", turns, "--teacher", "llava", "--batch-size", 2)
        run("recover", "small", *out, *data, "--config", "run.yaml")
    asked = ("--questions", shop / "mine.json", "--image-root", shop)
    assert facts("evaluate", "independent", *asked)["rows"][0]["n"] == 6
