"""The small world: tiny models, zoo, scenes and instruction data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_compress import zoo
from mllm_compress.data import batches as collator
from mllm_compress.data import instructions, scenes
from mllm_compress.data import scenes as small_sets
from mllm_compress.zoo import tiny_models as tiny
from mllm_compress.zoo.models import SHIPPED


def test_scenes_are_deterministic_and_splits_do_not_meet():
    train = {scenes.scene(i) for i in range(3000)}
    assert scenes.scene(5, "test") == scenes.scene(5, "test")
    for split in ("validation", "test"):
        assert not train & {scenes.scene(i, split) for i in range(1500)}
    assert np.array_equal(scenes.image(3), scenes.image(3)) and not np.array_equal(
        scenes.image(3), scenes.image(3, "test")
    )


def check(q, items):
    "Answer a question from the scene by an independent reading of its words."
    words = q["question"].split(" A. ")[0].rstrip("?").replace("?", "").split()
    attributes = {
        "color": list(scenes.COLORS),
        "shape": list(scenes.SHAPES),
        "size": list(scenes.SIZES),
    }
    singular = {
        "circles": "circle",
        "squares": "square",
        "triangles": "triangle",
        "crosses": "cross",
    }
    words = [singular.get(w, w) for w in words]
    of = lambda w: next((k for k, v in attributes.items() if w in v), None)
    fits = lambda it, ws: all(getattr(it, of(w)) == w for w in ws if of(w))
    if words[:2] == ["are", "all"]:
        subject, rule = (words[2:3], words[-1:])
        return "yes" if all(fits(it, rule) for it in items if fits(it, subject)) else "no"
    if words[:3] == ["are", "there", "more"]:
        cut = words.index("than")
        a, b = (sum(fits(it, ws) for it in items) for ws in (words[3:cut], words[cut:]))
        return "yes" if a > b else "no"
    if "there" in words or "contain" in words or words[:3] == ["can", "you", "see"]:
        return "yes" if any(fits(it, words) for it in items) else "no"
    if words[:2] == ["is", "the"]:
        subject = words[2:-1] if words[-2] != "a" else words[2:-2]
        return (
            "yes"
            if [it for it in items if fits(it, subject)]
            and all(fits(it, words[-1:]) for it in items if fits(it, subject))
            else "no"
        )
    if "common" in words:
        values = [getattr(it, "color" if "color" in words else "shape") for it in items]
        return max(set(values), key=values.count)
    if words[:3] == ["which", "of", "these"]:
        return [o for o in q["options"] if any(fits(it, o.split()) for it in items)]
    asked = next(w for w in words if w in attributes)
    found = [it for it in items if fits(it, [w for w in words if w != asked])]
    assert len(found) == 1, (q, items)
    return getattr(found[0], asked)


def test_every_answer_follows_from_its_scene():
    seen = set()
    for i in range(400):
        items = scenes.scene(i, "test")
        for q in scenes.ask(i, "test"):
            right, seen = check(q, items), seen | {q["type"]}
            if q["options"]:
                assert q["answer"] in "ABC" and len(set(q["options"])) == 3
                right = right[0] if isinstance(right, list) else right
                assert q["options"][ord(q["answer"]) - ord("A")] == right, q
            else:
                assert q["answer"] == right, (q, items)
    assert seen == set(scenes.KINDS)


def test_pairs_hold_one_yes_and_one_no():
    for kind in scenes.PAIRED:
        got = scenes.questions(kind, "test", 101)
        assert len(got) == 102
        for a, b in zip(got[::2], got[1::2]):
            assert a["pair"] == b["pair"] and {a["answer"], b["answer"]} == {"yes", "no"}


def test_guessing_without_the_picture_is_chance():
    blind = scenes.question_only(
        [q for i in range(4000) for q in scenes.ask(i)],
        [q for i in range(800) for q in scenes.ask(i, "test")],
    )
    for kind, limit in {
        "open": 0.28,
        "hallucination": 0.56,
        "perception": 0.56,
        "cognition": 0.58,
        "choice": 0.4,
        "composition": 0.41,
    }.items():
        assert blind[kind] < limit, (kind, blind[kind])


def test_every_word_is_in_the_vocabulary():
    tok = tiny.tiny_tokenizer()
    texts = {q["question"] for i in range(500) for q in scenes.ask(i)} | {
        p
        for d in (small_sets.easy_vqa(), small_sets.easy_vqa("test"))
        for e in d.samples
        for qa in instructions.turns(e)
        for p in qa
    }
    assert tok.unk_token_id not in {t for ids in tok(sorted(texts)).input_ids for t in ids}


@pytest.mark.parametrize("family", ["llava", "bunny"])
def test_padding_side_does_not_change_the_answer(family):
    model, processor = zoo.load_model(f"smoke-{family}")
    image, texts = (
        scenes.image(0),
        [
            "USER: <image>\nis it red? ASSISTANT:",
            "USER: <image>\nwhat is the most common color in the image? ASSISTANT:",
        ],
    )
    last = {}
    for side in ("left", "right"):
        b = processor(
            images=[image] * 2, text=texts, padding=True, padding_side=side, return_tensors="pt"
        )
        at = [len(r) - 1 if side == "left" else int(r.sum()) - 1 for r in b["attention_mask"]]
        with torch.no_grad():
            last[side] = model(**b).logits[[0, 1], at]
    assert torch.allclose(last["left"], last["right"], atol=1e-5)


def test_a_path_without_a_folder_is_named():
    for name in ("no-such-folder/", "/no/such/folder", "./here"):
        with pytest.raises(FileNotFoundError, match=f"There is no folder {name}"):
            zoo.load_model(name)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="safetensors"):
        zoo.load_model(str(tmp_path))


def test_a_checkpoint_with_a_missing_layer_is_refused(tmp_path):
    model, processor = zoo.load_model("smoke-llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing keys.*layers.4"):
        zoo.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-bunny"])
def test_shipped_models_are_small_and_answer(name):
    if not (SHIPPED / name).is_dir():
        pytest.skip("not shipped yet")
    assert sum(f.stat().st_size for f in (SHIPPED / name).glob("*.safetensors")) <= 10e6
    model, processor = zoo.load_model(name)
    asked = scenes.questions("hallucination", "validation", 60)
    text = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": q["question"]}],
                }
            ],
            add_generation_prompt=True,
        )
        for q in asked
    ]
    b = processor(
        images=[q["image"] for q in asked],
        text=text,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    said = processor.batch_decode(
        model.generate(**b, max_new_tokens=2, do_sample=False)[:, b["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    assert np.mean([s.strip() == q["answer"] for s, q in zip(said, asked)]) > 0.8


def test_fractions_are_nested_and_follow_the_seed():
    d = instructions.InstructionData([{"id": str(i)} for i in range(500)])
    sets = [{e["id"] for e in d.fraction(f).samples} for f in (0.01, 0.05, 0.5, 1.0)]
    assert [len(s) for s in sets] == [5, 25, 250, 500] and all(
        a <= b for a, b in zip(sets, sets[1:])
    )
    assert {e["id"] for e in d.fraction(0.05, 1).samples} != sets[1]
    for f in (0, -1, 1.1):
        with pytest.raises(ValueError, match="fraction"):
            d.fraction(f)


def test_every_entry_has_a_question_and_entries_are_made_late():
    small = small_sets.small_data(n=3000)
    assert all(instructions.turns(e) for e in small.samples)
    assert len({e["scene"] for e in small.samples if "scene" in e}) == 3000
    part = small.fraction(0.02, seed=3)
    assert part.hash == small.fraction(0.02, seed=3).hash and {e["id"] for e in part.samples} <= {
        e["id"] for e in small.samples
    }


def test_labels_are_the_answers_and_their_end():
    _, processor = zoo.load_model("smoke-llava")
    small = small_sets.scene_data("validation", 3)
    for kind in ("independent", "sequential"):
        batch = collator.Collator(processor, small, turns=kind)([small[i] for i in range(3)])
        want = [
            t
            for e in small.samples
            for _, a in instructions.turns(e)
            for t in processor.tokenizer(a + "</s>").input_ids
        ]
        assert batch["labels"][batch["labels"] != -100].tolist() == want
        assert (
            batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]
        ).all()


def test_packed_questions_equal_separate_ones():
    model, processor = zoo.load_model("smoke-bunny")
    model = model.double()
    small = small_sets.scene_data("test", 2)
    packed = collator.Collator(processor, small)([small[0], small[1]])
    apart = instructions.InstructionData(
        [
            small_sets.entry(f"{i}-{k}", "x", [p], scene=i)
            for i in range(2)
            for k, p in enumerate(instructions.turns(small[i]))
        ],
        images=lambda e: scenes.image(e["scene"], "test"),
    )
    single = collator.Collator(processor, apart, turns="sequential")(
        [apart[i] for i in range(len(apart))]
    )
    run = lambda b: model(
        **{k: v.double() if k == "pixel_values" else v for k, v in b.items() if k != "labels"}
    ).logits[b["labels"] != -100]
    with torch.no_grad():
        assert torch.allclose(run(packed), run(single), atol=1e-9)


def test_text_only_and_image_entries_share_a_batch():
    _, processor = zoo.load_model("smoke-llava")
    d = instructions.InstructionData(
        [
            small_sets.entry("t", None, [("is it red?", "no")]),
            small_sets.entry("i", "x", [("is it red?", "yes")]),
        ],
        images=lambda e: Image.new("RGB", (64, 64)),
    )
    batch = collator.Collator(processor, d)([d[0], d[1]])
    assert batch["pixel_values"].shape[0] == 1 and (
        batch["input_ids"] == processor.image_token_id
    ).sum(1).tolist() == [0, 16]


def test_missing_and_unreadable_images_are_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [
        small_sets.entry("a", "bad.png", [("q?", "yes")]),
        small_sets.entry("b", "gone.png", [("q?", "yes")]),
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with pytest.raises(FileNotFoundError, match="1 of 2 entries.*gone.png"):
        instructions.load_json(tmp_path / "d.json", tmp_path)
    d = instructions.load_json(tmp_path / "d.json", tmp_path, skip_missing=True)
    assert len(d) == 1
    with pytest.raises(OSError, match="bad.png cannot be read"):
        d.image(0)


@pytest.mark.parametrize("profile", ["quick", "tiny"])
def test_learning_rates_are_those_that_validation_chose(profile):
    import csv
    from pathlib import Path

    from mllm_compress.study.profiles import load_profile, rate_of

    file = (
        Path(__file__).parents[1] / "figures/tiny/00_learning_rates-rates.csv"
    )  # quick has the same models and rates
    used = {
        f"{train}/{losses}": rate
        for train, rates in load_profile(profile).learning_rates.items()
        for losses, rate in rates.items()
    }
    found = list(csv.DictReader(file.open()))
    assert set(used) == {r["objective"] for r in found} and len(used) == 10
    for r in found:
        here, ratio = float(r["chosen"]), float(r["ratio"])
        both = {rate_of(used[r["objective"]], p, ratio) for p in ("layerwise", "widthwise")}
        assert float(r["rate in use"]) == here and both == {here}
        assert float(r["points lost by it"]) <= 1
        assert r["interior"] == "yes" or here != float(r["best rate"])
