"""Quantization after pruning; skipped where bitsandbytes is not installed."""

import importlib.util
import json
import shutil
import warnings

import pytest
import torch
from commands import facts, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mllm_compress.anatomy.families import anatomy, lm_parameters
from mllm_compress.anatomy.wrappers import WRAPPERS
from mllm_compress.checkpoint import load_pruned, save_pruned, verify
from mllm_compress.checkpoint.engines import KEPT, QUANTIZATIONS, export_model, quantize
from mllm_compress.checkpoint.loading import unpackable
from mllm_compress.pruning.pruning_plan import make_plan
from mllm_compress.pruning.slicing import apply_plan

HAS_LIBRARY = importlib.util.find_spec("bitsandbytes") is not None
LIBRARY = pytest.mark.skipif(
    not HAS_LIBRARY, reason="needs the extra: pip install mllm_compress[quantize]"
)
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def small(tiny_lm, tmp_path):
    "A factory of pruned checkpoints: (folder, model, plan)."

    def make(shape="blockwise", family="llama", neurons=200):
        model = tiny_lm(family, hidden=128, groups=4, queries=1, neurons=256)
        layers = {"blockwise": (1,), "uniform": range(4)}[shape]
        cut = dict(heads={i: range(2) for i in layers}, neurons={i: range(neurons) for i in layers})
        plan = make_plan(model, **cut)
        pruned = apply_plan(model, plan)
        return save_pruned(pruned, plan, tmp_path / f"{shape}-{family}"), pruned, plan

    return make


@LIBRARY
@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("shape", ["blockwise", "uniform"])
def test_a_quantized_checkpoint_is_loaded_as_it_was(name, shape, small, tmp_path):
    folder, model, plan = small(shape)
    quantize(folder, name, tmp_path / "q")
    verify(tmp_path / "q")
    loaded, _, again = load_pruned(tmp_path / "q")
    twice, _, _ = load_pruned(tmp_path / "q")
    with torch.no_grad():
        found, same = loaded(input_ids=IDS).logits, twice(input_ids=IDS).logits
        expected = model(input_ids=IDS).logits
    assert torch.equal(found, same) and again == plan
    assert (found - expected).norm() / expected.norm() < {"int8": 0.05}.get(name, 0.45)
    size = lambda f: sum(p.stat().st_size for p in f.glob("*.safetensors"))
    assert size(tmp_path / "q") < {"int8": 0.35}.get(name, 0.25) * size(folder)
    assert anatomy(loaded).groups(1) == 2 and anatomy(loaded).neurons(1) == 200


@LIBRARY
def test_plain_transformers_loads_a_uniform_one(small, tmp_path):
    folder, _, _ = small("uniform", neurons=192)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantize(folder, "nf4", tmp_path / "q")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q")(input_ids=IDS).logits
        ours = load_pruned(tmp_path / "q")[0](input_ids=IDS).logits
    assert torch.equal(plain, ours)


@LIBRARY
def test_widths_that_the_packed_cpu_kernel_cannot_divide(small, tmp_path):
    folder, _, _ = small("uniform")  # 200 neurons are no multiple of 32
    with pytest.warns(UserWarning, match="prune with --round-to 64"):
        quantize(folder, "nf4", tmp_path / "q")
    model = load_pruned(tmp_path / "q")[0]
    layer = model.model.layers[0]
    unfit = [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]  # not the attention
    assert [m for m in unpackable(model) if any(m is n for n in layer.modules())] == unfit
    assert not any(m.support_avx512bf16_for_cpu for m in unpackable(model))


@LIBRARY
def test_the_decoder_of_an_mllm_and_its_card(tmp_path, tiny_llava):
    model, processor = tiny_llava
    plan = make_plan(model, heads={1: range(5)})
    pruned = apply_plan(model, plan)
    save_pruned(pruned, plan, tmp_path / "small", processor=processor)
    quantize(tmp_path / "small", "int8", tmp_path / "q")
    loaded, again, _ = load_pruned(tmp_path / "q")
    assert type(again) is type(processor)
    kinds = {n: p.dtype for n, p in loaded.named_parameters() if n.endswith("proj.weight")}
    assert {d for n, d in kinds.items() if "language_model" in n} == {torch.int8}
    assert {d for n, d in kinds.items() if "vision_tower" in n} == {torch.float32}
    card = (tmp_path / "q/README.md").read_text()
    assert f"{lm_parameters(pruned):,}" in card and "int8" in card
    steps = json.loads((tmp_path / "q/mllm_compress.json").read_text())["provenance"]
    assert steps[-1]["step"] == "quantize" and steps[-1]["quantization"] == "int8"


@LIBRARY
def test_a_quantized_model_is_not_quantized_or_cut_again(small, tmp_path):
    folder, _, _ = small()
    quantize(folder, "int8", tmp_path / "q")
    with pytest.raises(ValueError, match="is quantized to int8 already"):
        quantize(tmp_path / "q", "nf4", tmp_path / "again")
    loaded, _, _ = load_pruned(tmp_path / "q")
    with pytest.raises(ValueError, match="prune first, then quantize"):
        apply_plan(loaded, make_plan(loaded, layers=(0, 1)))


def test_bad_input_of_quantize(small, tmp_path, monkeypatch):
    folder, model, _ = small()
    model.is_quantized = True
    monkeypatch.setattr("mllm_compress.checkpoint.engines.load_any", lambda _: (model, None))
    with pytest.raises(ValueError, match="is quantized: export the checkpoint"):
        export_model("q", "gguf", tmp_path / "model.gguf")
    assert {row.vision for row in WRAPPERS.values()} < {*KEPT}  # vision towers stay as they are
    with pytest.raises(ValueError, match="Unknown quantization 'int4': use one of int8, nf4, fp4"):
        quantize(folder, "int4", tmp_path / "q")
    with pytest.raises(ValueError, match="prune first, then quantize"):
        quantize("tiny-llava", "int8", tmp_path / "q")
    with pytest.raises(ValueError, match="is the checkpoint"):
        quantize(folder, "int8", folder)
    if not HAS_LIBRARY:
        with pytest.raises(ImportError, match=r"pip install 'mllm_compress\[quantize\]'"):
            quantize(folder, "int8", tmp_path / "q")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))
    with pytest.raises(OSError, match="needs about"):
        quantize(folder, "int8", tmp_path / "q")
    assert not (tmp_path / "q").exists()


@LIBRARY
def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*"prune smoke-llava -o small --ratio 0.3 --method magnitude".split())
    found = facts(*"quantize small --to nf4 -o q".split())
    assert found["bytes"] < found["bytes_before"] and "quantize" in run("show", "q")
    run(*"compare small q --benchmark scenes/perception --limit 4 --json".split())


@LIBRARY
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_packed_weights_are_counted_as_what_they_stand_for(name, small, tmp_path):
    from mllm_compress.cost.arithmetic import weight_bytes
    from mllm_compress.cost.report import cost_report

    folder, pruned, _ = small()
    quantize(folder, name, tmp_path / "q")
    loaded, _, _ = load_pruned(tmp_path / "q")
    assert lm_parameters(loaded) == lm_parameters(pruned)
    report = cost_report(loaded)
    assert report.value("parameters", source="measured") == lm_parameters(pruned)
    assert report.value("parameters", source="closed form") == lm_parameters(pruned)
    stored = [load_file(f) for f in (tmp_path / "q").glob("*.safetensors")]
    named = {k: v for part in stored for k, v in part.items()}
    # beside the weights and scales a file has the settings of each matrix as JSON, or the format
    about = [k for k in named if "quant_state.bitsandbytes" in k or "weight_format" in k]
    assert weight_bytes(loaded) == sum(v.nbytes for k, v in named.items() if k not in about)
    if name == "int8":  # whose scales move at the first pass
        with torch.no_grad():
            loaded(input_ids=IDS)
        assert weight_bytes(loaded) == sum(v.nbytes for k, v in named.items() if k not in about)
