"""Pruning from file to file writes the bytes that pruning in memory writes, in little memory."""

import pruning_cases as cases
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mllm_compress.checkpoint import load_pruned, prune_files, save_pruned
from mllm_compress.importance.criteria import measure
from mllm_compress.importance.scores import check_record, model_record
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model
from mllm_compress.zoo.tiny_models import tiny_processor
from mllm_compress.zoo.weight_files import NotFromFiles, open_files

transformers.utils.logging.disable_progress_bar()
LMS = ["llama-4x1", "qwen2-3x2", "phi-4x1", "phi3-3x2"]


def dense_folder(name, folder, **options):
    "A dense checkpoint on disk."
    cases.build(name).save_pretrained(folder, **options)
    tiny_processor("llava").tokenizer.save_pretrained(folder)
    if name in cases.MLLMS:
        tiny_processor(name.removeprefix("tiny-")).save_pretrained(folder)
    return folder


def differing(one, two) -> list:
    "Names of files that are not the same bytes in both folders."
    names = {p.name for folder in (one, two) for p in folder.iterdir()}
    read = lambda p: p.read_bytes() if p.exists() else None
    return sorted(n for n in names if read(one / n) != read(two / n))


@pytest.mark.parametrize("kind", ["layerwise", "uniform", "blockwise", "combined"])
@pytest.mark.parametrize("name", [*LMS, *cases.MLLMS])
def test_the_same_bytes_as_in_memory(name, kind, tmp_path):
    folder = dense_folder(name, tmp_path / "dense")
    model, processor = load_model(folder)
    plan = cases.plan(model, kind)
    one = save_pruned(apply_plan(model, plan), plan, tmp_path / "one", processor=processor)
    two = prune_files(open_files(folder), plan, tmp_path / "two", processor)
    assert differing(one, two) == []
    load_pruned(two)


@pytest.mark.parametrize("kind", ["layerwise", "blockwise"])
def test_shards_in_and_out(kind, tmp_path):
    folder = dense_folder("tiny-llava", tmp_path / "dense", max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, processor = load_model(folder)
    plan = cases.plan(model, kind)
    size = dict(processor=processor, max_shard_size="200KB")
    one = save_pruned(apply_plan(model, plan), plan, tmp_path / "one", **size)
    two = prune_files(open_files(folder), plan, tmp_path / "two", **size)
    assert differing(one, two) == [] and len(list(two.glob("*.safetensors"))) > 2
    load_pruned(two)


def test_the_record_of_files_is_that_of_the_model(tmp_path):
    folder = dense_folder("tiny-llava", tmp_path / "dense")
    model, _ = load_model(folder)
    assert model_record(open_files(folder).model) == model_record(model)
    scores = measure("layerwise", "random", model)
    check_record(scores, model_record(open_files(folder).model))
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight += 0.01
    with pytest.raises(ValueError, match="another model: weights differ"):
        plan_layerwise(model, scores, ratio=0.3)


def test_what_is_more_than_renaming_is_loaded_instead(tmp_path):
    folder = dense_folder("llama-4x1", tmp_path / "dense")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["odd.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NotFromFiles):
        open_files(folder)
