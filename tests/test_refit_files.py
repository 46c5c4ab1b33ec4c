"""Reconstruction from file to file: the files of the form that holds both models in memory."""

import pytest
import torch
from pruning_cases import build
from test_recipes import ask, shop  # noqa: F401  the fixture

from mllm_compress.anatomy.streaming import PeakTensors
from mllm_compress.checkpoint import load_pruned, reconstruct_files, save_pruned
from mllm_compress.importance.criteria import random_scores
from mllm_compress.pruning import apply_plan, plan_layerwise, plan_widthwise, reconstruct
from mllm_compress.zoo.weight_files import open_files

CASES = [
    ("llama-4x1", torch.float32, {}),
    ("llama-4x1", torch.float16, {"tie_word_embeddings": True}),
    ("qwen2-3x2", torch.bfloat16, {"tie_word_embeddings": True}),
    ("phi-4x1", torch.float32, {}),
    ("phi3-3x2", torch.float32, {}),
    ("gemma-3x2", torch.float32, {"tie_word_embeddings": True}),
]
PLANS = {
    "width": lambda m: plan_widthwise(m, random_scores(m), ratio=0.3),
    "uniform": lambda m: plan_widthwise(m, random_scores(m), ratio=0.3, shape="uniform"),
    "layers": lambda m: plan_layerwise(m, layers=[0, 2]),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name, dtype, options", CASES, ids=lambda v: str(v))
def test_the_same_bytes_as_in_memory(tmp_path, name, dtype, options, plan):
    model = build(name, dtype, **options)
    model.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    rng = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (6, 40), generator=rng)}]
    plan = PLANS[plan](dense)
    small = reconstruct(apply_plan(dense, plan), dense, batches, plan)
    one = save_pruned(small, plan, tmp_path / "one")
    two = reconstruct_files(open_files(tmp_path / "dense"), plan, batches, tmp_path / "two")
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert [n for n in names if (one / n).read_bytes() != (two / n).read_bytes()] == []
    assert load_pruned(two)[0].config.reconstructed["tokens"] == 240


class Peak(PeakTensors):
    "Tensors with data; those on the meta device have none."

    def add(self, storage):
        if storage.device.type != "meta":
            super().add(storage)


def test_no_layer_is_left_in_memory(tmp_path):
    model = build("llama-4x1", torch.float32, num_hidden_layers=40, intermediate_size=400)
    model.save_pretrained(tmp_path / "dense")
    rng = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (24, 40), generator=rng)}]
    plan = plan_widthwise(model, random_scores(model), ratio=0.3)
    source = open_files(tmp_path / "dense")
    with Peak() as streamed:
        reconstruct_files(source, plan, batches, tmp_path / "two", ridge=0.1)
    with Peak() as held:
        dense = type(model).from_pretrained(tmp_path / "dense").eval()
        reconstruct(apply_plan(dense, plan), dense, batches, plan, ridge=0.1)
    weights = sum(p.nbytes for p in model.parameters())
    assert streamed.peak < held.peak - weights


def test_bad_input_comes_before_any_work(tmp_path):
    model = build("llama-4x1", torch.float32)
    model.save_pretrained(tmp_path / "dense")
    source = open_files(tmp_path / "dense")
    plan = plan_widthwise(model, random_scores(model), ratio=0.3)
    few = [{"input_ids": torch.randint(3, 64, (2, 4))}]
    with pytest.raises(ValueError, match="too few"):
        reconstruct_files(source, plan, few, tmp_path / "two")
    other = build("llama-4x1", num_hidden_layers=6)
    with pytest.raises(ValueError, match="Make a plan for this model"):
        wrong = plan_widthwise(other, random_scores(other), ratio=0.3)
        reconstruct_files(source, wrong, few, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_stored_scores_are_refitted_from_files(here):
    data = ("--data", "text.jsonl")
    assert ask("score", "lm", "-o", "scores", "--method", "gauss_newton", *data)[0] == 0
    options = ("--scores", "scores", "--ratio", 0.3, "--allocation", "global", "--reconstruct")
    code, _, error = ask("prune", "lm", "-o", "small", *options, *data)
    assert code == 0, error
    model, _, plan = load_pruned("small")
    assert plan.meta["allocation"] == "global" and model.config.reconstructed["tokens"] > 500
