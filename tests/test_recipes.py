"""Pruning in one step: recipes, what options say together, the refit on the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import save_data, save_models
from pruning_cases import build
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mllm_compress.anatomy import lm_parameters
from mllm_compress.checkpoint import load_pruned
from mllm_compress.cli import app
from mllm_compress.data import scenes
from mllm_compress.importance import block_influence, width_importance
from mllm_compress.pruning import apply_plan, plan_layerwise, plan_widthwise, prune, reconstruct
from mllm_compress.pruning.one_step import RECIPES, Recipe, auto_round, choose_recipe
from mllm_compress.pruning.pruning_plan import compose_plans


def ask(*args):
    "A command in this process: exit code, standard output, standard error."
    result = CliRunner().invoke(app, list(map(str, args)))
    return result.exit_code, result.stdout, result.stderr


def batches(rows=8, tokens=40, vocab=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, vocab, (rows, tokens), generator=rng)}]


GLOBAL = dict(method="gauss_newton", allocation="global", reconstruct=True)
CHOICES = [
    ({}, RECIPES["recommended"]),
    ({"shape": "uniform"}, RECIPES["uniform"]),
    ({"allocation": "layer"}, Recipe("gauss_newton", "layer", "uniform", True)),
    ({"reconstruct": False}, Recipe("gauss_newton", "global", "blockwise")),
    ({"method": "flap", "allocation": "standardized"}, Recipe("flap", "standardized")),
    ({"method": "taylor"}, Recipe("taylor")),
    ({"method": "taylor", "reconstruct": True}, Recipe("taylor", reconstruct=True)),
    ({"pruning": "layerwise"}, Recipe("block_influence", pruning="layerwise")),
    ({"recipe": "layers"}, Recipe("block_influence", reconstruct=True)),
    ({"recipe": "layers", "reconstruct": False}, Recipe("block_influence")),
    ({"recipe": "paper"}, Recipe("taylor", "layer", "blockwise")),
    ({"recipe": "paper", "reconstruct": True}, Recipe("taylor", "layer", "blockwise", True)),
    ({"recipe": "uniform", "method": "gauss_newton"}, RECIPES["uniform"]),
    (GLOBAL, Recipe("gauss_newton", "global", None, True)),
]


@pytest.mark.parametrize("options, chosen", CHOICES, ids=lambda v: str(v)[:40])
def test_what_is_asked_for_wins(options, chosen):
    assert choose_recipe(**options) == chosen


CONTRADICTIONS = [
    ({"recipe": "best"}, "recipe"),
    ({"recipe": "uniform", "method": "magnitude"}, "leave the method or the recipe out"),
    ({"method": "luck"}, "method"),
    ({"allocation": "fair"}, "allocation"),
    ({"pruning": "diagonal"}, "pruning"),
    ({"method": "taylor", "allocation": "global"}, "use method gauss_newton"),
    ({"method": "block_influence", "allocation": "global"}, "leave it out"),
    ({"shape": "uniform", "allocation": "global"}, "shape blockwise, or allocation layer"),
    ({"shape": "uniform", "allocation": "standardized"}, "shape blockwise, or allocation layer"),
    ({"method": "block_influence", "allocation": "standardized"}, "leave it out"),
    ({"recipe": "recommended", "shape": "uniform"}, "shape blockwise, or allocation layer"),
]


@pytest.mark.parametrize("options, says", CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_contradictions_name_both_options(options, says):
    with pytest.raises(ValueError, match=says):
        choose_recipe(**options)


@pytest.mark.parametrize("name", ["llama-4x1", "qwen2-3x2", "phi-4x1"])
def test_the_recommended_recipe_is_its_steps(name):
    model, data = build(name), batches()
    small, plan = prune(model, data, 0.3)
    scores = width_importance(model, data, method="gauss_newton")
    same = plan_widthwise(model, scores, ratio=0.3, allocation="global")
    again = reconstruct(apply_plan(model, same), model, data, same)
    assert plan == same
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters()))


def test_a_second_round_scores_what_the_first_one_left():
    model, data = build("llama-4x1", num_hidden_layers=6), batches()
    small, plan = prune(model, data, 0.5, ridge=0.1)  # of the recommended recipe: two rounds
    middle, first = prune(model, data, 0.25, ridge=0.1, **GLOBAL)
    scores = width_importance(middle, data, method="gauss_newton")
    rest = 1 - 0.5 / (1 - first.achieved_ratio)
    total = compose_plans(first, plan_widthwise(middle, scores, ratio=rest, allocation="global"))
    again = reconstruct(apply_plan(model, total), model, data, total, ridge=0.1)
    assert (plan.heads, plan.neurons) == (total.heads, total.neurons) and plan <= first
    assert plan.requested_ratio == 0.5 and abs(plan.achieved_ratio - 0.5) < 0.02
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters()))
    once = prune(model, data, 0.5, rounds=1, ridge=0.1)[1]
    assert once == prune(model, data, 0.5, ridge=0.1, **GLOBAL)[1] != plan
    for options in (dict(budget={"bytes": 0.5}), dict(ratio=0.5, recipe="layers")):
        with pytest.raises(ValueError, match="rounds score heads and neurons again"):
            prune(model, data, rounds=2, **options)


def test_layers_are_removed_and_the_rest_is_refitted():
    model, data = build("llama-4x1", num_hidden_layers=6), batches()
    small, plan = prune(model, data, 0.3, recipe="layers")
    same = plan_layerwise(model, block_influence(model, data), ratio=0.3)
    again = reconstruct(apply_plan(model, same), model, data, same)
    assert plan == same and plan.method == "layerwise" and len(small.model.layers) == 4
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters()))


def test_depth_and_width_in_one_step():
    model, data = build("llama-4x1", num_hidden_layers=6), batches()
    both = dict(layer_method="block_influence", layer_share=0.4)
    small, plan = prune(model, data, 0.5, round_to=4, **both)
    assert len(plan.removed_layers) == 1 and plan.method == "layerwise+widthwise"
    assert all(len(kept) % 4 == 0 for kept in plan.neurons.values())
    assert abs(1 - lm_parameters(small) / lm_parameters(model) - 0.5) < 0.03
    with pytest.raises(ValueError, match="scores layers already"):
        prune(model, data, method="block_influence", layer_method="random")


def test_a_plan_out_of_reach_is_an_error_before_the_scores(monkeypatch):
    where = "mllm_compress.pruning.one_step.scored_rows"
    monkeypatch.setattr(where, lambda *_: pytest.fail("it began to score"))
    for says, options in (
        ("outside", dict(ratio=0.97)),
        ("removes nothing", dict(ratio=1e-5)),
        ("every layer alike", dict(recipe="uniform", protect=(1, 1))),
        ("round_to have no effect", dict(recipe="layers", round_to=4)),
        ("cannot be met", dict(budget={"bytes": 0.01})),
    ):
        with pytest.raises(ValueError, match=says):
            prune(build("llama-4x1"), batches(), **options)


@pytest.mark.parametrize("device, most", [("cpu", 32), ("cuda", 64), ("cuda:1", 64), ("mps", 32)])
def test_automatic_rounding_keeps_the_ratio(device, most):
    wide, narrow = build("llama-4x1", intermediate_size=1024), build("llama-4x1")
    assert auto_round(wide, device) == most and auto_round(narrow, device) == 4
    _, plan = prune(wide, method="magnitude", ratio=0.4, shape="blockwise", round_to="auto")
    assert all(len(kept) % auto_round(wide) == 0 for kept in plan.neurons.values())
    assert abs(plan.achieved_ratio - 0.4) < 0.02


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_llava, tiny_lm):
    "A multimodal model, a language model, and data for both."
    folder = tmp_path_factory.mktemp("shop")
    save_models(folder, tiny_llava, tiny_lm)
    entries = []
    for k in range(24):
        said = [
            {"from": who, "value": a[key] if n or key == "answer" else "<image>\n" + a[key]}
            for n, a in enumerate(scenes.ask(k, "train")[:2])
            for who, key in (("human", "question"), ("gpt", "answer"))
        ]
        entries.append({"conversations": said})
    words = "the red circle and a blue square are left of some green triangle".split()
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (24, 60), generator=rng).tolist()
    save_data(folder, entries, [" ".join(words[i] for i in row) for row in drawn])
    shutil.copytree(folder / "llava", folder / "nan")
    weights = load_file(folder / "llava/model.safetensors")
    weights[next(n for n in weights if n.endswith("down_proj.weight"))][0, 0] = float("nan")
    save_file(weights, folder / "nan/model.safetensors", {"format": "pt"})
    return folder


DATA = ("--data", "mine.json")


def test_without_options_it_says_what_it_did(here):
    for out in ("a", "b"):
        code, told, note = ask("prune", "llava", "-o", out, "--ratio", 0.3, *DATA)
        assert code == 0 and "gauss_newton" in note and "--recipe" in note, (told, note)
        assert "allocation global, reconstruction" in told
    one, two = (load_file(f"{out}/model.pruned.safetensors") for out in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)  # the same seed, the same bits
    step = json.loads(ask("show", "a", "--json")[1])["provenance"][0]
    assert step["reconstruction"]["tokens"] > 1000 and step["reconstruction"]["ridge"]
    before, after = (step["reconstruction"][f"error_{k}"] for k in ("before", "after"))
    assert after < before and f"last layer from {before} to {after}." in told
    said = step["calibration"]
    assert said["samples"] == 48  # all questions of 24 images
    assert f"{said['tokens']:,} tokens of {len(said['kinds'])} kind" in note
    card = Path("a/README.md").read_text()
    assert "reconstruction" in card and step["recipe"] in card
    model, _, plan = load_pruned("a")
    assert plan.meta["allocation"] == "global" and model.config.reconstructed["ridge"] is None
    code, said, note = ask("prune", "a", "-o", "again", "--ratio", 0.2, *DATA)
    assert code == 0, note  # a reconstructed model is pruned further, with itself as the target
    assert load_pruned("again")[2].achieved_ratio > 0.4


def test_the_recipe_of_the_paper_refits_nothing(here):
    options = ("--ratio", 0.3, "--recipe", "paper", *DATA)
    code, said, note = ask("prune", "llava", "-o", "paper", *options)
    assert code == 0 and "no reconstruction" in said and "recipe is" not in note
    small, _, plan = load_pruned("paper")
    assert plan.meta["scores"]["kind"] == "taylor" and not hasattr(small.config, "reconstructed")


def test_uniform_shapes_and_layers_are_refitted_too(here):
    from transformers import AutoModelForImageTextToText

    options = (*DATA, "--ridge", 0.1)
    code, _, note = ask("prune", "llava", "-o", "u", "--ratio", 0.3, "--shape", "uniform", *options)
    assert code == 0, note
    assert AutoModelForImageTextToText.from_pretrained("u").config.reconstructed["ridge"] == 0.1
    code, _, note = ask("prune", "llava", "-o", "l", "--layers", 1, "--reconstruct", *options)
    assert code == 0, note
    assert ask("prune", "llava", "-o", "p", "--layers", 1)[0] == 0
    one, two = (load_file(f"{out}/model.safetensors") for out in "lp")
    moved = {k for k in one if not torch.equal(one[k], two[k])}
    refitted = ("_proj.weight", "model.norm.weight")
    assert {k.endswith(refitted) and "vision" not in k for k in moved} == {True}


def test_both_at_once_and_rounded(here):
    options = ("--layer-share", 0.5, "--round-to", "auto", "--method", "taylor")
    code, said, note = ask("prune", "llava", "-o", "both", "--ratio", 0.5, *options, *DATA)
    assert code == 0, note
    plan = load_pruned("both")[2]
    assert plan.removed_layers and all(len(n) % 4 == 0 for n in plan.neurons.values())
    assert plan.meta["layer_scores"]["kind"] == "block_influence"


def test_a_language_model_from_plain_text(here):
    entries = [json.loads(line) for line in Path("text.jsonl").read_text().splitlines()]
    options = ("--ratio", 0.3, "--data", "named.json")
    for kinds, says in ("", "of unknown kinds"), ("b", "of one kind (b)"), ("ab", "of 2 kind(s)"):
        named = [e | {"source": (2 * kinds)[k % 2 :][:1]} for k, e in enumerate(entries)]
        Path("named.json").write_text(json.dumps(named))
        code, said, note = ask("prune", "lm", "-o", f"s{kinds}", *options)
        assert code == 0 and says in note and ("twice as large" in note) == (kinds != "ab"), note
    assert load_pruned("sab")[0].config.reconstructed["tokens"] > 500
    (step,) = json.loads(ask("show", "sab", "--json")[1])["provenance"]
    assert step["calibration"]["kinds"] == {"a": 12, "b": 12}


MISTAKES = {  # options after `prune llava -o out --ratio 0.3`, and what the message must say
    "few-tokens": (("--samples", 4, "--ridge", 0.1), "ten times as many"),
    "few-samples": (("--samples", 3), "--samples"),
    "idle-ridge": (("--ridge", 0.1, "--no-reconstruct"), "without a refit (--reconstruct)"),
    "negative-ridge": (("--ridge", -1), "from 0"),
    "no-ridge": (("--ridge", "nan"), "from 0"),
    "round-word": (("--round-to", "much"), "give auto or a number from 1"),
    "share": (("--layer-share", 1.5), "a number from 0 to 1"),
    "two-layer-scores": (("--layer-share", 0.5, "--method", "block_influence"), "already"),
    "layer-method": (("--layer-share", 0.5, "--layer-method", "taylor"), "block_influence"),
    "idle-method": (("--scores", "width", "--method", "taylor"), "--method has no effect"),
}


@pytest.fixture(scope="module")
def mistaken(shop, tmp_path_factory):
    "A folder that nothing may change."
    folder = tmp_path_factory.mktemp("mistaken") / "here"
    shutil.copytree(shop, folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_their_cure_and_change_nothing(mistaken, monkeypatch, name):
    monkeypatch.chdir(mistaken)
    before = sorted(mistaken.rglob("*"))
    options, says = MISTAKES[name]
    code, said, error = ask("prune", "llava", "-o", "out", "--ratio", 0.3, *DATA, *options)
    line = error.strip().splitlines()[-1]
    assert code == 2 and line.startswith("Error: ") and says in line, (said, error)
    assert sorted(mistaken.rglob("*")) == before


def test_broken_weights_and_plans_of_other_models(mistaken, monkeypatch):
    monkeypatch.chdir(mistaken)
    code, _, error = ask("prune", "nan", "-o", "out", "--ratio", 0.3, *DATA)
    assert code == 2 and "NaN" in error
    assert ask("prune", "llava", "-o", "one", "--layers", 1)[0] == 0
    options = ("--plan", "one/pruning_plan.json", "--reconstruct", "--data", "text.jsonl")
    code, _, error = ask("prune", "one", "-o", "out", *options)
    assert code == 2 and "plan" in error and "Traceback" not in error
    shutil.rmtree("one")


def test_batches_without_answers_are_named():
    model, data = build("llama-4x1"), batches()
    empty = [data[0] | {"labels": torch.full_like(data[0]["input_ids"], -100)}]
    with pytest.raises(ValueError, match="no answer token"):
        prune(model, empty, 0.3)
    with pytest.raises(ValueError, match="[Bb]atches"):
        prune(model, None, 0.3)
