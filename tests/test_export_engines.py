"""Exports in the engines: GGUF files read back, and run by real llama.cpp where it can be had.

The first half needs the package gguf only. The second half runs node-llama-cpp (tests/llama_cpp.py
says how to install it) and compares next-token probabilities and greedy tokens with ours.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from llama_cpp import engine_folder, picture_engine, run_engine, run_pictures
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mllm_compress.anatomy.families import anatomy
from mllm_compress.checkpoint import export_model, load_pruned, save_pruned
from mllm_compress.checkpoint import llama_cpp as cpp
from mllm_compress.checkpoint.engines import ENGINES
from mllm_compress.checkpoint.loading import fill_up
from mllm_compress.pruning.pruning_plan import make_plan
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model

gguf = pytest.importorskip("gguf", reason="needs the extra: pip install mllm_compress[gguf]")
LLAMA_CPP = pytest.mark.skipif(engine_folder() is None, reason="needs node-llama-cpp")
PICTURES = pytest.mark.skipif(picture_engine() is None, reason="needs xllamacpp")
IDS = [1, 5, 9, 70, 33, 21, 100, 2, 64, 12, 77, 3]
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512}
LONG |= {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.5, 2.5, 4.0]}
FAMILIES = {
    "llama": {},
    "llama, biases, tied": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, scaled rotary": dict(rope_parameters=SCALED),
    "mistral": {},
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "phi": dict(num_key_value_heads=8),
    "phi, partial rotary": dict(num_key_value_heads=8, rope_parameters=PARTIAL),
    "phi3": {},
    "phi3, long rotary": dict(
        rope_parameters=LONG, original_max_position_embeddings=512, max_position_embeddings=1024
    ),
}
SHAPES = ("dense", "layerwise", "uniform", "blockwise")
WRITTEN_AS = {
    "llama": ("llama", "llama", "llama", "deci"),
    "mistral": ("llama", "llama", "llama", "deci"),
    "qwen2": ("qwen2", "qwen2", "llama", "deci"),
    "qwen3": ("qwen3", "qwen3", "qwen3", "fill"),
    "phi": ("phi2", "phi2", "fill", "fill"),
    "phi3": ("phi3", "phi3", "llama", "deci"),
}


def random_lm(case: str):
    "A random decoder whose attention, norms and biases all matter to its output."
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=128)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    config = AutoConfig.for_model(case.split(",")[0], **(sizes | heads | special | FAMILIES[case]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.mul_(6)
    return model


def pruned(model, shape: str):
    "A model and its plan."
    n = anatomy(model).num_layers
    layers = {"dense": (), "uniform": range(n), "blockwise": (1,)}.get(shape, ())
    options = dict(heads={i: (0, 1, 3) for i in layers}, neurons={i: range(70) for i in layers})
    if shape == "layerwise":
        options = dict(layers=(0, 2))
    plan = make_plan(model, **options)
    return apply_plan(model, plan), plan


def reference(path) -> torch.Tensor:  # [tokens, vocabulary] logits
    "llama.cpp's Llama and Deci graphs on a file, from its tensors alone: an independent check."
    reader = gguf.GGUFReader(path)
    field = lambda key: reader.fields[key].contents()
    arch = field("general.architecture")
    tensors = {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
        for t in reader.tensors
    }
    get = lambda name: tensors[name].reshape(tensors[name].shape)
    layers, dim = field(f"{arch}.block_count"), field(f"{arch}.attention.key_length")
    spread = lambda v: v if isinstance(v, list) else [v] * layers
    heads, groups, widths = (
        spread(field(f"{arch}.{k}"))
        for k in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    eps = field(f"{arch}.attention.layer_norm_rms_epsilon")
    base, n = field(f"{arch}.rope.freq_base"), len(IDS)
    angle = torch.arange(n)[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # [tokens, 1, dim / 2]
    norm = lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * w

    def turn(x):  # [tokens, heads, dim], neighbouring channels
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def linear(x, name):
        y = x @ get(f"{name}.weight").T
        return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y

    x = get("token_embd.weight")[IDS]
    for i in range(layers):
        block = f"blk.{i}."
        h = norm(x, get(block + "attn_norm.weight"))
        q = turn(linear(h, block + "attn_q").view(n, heads[i], dim))
        k = turn(linear(h, block + "attn_k").view(n, groups[i], dim))
        v = linear(h, block + "attn_v").view(n, groups[i], dim)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        x = x + linear(attended.transpose(0, 1).flatten(1), block + "attn_output")
        h = norm(x, get(block + "ffn_norm.weight"))
        gate = torch.nn.functional.silu(linear(h, block + "ffn_gate"))
        inner = gate * linear(h, block + "ffn_up")
        assert inner.shape[1] == widths[i]
        x = x + linear(inner, block + "ffn_down")
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    return norm(x, get("output_norm.weight")) @ get(head).T


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("case", ["llama", "llama, biases, tied", "qwen2", "mistral", "phi3"])
@pytest.mark.parametrize("shape", ["uniform", "blockwise"])
def test_a_file_computes_what_the_model_does(case, shape, tmp_path):
    model, _ = pruned(random_lm(case), shape)
    facts = cpp.write_gguf(model, tmp_path / "m.gguf", dtype="f32")
    assert facts["architecture"] == {"uniform": "llama", "blockwise": "deci"}[shape]
    torch.testing.assert_close(reference(tmp_path / "m.gguf"), logits(model), atol=2e-4, rtol=1e-4)


def test_the_order_of_rows_matters(tmp_path, monkeypatch):
    "Without reordering the reference would notice."
    monkeypatch.setattr(cpp, "interleave", lambda rows, head_dim: rows)
    model = random_lm("llama")
    cpp.write_gguf(model, tmp_path / "m.gguf", dtype="f32")
    assert (reference(tmp_path / "m.gguf") - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("case", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", ["dense", "layerwise"])
def test_transformers_reads_the_file(case, shape, tmp_path):
    model, _ = pruned(random_lm(case), shape)
    cpp.write_gguf(model, tmp_path / "m.gguf", dtype="f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(read), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_architecture_of_every_shape(case):
    family, found = case.split(",")[0], []
    for shape in SHAPES:
        try:
            found.append(cpp.choose_architecture(anatomy(pruned(random_lm(case), shape)[0])).name)
        except ValueError as error:
            assert "--fill" in str(error) and family in str(error)
            found.append("fill")
    assert tuple(found) == WRITTEN_AS[family]


def test_what_no_architecture_holds_is_named():
    model = random_lm("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="its MLP computes silu, not gelu") as error:
        cpp.choose_architecture(anatomy(model), fill=True)
    assert "--fill" not in str(error.value)  # it would not help
    phi3 = random_lm("phi3")
    phi3.config.rope_parameters |= {"partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="turns whole heads"):
        cpp.choose_architecture(anatomy(pruned(phi3, "blockwise")[0]))


def test_dtypes_and_their_bytes(tmp_path):
    model, sizes = random_lm("llama"), {}
    for dtype in cpp.DTYPES:
        sizes[dtype] = cpp.write_gguf(model, tmp_path / f"{dtype}.gguf", dtype=dtype)["bytes"]
        expected = logits(model)
        error = (reference(tmp_path / f"{dtype}.gguf") - expected).norm() / expected.norm()
        assert error < {"f": 0.01, "b": 0.05, "q8": 0.05}.get(dtype[:2], 0.6), (dtype, error)
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q4_0"]
    with pytest.raises(ValueError, match="llama-quantize model.gguf small.gguf Q4_K_M"):
        cpp.check_dtype("q4_k_m")
    with pytest.raises(ValueError, match="Unknown dtype 'int3'"):
        cpp.check_dtype("int3")


def test_filling_refuses_to_shrink():
    model, _ = pruned(random_lm("qwen2"), "blockwise")
    with pytest.raises(ValueError, match="layer 0 has 4 heads, more than 2"):
        fill_up(model, [(2, 96)] * 3)


# Tokenizers


def spm_like():
    "A Llama 2 tokenizer: BPE over pieces with a space mark, and a byte fallback."
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    unit = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    unit.normalizer = normalizers.Sequence(spaces)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    unit.train_from_iterator(TEXTS * 20, trainer)
    vocabulary = json.loads(unit.to_str())
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if t["id"] < 3]
    unit = Tokenizer.from_str(json.dumps(vocabulary))
    template = dict(single="<s> $A", special_tokens=[("<s>", 1)])
    unit.post_processor = processors.TemplateProcessing(**template)
    unit.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(
        tokenizer_object=unit, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(kind: str):
    "A byte-level BPE tokenizer that splits text as GPT-2, SmolLM2 or Llama 3 do."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    (llama,) = next(k for k, v in cpp.SPLITS.items() if v == "llama-bpe")
    split = pre_tokenizers.Split(Regex(llama), "isolated")
    steps = {"gpt-2": [gpt2], "smollm": [digits, gpt2], "llama-bpe": [split, plain]}[kind]
    unit = Tokenizer(models.BPE())
    unit.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    unit.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    unit.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=unit, bos_token="<s>", eos_token="</s>")


TEXTS = [
    "The capital of France is Paris, and 1234 people don't know it.",
    "How many apples are there in the picture? There are 15 apples.",
    "Größe, naïve café — 東京 🙂!\n\n  Two spaces   here\tand a tab.",
]
TOKENIZERS = ("spm", "gpt-2", "smollm", "llama-bpe")


def make_tokenizer(kind):
    return spm_like() if kind == "spm" else byte_level(kind)


def lm_for(tokenizer):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer) + 5, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_header_of_a_tokenizer(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = "{{ messages[0].content }}"
    facts = cpp.write_gguf(lm_for(tokenizer), tmp_path / "m.gguf", tokenizer)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    get = lambda key: fields[f"tokenizer.{key}"].contents()
    assert facts["notes"] == [] and get("chat_template") == tokenizer.chat_template
    assert get("ggml.model") == ("llama" if kind == "spm" else "gpt2")
    assert get("ggml.pre") == ("default" if kind == "spm" else kind)
    assert len(get("ggml.tokens")) == len(tokenizer) + 5
    assert get("ggml.add_bos_token") == (kind == "spm")
    assert get("ggml.tokens")[-1] == f"[PAD{len(tokenizer) + 4}]"


def test_an_unknown_tokenizer_leaves_ids(tmp_path, tiny_llava):
    notes = cpp.write_gguf(random_lm("llama"), tmp_path / "m.gguf")["notes"]
    assert "token ids, not text" in notes[0]
    model, processor = tiny_llava
    notes = cpp.write_gguf(model, tmp_path / "m.gguf", processor.tokenizer)["notes"]
    assert "WordLevel" in notes[0] and "this file holds the decoder" in notes[1]


# export_model and the other engines


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Folders of save_pruned, by case and shape."
    place, made = tmp_path_factory.mktemp("checkpoints"), {}

    def folder(case, shape):
        if (case, shape) not in made:
            model, plan = pruned(random_lm(case), shape)
            made[case, shape] = save_pruned(model, plan, place / f"{len(made)}")
        return made[case, shape]

    return folder


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi, partial rotary", "phi3"])
@pytest.mark.parametrize("shape", ["uniform", "blockwise"])
def test_stock_transformers_loads_what_is_filled_up(case, shape, checkpoints, tmp_path):
    folder = checkpoints(case, shape)
    if shape == "blockwise":
        with pytest.raises(ValueError, match="--fill"):
            export_model(folder, "transformers", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    facts = export_model(folder, "transformers", tmp_path / "out", fill=shape == "blockwise")
    load = AutoModelForCausalLM.from_pretrained
    loaded, report = load(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()) and facts["architecture"] == type(loaded).__name__
    expected = logits(load_pruned(folder)[0])
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


def test_vllm_configs(checkpoints, tmp_path, tiny_llava):
    "What vLLM's loading code reads; nothing was run there."
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())
    with pytest.raises(ValueError, match=r"head size of phi as hidden / heads.*--fill"):
        export_model(checkpoints("phi", "uniform"), "vllm", tmp_path / "phi")
    export_model(checkpoints("phi", "uniform"), "vllm", tmp_path / "phi", fill=True)
    phi = read("phi")
    assert phi["n_inner"] == phi["intermediate_size"] == 70 and phi["num_attention_heads"] == 8
    assert phi["architectures"] == ["PhiForCausalLM"]
    export_model(checkpoints("llama", "uniform"), "vllm", tmp_path / "llama", dtype="bf16")
    assert read("llama")["head_dim"] == 8 and read("llama")["num_key_value_heads"] == 3
    assert read("llama")["dtype"] == "bfloat16"
    model, processor = tiny_llava
    small, plan = pruned(model, "layerwise")
    save_pruned(small, plan, tmp_path / "mllm", processor=processor)
    export_model(tmp_path / "mllm", "vllm", tmp_path / "served")
    assert read("served")["architectures"] == ["LlavaForConditionalGeneration"]
    assert read("served")["text_config"]["architectures"] == ["LlamaForCausalLM"]
    record = json.loads((tmp_path / "served/export.json").read_text())
    assert "not run in vLLM" in record["notes"][0]


def test_bad_input_of_export(checkpoints, tmp_path, monkeypatch):
    folder, out = checkpoints("llama", "uniform"), tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="Unknown engine 'onnx': use one of gguf, vllm"):
        export_model(folder, "onnx", out)
    with pytest.raises(ValueError, match="Unknown dtype 'q4_0': use one of f32, f16, bf16"):
        export_model(folder, "vllm", tmp_path / "v", dtype="q4_0")
    with pytest.raises(ValueError, match="is a folder: name a file"):
        export_model(folder, "gguf", tmp_path)
    with pytest.raises(ValueError, match="overlaps the checkpoint"):
        export_model(folder, "gguf", folder / "m.gguf")
    out.write_text("mine")
    with pytest.raises(ValueError, match="was not written by export"):
        export_model(folder, "gguf", out, overwrite=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/file").write_text("mine")
    with pytest.raises(ValueError, match="was not written by export"):
        export_model(folder, "vllm", tmp_path / "own", overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))
    for name in ENGINES:
        size = 4 * load_pruned(folder)[0].num_parameters() / 2**20  # of float32
        with pytest.raises(OSError, match="needs about" + f" {size:.1f}" * (name != "gguf")):
            export_model(folder, name, tmp_path / f"{name}.out")
    assert out.read_text() == "mine" and not list(tmp_path.glob(".*"))


# Real llama.cpp


@LLAMA_CPP
@pytest.mark.parametrize("case", FAMILIES)
def test_llama_cpp_computes_the_same(case, tmp_path):
    "Probabilities after every token, and 12 greedy tokens, of all four shapes."
    models = {shape: pruned(random_lm(case), shape)[0] for shape in SHAPES}
    for shape, model in models.items():
        cpp.write_gguf(model, tmp_path / shape, dtype="f32", fill=True)
    asked = dict(prompts=[IDS], greedy=12, kv="F32", context=64)
    answers = run_engine([dict(model=tmp_path / shape, **asked) for shape in SHAPES])
    for (shape, model), answer in zip(models.items(), answers):
        expected = logits(model).softmax(-1)
        found = torch.tensor(answer["probabilities"][0])
        assert expected.max() > 0.02  # far from uniform over 128 tokens
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-2, msg=shape)
        (tokens,) = answer["greedy"]
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([IDS + tokens])).logits[0, len(IDS) - 1 : -1]
        p = rows.float().softmax(-1)
        assert len(tokens) == 12
        assert (p.max(-1).values - p[range(12), tokens]).max() < 1e-3, shape  # up to ties


@LLAMA_CPP
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_tokenizes_the_same(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    cpp.write_gguf(lm_for(tokenizer), tmp_path / "m.gguf", tokenizer)
    found = run_engine([dict(model=tmp_path / "m.gguf", texts=TEXTS)])[0]["texts"]
    first = 1 if kind == "spm" else 0
    for text, answer in zip(TEXTS, found):
        assert answer["tokens"] == tokenizer(text).input_ids[first:], text


@LLAMA_CPP
def test_smollm2_writes_the_same_text(tmp_path):
    "A pretrained model with unequal layers: tokens, probabilities and greedy text."
    from mllm_compress.zoo.weight_files import PACKAGED

    if reason := PACKAGED["smollm2-135m"].missing:
        pytest.skip(reason)
    dense, tokenizer = load_model("smollm2-135m")
    plan = make_plan(dense, neurons={i: range(1300) for i in range(2, 28, 4)})
    model = apply_plan(dense, plan)
    facts = cpp.write_gguf(model, tmp_path / "m.gguf", tokenizer, dtype="f16")
    assert facts["architecture"] == "deci" and facts["notes"] == []
    text = "The capital of France is"
    ids = tokenizer(text).input_ids
    asked = dict(prompts=[ids], greedy=8, texts=[text], kv="F32", context=64)
    (answer,) = run_engine([dict(model=tmp_path / "m.gguf", **asked)])
    assert answer["texts"][0]["tokens"] == ids
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
        ours = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    found = torch.tensor(answer["probabilities"][0])
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    assert tokenizer.decode(answer["greedy"][0]) == tokenizer.decode(ours)


# Vision tower and projector


@pytest.fixture
def mllm_folder(tmp_path, tiny_llava):
    "A pruned tiny LLaVA."
    model, processor = tiny_llava
    small, plan = pruned(model, "layerwise")
    return save_pruned(small, plan, tmp_path / "small", processor=processor), small, processor


def test_the_projector_file_lies_beside_the_decoder(tmp_path, mllm_folder):
    folder, small, processor = mllm_folder
    facts = export_model(folder, "gguf", tmp_path / "m.gguf", dtype="q8_0")
    file = tmp_path / "mmproj-m.gguf"
    assert facts["notes"][-1].startswith("mmproj-m.gguf holds vision tower and projector")
    assert facts["projector_bytes"] == file.stat().st_size
    fields, layers = gguf.GGUFReader(file).fields, small.config.vision_config.num_hidden_layers
    value = lambda key: fields[key].contents()
    header = {"general.architecture": "clip", "clip.projector_type": "mlp"}
    header |= {"clip.vision.block_count": layers, "clip.vision.feature_layer": [layers]}
    header |= {"clip.vision.projection_dim": anatomy(small).hidden_size}
    assert {key: value(key) for key in header} == header and "clip.use_gelu" not in fields
    assert value("clip.vision.image_mean") == pytest.approx(processor.image_processor.image_mean)
    with pytest.raises(ValueError, match="mmproj-m.gguf exists: .* --overwrite"):
        (tmp_path / "m.gguf").unlink()
        export_model(folder, "gguf", tmp_path / "m.gguf")


MISFITS = [
    ("vision_feature_select_strategy", "full", "class token"),
    ("projector_hidden_act", "relu", "computes relu, not gelu"),
    ("vision_feature_layer", [-2, -1], "several layers"),
]


@pytest.mark.parametrize("entry, wrong, says", MISFITS)
def test_a_vision_tower_that_llama_cpp_cannot_hold(tmp_path, tiny_llava, entry, wrong, says):
    model, processor = tiny_llava
    model = copy.deepcopy(model)
    setattr(model.config, entry, wrong)
    assert says in cpp.write_gguf(model, tmp_path / "m.gguf", processor)["notes"][-1]
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_full_disk_leaves_no_half_of_a_pair(tmp_path, mllm_folder, monkeypatch):
    folder, write = mllm_folder[0], gguf.GGUFWriter.write_tensors_to_file
    full = lambda self: 1 / 0 if self.arch == "clip" else write(self)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    (tmp_path / "m.gguf").write_bytes(b"GGUF, old")
    with pytest.raises(ZeroDivisionError):
        export_model(folder, "gguf", tmp_path / "m.gguf", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF, old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "small"]


def test_other_towers_are_named(tmp_path, tiny_bunny):
    model, processor = tiny_bunny
    small, plan = pruned(model, "dense")
    folder = save_pruned(small, plan, tmp_path / "bunny", processor=processor)
    (*_, note) = export_model(folder, "gguf", tmp_path / "m.gguf")["notes"]
    assert "only LLaVA with a CLIP tower is written, not llava with siglip_vision_model" in note
    assert not (tmp_path / "mmproj-m.gguf").exists()


@PICTURES
def test_llama_cpp_answers_questions_about_a_picture(tmp_path):
    from mllm_compress.data import scenes

    model, processor = load_model("tiny-llava")
    export_model("tiny-llava", "gguf", tmp_path / "m.gguf", dtype="f32")
    image, questions = scenes.image(5, "test"), [q["question"] for q in scenes.ask(5, "test")[:6]]
    image.save(tmp_path / "scene.png")
    prompts = [f"USER: <image> {q} ASSISTANT:" for q in questions]
    files = dict(model=tmp_path / "m.gguf", mmproj=tmp_path / "mmproj-m.gguf")
    answers = run_pictures(
        **files, image=tmp_path / "scene.png", prompts=prompts, vocabulary=len(processor.tokenizer)
    )
    for text, answer in zip(prompts, answers):
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1].softmax(-1)
        assert answer.pop("tokens") == inputs["input_ids"].shape[1]
        found = torch.zeros_like(expected)
        for token, value in answer.items():
            found[int(token)] = np.exp(value)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
