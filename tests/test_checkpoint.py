"""Checkpoints come back bit for bit, load with stock classes where they can, or fail loudly."""

import json
import os
import subprocess
import sys

import pruning_cases as cases
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mllm_compress.checkpoint import load_pruned, loading, save_pruned, saving, verify
from mllm_compress.pruning.plans import plan_layerwise, plan_none
from mllm_compress.pruning.pruning_plan import PruningPlan
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.tiny_models import tiny_processor

transformers.utils.logging.disable_progress_bar()
STOCK_KINDS = {"layerwise", "uniform"}


def pruned(name, kind, dtype=torch.float32, **kw):
    model = cases.build(name, dtype, **kw)
    plan = plan_none(model) if kind == "none" else cases.plan(model, kind)
    return apply_plan(model, plan), plan


def saved(tmp_path, *given, **options):
    "A pruned model, and the folder that it is saved to."
    model, plan = pruned(*given, **options)
    return model, save_pruned(model, plan, tmp_path / "out")


def same(one, other) -> bool:
    "Whether two models give the same logits, to the last bit."
    batch = cases.inputs(one)
    return torch.equal(cases.logits(one, batch), cases.logits(other, batch))


def kind_of(folder):
    return json.loads((folder / "mllm_compress.json").read_text())["kind"]


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    "name", cases.LMS[::2] + ["llama-3x2", "phi3-3x2", "qwen2-3x2"] + cases.MLLMS
)
def test_round_trip_is_bit_identical(name, kind, tmp_path):
    model, plan = pruned(name, kind)
    processor = tiny_processor(name.removeprefix("tiny-")) if name in cases.MLLMS else None
    save_pruned(model, plan, tmp_path / "out", processor=processor)
    again, loaded, plan_again = load_pruned(tmp_path / "out")
    batch = cases.inputs(model)
    assert same(model, again) and plan_again == plan
    assert torch.equal(cases.greedy(model, batch, True), cases.greedy(again, batch, True))
    assert kind_of(tmp_path / "out") == ("stock" if kind in STOCK_KINDS else "pruned")
    suffixes = {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}
    assert not again.training and type(again).__module__.startswith("transformers.models")
    if processor is not None:
        text = "USER: <image>\nwhat color is the circle? ASSISTANT:"
        assert type(loaded) is type(processor)
        assert loaded.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    else:
        assert loaded is None


STOCK = """
import json, sys, torch, transformers
assert "mllm_compress" not in sys.modules
from safetensors.torch import load_file
for folder, auto in json.loads(sys.argv[1]):
    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), (folder, report)
    case = load_file(folder + ".case")
    logits = case.pop("logits")
    with torch.no_grad(): out = model(**case).logits[case["attention_mask"].bool()]
    assert torch.allclose(out, logits, rtol=1e-5, atol=1e-5), (folder, (out - logits).abs().max())
    for cache in (True, False):
        ids = model.generate(**case, use_cache=cache, max_new_tokens=4, do_sample=False,
                             eos_token_id=None, pad_token_id=0, suppress_tokens=[4])
        first = ids if cache else first
    assert torch.equal(ids, first), folder
assert "mllm_compress" not in sys.modules
print("loaded", len(json.loads(sys.argv[1])))
"""


def test_stock_transformers_loads_layerwise_and_uniform_in_a_fresh_process(tmp_path):
    from safetensors.torch import save_file

    jobs = []
    for name in cases.LMS[1::2] + ["llama-4x1", "phi-4x1"] + cases.MLLMS:
        for kind in ("layerwise", "uniform"):
            model, plan = pruned(name, kind)
            folder = tmp_path / f"{name}-{kind}"
            save_pruned(model, plan, folder)
            batch = cases.inputs(model)
            save_file({**batch, "logits": cases.logits(model, batch)}, f"{folder}.case")
            auto = "ImageTextToText" if name in cases.MLLMS else "CausalLM"
            jobs.append((str(folder), f"AutoModelFor{auto}"))
    command = [sys.executable, "-c", STOCK, json.dumps(jobs)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and f"loaded {len(jobs)}" in done.stdout, done.stderr[-3000:]


def test_llama_with_a_head_count_it_refuses_becomes_mistral(tmp_path):
    model, plan = pruned("llama-4x1", "uniform")
    assert model.config.num_attention_heads == 3 and model.config.hidden_size % 3
    wide = pruned("llama-4x1", "blockwise")[0]
    for small, fault in ((model, r"attention heads \(3\)"), (wide, "layers differ in width")):
        with pytest.raises(ValueError, match=rf"{fault}. Save it with .*save_pruned"):
            small.save_pretrained(tmp_path / "llama")
    save_pruned(model, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None and config["head_dim"] == 8
    same_keys = ("rms_norm_eps", "hidden_act", "rope_parameters", "vocab_size")
    assert {k: config[k] for k in same_keys} == {k: model.config.to_dict()[k] for k in same_keys}
    assert "saved as mistral" in (tmp_path / "out" / "README.md").read_text()


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
LONG_ROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG_ROPE |= {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    "name,options",
    [
        ("llama-4x1", dict(attention_bias=True)),  # Mistral has no biases
        ("llama-4x1", dict(mlp_bias=True)),
        ("phi-4x1", dict(qk_layernorm=True)),  # its norms are sized by hidden_size / heads
        ("phi3-4x1", dict(rope_parameters=LONG_ROPE)),
    ],
)
def test_uniform_plans_no_stock_class_can_hold_use_our_format(name, options, tmp_path):
    model, folder = saved(tmp_path, name, "uniform", **options)
    assert kind_of(folder) == "pruned"
    assert same(model, load_pruned(folder)[0])


@pytest.mark.parametrize(
    "name,auto",
    [("tiny-llava", "AutoModelForImageTextToText"), ("llama-4x1", "AutoModelForCausalLM")],
)
def test_auto_classes_load_blockwise_folders_with_us(name, auto, tmp_path):
    model, folder = saved(tmp_path, name, "blockwise")
    load = getattr(transformers, auto).from_pretrained
    again = load(folder, subfolder="")  # as lm-eval calls it
    theirs, ours = again.state_dict(), model.state_dict()
    assert type(again) is type(model) and all(torch.equal(theirs[k], ours[k]) for k in ours)
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, dtype="auto").dtype == model.dtype
    with pytest.raises(ValueError, match="leave it out"):
        load(folder, output_loading_info=True)
    named = transformers.AutoConfig.from_pretrained(folder).architectures[0]  # as TRL reads it
    assert type(getattr(transformers, named).from_pretrained(folder)) is type(model)


@pytest.mark.slow
def test_auto_classes_refuse_blockwise_folders_without_us(tmp_path):
    "In three processes: without this package, and with it imported before or after transformers."
    model, folder = saved(tmp_path, "llama-4x1", "blockwise")
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).num_parameters()"
    them, us, runs = "from transformers import AutoModelForCausalLM", "import mllm_compress", {}
    for name, lines in {"without": [them], "before": [us, them], "after": [them, us]}.items():
        code = "; ".join([*lines, f"print({load})"])
        runs[name] = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert runs["without"].returncode and "mllm_compress_pruned" in runs["without"].stderr
    for name in ("before", "after"):
        assert runs[name].stdout.strip() == str(model.num_parameters()), runs[name].stderr


def test_the_full_size_model_never_exists(tmp_path, monkeypatch):
    model, folder = saved(tmp_path, "tiny-llava", "blockwise")
    seen, shrink = [], loading.formats.shrink

    def seeing(fresh, plan):
        seen.extend(p.device.type for p in fresh.parameters())
        return shrink(fresh, plan)

    monkeypatch.setattr(loading.formats, "shrink", seeing)
    load_pruned(folder)
    assert seen and set(seen) == {"meta"}


@pytest.mark.parametrize("kind", ["uniform", "blockwise"])
def test_sharded_checkpoints(kind, tmp_path):
    model, plan = pruned("phi-4x1", kind)
    save_pruned(model, plan, tmp_path / "out", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and same(model, load_pruned(tmp_path / "out")[0])
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(second), shards[1].write_bytes(first)
    swapped = f"{shards[0].name}: swapped, it holds what belongs in {shards[1].name}"
    with pytest.raises(ValueError, match=swapped):
        load_pruned(tmp_path / "out")
    shards[0].write_bytes(first), shards[1].write_bytes(second)
    (tmp_path / "out" / "model.safetensors").write_bytes(first)
    with pytest.raises(ValueError, match="model.safetensors: not part of this checkpoint"):
        load_pruned(tmp_path / "out")


@pytest.mark.parametrize("kind", ["uniform", "blockwise"])
def test_damage_is_found_and_named(kind, tmp_path):
    model, plan = pruned("llama-4x1", kind)
    folder = save_pruned(model, plan, tmp_path / "out", card={"note": 1})
    saving.add_step(folder, model, {"step": "evaluate"})
    assert "**note**: 1" in (folder / "README.md").read_text()  # what the user wrote stays
    files = sorted(p.name for p in folder.iterdir() if p.name != "README.md")
    for name in files:
        intact = (folder / name).read_bytes()
        half, flipped = intact[: len(intact) // 2], intact[:-1] + bytes([intact[-1] ^ 1])
        for broken in (half, b"", flipped, intact.replace(b"1", b"2", 1)):
            (folder / name).write_bytes(broken)
            with pytest.raises(ValueError, match=name):
                load_pruned(folder)
        (folder / name).unlink()  # and absent
        with pytest.raises(ValueError, match=name):
            load_pruned(folder)
        (folder / name).write_bytes(intact)
    (folder / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match="README.md"):
        assert set(files) - {"mllm_compress.json"} < set(verify(folder)["files"])


def test_without_checksums_loading_is_still_strict(tmp_path):
    model, folder = saved(tmp_path, "llama-4x1", "layerwise")
    config = json.loads((folder / "config.json").read_text())
    for layers in (2, 4):
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(ValueError, match="does not fit LlamaForCausalLM|planned 3 layers"):
            load_pruned(folder, check_files=False)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, folder = saved(tmp_path, "llama-4x1", "layerwise")
    before = (folder / "model.safetensors").read_bytes()
    other, other_plan = pruned("llama-4x1", "blockwise")
    monkeypatch.setattr(saving, "model_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pruned(other, other_plan, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (folder / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save_pruned(other, other_plan, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and load_pruned(folder)[2] == other_plan
    assert not (folder / "model.safetensors").exists()


def test_a_plan_that_is_not_the_models_is_refused(tmp_path):
    model, plan = pruned("llama-4x1", "blockwise")
    wrong = plan_layerwise(cases.build("llama-4x1"), layers=[1])
    with pytest.raises(ValueError, match="does not describe this model"):
        save_pruned(model, wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="sizes of its model"):
        save_pruned(model, PruningPlan("llama", 4, (0, 1)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_adapters_must_be_merged(tmp_path):
    peft = pytest.importorskip("peft")
    model, plan = pruned("llama-4x1", "layerwise")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_pruned(adapted, plan, tmp_path / "out")
    merged = adapted.merge_and_unload()
    save_pruned(merged, plan, tmp_path / "out")
    assert same(merged, load_pruned(tmp_path / "out")[0])


@pytest.mark.parametrize("kind", ["none", "blockwise"])
def test_dtype_is_kept_or_changed_on_request(kind, tmp_path):
    model, folder = saved(tmp_path, "phi-4x1", kind, torch.bfloat16)
    again, wide = (load_pruned(folder, dtype=dtype)[0] for dtype in (None, torch.float32))
    dtypes = lambda m: {p.dtype for p in m.parameters()}
    assert dtypes(again) == {torch.bfloat16} and dtypes(wide) == {torch.float32}
    pairs = zip(again.state_dict().values(), model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["layerwise", "blockwise"])
def test_tied_embeddings_are_stored_once_and_come_back_tied(kind, tmp_path):
    model, folder = saved(tmp_path, "qwen2-4x1", kind, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(next(folder.glob("*.safetensors")))
    again = load_pruned(folder)[0]
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert same(model, again)


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    model, folder = saved(tmp_path, "llama-4x1", "blockwise")
    again, batch = load_pruned(folder)[0], cases.inputs(model)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert torch.equal(cases.logits(again, batch), cases.logits(model, batch))
