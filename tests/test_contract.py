"""One contract over every row of WRAPPERS and FAMILIES, on small random models; README's table."""

import csv
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import contract_cases as cases
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mllm_compress.anatomy import FAMILIES, WRAPPERS, anatomy, part_parameters
from mllm_compress.anatomy.families import family_of
from mllm_compress.anatomy.wrappers import token_inputs
from mllm_compress.cli import app
from mllm_compress.cli.check import Case, run_checks, trial_data
from mllm_compress.cost import arithmetic
from mllm_compress.data.batches import Collator, Renderer
from mllm_compress.data.instructions import turns
from mllm_compress.importance.criteria import random_layers
from mllm_compress.importance.scores import model_inputs
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.recovery import RecoveryConfig, recover

SUPPORT = Path(__file__).parents[1] / "figures/support.csv"
FOUND = {}  # name -> its row of the table
ROWS = [*cases.MLLMS, *cases.LMS]
PROCESSED = [name for name in cases.MLLMS if cases.processor(name)]
# counted in part: linear attention, experts; VideoLLaMA scores all tokens, and late layers of
# Gemma 4 compute the last one only
COUNTED = [name for name in cases.MLLMS if not re.match("qwen3.5|lfm2|.*moe|video|gemma4", name)]


def support_row(config, findings: list) -> dict:
    "A row of the table of support in nbs/README.md."
    text = config.get_text_config()
    row = {"class": "" if text is config else config.model_type, "decoder": text.model_type}
    states = {True: "yes", False: "NO", None: "-"}
    for f in (f for f in findings if f.check != "tokens"):
        prunes = f.check in ("layerwise", "uniform", "blockwise", "combined", "reload")
        row[f.check] = f.detail if prunes and f.passed else states[f.passed]
    return row


def test_every_row_is_tried():
    configs = [cases.build(name).config for name in cases.MLLMS]
    tried = {config.get_text_config().model_type for config in configs} | set(cases.LMS)
    assert tried == set(FAMILIES)
    assert {config.model_type for config in configs} == set(WRAPPERS)


@pytest.mark.parametrize("name", ROWS)
def test_contract(name):
    model = cases.build(name, torch.float32)
    findings = run_checks(Case(model, cases.processor(name)))
    broken = {f.check: f.detail for f in findings if f.passed is False}
    skipped = {f.check for f in findings if f.passed is None}
    assert not broken
    assert skipped - {"reconstruct", "tokens"} == (set() if name in PROCESSED else {"evaluate"})
    FOUND[name] = support_row(model.config, findings)


@pytest.mark.parametrize("name", COUNTED)
def test_counted_operations_are_those_of_a_forward_pass(name, monkeypatch):
    monkeypatch.setattr("mllm_compress.cost.arithmetic.SIDE", 48)
    model = cases.build(name, torch.float32)
    model.set_attn_implementation("eager")
    inputs = arithmetic.example_inputs(model, 6, batch=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        arithmetic.forward(model, inputs)
    decoder = arithmetic.decoder_flops(
        arithmetic.shape_of_model(model), inputs["input_ids"].shape[1], batch=2
    )
    pictures = sum(arithmetic.picture_cost(model.config, 2).operations.values())
    assert counter.get_total_flops() == decoder + pictures


@pytest.mark.parametrize("name", PROCESSED)
@torch.no_grad()
def test_our_batches_are_those_of_the_processor(name):
    "Several pictures, of several sizes, and the same logits as from the processor's own call."
    model, processor = cases.build(name, torch.float32), cases.processor(name)
    data = trial_data(True)
    batch = Collator(processor, data, "sequential")([data[i] for i in range(4)])
    ours, known = model(**model_inputs(model, batch)).logits, inspect.signature(model.forward)
    for i in range(4):
        pictures, length = data.pictures(i), int(batch["attention_mask"][i].sum())
        if name == "llava-onevision" and len(pictures) > 1:
            continue  # its own call shows several pictures without tiles
        text = [Renderer(processor).text(tuple(turns(data[i])), len(pictures))]
        if pictures:
            own = dict(processor(text=text, images=[pictures], return_tensors="pt"))
        else:
            own = dict(processor.tokenizer(text, return_tensors="pt"))
        if name.startswith("paligemma"):  # its own call adds <bos> and a line end to the text
            own["input_ids"] = batch["input_ids"][i : i + 1, :length]
            own["attention_mask"] = torch.ones_like(own["input_ids"])
            own["labels"] = batch["labels"][i : i + 1, :length]
            own.pop("token_type_ids", None)
        own |= token_inputs(model.config, own)
        own = {k: v for k, v in own.items() if k in known.parameters and k != "labels"}
        theirs = model(**own).logits[0]
        assert theirs.shape == ours[i, :length].shape
        assert torch.allclose(theirs, ours[i, :length], atol=1e-4)


def test_the_table_of_support_is_current(request):
    "README's table holds what this test found; --update-golden writes it."
    if set(FOUND) != set(ROWS):
        pytest.skip("takes all rows")
    rows = [FOUND[name] for name in ROWS]
    if request.config.getoption("--update-golden"):
        with open(SUPPORT, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(SUPPORT, encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows


# Other shapes of the same classes


@pytest.mark.parametrize("name", ["llava-llama", "qwen3-vl", "gemma3", "olmo2", "cohere"])
@pytest.mark.parametrize("heads, groups", [(6, 3), (8, 1)])
def test_other_groups_of_queries(name, heads, groups):
    if groups == 1 and name in ("olmo2", "cohere"):
        pytest.skip("one group leaves nothing to remove")
    width = 32 if name == "qwen3-vl" else 8 * heads  # 32 is that of its merger
    shape = dict(num_attention_heads=heads, num_key_value_heads=groups, hidden_size=width)
    case = Case(cases.build(name, torch.float32, **shape), cases.processor(name))
    findings = run_checks(case, ("parts", "cost", "layerwise", "uniform", "blockwise"))
    assert not {f.check: f.detail for f in findings if not f.passed}


def test_a_model_of_one_layer_is_no_broken_one():
    found = {f.check: f.passed for f in run_checks(Case(cases.build("llama", num_hidden_layers=1)))}
    assert False not in found.values() and found["uniform"] and found["layerwise"] is None


# What must stay


def test_layers_that_receive_features_stay():
    model = cases.build("qwen3-vl")
    assert list(anatomy(model).fixed_layers) == [0, 1]
    plan = plan_layerwise(model, random_layers(model), n_layers=3)
    assert {0, 1} <= set(plan.layers) and len(plan.layers) == 3
    with pytest.raises(ValueError, match="layers 0 receive image features and must stay"):
        plan_layerwise(model, layers=[0, 3])
    with pytest.raises(ValueError, match="n_layers must be in 0 … 4"):
        plan_layerwise(model, random_layers(model), n_layers=5)


def test_both_kinds_of_attention_survive():
    model = cases.build("gemma3")
    small = apply_plan(model, plan_layerwise(model, random_layers(model), n_layers=4))
    assert sorted(small.config.text_config.layer_types) == ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="all layers with full_attention would go.*1,3,5"):
        plan_layerwise(model, layers=[1, 3, 5])
    with pytest.raises(ValueError, match="cannot be reached"):
        plan_layerwise(model, random_layers(model), ratio=0.9)


def test_layers_without_positions_keep_their_place():
    model = cases.build("smollm3")
    assert model.config.no_rope_layers == [1, 1, 0, 1, 1, 0]
    small = apply_plan(model, plan_layerwise(model, layers=[1, 4]))
    assert small.config.no_rope_layers == [1, 0, 1, 0]


# What is refused


def test_decoders_that_no_row_describes_are_refused():
    with pytest.raises(ValueError, match="mixtures of experts.*num_local_experts"):
        family_of(AutoConfig.for_model("granitemoe", **cases.TEXT | dict(num_local_experts=4)))
    with pytest.raises(ValueError, match="tower is a part of its decoder.*vision_config"):
        family_of(AutoConfig.for_model("phi4_multimodal", **cases.TEXT))


def test_a_class_without_a_row_is_named_before_its_processor(tmp_path):
    size = dict(n_embd=8, n_head=2, n_layer=2, vocab_size=96, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model("gpt2", **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert found.exit_code == 2 and "no anatomy for model_type 'gpt2'" in found.output


def test_an_unknown_wrapper_names_the_row_to_add(monkeypatch):
    model = cases.build("smolvlm")
    monkeypatch.delitem(WRAPPERS, "smolvlm")
    with pytest.raises(ValueError, match=r"Add a row Wrapper\('smolvlm', …\).*WRAPPERS"):
        anatomy(model)


def test_a_part_that_a_row_forgets_is_an_error(monkeypatch):
    model = cases.build("llava-next")
    row = replace(WRAPPERS["llava_next"], projector=("model.multi_modal_projector",))
    monkeypatch.setitem(WRAPPERS, "llava_next", row)
    with pytest.raises(ValueError, match="1 weights .* belong to no part.*image_newline"):
        part_parameters(model)


# The command


def test_check_is_a_command(tmp_path):
    say = lambda *args: CliRunner().invoke(app, ["check", *args])
    found = say("smoke-llava", "--only", "parts", "--only", "uniform", "--json")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.output.splitlines()[-1])["checks"]
    assert [(row["check"], row["passed"]) for row in rows] == [("parts", True), ("uniform", True)]
    assert "stock" in rows[1]["detail"]


def test_a_broken_promise_is_named(monkeypatch):
    monkeypatch.setattr("mllm_compress.cost.closed_parameters", lambda *_: {"vision": 0})
    found = CliRunner().invoke(app, ["check", "smoke-llava", "--only", "cost"])
    assert found.exit_code == 1 and "broken: cost" in found.output
    assert "closed form" in found.output


# Training and the command line, one row per kind: tiles, the model's own forward pass, a window


USERS = ["llama", "llava-llama", "qwen2-vl"]  # who try all commands


def give_spaces(model, processor):
    "A tokenizer that joins a space with the word behind it; a prompt that ends in a space."
    trained, prompt = ByteLevelBPETokenizer(), "ASSISTANT:{% endif %}"
    trained.train_from_iterator(cases.WORDS, vocab_size=300, special_tokens=cases.MARKS)
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256)
    names |= {"tokenizer_object": trained._tokenizer, "unk_token": "<unk>"}
    image = {"image_token": "<image>"}
    processor.tokenizer = PreTrainedTokenizerFast(**names, extra_special_tokens=image)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    assert prompt in processor.chat_template
    processor.chat_template = processor.chat_template.replace(prompt, "ASSISTANT: {% endif %}")


def files(name: str, folder: Path) -> Path:
    "A checkpoint with its processor, conversations and their pictures, in a folder."
    model, processor = cases.build(name, torch.float32), cases.processor(name)
    if name == "llava-llama":
        give_spaces(model, processor)
    if name == "qwen2-vl":
        pytest.importorskip("torchvision")
        processor.video_processor = transformers.Qwen2VLVideoProcessor()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    data, entries = trial_data(name in cases.MLLMS), []
    for i, entry in enumerate(data.samples):
        names = [f"{i}-{k}.png" for k, _ in enumerate(data.stored(i))]
        for file, picture in zip(names, data.pictures(i)):
            picture.save(folder / file)
        entries.append(entry | {"image": names})
    (folder / "data.json").write_text(json.dumps(entries))
    question = {
        "image": "0-0.png",
        "question": "is it red ?",
        "answer": "yes",
        "candidates": ["yes"],
    }
    (folder / "questions.json").write_text(json.dumps([question]))
    return folder


@pytest.mark.parametrize(
    "name",
    ["llava-next", "idefics3", "gemma3", "aya-vision", "gemma4_text", "lfm2"]
    + ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in USERS[1:])],
)
def test_the_command_line_from_scores_to_answers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(files(name, tmp_path))
    data = asked = "--data data.json"
    if name in cases.MLLMS:
        asked = "--questions questions.json"
    steps = [
        f"prune model {data} --ratio 0.2 --method taylor --samples 4 -o small",
        f"recover small --teacher model {data} --batch-size 3 -o trained",
        f"evaluate trained {asked} --json",
    ]
    if name in USERS:
        steps += ["check model", f"compare model trained {asked} -o compared", "show trained"]
        steps += ["export trained --to transformers --fill -o exported"]
    for step in [*steps, "cost trained --json"]:
        found = CliRunner().invoke(app, ["-q", *step.split()])
        assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["rows"]
    rows = {(r["quantity"], r["part"], r["source"]): r["value"] for r in rows}
    for part in ("lm", "total"):
        assert rows["parameters", part, "closed form"] == rows["parameters", part, "measured"] > 0


@pytest.mark.parametrize("name", ["qwen3-vl", "gemma2"])
def test_recovery_trains_what_it_should(name):
    teacher, processor = cases.build(name, torch.float32), cases.processor(name)
    plan = plan_layerwise(teacher, layers=[3])
    small, data = apply_plan(teacher, plan), trial_data(name in cases.MLLMS)
    config = RecoveryConfig(batch_size=3, epochs=2, lr=1e-2, held_out=0.0)
    result = recover(small, teacher, data, config, processor, plan, progress=False)
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]
    before, after = dict(small.named_parameters()), dict(result.model.named_parameters())
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert any("layers" in k for k in moved)
    if name in cases.MLLMS:
        projector = {id(p) for p in anatomy(small).projector_parameters}
        inside = {k for k, p in before.items() if k.startswith("model.visual")}
        assert moved & inside == {k for k in moved if id(before[k]) in projector} != set()
