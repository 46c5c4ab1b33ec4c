"""Original layouts: native models give the original's numbers, and bad folders are refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from original_layouts import NAMES, copy_of, toy_tokenizer, with_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from test_refit_files import Peak
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_compress.evaluation.benchmarks import Question
from mllm_compress.evaluation.generation import prepare
from mllm_compress.zoo import releases

QUESTION = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}],
}


@pytest.fixture(scope="module")
def layouts(golden):
    return golden / "original_layout"


@pytest.fixture(scope="module")
def loaded(layouts):
    return {name: releases.load_original(layouts / name)[0] for name in NAMES}


def tensors(layouts, name):
    return [load_file(layouts / name / f"{kind}puts.safetensors") for kind in ("in", "out")]


def expanded(ids, config):
    return torch.where(ids == -200, config.image_token_id, ids)


def sample(given, config, k):
    "Sample k unpadded, with its images."
    real = given["batch.expanded_attention_mask"][k].bool()
    ids = given["batch.expanded_input_ids"][k : k + 1, real]
    tiles = given.get("num_tiles", torch.ones(2, dtype=torch.long)).tolist()
    start = sum(tiles[:k])
    return expanded(ids, config), given["pixel_values"][start : start + tiles[k]]


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# the model computes what the original computes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_a_padded_batch(layouts, loaded, name, attention):
    model, (given, expected) = loaded[name], tensors(layouts, name)
    model.set_attn_implementation(attention)
    mask, size = given["batch.expanded_attention_mask"], expected["batch.logits"].shape[-1]
    out = model(
        input_ids=expanded(given["batch.expanded_input_ids"], model.config),
        attention_mask=mask,
        pixel_values=given["pixel_values"],
    )
    found = out.logits[mask.bool()]
    assert (found[..., :size] - expected["batch.logits"][mask.bool()]).abs().max() < 5e-5
    assert found.argmax(-1).equal(found[..., :size].argmax(-1))  # appended rows never win


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_sample_alone_and_text_only(layouts, loaded, name):
    model, (given, expected) = loaded[name], tensors(layouts, name)
    size = expected["text_only.logits"].shape[-1]
    found = {"text_only.logits": model(input_ids=given["text_only.input_ids"]).logits[..., :size]}
    for k in (0, 1):
        ids, pixels = sample(given, model.config, k)
        found[f"s{k}.logits"] = model(input_ids=ids, pixel_values=pixels).logits[..., :size]
    features = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
    features = torch.stack(list(features)) if not torch.is_tensor(features) else features
    found["image_features"] = features.reshape(expected["image_features"].shape)
    for name, values in found.items():
        assert (values - expected[name]).abs().max() < 5e-5, name


def test_long_rope_takes_the_long_factors_beyond_the_original_length(layouts, tmp_path):
    folder = copy_of(layouts, "internvl", tmp_path)
    config = json.loads((folder / "config.json").read_text())

    def logits(scale):
        llm = config["llm_config"]
        rope = dict(llm["rope_scaling"])
        rope["long_factor"] = [scale * x for x in rope["long_factor"]]
        lengths = dict(max_position_embeddings=96, original_max_position_embeddings=24)
        llm = llm | lengths | {"rope_scaling": rope}
        (folder / "config.json").write_text(json.dumps(config | dict(llm_config=llm)))
        model, _ = releases.load_original(folder)
        assert model.config.text_config.rope_parameters["factor"] == 4
        long, short = torch.arange(28)[None], torch.arange(13)[None]
        with torch.no_grad():
            return model(input_ids=long).logits, model(input_ids=short).logits

    (long_a, short_a), (long_b, short_b) = logits(1.0), logits(1.5)
    assert torch.equal(short_a, short_b) and (long_a - long_b).abs().max() > 0.1


# images


def expand2square(image, color):  # LLaVA, mm_utils.py
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    result = Image.new(image.mode, (side, side), color)
    at = (0, (width - height) // 2) if width > height else ((height - width) // 2, 0)
    result.paste(image, at)
    return result


@pytest.mark.parametrize("name, side", [("llava", 56), ("bunny", 60)])
def test_pixels_of_many_shapes(layouts, name, side):
    process, draw = (
        releases.image_processor(releases.open_original(layouts / name)),
        np.random.default_rng(0),
    )
    for width, height in draw.integers(3, 200, (25, 2)).tolist():
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        square = expand2square(image, tuple(int(255 * m) for m in process.image_mean))
        plain = np.asarray(square.resize((side, side), Image.BICUBIC)).astype(np.float32) / 255
        wanted = (plain - np.float32(process.image_mean)) / np.float32(process.image_std)
        found = process(image, return_tensors="np")["pixel_values"][0]
        assert np.abs(found - wanted.transpose(2, 0, 1)).max() < 1e-5


def original_grid(width, height, size, largest):  # InternVL, find_closest_aspect_ratio
    sides = range(1, largest + 1)
    grids = {(i, j) for n in sides for i in sides[:n] for j in sides[:n] if i * j <= largest}
    grids = sorted(grids, key=lambda x: x[0] * x[1])
    best, best_difference = (1, 1), float("inf")
    for grid in grids:
        difference = abs(width / height - grid[0] / grid[1])
        if difference < best_difference:
            best, best_difference = grid, difference
        elif (
            difference == best_difference and width * height > 0.5 * size * size * grid[0] * grid[1]
        ):
            best = grid
    return best


def test_tiles_are_the_originals(layouts):
    process, draw = (
        releases.image_processor(releases.open_original(layouts / "internvl")),
        np.random.default_rng(1),
    )
    for width, height in draw.integers(10, 400, (25, 2)).tolist():
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        columns, rows = original_grid(width, height, 56, 12)
        whole = image.resize((56 * columns, 56 * rows))
        tiles = [
            whole.crop((56 * c, 56 * r, 56 * c + 56, 56 * r + 56))
            for r in range(rows)
            for c in range(columns)
        ]
        if len(tiles) > 1:
            tiles.append(image.resize((56, 56)))
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        wanted = (np.stack([np.asarray(t) for t in tiles]) / 255 - mean) / std
        found = process(image, return_tensors="np")["pixel_values"]
        assert np.abs(found - wanted.transpose(0, 3, 1, 2)).max() < 1e-5


# words

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPTS = {
    "vicuna_v1": f"{SYSTEM} USER: <image>\nWhat is shown? ASSISTANT:",
    "bunny": f"{SYSTEM} USER: <image>\nWhat is shown? ASSISTANT:",
    "phi3-chat": "<|system|>\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。<|end|>"
    "<|user|>\n<IMG_CONTEXT>\nWhat is shown?<|end|><|assistant|>\n",
    "phi3-chat-2024-05": "<|system|>\nYou are an AI assistant whose name is Phi-3.<|end|>\n"
    "<|user|>\n<IMG_CONTEXT>\nWhat is shown?<|end|>\n<|assistant|>\n",
}
TWO_TURNS = {
    "vicuna_v1": " A cat.</s>USER: Sure? ASSISTANT:",
    "bunny": " A cat.<|endoftext|>USER: Sure? ASSISTANT:",
    "phi3-chat": "A cat.<|end|><|user|>\nSure?<|end|><|assistant|>\n",
    "phi3-chat-2024-05": "A cat.<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_chat_templates_by_the_character(name):
    tokenizer = toy_tokenizer("first", ["<unk>", "<s>", "</s>"], 200)
    render = lambda turns: tokenizer.apply_chat_template(
        turns,
        chat_template=releases.CHAT_TEMPLATES[name],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert render([QUESTION]) == PROMPTS[name]
    answer = {"role": "assistant", "content": "A cat."}
    turns = [QUESTION, answer, {"role": "user", "content": "Sure?"}]
    assert render(turns) == PROMPTS[name] + TWO_TURNS[name]
    own = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert "Be brief." in own and "assistant gives" not in own


def test_a_template_that_writes_bos_gets_no_second_one(tiny_lm):
    tokenizer = toy_tokenizer("first", ["<unk>", "<s>", "</s>"], 200)
    tokenizer.chat_template = "{{ bos_token }}" + releases.CHAT_TEMPLATES["vicuna_v1"]
    (prompt,) = prepare(tiny_lm("llama", vocab=200), tokenizer, [Question("1", "same?", "no")])[1]
    assert [*prompt.shared, *prompt.own].count(1) == 1 == tokenizer("").input_ids.count(1)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("name", ["llava", "bunny"])
def test_processor_tokenises_as_the_original(layouts, tmp_path, name, scheme):
    folder, size = copy_of(layouts, name, tmp_path), 320
    plain = ["<|pad|>", "<|x|>", "<|endoftext|>"]
    specials = ["<unk>", "<s>", "</s>"] if name == "llava" else plain
    toy_tokenizer(scheme, specials, size).save_pretrained(folder)
    model, processor = releases.load_original(folder)
    image = Image.new("RGB", (30, 20), "red")
    prompt = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    batch = processor(images=image, text=prompt, return_tensors="pt")
    ids, mark = batch["input_ids"][0].tolist(), model.config.image_token_id
    plain = toy_tokenizer(scheme, specials, size)
    wanted = releases.original_ids(PROMPTS["vicuna_v1"], plain, mark)
    at, marks = wanted.index(mark), [mark] * model.config.image_seq_length
    assert mark == size and ids == wanted[:at] + marks + wanted[at + 1 :]
    assert (ids[0] == 1) == (name == "llava")
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    again = AutoProcessor.from_pretrained(releases.convert_original(folder, tmp_path / "out"))
    prompt = again.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert again(images=image, text=prompt)["input_ids"][0] == ids


def test_internvl_processor(layouts, tmp_path):
    pytest.importorskip(
        "torchvision",
        reason="InternVL's processor of transformers needs it: pip install mllm_compress[vision]",
    )
    model, processor = releases.load_original(with_tokenizer(layouts, "internvl", tmp_path))
    assert model.config.image_token_id == 313
    prompt = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    batch = processor(images=Image.new("RGB", (110, 52)), text=prompt, return_tensors="pt")
    ids, tiles = batch["input_ids"][0].tolist(), len(batch["pixel_values"])
    start = ids.index(311)
    assert tiles == 3 and ids.count(313) == 12
    assert ids[start : start + 4 * tiles + 2] == [311] + [313] * 4 * tiles + [312]
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_older_phi3_chat_is_recognised_from_the_text_of_conversation_py(layouts, tmp_path):
    folder = copy_of(layouts, "internvl", tmp_path)
    assert releases.chat_template(folder, "phi3-chat") == releases.CHAT_TEMPLATES["phi3-chat"]
    code = (
        "raise SystemExit('never run')\n"
        "register_conv_template(Conversation(name='other', sep_style=SeparatorStyle.{}))\n"
        "register_conv_template(\n    Conversation(\n        name='phi3-chat',\n"
        "        sep_style=SeparatorStyle.{},\n    )\n)\n"
    )
    for other, style, expected in (
        ("CHATML", "MPT", "phi3-chat"),
        ("MPT", "CHATML", "phi3-chat-2024-05"),
    ):
        (folder / "conversation.py").write_text(code.format(other, style))
        assert releases.chat_template(folder, "phi3-chat") == releases.CHAT_TEMPLATES[expected]


def test_a_tokenizer_of_another_release_is_refused(layouts, tmp_path):
    folder = copy_of(layouts, "llava", tmp_path)
    toy_tokenizer("first", ["<unk>", "<s>", "</s>"], 300).save_pretrained(folder)
    with pytest.raises(ValueError, match="id 300 and the model 320"):
        releases.load_original(folder)


# converting


STOCK = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText as Auto
for name in ("llava", "bunny", "internvl"):
    model, report = Auto.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    assert not any(report.values()), report
    folder = f"{sys.argv[2]}/{name}"
    given, expected = (load_file(f"{folder}/{kind}puts.safetensors") for kind in ("in", "out"))
    ids, mask = given["batch.expanded_input_ids"], given["batch.expanded_attention_mask"]
    ids = torch.where(ids == -200, model.config.image_token_id, ids)
    with torch.no_grad():
        out = model.eval()(input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"])
    expected = expected["batch.logits"]
    difference = out.logits[..., : expected.shape[-1]] - expected
    assert difference[mask.bool()].abs().max() < 5e-5, name
assert "mllm_compress" not in sys.modules
"""


def test_converted_checkpoints_load_in_stock_transformers(layouts, tmp_path):
    for name in NAMES:
        releases.convert_original(layouts / name, tmp_path / name)
    command = [sys.executable, "-c", STOCK, str(tmp_path), str(layouts)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


def test_one_tensor_is_in_memory_while_converting(layouts, tmp_path):
    folder = copy_of(layouts, "bunny", tmp_path)
    with Peak() as memory:
        releases.convert_original(folder, tmp_path / "out")
    sizes = [t.nbytes for t in load_file(tmp_path / "out/model.safetensors").values()]
    assert memory.peak < 4 * max(sizes) < 0.5 * sum(sizes)  # as read, with more rows, cast


@pytest.mark.parametrize("name", NAMES)
def test_shards_streamed_into_one_file_give_the_same(layouts, loaded, tmp_path, name):
    folder = copy_of(layouts, name, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(3):
        part = dict(list(weights.items())[i::3])
        save_file(part, folder / f"pytorch_model-{i}.safetensors")
    out = releases.convert_original(folder, tmp_path / "out", dtype=torch.bfloat16)
    stock = AutoModelForImageTextToText.from_pretrained(out)
    assert stock.dtype == torch.bfloat16
    for key, value in loaded[name].state_dict().items():
        assert torch.equal(stock.state_dict()[key], value.bfloat16()), key


# refusals


def test_the_advised_command_makes_a_loadable_folder(layouts, tmp_path):
    from mllm_compress.zoo.weight_files import HOW_TO_CONVERT

    folder = copy_of(layouts, "llava", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = HOW_TO_CONVERT.split("spare: ")[1].replace("python", sys.executable, 1)
    command = command.replace("FOLDER", str(folder))
    subprocess.run(command, shell=True, check=True)
    assert releases.load_original(folder)[0].config.text_config.vocab_size == 384


def test_a_full_clip_checkpoint_serves_as_tower(layouts, loaded, tmp_path):
    folder = copy_of(layouts, "llava", tmp_path)

    def add_text_side(weights):
        weights |= {
            "text_model.embeddings.token_embedding.weight": torch.zeros(5, 4),
            "logit_scale": torch.tensor(1.0),
            "visual_projection.weight": torch.zeros(4, 32),
            "vision_model.embeddings.position_ids": torch.arange(17)[None],
        }

    change_weights(folder / "vision_tower" / "model.safetensors", add_text_side)
    vision = json.loads((folder / "vision_tower" / "config.json").read_text())
    (folder / "vision_tower" / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}})
    )
    model, _ = releases.load_original(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded["llava"].parameters()))


UP, SIZE = "model.layers.{}.mlp.up_proj.weight", r"\(65,\), not \(64,\)"


@pytest.mark.parametrize(
    "name, shape, message",
    [
        (UP.format(1), None, "missing: model.language_model.layers.1.mlp.up_proj.weight"),
        (UP.format(9), (112, 64), "unexpected: model.language_model.layers.9"),
        ("model.norm.weight", (65,), f"of another size: model.language_model.norm.weight {SIZE}"),
        ("adapter.weight", (2,), "no rule for the tensor 'adapter.weight'"),
        ("lm_head.weight", (400, 64), "400 rows"),
    ],
)
def test_wrong_tensors_are_named_before_any_work(layouts, tmp_path, name, shape, message):
    folder = copy_of(layouts, "llava", tmp_path)
    change = lambda w: w.update({name: torch.zeros(shape)}) if shape else w.pop(name)
    change_weights(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        releases.convert_original(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_same_tensor_twice(layouts, tmp_path):
    folder = copy_of(layouts, "bunny", tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.safetensors")
    with pytest.raises(ValueError, match="twice: "):
        releases.open_original(folder)


def test_missing_shards(layouts, tmp_path):
    folder = copy_of(layouts, "bunny", tmp_path)
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(FileNotFoundError, match="lacks model-2.safetensors"):
        releases.open_original(folder)


# details


def test_real_configs_hold_the_pitfalls():
    llava, bunny, internvl = (releases.real_config(name) for name in releases.REAL_MODELS)
    features = lambda c: (c.vision_feature_layer, c.vision_feature_select_strategy)
    assert features(llava) == (-2, "default") and features(bunny) == (-1, "full")
    assert llava.vision_config.hidden_act == "quick_gelu"
    assert bunny.vision_config.num_hidden_layers == 26
    assert bunny.text_config.rope_parameters["partial_rotary_factor"] == 0.4
    assert bunny.text_config.hidden_act == "gelu_new"
    assert not internvl.tie_word_embeddings and internvl.vision_config.attention_bias
    assert internvl.text_config.rope_parameters["rope_type"] == "longrope"


def test_native_config_reads_the_placeholder_from_tokenizer_files(layouts, tmp_path):
    folder = copy_of(layouts, "internvl", tmp_path)
    (folder / "token_ids.json").unlink()
    with pytest.raises(ValueError, match="added_tokens.json"):
        releases.native_config(folder)  # the real id is beyond this vocabulary
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 309}))
    assert releases.native_config(folder).image_token_id == 309


# names of the real models


@pytest.mark.parametrize("text", ["llava", "llava-v1.5-13b", ""])
def test_another_model_is_refused_with_the_names_there_are(text):
    with pytest.raises(ValueError, match="use one of LLaVA-v1.5-7B .*llava-hf.*Mini-InternVL"):
        releases.real_name(text)
