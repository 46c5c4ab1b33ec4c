"""Recovery: what is trained, towards what, and that a run can be killed, split and repeated."""

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.trainer_utils import sort_checkpoints

from mllm_compress.anatomy.families import anatomy
from mllm_compress.anatomy.streaming import weights_hash
from mllm_compress.data.batches import Collator, SizedCache, blocks, packed_mask
from mllm_compress.data.instructions import InstructionData
from mllm_compress.data.scenes import scene_data
from mllm_compress.pruning.plans import plan_none
from mllm_compress.recovery import training
from mllm_compress.recovery.best_state import held_out_samples
from mllm_compress.recovery.config import PAPER, RecoveryConfig, learning_rate, run_identity
from mllm_compress.recovery.states import SHARED_PREFIX, decoder_states, use_attention
from mllm_compress.recovery.steps import Batches, add_lora, layer_pairs, samples_per_step
from mllm_compress.recovery.training import NonFiniteLoss, RecoveryTrainer, recover
from mllm_compress.utils.files import content_hash
from mllm_compress.zoo.models import load_model

N = 8
SFT = {"losses": {"sft": 1}}
HIDDEN = {"losses": {"hidden_kd": 1}}
ONE_STEP = dict(batch_size=N, lr=1e-3)
TWO_STEPS = dict(batch_size=4, lr=1e-3)
WHOLE_ROWS = ONE_STEP | {"turns": "sequential"}


@pytest.fixture(scope="module")
def data():
    return scene_data("train", N)


@pytest.fixture(scope="module")
def run(pair, data):
    "Recover with options of the config; `models`, `samples` and `how` replace those above."

    def run(models=pair, samples=data, how={}, **options):
        student, teacher, processor = models
        quiet = {"cache": SizedCache(2**31), "device": "cpu", "progress": False} | how
        config = RecoveryConfig(**{"held_out": 0.0} | options)
        return recover(student, teacher, samples, config, processor, **quiet)

    return run


# -- the loss of a step, against the models' own forward pass ----------------------------------


def whole_batch(models, data):
    "Labels, and both models from pixels to logits at every position, on all samples at once."
    student, teacher, processor = models
    batch = Collator(processor, data, "sequential")([data[i] for i in range(len(data))])
    labels = batch.pop("labels")
    with torch.no_grad():
        return labels, *(model(**batch, output_hidden_states=True) for model in (student, teacher))


def test_sft_equals_the_models_own_loss(run, pair, data):
    labels, student, _ = whole_batch(pair, data)
    expected = F.cross_entropy(student.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert run(**SFT, **WHOLE_ROWS).history.sft[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "losses", [["logits_kd"], ["reverse_logits_kd"], ["hidden_kd", "logits_kd"]], ids="+".join
)
def test_all_positions_equal_the_original(run, pair, data, losses):
    "The original's formulas on full sequences, padding included."
    labels, student, teacher = whole_batch(pair, data)
    log_s, log_t = (F.log_softmax(out.logits / 2, -1) for out in (student, teacher))
    kl = lambda p, q: F.kl_div(p, q, reduction="sum", log_target=True) * 4 / len(labels)
    terms = {
        "logits_kd": kl(log_s, log_t),
        "reverse_logits_kd": kl(log_t, log_s),
        "hidden_kd": F.mse_loss(student.hidden_states[-1], teacher.hidden_states[-1]),
    }
    assert (labels[:, -1] == -100).any()  # there is padding
    found = run(losses=dict.fromkeys(losses, 1), positions="all", **WHOLE_ROWS).history.loss[0]
    assert found == pytest.approx(sum(terms[name] for name in losses).item(), rel=1e-4)


def test_answer_positions_are_the_default(run, pair, data):
    labels, student, teacher = whole_batch(pair, data)
    where = labels[:, 1:] != -100
    difference = (student.hidden_states[-1] - teacher.hidden_states[-1])[:, :-1]
    found = run(**WHOLE_ROWS).history
    expected = difference[where].square().mean().item()
    assert found.hidden_kd[0] == pytest.approx(expected, rel=1e-4)
    assert found.loss[0] == pytest.approx(0.5 * found.sft[0] + 0.5 * found.hidden_kd[0], rel=1e-6)


def test_chosen_layers(run, pair, data):
    labels, student, teacher = whole_batch(pair, data)
    where = labels[:, 1:] != -100
    states = lambda out: [state[:, :-1][where] for state in out.hidden_states[1:]]
    expected = F.mse_loss(torch.stack(states(student)), torch.stack(states(teacher)))
    found = run(**HIDDEN, hidden_layers="every", **WHOLE_ROWS).history.hidden_kd[0]
    assert found == pytest.approx(expected.item(), rel=1e-4)


FINAL = ("final", "final")


@pytest.mark.parametrize(
    "layers, kept, pairs",
    [
        ("final", (0, 3), (FINAL,)),
        ("every", (0, 1, 2), ((0, 0), (1, 1), FINAL)),
        ("every", (0, 3, 4), ((0, 2), (1, 3), FINAL)),  # before the next layer that is left
        ("quarters", tuple(range(20)), ((4, 4), (9, 9), (14, 14), FINAL)),
        ("quarters", (0, 1, 2, 3, 4, 9, 18, 19), ((1, 1), (3, 3), (5, 17), FINAL)),
        ("quarters", (0, 9, 19), ((0, 8), (1, 18), FINAL)),
        ("quarters", (0,), (FINAL,)),
    ],
)
def test_pairs_of_layers(layers, kept, pairs):
    assert layer_pairs(layers, kept) == pairs


def test_packed_questions_equal_separate_ones(run, data):
    "A packed row is a saving, not another loss."
    single = [
        s | {"conversations": s["conversations"][i : i + 2]}
        for s in data.samples
        for i in range(0, len(s["conversations"]), 2)
    ]
    single = InstructionData(single, images=data.images)
    apart = run(samples=single, batch_size=len(single), lr=1e-3).history
    assert run(**ONE_STEP).history.loss[0] == pytest.approx(apart.loss[0], rel=1e-4)


def test_short_rows_and_small_passes_are_a_saving_and_nothing_else(run, monkeypatch):
    options = ONE_STEP | {"losses": {"sft": 1, "hidden_kd": 1, "logits_kd": 1}}
    short, split = run(**options).history, run(**options, passes=4).history
    monkeypatch.setattr("mllm_compress.recovery.steps.block_size", lambda config: None)
    whole = run(**options).history
    for column in ("loss", "sft", "hidden_kd", "logits_kd", "grad_norm"):
        assert short[column][0] == pytest.approx(whole[column][0], rel=1e-5)
        assert split[column][0] == pytest.approx(whole[column][0], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi", "phi3"])
@pytest.mark.parametrize("added", [False, True])
def test_a_borrowed_prefix_is_the_prefix(tiny_lm, family, added):
    "A block's states are those of the whole row, whatever the attention and its projections."
    model, g = tiny_lm(family), torch.Generator().manual_seed(0)
    parts, segment = anatomy(model), [0] * 5 + [1] * 4 + [2] * 3 + [3] * 6
    row = {
        "segment": segment,
        "ids": torch.randint(3, 60, (18,), generator=g).tolist(),
        "position": [*range(5), *range(5, 9), *range(5, 8), *range(5, 11)],
    }
    cut, first = blocks(row, 9), torch.tensor([0, 0])
    assert [len(block["ids"]) for block in cut] == [9, 9]
    batch = lambda rows: {
        "input_ids": torch.tensor([r["ids"] for r in rows]),
        "position_ids": torch.tensor([r["position"] for r in rows]),
    }
    whole = batch([row]) | {"attention_mask": packed_mask(torch.tensor([segment]))}
    mask = packed_mask(torch.tensor([block["segment"] for block in cut]), first)
    mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9) if added else mask
    short = batch(cut) | {"attention_mask": mask, "first_row": first}
    some = torch.rand(2, 9, generator=g) < 0.3
    with torch.no_grad():
        expected = decoder_states(parts, whole, None, (0, "final"))
        with use_attention(model, SHARED_PREFIX):
            found = decoder_states(parts, short, None, (0, "final"))
            few = decoder_states(parts, short, None, (0, "final"), some)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name in (0, "final"):
        close(found[name].reshape(18, -1), expected[name][0])
        close(few[name][some], found[name][some])
    assert not torch.allclose(few["final"][~some], found["final"][~some])  # not finished there


def test_ahead_or_while_training_is_the_same(run, data):
    "With and without pictures, and with a question too long for a block."
    long = {"from": "human", "value": "<image>\n" + "is there a red circle " * 30}
    samples = [
        {k: v for k, v in s.items() if k != "image"} if i % 2 else s
        for i, s in enumerate(data.samples)
    ]
    samples[0] = samples[0] | {"conversations": [long, {"from": "gpt", "value": "yes"}]}
    mixed = InstructionData(samples, images=data.images)
    options = TWO_STEPS | {"losses": {"sft": 1, "hidden_kd": 1, "logits_kd": 1}}
    ahead = run(samples=mixed, **options).history.loss
    now = run(samples=mixed, how={"cache": SizedCache(0)}, **options).history.loss
    assert ahead.tolist() == pytest.approx(now.tolist(), rel=1e-4, abs=1e-5)


# -- what is trained ---------------------------------------------------------------------------


def changed(before, after):
    after = dict(after.named_parameters())
    return {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}


def test_projector_alone(run, pair, data):
    student, teacher, _ = pair
    before = weights_hash(student, teacher)
    model = run(train="projector", batch_size=4, lr=1e-2).model
    projector = {name for name, _ in student.named_parameters() if "projector" in name}
    assert changed(student, model) == projector
    assert weights_hash(student, teacher) == before  # neither was touched
    embedding = lambda model: anatomy(model).embed_tokens.weight.data_ptr()
    assert embedding(model) == embedding(student)  # no second copy
    text = [{k: v for k, v in s.items() if k != "image"} for s in data.samples]
    model = run(samples=InstructionData(text), train="projector", **ONE_STEP).model
    assert changed(student, model) == set()


def test_a_warmup_may_take_all_steps(tmp_path):
    config = RecoveryConfig(**SFT, warmup=1.0)
    assert training.training_arguments(config, tmp_path, 0, None, {}).get_warmup_steps(100) == 100


def test_projector_and_lm_in_full(run, pair):
    result = run(**TWO_STEPS, warmup=0.0, epochs=3)
    tower = {name for name, _ in pair[0].named_parameters() if "vision_tower" in name}
    assert changed(pair[0], result.model) == dict(pair[0].named_parameters()).keys() - tower
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]
    assert list(result.history.step) == [1, 2, 3, 4, 5, 6]


def test_the_teacher_keeps_its_own_projector(run, pair, data):
    "The original feeds the teacher the student's image embeddings, so its target drifts."
    _, teacher, processor = pair
    moved = copy.deepcopy(teacher)
    anatomy(moved).projector.linear_2.weight.data *= 2
    labels, student, dense = whole_batch((moved, teacher, processor), data)
    where = labels[:, 1:] != -100
    difference = (student.hidden_states[-1] - dense.hidden_states[-1])[:, :-1]
    expected = difference[where].square().mean().item()
    found = run((moved, teacher, processor), **HIDDEN, **WHOLE_ROWS).history.hidden_kd[0]
    assert expected > 1e-4 and found == pytest.approx(expected, rel=1e-4)


def adapted_layers(names):
    return {n.removeprefix("base_model.model.").split(".lora_A")[0] for n in names if "lora_A" in n}


def test_lora_is_merged(run, pair):
    student, names = pair[0], {name for name, _ in pair[0].named_parameters()}
    result = run(lora={"r": 4, "lora_alpha": 8}, batch_size=4, lr=1e-2)
    model, linears = result.model, {n + ".weight" for n in adapted_layers(result.adapters)}
    projector = {name for name in names if "projector" in name}
    assert type(model) is type(student) and changed(student, model) == linears | projector
    assert {name for name, _ in model.named_parameters()} == names


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi", "phi3"])
def test_lora_reaches_every_linear_layer_of_every_family(tiny_lm, family):
    model, ids = tiny_lm(family), torch.arange(6)[None]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    before = model(ids).logits
    adapted = add_lora(model, {"r": 2})
    layers = adapted_layers(name for name, _ in adapted.named_parameters())
    assert layers == {n for n in linears if "lm_head" not in n}
    assert torch.equal(adapted(ids).logits, before)  # an adapter starts at zero
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    after = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, after, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(after, before)


# -- never worse than the start ----------------------------------------------------------------

WILD = {"batch_size": 3, "epochs": 4, "warmup": 0.0, "held_out": 0.25, "turns": "sequential"}


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_rate_that_destroys_the_student_returns_the_start(run, pair, lora):
    "The student equals its teacher, so that every step is away from it."
    perfect, how = (pair[1], pair[1], pair[2]), {"plan": plan_none(pair[1])}
    options = {"losses": {"sft": 0.01, "hidden_kd": 1}, "lr": 0.5, "lora": lora, "patience": 3}
    result = run(perfect, how=how, **options | WILD)
    assert result.best_step == 0 and "better than the start" in str(result)
    assert weights_hash(result.model) == weights_hash(pair[1])
    assert result.looks.held_out_loss[0] < result.looks.held_out_loss[1:].min()


def test_the_best_state_is_returned(run, pair, data):
    "Its loss on the held-out samples is that of its look, and the lowest."
    result = run(**SFT, **WILD, lr=2e-2, schedule="constant")
    looks = result.looks.set_index("step").held_out_loss
    assert 0 < result.best_step == looks.idxmin() < looks.index[-1]
    held = [data.samples[i] for i in held_out_samples([s["id"] for s in data.samples], 0.25)]
    held = InstructionData(held, images=data.images)
    labels, out, _ = whole_batch((result.model, *pair[1:]), held)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert len(held_out_samples([*"abc"], 0.9)) == 2  # one is left to train on
    assert len(held) == 2 and loss.item() == pytest.approx(looks[result.best_step], rel=1e-4)
    assert result.samples == 6


def test_validation_data_decide_in_place_of_a_part_of_the_data(run, data):
    "Wrong answers can be learned, which is better on held-out ones, and worse on right ones."
    (model, processor), said = load_model("tiny-llava"), {"from": "gpt", "value": "of another kind"}
    wrong = [s | {"conversations": [s["conversations"][0], said]} for s in data.samples]
    how = SFT | TWO_STEPS | {"models": (model, model, processor), "held_out": 0.25}
    how["samples"], whole = InstructionData(wrong, images=data.images), {"plan": plan_none(model)}
    assert run(**how, how=whole).best_step > 0
    kept = run(**how, how=whole | {"validation": scene_data("validation", 3)})
    assert kept.samples == N and kept.best_step == 0 and kept.looks.held_out_loss[0] < 0.1
    assert weights_hash(kept.model) == weights_hash(model)
    with pytest.raises(ValueError, match="held_out=0 returns the last state"):
        run(how={"validation": data})
    how["samples"] = [{"question": f"{k}?", "answer": "yes"} for k in range(N)]
    with pytest.raises(ValueError, match="validation is the data of the training"):
        run(**how, how=whole | {"validation": how["samples"][:3:-1]})


def test_the_search_picks_the_best_rate_on_the_held_out_part(run):
    result = run(**HIDDEN, **WILD, lr="search")
    first, last = (result.search[result.search["round"] == i] for i in (0, 1))
    assert list(first.lr) == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3])  # around that of the table
    assert list(first.steps) == [4] * 4 and list(last.steps) == [8] * 2
    start = result.looks.held_out_score[0]
    ranked = lambda rows: rows.assign(forgot=rows.held_out_score < start).sort_values(
        ["forgot", "held_out_loss"]
    )
    assert set(last.lr) == set(ranked(first).lr[:2]) and result.lr == ranked(last).lr.iloc[0]
    assert weights_hash(run(**HIDDEN, **WILD, lr=result.lr).model) == weights_hash(result.model)
    assert f"found in {4 * 4 + 2 * 8} steps" in str(result)


def test_later_options_are_in_a_key_only_where_they_are_used():
    config = lambda share: training.settled(RecoveryConfig(batch_size=32, held_out=share))
    old, new = (run_identity(asdict(config(share))) for share in (0.0, 0.1))
    assert content_hash(old) == "7ec7ad6f5c4f8ae1efdb"  # before there were any
    assert new == old | {"held_out": 0.1, "patience": 4}


# -- samples per step --------------------------------------------------------------------------


@given(
    samples=st.integers(1, 10**6),
    epochs=st.floats(0.01, 100),
    passes=st.none() | st.integers(1, 64),
    processes=st.integers(1, 8),
)
def test_a_batch_leaves_the_run_its_steps_and_no_pass_empty(samples, epochs, passes, processes):
    config = RecoveryConfig(epochs=epochs, passes=passes)
    size, least = samples_per_step(config, samples, processes), processes * (passes or 1)
    assert max(4, least) <= size <= max(32, least)
    if size > max(4, least):
        assert samples * epochs / size >= 40
    if size < 32:  # one more would leave fewer steps
        assert int(samples * epochs) // (size + 1) < 40
    fixed = RecoveryConfig(epochs=epochs, passes=passes, batch_size=7)
    assert samples_per_step(fixed, samples, processes) == 7


def test_few_samples_are_trained_on_in_small_batches(run):
    "Eight samples: two steps of four; one of eight, if it is asked for."
    assert len(run(lr=1e-3).history) == 2 and len(run(**ONE_STEP).history) == 1
    assert weights_hash(run(lr=1e-3).model) == weights_hash(run(**TWO_STEPS).model)


# -- the same numbers again --------------------------------------------------------------------


def test_a_seed_decides_everything(run):
    options = TWO_STEPS | {"lora": {"r": 2, "lora_dropout": 0.1}}
    one, two, other = (weights_hash(run(**options, seed=s).model) for s in (0, 0, 1))
    assert one == two != other


def test_passes_and_checkpointing_do_not_change_a_step(run):
    columns = ["loss", "sft", "hidden_kd", "grad_norm"]
    plain = run(**TWO_STEPS).history[columns].values
    for option in ({"passes": 2}, {"gradient_checkpointing": True}):
        other = run(**TWO_STEPS, **option).history[columns].values
        assert other == pytest.approx(plain, rel=2e-4, abs=1e-5)


def test_bf16_follows_float32(run, pair):
    full, half = (run(**TWO_STEPS, precision=p) for p in ("fp32", "bf16"))
    losses = [result.history.loss.tolist() for result in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2, abs=1e-2)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    attention = lambda model: anatomy(model).text_config._attn_implementation
    assert attention(half.model) == attention(pair[0])


def test_teacher_outputs_are_computed_once(run, monkeypatch):
    calls, compute = [], training.compute_teacher_outputs
    counted = lambda *a, **k: calls.append(1) or compute(*a, **k)
    monkeypatch.setattr(training, "compute_teacher_outputs", counted)
    cache = SizedCache(2**31)
    first = run(**TWO_STEPS, how={"cache": cache})
    run(batch_size=4, lr=1e-2, seed=1, how={"cache": cache})  # another run
    again = run(**TWO_STEPS, how={"cache": cache})
    assert len(calls) == 1 and weights_hash(first.model) == weights_hash(again.model)
    run(**TWO_STEPS, turns="sequential", how={"cache": cache})  # other rows, other outputs
    assert len(calls) == 2


def test_batches_share_similar_lengths_and_lose_nothing():
    lengths = [i % 17 for i in range(100)]
    grouped = list(Batches(lengths, 10, seed=1))
    assert sorted(sum(grouped, [])) == list(range(100))
    assert grouped != list(Batches(lengths, 10, seed=2))
    width = lambda batch: max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
    spread = lambda batches: sum(map(width, batches)) / len(batches)
    assert spread(grouped) < 3 < spread(list(Batches([1] * 100, 10)))
    three = [list(Batches(lengths, 12, passes=2, processes=3, rank=r)) for r in range(3)]
    assert len({len(part) for part in three}) == 1
    assert sorted(i for part in three for batch in part for i in batch) == list(range(100))
    for samples, size in ((3, 8), (8, 3)):
        with pytest.raises(ValueError, match="3 samples cannot be split into 4 parts"):
            Batches([1] * samples, size, passes=2, processes=2)


def test_every_epoch_has_its_own_order(run, monkeypatch):
    seen, compute_loss = [], RecoveryTrainer.compute_loss

    def seeing(self, model, inputs, **kwargs):
        seen.append(inputs["index"].tolist())
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", seeing)
    run(**SFT, **TWO_STEPS, epochs=2)
    assert seen[:2] != seen[2:]
    assert all(sorted(sum(part, [])) == list(range(N)) for part in (seen[:2], seen[2:]))


# -- safety ------------------------------------------------------------------------------------

TWO = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 --standalone".split()
SAVED = ["checkpoint-2", "checkpoint-4"]


def process(tmp_path, launcher=(sys.executable,), name="result.json", **options):
    "tests/recovery_run.py in its own process; its result."
    result = tmp_path / name
    script = str(Path(__file__).parent / "recovery_run.py")
    code = subprocess.run(
        [*launcher, script, json.dumps(options | {"result": str(result)})],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    return code, json.loads(result.read_text()) if result.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("lr, left", [(1e-3, ["checkpoint-3"]), ("search", [])])  # or in a trial
def test_killed_and_resumed_is_bit_identical(tmp_path, lr, left):
    lora = {"lora": {"r": 4, "lora_dropout": 0.1}, "held_out": 0.25, "patience": 9}
    config = {"batch_size": 4, "epochs": 6, "lr": lr} | lora  # a look at every second step
    _, whole = process(tmp_path, name="whole.json", config=config)
    options = {"config": config, "folder": str(tmp_path / "run"), "save_every": 3}
    killed, nothing = process(tmp_path, **options, kill_at=5)
    assert killed.returncode == -9 and nothing is None
    assert [Path(p).name for p in sort_checkpoints(options["folder"])] == left
    written = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert written == ({".json", ".safetensors"} if left else {".json"})  # nothing pickled
    _, resumed = process(tmp_path, **options)
    assert resumed == whole and len(whole["looks"]["step"]) == 10


@pytest.mark.slow
def test_two_processes_follow_the_loss_curve_of_one(tmp_path):
    config = {"batch_size": 4, "epochs": 2, "lr": 1e-3}
    _, one = process(tmp_path, name="one.json", config=config, n=14)
    code, two = process(tmp_path, TWO, name="two.json", config=config, n=14)
    assert two is not None, code.stderr[-2000:]
    for column in ("loss", "sft", "hidden_kd"):
        assert two["history"][column] == pytest.approx(one["history"][column], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_fsdp(tmp_path):
    "The losses of one process; the same bits when killed and resumed; a whole model at the end."
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "held_out": 0.2, "patience": 9}
    options = {"config": config, "n": 18}  # 14 are trained on
    sharded = options | {"fsdp": True, "trainer": {"fsdp": True, "fsdp_config": sharding}}
    _, one = process(tmp_path, name="one.json", **options)
    code, two = process(tmp_path, TWO, name="two.json", **sharded)
    assert two is not None, code.stderr[-2000:]
    assert one["sharded"] == 0 and two["sharded"] > 0
    # before 2.10, torch got the norm of gradients in slices wrong
    right = torch.__version__ >= torch.torch_version.TorchVersion("2.10")
    for column in ("loss", "grad_norm") if right else ("loss",):
        assert two["history"][column] == pytest.approx(one["history"][column], rel=1e-4, abs=1e-6)
    folder = {"folder": str(tmp_path / "run"), "save_every": 2}
    _, nothing = process(tmp_path, TWO, **sharded, **folder, kill_at=5)
    assert nothing is None and [Path(p).name for p in sort_checkpoints(folder["folder"])] == SAVED
    code, resumed = process(tmp_path, TWO, **sharded, **folder)
    assert resumed is not None, code.stderr[-2000:]
    assert resumed["weights"] == two["weights"]
    assert resumed["history"]["loss"] == two["history"]["loss"]
    assert resumed["looks"] == two["looks"] and two["chosen"] == one["chosen"]
    checkpoint = load_file(sort_checkpoints(folder["folder"])[-1] + "/weights.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.items()}
    assert shapes and shapes.items() <= two["shapes"].items()


@pytest.mark.slow
def test_accelerate_launch_shards_adapters_on_half_precision(tmp_path):
    "As the real models: frozen bfloat16, float32 adapters and projector, gradient checkpointing."
    lora = {"lora": {"r": 4, "lora_alpha": 8}, "precision": "bf16", "gradient_checkpointing": True}
    config = {"batch_size": 4, "epochs": 2, "lr": 1e-3} | lora
    options = {"config": config, "n": 14, "dtype": "bfloat16"}
    wrapped = "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap"
    machines = "--num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no"
    line = f"--use_fsdp --fsdp_version 2 {wrapped} LlamaDecoderLayer {machines}"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        line += f" --main_process_port {free.getsockname()[1]}"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", *line.split())
    _, one = process(tmp_path, name="one.json", **options)
    code, two = process(tmp_path, launcher, name="two.json", **options, fsdp=True)
    assert two is not None, code.stderr[-2000:]
    assert two["sharded"] > 0 and two["history"]["loss"][-1] < 0.8 * two["history"]["loss"][0]
    assert two["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=2e-2)
    assert two["shapes"] == one["shapes"]


def test_another_runs_folder_is_refused(run, tmp_path):
    saving = {"folder": tmp_path, "save_every": 1}
    run(**SFT, **ONE_STEP, how=saving)
    with pytest.raises(ValueError, match="another run .different config"):
        run(**SFT, batch_size=N, lr=2e-3, how=saving)
    (tmp_path / "run.json").write_text('{"model": "a", "split": "test"}')  # of stored answers
    with pytest.raises(ValueError, match="another run .different .*split"):
        run(**SFT, **ONE_STEP, how=saving)


def test_a_loss_that_is_no_number_stops_the_run(run, data, tmp_path):
    "So high a learning rate destroys the weights in step 1; the loss of step 2 shows it."
    options = SFT | {"batch_size": 4, "lr": 1e30, "warmup": 0.0, "epochs": 2}
    with pytest.raises(NonFiniteLoss, match="checkpoint-1") as error:
        run(**options, how={"folder": tmp_path, "save_every": 1})
    assert sum(s["id"] in str(error.value) for s in data.samples) == 4
    assert "at step 1, " in str(error.value) and sort_checkpoints(tmp_path)


# -- wrong input -------------------------------------------------------------------------------


def test_models_that_do_not_fit(run, pair):
    from mllm_compress.zoo.tiny_models import tiny_model

    student, teacher, processor = pair
    smaller, blind = copy.deepcopy(student), copy.deepcopy(student)
    smaller.resize_token_embeddings(len(processor.tokenizer) - 5)
    anatomy(blind).vision_tower.requires_grad_(False)
    next(anatomy(blind).vision_tower.parameters()).data += 1
    for models, says in (
        (
            (tiny_model("llava", 2, hidden_size=48, head_dim=6), teacher),
            "differ in hidden_size .48 and 96",
        ),
        ((smaller, teacher), "differ in vocab_size"),
        ((blind, teacher), "different vision towers"),
        ((student, None), "hidden_kd needs a teacher"),
    ):
        with pytest.raises(ValueError, match=says):
            run((*models, processor), **ONE_STEP)


def test_no_supervised_token(run, data):
    silent = {"from": "gpt", "value": ""}
    empty = [s | {"conversations": [s["conversations"][0], silent]} for s in data.samples]
    empty = InstructionData(empty, images=data.images)
    with pytest.raises(ValueError, match="in 8 of 8 samples, .*scene-train.* after token 18 "):
        run(samples=empty, **SFT, max_length=18, **ONE_STEP)


def test_learning_rates():
    rate = lambda **options: learning_rate(RecoveryConfig(**options))
    assert rate(train="projector") == 2e-3 and rate(**SFT) == 1e-3
    assert rate(lora={"r": 2}) == 2e-5 and rate(**PAPER["internvl"]) == 4e-5
