"""The pictures of emoji, the questions about them, and the pretrained model with eyes."""

import copy
import json
import lzma
from collections import Counter

import pytest
import torch
from safetensors import torch as safe
from transformers import EfficientNetModel

from mllm_compress import evaluate, zoo
from mllm_compress.evaluation.benchmarks import BENCHMARKS, load_questions
from mllm_compress.study import emoji
from mllm_compress.study.profiles import load_profile, missing_inputs
from mllm_compress.zoo import eyes

KINDS = list(emoji.KINDS.values())


def things(n: int = 30) -> list:
    return [
        emoji.Thing(f"1F{i:03X}", f"thing {i}", KINDS[i % 5], f"family-{i % 3}") for i in range(n)
    ]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    "A folder of made-up pictures: every vendor in its colour, every thing of another size."
    pytest.importorskip("resvg_py")
    colors = dict(zip(emoji.VENDORS, ("red", "green", "blue", "black", "gold", "teal", "brown")))
    shape = lambda i, c: f"<circle cx='8' cy='8' r='{1 + i / 5}' fill='{c}'/>"
    packages = {
        vendor: {
            "icons": {f"thing-{i}": {"body": shape(i, c)} for i in range(30)},
            "codes": {},
            "width": 16,
            "height": 16,
        }
        for vendor, c in colors.items()
    }
    packages["fxemoji"]["icons"].pop("thing-3")
    emoji.draw_emoji(things(), packages, tmp_path)
    monkeypatch.setenv("MLLM_COMPRESS_EMOJI", str(tmp_path))
    load_questions.cache_clear()
    yield tmp_path
    load_questions.cache_clear()


def test_every_vendor_is_in_one_part(drawn):
    seen = {part: {v for _, v in emoji.shown(part)} for part in emoji.PARTS}
    assert seen["test"] == {"twemoji"} and seen["validation"] == {"emojione"}
    assert len(emoji.shown("train")) == 30 * 5 - 1
    listed = emoji.listed_emoji()["pictures"]
    assert "fxemoji/1F003" not in listed and len(listed) == 30 * 7 - 1
    assert emoji.picture_of("twemoji", "1F001").getpixel((80, 80)) == (165, 42, 42)  # brown


def test_a_thing_with_few_drawings_is_left_out(tmp_path):
    pytest.importorskip("resvg_py")
    package = {"icons": {"thing-1": {"body": "<path/>"}}, "codes": {}, "width": 1, "height": 1}
    emoji.draw_emoji(things(), dict.fromkeys(list(emoji.VENDORS)[:3], package), tmp_path)
    assert json.loads((tmp_path / "emoji.json").read_text())["things"] == []


def test_answers_are_right_and_balanced(drawn):
    ask = {type: emoji.type_questions(type, "test", 400) for type in emoji.TYPES}
    known = {t.code: t for t in things()}
    for type in emoji.ONE:
        assert len(ask[type]) == 30
    for q in ask["name"]:
        assert q["answer"] == known[q["places"][0][1]].name
    assert set(Counter(q["answer"] for q in ask["kind"]).values()) == {6}
    for q in ask["yes-no"]:
        right = q["question"] == f"Is this: {known[q['places'][0][1]].name}?"
        assert right == (q["answer"] == "yes")
    for q in ask["choice"]:
        assert q["options"]["ABCD".index(q["answer"])] == known[q["places"][0][1]].name
        assert len(set(q["options"])) == 4
    counts = Counter(q["answer"] for q in ask["count"])
    assert set(counts) == set("1234") and min(counts.values()) > 70
    assert all(len(q["places"]) == int(q["answer"]) for q in ask["count"])
    for q in ask["side"]:
        left = min(q["places"], key=lambda place: place[2])
        assert q["answer"] == known[left[1]].name
    first = sum(q["question"].split(": ")[1].startswith(q["answer"] + " or") for q in ask["side"])
    assert 150 < first < 250


def test_benchmarks_read_the_held_out_vendor(drawn):
    questions = load_questions("emoji/name", "test", 8)
    wrong = load_questions("emoji/name/wrong-picture", "test", 8)
    assert [q.answer for q in questions] == [q.answer for q in wrong]
    assert all(a.images[0].tobytes() != b.images[0].tobytes() for a, b in zip(questions, wrong))
    assert BENCHMARKS["emoji/choice"].scorer == "letter"
    assert questions[0].images[0].size == (160,) * 2


def test_missing_pictures_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_COMPRESS_EMOJI", str(tmp_path))
    load_questions.cache_clear()
    for call in (lambda: emoji.emoji_data(), lambda: load_questions("emoji/kind", "test", 2)):
        with pytest.raises(FileNotFoundError, match="fetch_emoji"):
            call()
    assert emoji.emoji_hash() == "" and "not on this machine" in emoji.missing_emoji()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLLM_COMPRESS_EMOJI")
    with pytest.raises(OSError, match="No such file.*npm.*Install Node.js"):
        emoji.fetch_emoji()
    assert not list(tmp_path.rglob("emoji.json"))


@pytest.fixture
def model(tiny_lm):
    "A small language model with an untrained tower."
    from small_texts import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [eyes.IMAGE_TOKEN]})
    lm = tiny_lm("llama", vocab=len(tokenizer))
    return eyes.with_eyes(lm, tokenizer, EfficientNetModel(eyes.TOWER_CONFIG).eval()), lm


def test_pictures_take_twenty_five_tokens(model):
    from PIL import Image

    (together, processor), lm = model
    picture = Image.new("RGB", (160, 160), (200, 30, 60))
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    prompt = processor.apply_chat_template(said, add_generation_prompt=True)
    batch = processor(images=picture, text=prompt, return_tensors="pt")
    assert (batch["input_ids"] == together.config.image_token_id).sum() == 25
    with torch.no_grad():
        one = together(**batch).logits
        together.model.multi_modal_projector.linear_2.bias += 1
        assert not torch.allclose(one, together(**batch).logits)
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(together(input_ids=ids).logits, lm(input_ids=ids).logits)


def test_a_model_with_eyes_is_saved_and_loaded_exactly(model, tmp_path):
    from mllm_compress.zoo import load_model

    (together, processor), _ = model
    together.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load_model(tmp_path)
    for name, weight in together.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert same.image_token == eyes.IMAGE_TOKEN and same.patch_size == 32


def test_trained_parts_are_checked(model, tmp_path):
    (together, _), _ = model
    own, file = together.model.multi_modal_projector.state_dict(), tmp_path / "trained.safetensors"
    name = "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight"
    eyes.save_trained(file, own, {name: torch.randn(2, 2)}, 2.0)
    with pytest.raises(ValueError, match="adapters of another model"):
        eyes.add_trained(together, file)


REAL = eyes.TOWER.missing or emoji.missing_emoji()


@pytest.mark.skipif(bool(REAL), reason=REAL or "the tower is there")
def test_the_tower_knows_what_imagenet_knows():
    "The classifier of the package, on drawings of things that ImageNet has."
    tower, stored = eyes.efficientnet_lite0(), torch.load(eyes.TOWER.path, weights_only=True)
    side = dict(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    from transformers import CLIPImageProcessorPil

    crop = {"height": eyes.SIDE, "width": eyes.SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": eyes.SIDE}, crop_size=crop, **side)
    codes = {t["name"]: t["code"] for t in emoji.listed_emoji()["things"]}
    for name, classes in {"teapot": {849}, "violin": {889, 486}, "soccer ball": {805}}.items():
        picture = emoji.picture_of("noto", codes[name])
        with torch.no_grad():
            states = tower(images(picture, return_tensors="pt")["pixel_values"]).last_hidden_state
            scores = states.mean((2, 3)) @ stored["_fc.weight"].T + stored["_fc.bias"]
        assert int(scores.argmax()) in classes, name


# The model that ships


def shipped() -> tuple:  # (names of the weights, record)
    names = set(safe.load(eyes.unpacked(eyes.TRAINED)))
    return names, json.loads(eyes.TRAINED.with_name("training.json").read_text(encoding="utf-8"))


def test_what_ships_is_small_and_holds_the_projector_and_the_adapters_of_every_layer():
    names, _ = shipped()
    adapters = {match[1] for n in names if (match := eyes.ADAPTER.fullmatch(n))}
    slots = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert len(names) == 2 * len(adapters) + 4 and len(adapters) == 30 * len(slots)
    assert {name.rsplit(".", 1)[-1] for name in adapters} == set(slots)
    assert eyes.TRAINED.stat().st_size < 10e6


@pytest.mark.skipif(bool(emoji.missing_emoji()), reason=emoji.missing_emoji() or "all is there")
def test_few_possible_answers_are_candidates():
    few = {"kind": KINDS, "yes-no": ["yes", "no"], "choice": list("ABCD"), "count": list("1234")}
    for type in emoji.TYPES:
        asked = load_questions(f"emoji/{type}", "test", 40, None)
        assert {q.candidates for q in asked} == {tuple(few.get(type, ()))}
        assert all(q.answer in q.candidates for q in asked if q.candidates)


def test_four_types_are_answered_by_looking_and_only_these_are_in_the_profile():
    _, record = shipped()
    seen = {
        name
        for name, of in record["scores"].items()
        if of["right"] - of["no picture"] >= 15 > of["wrong"] - of["no picture"]
    }
    assert len(seen) >= 4 and seen == set(load_profile("eyes").evaluation.benchmarks)
    assert record["questions"] == 200 and record["curve"][-1][1] < record["curve"][0][1] / 10


def test_without_its_packages_the_error_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(eyes.Packaged, "files", [])
    for load in (zoo.load_model, zoo.models.native_folder):
        with pytest.raises(FileNotFoundError, match=r"smollm2-eyes: .*mllm_compress\[eyes\]"):
            load("smollm2-eyes")
    assert zoo.models.packaged_identity("smollm2-eyes") is None
    lacking = "\n".join(missing_inputs(load_profile("eyes")))
    assert "model smollm2-eyes: " in lacking and "mllm_compress[eyes]" in lacking
    zoo.models.check_model("smollm2-eyes")  # a known name


def test_putting_it_together_adds_what_was_trained(model, monkeypatch, tmp_path):
    (small, processor), _ = model
    projector = {k: v + 1 for k, v in small.model.multi_modal_projector.state_dict().items()}
    file = tmp_path / "trained.safetensors"
    eyes.save_trained(file, projector, {}, 2.0)
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "trained.safetensors.xz"
    packed.write_bytes(lzma.compress(file.read_bytes()))
    monkeypatch.setattr(eyes, "TRAINED", packed)
    monkeypatch.setattr(eyes, "missing_eyes", lambda: "")
    monkeypatch.setattr(eyes.Packaged, "path", file)
    monkeypatch.setattr(eyes, "untrained_eyes", lambda: (copy.deepcopy(small), processor))
    made, _ = zoo.load_model("smollm2-eyes")
    for name, weight in made.model.multi_modal_projector.state_dict().items():
        torch.testing.assert_close(weight, projector[name].bfloat16().float(), rtol=0, atol=0)
    at = zoo.models.native_folder("smollm2-eyes")
    assert at.is_relative_to(tmp_path / "cache") and at.name == eyes.eyes_identity()
    monkeypatch.setattr(eyes, "untrained_eyes", lambda: 1 / 0)  # it is there already
    zoo.load_model("smollm2-eyes", stream=True)


WHOLE = eyes.missing_eyes() or emoji.missing_emoji()


@pytest.mark.skipif(bool(WHOLE), reason=WHOLE or "all is there")
def test_the_shipped_model_sees():
    model, processor = zoo.load_model("smollm2-eyes")
    options = dict(limit=24, batch_size=12, other_pictures=True)
    right, wrong, _ = evaluate(model, processor, ["emoji/kind"], **options).score
    assert right >= 50 and wrong <= 25  # 70 and 4 of 200
