"""Experiments, profiles and the running of experiments: nothing lost, nothing twice."""

import copy
import multiprocessing
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pruning_cases as cases
import pytest
import torch

from mllm_compress.anatomy.streaming import weights_hash
from mllm_compress.evaluation.benchmarks import benchmark
from mllm_compress.evaluation.scorers import SCORERS
from mllm_compress.pruning import apply_plan
from mllm_compress.pruning.plans import PRUNINGS
from mllm_compress.pruning.reconstruction import reconstructed
from mllm_compress.recovery import LOSSES
from mllm_compress.study import experiments, profiles, runs, stages, store, workers
from mllm_compress.study.alternatives import QUANTIZERS
from mllm_compress.study.experiments import Experiment, canonical
from mllm_compress.study.profiles import load_profile, profile_names
from mllm_compress.study.stages import name_of, recovery_config, subject_key
from mllm_compress.study.store import results_of
from mllm_compress.utils.files import content_hash

ROOT = Path(__file__).parent.parent


SMOKE = load_profile("smoke")
FEW = replace(SMOKE.evaluation, benchmarks=["scenes/hallucination"], questions=4)
SMOKE = replace(SMOKE, evaluation=FEW, recovery={"epochs": 2, "batch_size": 2})
DENSE = Experiment("smoke-llava")
LAYERS = Experiment("smoke-llava", "layerwise", 0.3)
WIDTH = Experiment("smoke-llava", "widthwise", 0.3)
TRAINED = replace(LAYERS, recovery="sft", fraction=0.5)
HOPELESS = Experiment("smoke-llava", "widthwise", 0.94)
OURS = dict(importance="gauss_newton", allocation="global", reconstruct="stream")


def inline(experiments: list, profile=SMOKE) -> pd.DataFrame:
    "A study in this process."
    return runs.run(experiments, profile, executor="inline", quiet=True)


# ---- experiments and profiles


LAYERWISE = dict(pruning="layerwise", ratio=0.3)
WIDTHWISE = dict(pruning="widthwise", ratio=0.3)
WRONG = [
    (dict(pruning="depth", ratio=0.3), "Unknown pruning 'depth'"),
    (LAYERWISE | dict(ratio=1.0), "Ratio 1.0 is outside"),
    (LAYERWISE | dict(ratio=0.0), "0 belongs to 'none'"),
    (LAYERWISE | dict(ratio="a third"), "must be a number"),
    (LAYERWISE | dict(ratio=float("nan")), "Ratio nan is outside"),
    (dict(ratio=0.3), "does not fit pruning 'none'"),
    (LAYERWISE | dict(importance="taylor"), "Unknown importance"),
    (dict(recovery="sft+magic"), "Unknown loss 'magic'"),
    (dict(recovery="sft+sft"), "names a loss twice"),
    (dict(recovery="sft", train="vision"), "Unknown train"),
    (dict(recovery="sft", fraction=0.0), "Fraction 0.0 is outside"),
    *((dict(seed=seed), "seed") for seed in ("first", True, 1.5, -1)),
    *((LAYERWISE | dict(calibration_seed=seed), "seed") for seed in (-1, "a")),
    *(
        (LAYERWISE | dict(calibration=design), f"Calibration '{design}'")
        for design in ("first", "last 5", "stratified 0", "stratified many")
    ),
    *((LAYERWISE | dict(epochs=epochs), "epochs") for epochs in (-1, 0.5)),
    (LAYERWISE | dict(recovery="sft", hidden_layers="every"), "compares no states"),
    (LAYERWISE | dict(recovery="hidden_kd", hidden_layers="all"), "quarters"),
    (LAYERWISE | dict(layer_share=0.5), "widthwise plans"),
    (WIDTHWISE | dict(layer_share=1.0), "outside"),
    (WIDTHWISE | dict(layer_share="half"), "must be a number"),
    (WIDTHWISE | dict(rounds=2), "rounds=2 is of widthwise plans that are refitted"),
    (WIDTHWISE | dict(rounds=0, reconstruct="stream"), "rounds=0"),
    (WIDTHWISE | dict(rounds=1.5, reconstruct="stream"), "must be a whole number"),
    (LAYERWISE | dict(start="scratch"), "give a recovery"),
    (LAYERWISE | dict(start="scratch", recovery="sft", train="projector"), "projector"),
    (LAYERWISE | dict(start="zero", recovery="sft"), "pruned, scratch"),
    (WIDTHWISE | dict(reconstruct="magic"), "stream"),
    (WIDTHWISE | dict(allocation="fair"), "global"),
    (WIDTHWISE | dict(allocation="global"), "gauss_newton"),
    (WIDTHWISE | OURS | dict(shape="uniform"), "own width"),
    (dict(reconstruct="stream"), "needs a pruning"),
    (LAYERWISE | dict(allocation="global"), "widthwise"),
    (WIDTHWISE | dict(quantize="int3"), "use one of none, int8, nf4"),
    (WIDTHWISE | dict(quantize="int8", recovery="sft"), "studied without training"),
]


@pytest.mark.parametrize("wrong, says", WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_experiments_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Experiment("m", **wrong)


def test_equal_experiments_have_one_name():
    numpy = {"ratio": np.float64(0.3), "fraction": 1, "seed": np.int64(2)}
    ours = {"ratio": 0.3, "fraction": 1.0, "seed": 2}
    one, two = (Experiment("m", "layerwise", recovery="sft", **n) for n in (numpy, ours))
    assert repr(one) == repr(two)
    assert canonical(Experiment("m", fraction=0.5, train="projector")) == Experiment("m")
    a, b = (replace(LAYERS, recovery=r) for r in ("sft+hidden_kd", "hidden_kd+sft"))
    assert name_of(a, SMOKE) == name_of(b, SMOKE) != name_of(replace(a, seed=1), SMOKE)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_read(name):
    profile = load_profile(name)
    e = Experiment(profile.models[0], "widthwise", profile.ratios[0], recovery="sft+hidden_kd")
    assert recovery_config(e, profile).losses == {"sft": 0.5, "hidden_kd": 0.5} and profile.about


BAD_LINES = [
    ("ratios: [0.3", "is not valid YAML"),
    ("- a\n- b", "holds no keys and values"),
    ("1: 2", "holds no keys and values"),
    ("ratios: [1.45]", r"ratios\[0\] is 1.45: it must be less than 0.95"),
    ("seed: [0]", "unknown seed; the keys are name, about, models"),
    ("seeds: [0.5]", r"seeds\[0\] is 0.5: it must be"),
    ("seeds: []", "seeds is .*: it must be"),
    ("seeds: [0, 1, 0]", "names a value twice"),
    ("name: ../elsewhere", "name is '../elsewhere'"),
    ("students: some", "students is 'some': it must be 'none', 'adapters' or 'all'"),
    ("calibration: {samples: -1, batch_size: 4}", "calibration: samples is -1"),
    ("calibration: 4", "calibration must be a mapping, not 4"),
    ("evaluation: {benchmarks: []}", "evaluation: benchmarks is .*: it must be"),
    ("evaluation: {benchmarks: [a], split: train}", "split is 'train': it must be 'test' or"),
    ("learning_rates: {projector+lm: {hidden_kd+sft: 0.1}}", "write 'sft.hidden_kd', not 'hidden"),
    ("recovery: {epochs: 1, seed: 7}", "recovery may not set seed: every experiment has its own"),
    ("notebooks: {02_pruning: [0.3]}", "notebooks, 02_pruning must be a mapping, not"),
    ("notebooks: {05_data: {fewer: {0.1: {models: [tiny-lava]}}}}", "model of profile .*05_data"),
    ("per_model: {smoke-llava: {data: {}}}", "'data': it must be 'training' or 'recovery'"),
    (
        "learning_rates: {projector: {sft: {0.96: 0.1}}}",
        "projector, sft: {0.96: 0.1} must be a number",
    ),
    ("learning_rates: {vision: {sft: 0.1}}", "it must be 'projector', 'projector.lm'"),
]


@pytest.mark.parametrize("text, says", BAD_LINES, ids=[text for text, _ in BAD_LINES])
def test_profiles_that_cannot_be_read(tmp_path, text, says):
    path, key = tmp_path / "mine.yaml", text.split(":")[0]
    smoke = (ROOT / "mllm_compress/profiles/smoke.yaml").read_text().partition("notebooks:")[0]
    lines = [line for line in smoke.splitlines() if line.split(":")[0] != key]
    if key == "evaluation":
        lines = [line for line in lines if not line.startswith("  ")]
    path.write_text(text if text.startswith("-") else "\n".join([*lines, text]))
    with pytest.raises(ValueError, match=says) as error:
        load_profile(path)
    assert "pydantic" not in str(error.value)


def test_a_copy_of_a_profile_with_one_model_keeps_the_others_entries(tmp_path):
    text = (ROOT / "mllm_compress/profiles/paper.yaml").read_text()
    models = "models: [llava-v1.5-7b, bunny-v1.0-3b, mini-internvl-4b]"
    assert models in text
    (tmp_path / "mine.yaml").write_text(text.replace(models, "models: [bunny-v1.0-3b]"))
    mine = load_profile(tmp_path / "mine.yaml")
    assert mine.models == ["bunny-v1.0-3b"]
    assert load_profile("paper@bunny-v1.0-3b").models == mine.models
    named = " ".join(profiles.missing_inputs(mine))
    assert "bunny" in named and "llava-v1.5" not in named and "internvl" not in named
    whole = " ".join(profiles.missing_inputs(load_profile("paper")))
    assert "vision tower of llava-v1.5-7b" in whole
    with pytest.raises(ValueError, match="Unknown model of profile paper 'gpt'"):
        load_profile("paper@gpt")


# ---- keys


def test_a_key_has_what_determines_a_stage_and_nothing_else():
    longer = replace(SMOKE, recovery=SMOKE.recovery | {"epochs": 7})
    assert subject_key(LAYERS, SMOKE) == subject_key(LAYERS, longer)
    assert subject_key(TRAINED, SMOKE) != subject_key(TRAINED, longer)
    elsewhere = {
        "name": "other",
        "workers": 3,
        "processes": 2,
        "checkpoint_every": 5,
        "students": "all",
        "evaluation": replace(FEW, batch_size=3),
        "slurm": replace(SMOKE.slurm, gpus=2),
        "recovery": SMOKE.recovery | {"passes": 4},
    }
    for key, value in elsewhere.items():
        assert name_of(TRAINED, replace(SMOKE, **{key: value})) == name_of(TRAINED, SMOKE), key
    wider = replace(SMOKE, width=replace(SMOKE.width, protect_last=0))
    assert subject_key(LAYERS, SMOKE) == subject_key(LAYERS, wider)
    assert subject_key(WIDTH, SMOKE) != subject_key(WIDTH, wider)
    low, high = (stages.inputs_of("scores", replace(WIDTH, ratio=r), SMOKE) for r in (0.2, 0.5))
    assert content_hash(low) == content_hash(high)


VERSIONS = [  # what is raised, and which of the dense, layerwise, widthwise, trained it concerns
    (stages, "CALIBRATION_VERSION", (0, 1, 1, 1)),
    (stages, "RECOVERY_VERSION", (0, 0, 0, 1)),
    (stages, "GENERATION_VERSION", (1, 1, 1, 1)),
    (profiles, "SMOKE_VERSION", (1, 1, 1, 1)),
    (profiles, "DATA_VERSION", (0, 1, 1, 1)),
    (PRUNINGS, "layerwise", (0, 1, 0, 1)),
    (LOSSES, "sft", (0, 0, 0, 1)),
]


@pytest.mark.parametrize("place, name, concerned", VERSIONS, ids=[n for _, n, _ in VERSIONS])
def test_a_raised_version_renames_what_it_makes(monkeypatch, place, name, concerned):
    def names():
        kept = (stages.key_of, stages.name_of, stages.drawn_hash, profiles.model_inputs)
        for cached in (*kept, profiles.model_identity, profiles.data_inputs):
            cached.cache_clear()
        return [name_of(e, SMOKE) for e in (DENSE, LAYERS, WIDTH, TRAINED)]

    before = names()
    if isinstance(place, dict):  # a table of methods
        monkeypatch.setitem(place, name, replace(place[name], version=place[name].version + 1))
    else:
        monkeypatch.setattr(place, name, getattr(place, name) + 1)
    assert tuple(int(a != b) for a, b in zip(before, names())) == concerned
    monkeypatch.undo()
    assert names() == before


def test_a_tower_that_lies_elsewhere_is_part_of_the_name(tmp_path):
    towers = [tmp_path / name for name in "ab"]
    for tower in towers:
        tower.mkdir()
        (tower / "weights").write_text(tower.name)
    given = [{"smoke-llava": str(t)} if t else {} for t in (None, *towers)]
    assert len({name_of(LAYERS, replace(SMOKE, towers=t)) for t in given}) == 3


def test_a_precision_left_open_is_the_same_key_on_every_machine():
    left_open = replace(SMOKE, recovery=SMOKE.recovery | {"precision": "fastest"})
    options = stages.inputs_of("student", TRAINED, left_open)["options"]
    assert options["precision"] == "fastest" and recovery_config(TRAINED, left_open).lr
    assert name_of(TRAINED, left_open) != name_of(TRAINED, SMOKE)


# ---- stages


def test_a_kept_student_gives_the_same_answers(away):
    keeping = replace(SMOKE, students="all", evaluation=replace(FEW, questions=8))
    first = inline([TRAINED], keeping)
    for stage in ("answers", "score"):
        for path in (away / "runs/smoke" / stage).glob("*.json"):
            path.unlink()
    again = inline([TRAINED], keeping)
    same = ["benchmark", "score", "candidate_score", "low", "high"]
    pd.testing.assert_frame_equal(first[same], again[same])
    assert (first.units[0] == again.units[0]).all()
    (weights,) = (away / "runs/smoke/student").glob("*/weights.safetensors")
    assert weights.stat().st_size > 100_000  # training has changed the model
    log = results_of(keeping).log(name_of(TRAINED, keeping)).read_text()
    assert log.count("smoke-llava, layerwise") == 2
    weights.write_bytes(weights.read_bytes()[:-8])
    more = replace(keeping, evaluation=replace(FEW, benchmarks=["scenes/open"]))
    with pytest.warns(UserWarning, match="damaged"):
        stages.compute(TRAINED, more, results_of(keeping))
    assert weights.stat().st_size > 100_000  # trained again


@pytest.mark.parametrize(
    "students, train, kept",
    [("none", "projector", 0), ("adapters", "projector", 1), ("adapters", "projector+lm", 0)],
)
def test_students_are_kept_as_the_profile_says(away, students, train, kept):
    inline([replace(TRAINED, train=train)], replace(SMOKE, students=students))
    assert len(list((away / "runs/smoke/student").glob("*/weights.safetensors"))) == kept


def test_a_tied_weight_is_kept_once():
    start = cases.build("llama-4x1", tie_word_embeddings=True)
    student = copy.deepcopy(start)
    student.lm_head.weight.data += 1
    kept = stages.tensors_to_keep(TRAINED, replace(SMOKE, students="all"), student, start, None)
    assert [*kept] == ["model.embed_tokens.weight"]


def test_adapters_are_kept_and_give_the_same_student(away):
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    recovery = {"epochs": 2, "batch_size": 2, "lr": 0.01, "lora": lora}
    keeping = replace(SMOKE, students="adapters", recovery=recovery)
    results = results_of(keeping)
    first = stages.student_of(TRAINED, keeping, results, "cpu")
    again = stages.kept_student(TRAINED, keeping, results, "cpu")
    pruned = stages.student_of(LAYERS, keeping, results, "cpu")
    assert weights_hash(first) == weights_hash(again) != weights_hash(pruned)
    (weights,) = (away / "runs/smoke/student").glob("*/weights.safetensors")
    assert weights.stat().st_size < sum(p.nbytes for p in pruned.parameters()) / 3


def test_without_kept_students_the_dry_run_says_what_is_trained_again(away):
    inline([LAYERS, TRAINED])
    more = replace(SMOKE, evaluation=replace(FEW, benchmarks=[*FEW.benchmarks, "scenes/open"]))
    table = runs.status([LAYERS, TRAINED], more).set_index("recovery")
    assert table.missing.to_dict() == {
        "none": "answers to scenes/open; score of scenes/open",
        "sft": "training; answers to scenes/open; score of scenes/open",
    }
    assert not table.cached.any() and table.seconds.notna().all()


# ---- running


def test_failure_is_reported_and_stops_nobody(away, capsys):
    frame = runs.run([HOPELESS, DENSE, LAYERS], SMOKE, executor="inline")
    assert frame.groupby("status").size().to_dict() == {"done": 2, "failed": 1}
    assert "1 FAILED" in capsys.readouterr().out
    assert "ValueError" in frame[frame.status == "failed"].error.iloc[0]
    assert "Traceback" in results_of(SMOKE).log(name_of(HOPELESS, SMOKE)).read_text()


def test_local_equals_inline_and_nothing_is_computed_twice(away, monkeypatch):
    four = [DENSE, LAYERS, WIDTH, TRAINED]
    one, other = (replace(SMOKE, name=name) for name in ("one", "two"))
    first = inline(four, one)
    second = runs.run(four, other, executor="local", workers=2, quiet=True)
    same = ["pruning", "recovery", "benchmark", "score", "achieved_ratio", "candidate_score"]
    pd.testing.assert_frame_equal(first[same], second[same])
    logs = [p.read_text() for p in (away / "runs/two/logs").glob("*.txt")]
    assert len(logs) == 4  # two workers on two cores must not use four threads
    assert all(", 1 thread, on cpu" in text for text in logs)
    monkeypatch.setattr(stages, "compute", lambda *a: pytest.fail("computed twice"))
    again = inline(four, one)
    pd.testing.assert_frame_equal(first.drop(columns="units"), again.drop(columns="units"))


@pytest.mark.parametrize(("reconstruct", "equal"), [("none", True), ("stream", False)])
def test_two_refits_of_one_plan_are_two_models(away, reconstruct, equal):
    "Two seeds with one plan are one model when sliced, and two when each is refitted to its own."
    same = dict(pruning="widthwise", ratio=0.3, importance="magnitude", reconstruct=reconstruct)
    pair = [Experiment("smoke-llava", seed=seed, **same) for seed in (0, 1)]
    rows = inline(pair)
    plans = [stages.plan_of(e, SMOKE, results_of(SMOKE)) for e in pair]
    assert plans[0].neurons == plans[1].neurons and plans[0].heads == plans[1].heads
    first, second = (np.concatenate([*its.log_likelihoods]) for _, its in rows.groupby("seed"))
    assert np.array_equal(first, second) is equal


def test_what_is_left_is_estimated_from_what_is_done(away):
    seconds = runs.status([DENSE, LAYERS, HOPELESS, TRAINED], SMOKE).seconds
    assert len(seconds) == 4 and seconds.isna().all()  # nothing finished, nothing known
    inline([DENSE, LAYERS, LAYERS])
    known = runs.status([DENSE, LAYERS, WIDTH, TRAINED, TRAINED], SMOKE)
    assert known.cached.tolist() == [True, True, False, False]
    assert known.seconds.isna().tolist() == [False, False, False, True]


def test_whatever_goes_wrong_is_a_failed_experiment(away, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    results = results_of(SMOKE)
    monkeypatch.setattr(stages, "missing_stages", full)
    word, message = workers.complete(DENSE, SMOKE, results)
    assert word == "failed" and "No space left" in message


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(away):
    "Killed between two experiments, or at the start of one, it costs one at most."
    run = workers.local([DENSE, LAYERS, WIDTH], SMOKE, results_of(SMOKE), workers=1)
    assert next(run)[1] == "done"
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    answers = [(word, message) for _, word, message in run]
    assert len(answers) == 2 and ("done", "") in answers
    assert all(word == "done" or "exit code -9" in message for word, message in answers)
    assert not multiprocessing.active_children()


def test_a_failure_on_a_gpu_costs_one_experiment_and_one_worker(away, monkeypatch):
    "An error of the device breaks whatever its process does next; on a CPU a worker goes on."
    made = []

    class Fragile(workers.Place):
        "Its device breaks at the first experiment that needs too much."

        def submit(self, experiment):
            if self.pool is None:
                self.pool, self.broken = object(), False
                made.append(self.device)
            self.last, future = experiment, Future()
            self.broken = self.broken or experiment.ratio > 0.9
            future.set_result(("failed" if self.broken else "done", ""))
            return future

        def stop(self):
            self.pool = None

    monkeypatch.setattr(workers, "Place", Fragile)
    three = [Experiment("m", "widthwise", r) for r in (0.94, 0.3, 0.5)]
    for device, places, failed in (("cuda:0", 2, 1), ("cpu", 1, 3)):
        made.clear()
        monkeypatch.setattr(workers, "devices", lambda *_, d=device: [d])
        words = [word for _, word, _ in workers.local(three, SMOKE, results_of(SMOKE))]
        assert words.count("failed") == failed and made == [device] * places


def test_what_a_worker_finds_in_its_environment(monkeypatch):
    one = workers.surroundings("cpu")
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    assert {one[k] for k in threads} == {"1"} and "CUDA_VISIBLE_DEVICES" not in one
    assert one["MALLOC_TRIM_THRESHOLD_"] == str(2**30)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert workers.surroundings("cpu")["MALLOC_TRIM_THRESHOLD_"] == "1000"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert workers.surroundings("cuda:2", 2)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert workers.surroundings("cuda:1")["CUDA_VISIBLE_DEVICES"] == "5"


def test_workers_are_counted():
    with pytest.raises(ValueError, match="workers is -1"):
        workers.devices(-1)
    with pytest.raises(ValueError, match="workers"):
        replace(SMOKE, workers=-2)
    assert len(workers.devices(3)) == 3


def test_what_a_store_has_from_other_settings_is_passed_over(away):
    "And a run that was killed before it described an experiment is made up for."
    inline([DENSE, LAYERS])
    results = results_of(SMOKE)
    for other in ({"model": "gone"}, {"model": "smoke-llava", "depth": 3}, {"pruning": "odd"}):
        store.write(results, {"stage": "experiment", "version": 1, **other}, {})
    assert set(runs.stored(SMOKE)) == {DENSE, LAYERS} and len(results.keys("experiment")) == 5
    assert runs.stored(replace(SMOKE, evaluation=replace(FEW, questions=5))) == {}
    for key in results.keys("experiment"):
        results.path("experiment", key).unlink()
    assert runs.stored(SMOKE) == {}
    inline([LAYERS])
    assert list(runs.stored(SMOKE)) == [LAYERS]


# ---- what is shown of a question


PAIRED = {"mme_perception", "mme_cognition", "scenes/perception", "scenes/hallucination"}


@pytest.mark.parametrize("name", [*sorted(PAIRED), "pope", "gqa"])
def test_units_average_to_the_score(name):
    "MME sums two hundred points a subtask: its units must say the same as its score."
    rng, mme = np.random.default_rng(1), name.startswith("mme")
    rows = pd.DataFrame({"id": [f"{name}{k}" for k in range(120)], "benchmark": name})
    rows["group"] = [f"g{k // 2}" if name in PAIRED else None for k in range(120)]
    rows["subtask"] = [f"s{int(k > 89)}" if mme else "" for k in range(120)]
    rows["value"] = (rng.random(120) < 0.7) * 1.0
    rows = rows.assign(answer=["no", "yes"] * 60, parsed="yes")
    units = stages.units_of(name, rows)
    score = SCORERS[benchmark(name).scorer].combine(rows)["score"]
    assert 100 * np.mean(units) == pytest.approx(score, abs=0.01)
    assert len(units) == (60 if name in PAIRED else 120)
    if name == "scenes/hallucination":  # scored one by one, kept two by two
        assert units == rows.groupby("group", sort=False).value.mean().tolist()
    assert (score > 150) == mme  # a sum over two subtasks


def test_groups_of_unequal_size_count_by_their_questions():
    answers = pd.DataFrame({"id": [f"q{k}" for k in range(5)], "benchmark": "gqa"})
    answers["group"], answers["subtask"] = [*"aaaa", None], [*"xxxyx"]  # "a" of two subtasks
    answers["value"] = [1.0, 1.0, 0.0, 1.0, 0.0]
    units = stages.units_of("gqa", answers)
    assert len(units) == 3 and np.mean(units) == pytest.approx(3 / 5)
    assert units == pytest.approx([2 * 3 / 5, 3 / 5, 0], abs=1e-6)


# ---- ways of pruning beyond the paper's


def test_new_fields_change_no_key_at_their_defaults():
    smoke = load_profile("smoke")
    plain = Experiment("smoke-llava", "widthwise", 0.3, recovery="sft", fraction=0.2)
    for stage in ("scores", "plan", "student"):
        fields = set(experiments.METHOD_FIELDS) - {"start"}  # a student starts from its plan
        assert not set(stages.inputs_of(stage, plain, smoke)) & fields, stage
    starts = content_hash(stages.inputs_of("plan", plain, smoke))
    assert stages.inputs_of("student", plain, smoke)["start"] == starts
    found = stages.inputs_of("experiment", plain, smoke)
    assert not set(found) & set(experiments.METHOD_FIELDS)
    newton, flap = {"importance": "gauss_newton"}, {"importance": "flap", "reconstruct": "bias"}
    changes = [{}, newton, newton | {"allocation": "global"}]
    changes += [flap, flap | {"allocation": "standardized"}]
    changes += [{"shape": "uniform"}, {"reconstruct": "stream"}, {"reconstruct": "bias"}]
    changes += [{"quantize": how, "recovery": "none"} for how in ("none", *QUANTIZERS)]
    keys = {stages.subject_key(replace(plain, **change), smoke) for change in changes}
    assert len(keys) == len(changes) == 9 + len(QUANTIZERS)
    rounded = replace(plain, recovery="none", quantize="int8")
    assert stages.inputs_of("plan", plain, smoke) == stages.inputs_of("plan", rounded, smoke)


def test_a_refitted_student_is_the_refit_of_its_plan(tmp_path):
    smoke = load_profile("smoke")
    results = store.Store(tmp_path)
    e = Experiment("smoke-llava", "widthwise", 0.3, **OURS, calibration="stratified 64")
    plan = stages.plan_of(e, smoke, results, "cpu")
    model, processor = stages.teacher_of(e.model, smoke)
    batches = stages.calibration_batches_of(e, smoke, processor, "cpu")
    expected = reconstructed("stream", apply_plan(model, plan), model, batches, plan)
    pairs = zip(expected.parameters(), stages.student_of(e, smoke, results, "cpu").parameters())
    assert plan.meta["allocation"] == "global" and all(torch.equal(a, b) for a, b in pairs)
    assert results.keys("reconstruction") == sorted(stages.stage_keys(e, smoke)["reconstruction"])
    trained = replace(e, recovery="hidden_kd", fraction=0.2)
    assert stages.recovery_config(trained, smoke).lr == 1e-4
    assert stages.recovery_config(replace(trained, train="projector"), smoke).lr == 2e-3
    one, two = (stages.student_of(trained, smoke, results, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
