"""Every step of a practitioner, on converted checkpoints of the three real layouts."""

import json
import subprocess
import sys

import pytest
import test_benchmarks
import torch
from original_layouts import NAMES, instruction_json, with_tokenizer
from safetensors.torch import save_file

from mllm_compress import recovery
from mllm_compress.anatomy.families import anatomy, lm_parameters
from mllm_compress.anatomy.streaming import weights_hash
from mllm_compress.checkpoint import load_pruned, save_pruned
from mllm_compress.data import Collator, calibration_batches, load_json
from mllm_compress.evaluation.scoring import evaluate
from mllm_compress.importance.criteria import width_importance
from mllm_compress.importance.influence import block_influence
from mllm_compress.pruning.plans import plan_layerwise, plan_widthwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model
from mllm_compress.zoo.releases import convert_original

public_sets = test_benchmarks.root  # a fixture: small folders in the layout of the real sets


@pytest.fixture(scope="module", params=NAMES)
def case(request, golden, tmp_path_factory):
    "A converted model with processor, training data and calibration batches."
    if request.param == "internvl":
        pytest.importorskip("torchvision", reason="InternVL's processor of transformers needs it")
    work = tmp_path_factory.mktemp(request.param)
    source = with_tokenizer(golden / "original_layout", request.param, work)
    model, processor = load_model(str(convert_original(source, work / "native")))
    (work / "data.json").write_text(json.dumps(instruction_json(work / "images")))
    samples = load_json(work / "data.json", work / "images")
    return request.param, model, processor, samples, calibration_batches(samples, processor, 6, 3)


@pytest.fixture(scope="module")
def scores(case):
    _, model, _, _, batches = case
    return block_influence(model, batches), width_importance(model, batches, method="taylor")


def test_a_batch_is_what_the_processor_makes_of_each_entry(case):
    name, model, processor, samples, _ = case
    collate = Collator(processor, samples, turns="sequential")
    for i in (0, 2, 5):  # wide, square, without an image
        batch = collate([samples[i]])
        asked = samples.samples[i]["conversations"][0]["value"].replace("<image>\n", "")
        image = samples.image(i)
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": asked}]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        prompt = processor(images=image, text=text, return_tensors="pt")
        size = prompt["input_ids"].shape[1]
        assert batch["input_ids"][0, :size].equal(prompt["input_ids"][0])
        assert (batch["labels"][0, :size] == -100).all()
        if image is not None:
            assert torch.equal(batch["pixel_values"], prompt["pixel_values"])
        supervised = batch["input_ids"][0][batch["labels"][0] != -100]
        said = processor.tokenizer.convert_ids_to_tokens(supervised)
        answer = samples.samples[i]["conversations"][1]["value"]
        assert "".join(said).replace("▁", "")[: -len(said[-1])] == answer
        assert said[-1] == {"llava": "</s>", "bunny": "<|endoftext|>", "internvl": "<|end|>"}[name]


STOCK = (
    "import sys, torch; from safetensors.torch import load_file\n"
    "from transformers import AutoModelForImageTextToText as A\n"
    "m, report = A.from_pretrained(sys.argv[1], output_loading_info=True)\n"
    "assert not any(report.values()), report\n"
    "batch = load_file(sys.argv[1] + '.case'); logits = batch.pop('logits')\n"
    "with torch.no_grad(): found = m.eval()(**batch).logits\n"
    "assert torch.allclose(found, logits, atol=1e-4, rtol=1e-4)\n"
    "assert 'mllm_compress' not in sys.modules; print(type(m).__name__)"
)


def planned(name, model, scores, kind):
    "A plan of each kind. With long rope, Phi-3's config takes fewer neurons but not fewer heads."
    if kind == "layerwise":
        return plan_layerwise(model, scores[0], ratio=0.2)
    if (name, kind) == ("internvl", "uniform"):
        where = dict(attention_layers=(), mlp_layers=range(anatomy(model).num_layers))
        return plan_widthwise(model, scores[1], channel_ratio=0.4, **where)
    return plan_widthwise(model, scores[1], ratio=0.2, shape=kind)


@pytest.mark.parametrize("kind", ["layerwise", "uniform", "blockwise"])
def test_plans_apply_save_and_reload(case, scores, kind, tmp_path):
    name, model, processor, _, batches = case
    plan = planned(name, model, scores, kind)
    small = apply_plan(model, plan)
    removed = 1 - lm_parameters(small) / lm_parameters(model)
    assert removed == pytest.approx(plan.achieved_ratio) and 0.05 < removed < 0.35
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    with torch.no_grad():
        logits = small(**batch).logits
    save_pruned(small, plan, tmp_path / "small", processor=processor, card={"Where from": name})
    card = (tmp_path / "small/README.md").read_text()
    assert f"{lm_parameters(small):,}" in card and name in card
    assert ("load_pruned" in card) == (kind == "blockwise")
    again, words, same = load_pruned(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits) and same == plan
    assert type(words) is type(processor)
    if kind == "blockwise":
        return
    tensors = {k: v.contiguous() for k, v in (batch | {"logits": logits}).items()}
    save_file(tensors, tmp_path / "small.case")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "small")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "ForConditionalGeneration" in run.stdout, run.stderr[-2000:]


@pytest.mark.parametrize("train", ["projector", "lora", "full"])
def test_one_recovery_step_of_each_kind(case, scores, train):
    name, model, processor, samples, _ = case
    small = apply_plan(model, plan_layerwise(model, scores[0], ratio=0.2))
    options = dict(recovery.PAPER[name], lr=1e-3, warmup=0.0, batch_size=12)
    options["train"] = "projector" if train == "projector" else "projector+lm"
    for left_out in ("precision",) if train == "lora" else ("precision", "lora"):
        options.pop(left_out, None)
    config, quiet = recovery.config_from_dict(options), dict(device="cpu", progress=False)
    result = recovery.recover(small, model, samples, config, processor=processor, **quiet)
    assert len(result.history) == 1 and result.history[["sft", "hidden_kd"]].gt(0).all().all()
    before, after = anatomy(small), anatomy(result.model)
    moved = {
        part: weights_hash(getattr(before, part)) != weights_hash(getattr(after, part))
        for part in ("projector", "decoder", "vision_tower")
    }
    assert moved == {"projector": True, "decoder": train != "projector", "vision_tower": False}
    assert type(result.model) is type(model)
    assert not any("lora" in n for n, _ in result.model.named_parameters())


def test_evaluation_on_public_sets(case, public_sets):
    name, model, processor, *_ = case
    rows = evaluate(model, processor, ["pope", "mme_perception", "sqa"], root=public_sets)
    assert rows.n.tolist() == [2, 8, 2] and rows.score.notna().all()
