"""The study's design: calibration, seeds, equal sizes, learning rates, and outcomes."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pruning_cases import build
from test_study import DENSE, LAYERS, SMOKE, TRAINED, WIDTH, inline

from mllm_compress.anatomy.families import anatomy
from mllm_compress.cost.arithmetic import without_weights
from mllm_compress.data import InstructionData, scene_data, small_data
from mllm_compress.data.calibration import calibration_data, calibration_hash, coverage
from mllm_compress.data.scenes import entry, mix
from mllm_compress.importance.criteria import random_scores
from mllm_compress.importance.scores import LayerScores, WidthScores
from mllm_compress.pruning.plans import plan_layerwise
from mllm_compress.study import stages
from mllm_compress.study.experiments import FIRST, Experiment, canonical, describe, described
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.stages import inputs_of, key_of, name_of, planned, subject_key
from mllm_compress.study.store import results_of
from mllm_compress.zoo.releases import real_config

# ---- calibration


def test_all_types_alike_and_no_entry_more_than_its_share():
    for n, per_entry in ((1, 2), (7, 1), (64, 2), (64, 9)):
        drawn = calibration_data(small_data(n=500), n, seed=3, per_entry=per_entry)
        counts = coverage(drawn).values()
        assert len(drawn) == n and max(counts) - min(counts) <= 1
        assert max(Counter(e["id"] for e in drawn.samples).values()) <= per_entry


def test_a_small_set_gives_what_it_has():
    said = [("a?", "yes"), ("b?", "no"), ("c?", "B")]
    two = InstructionData([entry(str(i), None, said) for i in range(2)])
    drawn = calibration_data(two, 50, per_entry=2)
    assert len(drawn) == 4 and set(coverage(drawn)) == {"no image/letter", "no image/yes or no"}
    assert len(calibration_data(two, 50, design="first")) == 2
    assert set(coverage(calibration_data(mix(two, two), 50))) == {"0", "1"}
    odd = [two.samples[0] | {"types": types} for types in (None, "vqa", ["one"], 3)]
    assert set(coverage(calibration_data(InstructionData(odd), 50))) == set(coverage(drawn))
    with pytest.raises(ValueError, match="design"):
        calibration_data(two, 5, design="last")


def test_seeds_draw_other_questions_and_the_hash_sees_every_answer():
    data = scene_data(n=60)
    draws = [calibration_data(data, 12, seed) for seed in (0, 0, 1)]
    hashes = [calibration_hash(d) for d in draws]
    assert hashes[0] == hashes[1] != hashes[2]
    changed = InstructionData(deepcopy(draws[0].samples))
    assert calibration_hash(changed) == hashes[0]
    changed.samples[3]["conversations"][1]["value"] += "!"
    assert calibration_hash(changed) != hashes[0]


def test_the_key_of_scores_has_what_was_drawn_and_not_the_batch_size():
    def key(e=WIDTH, **changes):
        changed = replace(SMOKE, calibration=replace(SMOKE.calibration, **changes))
        return key_of("scores", e, changed)

    assert key() == key(batch_size=1) != key(samples=5)
    assert len({key(), key(design="first"), key(per_entry=1), key(mode="reference")}) == 4
    assert key(layerwise_samples=3) == key() and key(LAYERS, layerwise_samples=3) != key(LAYERS)
    as_many = f"first {SMOKE.calibration.samples}"
    assert key(replace(WIDTH, calibration=as_many)) == key(design="first")
    magnitude = replace(WIDTH, importance="magnitude")
    assert key(magnitude) == key(magnitude, mode="reference")  # it has no such option


def test_edited_data_is_another_calibration(monkeypatch):
    before = inputs_of("scores", LAYERS, SMOKE)
    samples = [deepcopy(scene_data(n=12).samples[i]) for i in range(12)]
    for turn in (turn for sample in samples for turn in sample["conversations"]):
        turn["value"] += "!"
    monkeypatch.setattr(stages.profiles, "calibration_source", lambda _: InstructionData(samples))
    stages.drawn_hash.cache_clear()
    assert inputs_of("scores", LAYERS, SMOKE)["calibration"] != before["calibration"]
    stages.drawn_hash.cache_clear()


def test_a_large_draw_is_hashed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    real, drawn = stages.calibration_data, []
    counted = lambda *given: drawn.append(given[1:3]) or real(*given)
    monkeypatch.setattr(stages, "calibration_data", counted)
    again = stages.drawn_hash.__wrapped__  # as in another process
    ask = lambda n, seed=0: again(SMOKE.training, "stratified", n, 2, seed)
    names = [ask(100), ask(100), ask(100, 1), ask(20), ask(20)]
    assert drawn == [(100, 0), (100, 1), (20, 0), (20, 0)]
    assert names[0] == names[1] != names[2] and names[3] == names[4]
    monkeypatch.setattr(stages, "code_of", lambda *_: "edited")
    assert ask(100) == names[0] and drawn[4:] == [(100, 0)]


# ---- experiments


def test_seeds_are_named_apart():
    both = replace(TRAINED, calibration_seed=0, seed=4)
    plans = [inputs_of("plan", e, SMOKE) for e in (TRAINED, both)]
    assert plans[0] == plans[1] and subject_key(TRAINED, SMOKE) != subject_key(both, SMOKE)
    assert Experiment("m", "layerwise", 0.3, seed=2).calibration_seed == 2
    dense = Experiment("m", recovery="sft", calibration_seed=3, calibration="first 5")
    assert canonical(dense) == Experiment("m", recovery="sft")


def test_later_fields_leave_older_descriptions_as_they_were():
    assert set(described(TRAINED)) == set(FIRST)
    new = replace(TRAINED, epochs=3, calibration_seed=5, calibration="first 9")
    assert set(described(new)) == {*FIRST, "epochs", "calibration_seed", "calibration"}
    assert Experiment(**described(new)) == new


def test_epochs_of_an_experiment_replace_those_of_the_profile():
    longer = replace(TRAINED, epochs=5)
    assert stages.recovery_config(longer, SMOKE).epochs == 5
    same = replace(TRAINED, epochs=SMOKE.recovery["epochs"])
    assert name_of(same, SMOKE) == name_of(TRAINED, SMOKE) != name_of(longer, SMOKE)


def test_a_contiguous_block_is_an_experiment(away):
    blocks = replace(LAYERS, importance="angular_distance")
    larger = replace(blocks, ratio=0.5)
    assert inputs_of("scores", blocks, SMOKE) != inputs_of("scores", larger, SMOKE)
    frame = inline([DENSE, blocks, larger])
    assert frame.status.eq("done").all() and frame.achieved_ratio.nunique() == 3


# ---- sizes


def test_both_prunings_reach_the_same_size(away):
    exact = replace(SMOKE, width=replace(SMOKE.width, aim="ratio"))
    sizes = {n: inline([LAYERS, WIDTH], p).achieved_ratio for n, p in (("o", SMOKE), ("e", exact))}
    layers, width = sizes["o"]
    assert abs(layers - width) < 0.02
    assert abs(sizes["e"][1] - 0.3) < 0.02 and name_of(WIDTH, SMOKE) != name_of(WIDTH, exact)
    assert name_of(LAYERS, SMOKE) == name_of(LAYERS, exact)


def test_a_size_out_of_reach_of_width_falls_back_to_the_request(away):
    high = [replace(LAYERS, ratio=0.45), replace(WIDTH, ratio=0.45)]
    layers, width = inline(high).achieved_ratio
    assert layers > 0.47 and abs(width - 0.45) < 0.02


def test_a_ratio_may_be_a_share_of_the_weights_of_the_layers(away):
    of_layers = replace(SMOKE, ratio_of="layers")
    quarter = [replace(e, ratio=0.25) for e in (LAYERS, WIDTH)]
    frame = inline([DENSE, *quarter], of_layers).groupby("pruning")
    sizes = frame[["achieved_ratio", "decoder_ratio"]].first()
    assert sizes.achieved_ratio.layerwise == 0.25  # one of four layers
    assert abs(sizes.achieved_ratio.widthwise - 0.25) < 0.03
    assert (sizes.decoder_ratio < sizes.achieved_ratio)[["layerwise", "widthwise"]].all()
    for stage, same in (("scores", True), ("plan", False)):
        keys = {key_of(stage, quarter[0], profile) for profile in (SMOKE, of_layers)}
        assert (len(keys) == 1) == same


@pytest.mark.parametrize("name", ["llava-v1.5-7b", "bunny-v1.0-3b", "mini-internvl-4b"])
def test_the_ranges_of_authors_reach_its_ratios(name):
    profile = load_profile("authors")
    model = without_weights(real_config(profile.printed[name]))
    parts = anatomy(model)
    units = [{i: torch.rand(n(i)) for i in range(32)} for n in (parts.groups, parts.neurons)]
    scores, w = WidthScores(*units, "random", {}), profile.width
    spans = [range(a, b + 1) for a, b in (w.attention_layers, w.mlp_layers)]
    for ratio in profile.ratios:
        plan = stages.plan_channels(model, scores, ratio, *spans)
        assert abs(plan.achieved_ratio - ratio) < 0.01
        layers = plan_layerwise(model, LayerScores(torch.rand(32), "random"), ratio=ratio)
        assert abs(layers.achieved_ratio - ratio) < 0.016  # half a layer
        cut = {i for i in range(32) for part in ("heads", "neurons") if plan.removed(part, i)}
        assert cut == set(range(3, 21))
    with pytest.raises(ValueError, match="cannot be reached"):
        stages.plan_channels(model, scores, 0.6, *spans)


# ---- outcomes


def test_the_likelihood_of_right_answers_is_in_the_frame(away):
    frame = inline([DENSE, LAYERS])
    assert frame.log_likelihood.lt(0).all()
    for row in frame.itertuples():
        assert len(row.log_likelihoods) == len(row.units)
        assert np.isclose(row.log_likelihoods.mean(), row.log_likelihood, rtol=0.05)


# ---- hybrids, and students from scratch


def test_a_hybrid_removes_the_layers_of_its_share_and_has_the_size_of_width_alone():
    "The layers of layerwise planning at that share, and the units of both up to the same size."
    model = build("llama-4x1", num_hidden_layers=10)
    values = torch.rand(10, generator=torch.Generator().manual_seed(5))
    layers, units = LayerScores(values, "random"), random_scores(model)
    width = replace(SMOKE.width, aim="layers")
    for ratio in (0.3, 0.4, 0.6):
        e = Experiment("m", "widthwise", ratio, layer_share=0.5)
        base = plan_layerwise(model, layers, ratio=ratio / 2)
        first, again = (planned(e, model, units, width, base) for _ in range(2))
        alone = planned(replace(e, layer_share=0.0), model, units, width)
        assert first == again and first.method == "layerwise+widthwise"
        assert first.layers == base.layers
        assert len(first.layers) < 10 == len(alone.layers)
        whole = plan_layerwise(model, layers, ratio=ratio).achieved_ratio
        assert first.achieved_ratio == pytest.approx(whole, abs=0.02)


def test_a_hybrid_has_keys_of_its_own_and_the_scores_of_its_parts():
    hybrid = replace(WIDTH, layer_share=0.5)
    assert subject_key(hybrid, SMOKE) != subject_key(WIDTH, SMOKE)
    first = stages.layers_first(hybrid)
    assert (first.pruning, first.ratio) == ("layerwise", hybrid.ratio / 2)
    ours, width, layers = (stages.stage_keys(e, SMOKE) for e in (hybrid, WIDTH, first))
    assert ours["scores"] == width["scores"] | layers["scores"] and layers["plan"] < ours["plan"]


def test_two_rounds_have_the_size_of_one_and_the_same_first_scores(away):
    "The second round scores what the first has left, which chooses other units."
    once = replace(WIDTH, ratio=0.45, reconstruct="stream")
    twice = replace(once, rounds=2)
    sizes = inline([DENSE, once, twice]).groupby("importance").achieved_ratio.first()
    assert sizes["taylor + stream"] == pytest.approx(sizes["taylor + stream + 2 rounds"], abs=0.01)
    first, second = (stages.plan_of(e, SMOKE, results_of(SMOKE)) for e in (once, twice))
    assert first.neurons != second.neurons and second.requested_ratio == first.achieved_ratio
    for stage, same in (("scores", True), ("plan", False)):
        assert (key_of(stage, once, SMOKE) == key_of(stage, twice, SMOKE)) == same
    assert Experiment(**described(twice)) == twice


def test_a_student_from_scratch_differs_by_seed_and_in_nothing_else_of_its_key():
    pruned = replace(LAYERS, recovery="sft", fraction=0.5)
    fresh = replace(pruned, start="scratch")
    ours, theirs = (inputs_of("student", e, SMOKE) for e in (fresh, pruned))
    assert [k for k in ours if ours[k] != theirs[k]] == ["start"]
    own = replace(SMOKE, learning_rates={"scratch": {"sft": 0.5}, "projector+lm": {"sft": 0.1}})
    rates = [stages.recovery_config(e, own).lr for e in (fresh, pruned)]
    assert rates == [0.5, 0.1]


def test_states_of_several_layers_are_a_setting_of_training():
    plain = replace(LAYERS, recovery="hidden_kd", fraction=0.5)
    deeper = replace(plain, hidden_layers="quarters")
    configs = [stages.recovery_config(e, SMOKE) for e in (plain, deeper)]
    assert [c.hidden_layers for c in configs] == [None, "quarters"]
    ours, theirs = (stages.stage_keys(e, SMOKE) for e in (deeper, plain))
    assert ours["plan"] == theirs["plan"] and ours["student"] != theirs["student"]
    assert "hidden_kd (quarters)" in describe(deeper)
    best = replace(plain, returned="validated")
    assert [stages.recovery_config(e, SMOKE).held_out for e in (plain, best)] == [0.0, 0.1]
    assert stages.inputs_of("student", best, SMOKE)["validation"]


def test_adapters_are_trained_at_rates_of_their_own():
    full = replace(LAYERS, recovery="sft", fraction=0.5)
    adapted = replace(full, adapters="LoRA")
    own = {"projector+lm": {"sft": 0.1}, "projector+lm, LoRA": {"sft": 0.2}}
    own |= {"reconstructed": {"sft": 0.3}, "reconstructed, LoRA": {"sft": 0.4}}
    ways = [full, adapted, *(replace(e, reconstruct="stream") for e in (full, adapted))]
    configs = [stages.recovery_config(e, replace(SMOKE, learning_rates=own)) for e in ways]
    assert [c.lr for c in configs] == [0.1, 0.2, 0.3, 0.4]
    assert [(c.lora or {}).get("r") for c in configs] == [None, 128, None, 128]
    assert canonical(replace(adapted, recovery="none")) == canonical(replace(full, recovery="none"))
    assert describe(adapted).replace(" + LoRA", "") == describe(full) != describe(adapted)
    with pytest.raises(ValueError, match="lora adapts the LM decoder: use train='projector.lm'"):
        stages.recovery_config(replace(adapted, train="projector"), SMOKE)
