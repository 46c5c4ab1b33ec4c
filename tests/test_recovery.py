"""Recovery: what is trained, towards what, and that a run can be killed, split and repeated."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mllm_compress.anatomy.families import Anatomy, anatomy
from mllm_compress.anatomy.streaming import weights_hash
from mllm_compress.data.batches import Collator, blocks, borrowing_mask, packed_mask
from mllm_compress.data.instructions import InstructionData
from mllm_compress.data.scenes import scene_data
from mllm_compress.recovery import training
from mllm_compress.recovery.config import PAPER, RecoveryConfig, config_from_dict, learning_rate
from mllm_compress.recovery.states import (
    SHARED_PREFIX,
    TeacherCache,
    decoder_states,
    use_attention,
)
from mllm_compress.recovery.steps import Batches, add_lora, layer_pairs, lora_targets
from mllm_compress.recovery.training import NonFiniteLoss, RecoveryTrainer, checkpoints, recover

N = 8


@pytest.fixture(scope="module")
def data():
    return scene_data("train", N)


@pytest.fixture(scope="module")
def pair(tiny_llava):
    "A student whose decoder was disturbed, its teacher, and the processor."
    teacher, processor = tiny_llava
    return disturbed(teacher), teacher, processor


def disturbed(model, seed=1):
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in anatomy(other).decoder.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    return other


def run(pair, data, config, **kwargs):
    student, teacher, processor = pair
    return recover(
        student,
        teacher,
        data,
        config,
        processor,
        **{"cache": TeacherCache(), "device": "cpu", "progress": False} | kwargs,
    )


ONE_STEP = dict(batch_size=N, lr=1e-3)


# -- the loss of a step, against the models' own forward pass ----------------------------------


def whole_batch(pair, data, turns="sequential"):
    "Both models from pixels to logits at every position, on all samples at once."
    student, teacher, processor = pair
    batch = Collator(processor, data, turns)([data[i] for i in range(len(data))])
    with torch.no_grad():
        out = [
            m(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
            for m in (student, teacher)
        ]
    return batch["labels"], *out


def test_sft_equals_the_models_own_loss(pair, data):
    labels, student, _ = whole_batch(pair, data)
    own = F.cross_entropy(student.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert run(
        pair, data, RecoveryConfig(losses={"sft": 1}, turns="sequential", **ONE_STEP)
    ).history.sft[0] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    "weights, strategy",
    [
        ({"logits_kd": 1}, "kl"),
        ({"reverse_logits_kd": 1}, "rkl"),
        ({"hidden_kd": 1, "logits_kd": 1}, "l2+kl"),
    ],
)
def test_all_positions_equal_the_original(pair, data, weights, strategy):
    "The original's formulas on full sequences, padding included."
    labels, student, teacher = whole_batch(pair, data)
    log_s, log_t = (F.log_softmax(out.logits / 2, -1) for out in (student, teacher))
    terms = {
        "kl": F.kl_div(log_s, log_t, reduction="sum", log_target=True) * 4 / len(labels),
        "rkl": F.kl_div(log_t, log_s, reduction="sum", log_target=True) * 4 / len(labels),
        "l2": F.mse_loss(student.hidden_states[-1], teacher.hidden_states[-1]),
    }
    expected = sum(terms[name] for name in strategy.split("+"))
    assert (labels[:, -1] == -100).any()  # there is padding
    found = run(
        pair, data, RecoveryConfig(losses=weights, positions="all", turns="sequential", **ONE_STEP)
    ).history
    assert found.loss[0] == pytest.approx(expected.item(), rel=1e-4)


def test_answer_positions_are_the_default(pair, data):
    labels, student, teacher = whole_batch(pair, data)
    where = labels[:, 1:] != -100
    expected = (
        (student.hidden_states[-1] - teacher.hidden_states[-1])[:, :-1][where].square().mean()
    )
    found = run(pair, data, RecoveryConfig(turns="sequential", **ONE_STEP)).history
    assert found.hidden_kd[0] == pytest.approx(expected.item(), rel=1e-4)
    assert found.loss[0] == pytest.approx(0.5 * found.sft[0] + 0.5 * found.hidden_kd[0], rel=1e-6)


def test_chosen_layers(pair, data):
    labels, student, teacher = whole_batch(pair, data)
    where = labels[:, 1:] != -100
    state = lambda out, layer: out.hidden_states[layer + 1][:, :-1][
        where
    ]  # true for all layers but the last
    expected = sum(F.mse_loss(state(student, i), state(teacher, i)) for i in (0, 2)) / 2
    found = run(
        pair,
        data,
        RecoveryConfig(
            losses={"hidden_kd": 1}, hidden_layers=(0, 2), turns="sequential", **ONE_STEP
        ),
    ).history
    assert found.hidden_kd[0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "name, kept, pairs",
    [
        ("final", (0, 3), ()),
        ("every", (0, 1, 2), ((0, 0), (1, 1))),
        ("every", (0, 3, 4), ((0, 2), (1, 3))),  # before the next layer that is left
        ("quarters", tuple(range(20)), ((4, 4), (9, 9), (14, 14))),
        ("quarters", (0, 1, 2, 3, 4, 9, 18, 19), ((1, 1), (3, 3), (5, 17))),
        ("quarters", (0, 9, 19), ((0, 8), (1, 18))),
        ("quarters", (0, 9), ((0, 8),)),
        ("quarters", (0,), ()),
    ],
)
def test_named_layers_aim_at_the_state_before_the_next_layer_kept(name, kept, pairs):
    assert layer_pairs(name, kept) == (*pairs, ("final", "final"))


def test_packed_questions_equal_separate_ones(pair, data):
    "A packed row is a saving, not another loss."
    student, teacher, processor = pair
    single = InstructionData(
        [
            s | {"conversations": s["conversations"][i : i + 2]}
            for s in data.samples
            for i in range(0, len(s["conversations"]), 2)
        ],
        images=data.images,
    )
    packed = run(pair, data, RecoveryConfig(**ONE_STEP)).history
    apart = run(pair, single, RecoveryConfig(batch_size=len(single), lr=1e-3)).history
    assert packed.loss[0] == pytest.approx(apart.loss[0], rel=1e-4)


def test_short_rows_and_small_passes_are_a_saving_and_nothing_else(pair, data, monkeypatch):
    config = RecoveryConfig(losses={"sft": 1, "hidden_kd": 1, "logits_kd": 1}, **ONE_STEP)
    short = run(pair, data, config).history
    monkeypatch.setattr("mllm_compress.recovery.steps.block_size", lambda config: None)
    whole = run(pair, data, config).history
    split = run(pair, data, RecoveryConfig(losses=config.losses, passes=4, **ONE_STEP)).history
    for column in ("loss", "sft", "hidden_kd", "logits_kd", "grad_norm"):
        assert short[column][0] == pytest.approx(whole[column][0], rel=1e-5) and split[column][
            0
        ] == pytest.approx(whole[column][0], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi", "phi3"])
@pytest.mark.parametrize("added", [False, True])
def test_a_borrowed_prefix_is_the_prefix(tiny_lm, family, added):
    "A block's states are those of the whole row, whatever the attention and its projections."
    model, g = tiny_lm(family), torch.Generator().manual_seed(0)
    parts = anatomy(model)
    segment = [0] * 5 + [1] * 4 + [2] * 3 + [3] * 6
    row = {
        "segment": segment,
        "ids": torch.randint(3, 60, (18,), generator=g).tolist(),
        "position": [*range(5), *range(5, 9), *range(5, 8), *range(5, 11)],
    }
    cut = blocks(row, 9)
    assert [len(b["ids"]) for b in cut] == [9, 9]
    batch = lambda rows: {
        "input_ids": torch.tensor([r["ids"] for r in rows]),
        "position_ids": torch.tensor([r["position"] for r in rows]),
    }
    whole = batch([row]) | {"attention_mask": packed_mask(torch.tensor([segment]))}
    first = torch.tensor([0, 0])
    short = batch(cut) | {
        "attention_mask": borrowing_mask(torch.tensor([b["segment"] for b in cut]), first),
        "first_row": first,
    }
    if added:
        short["attention_mask"] = torch.zeros(short["attention_mask"].shape).masked_fill(
            ~short["attention_mask"], -1e9
        )
    with torch.no_grad():
        expected = decoder_states(parts, whole, None, (0, "final"))
        with use_attention(model, SHARED_PREFIX):
            found = decoder_states(parts, short, None, (0, "final"))
        some = torch.rand(2, 9, generator=g) < 0.3
        with use_attention(model, SHARED_PREFIX):
            few = decoder_states(parts, short, None, (0, "final"), some)
    for name in (0, "final"):
        torch.testing.assert_close(
            found[name].reshape(18, -1), expected[name][0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(few[name][some], found[name][some], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        few["final"][~some], found["final"][~some]
    )  # elsewhere the last layer was not finished


def test_ahead_or_while_training_is_the_same(pair, data):
    config = RecoveryConfig(
        losses={"sft": 1, "hidden_kd": 1, "logits_kd": 1}, batch_size=4, lr=1e-3
    )
    ahead, now = run(pair, data, config), run(pair, data, config, cache=TeacherCache(limit=0))
    torch.testing.assert_close(
        torch.tensor(ahead.history.loss), torch.tensor(now.history.loss), rtol=1e-4, atol=1e-5
    )


# -- what is trained ---------------------------------------------------------------------------


def changed(before, after):
    after = dict(after.named_parameters())
    return {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}


def test_projector_alone(pair, data):
    student, teacher, _ = pair
    before = weights_hash(student, teacher)
    model = run(pair, data, RecoveryConfig(train="projector", batch_size=4, lr=1e-2)).model
    moved = changed(student, model)
    assert (
        moved
        and all("projector" in name for name in moved)
        and len(moved) == len(list(anatomy(student).projector.parameters()))
    )
    assert weights_hash(student, teacher) == before  # neither was touched
    assert (
        anatomy(model).embed_tokens.weight.data_ptr()
        == anatomy(student).embed_tokens.weight.data_ptr()
    )  # no second copy


def test_projector_and_lm_in_full(pair, data):
    student = pair[0]
    result = run(pair, data, RecoveryConfig(batch_size=4, lr=1e-3, warmup=0.0, epochs=3))
    moved, tower = (
        changed(student, result.model),
        {n for n, _ in student.named_parameters() if "vision_tower" in n},
    )
    assert moved == {n for n, _ in student.named_parameters()} - tower
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0] and list(
        result.history.step
    ) == [1, 2, 3, 4, 5, 6]


def test_an_identical_teacher_leaves_the_student_alone(tiny_llava, data):
    teacher, processor = tiny_llava
    result = run(
        (teacher, teacher, processor),
        data,
        RecoveryConfig(losses={"hidden_kd": 1}, batch_size=4, lr=1e-3),
    )
    assert result.history.hidden_kd.max() < 1e-8


def test_the_teacher_keeps_its_own_projector(pair, data):
    "The original feeds the teacher the student's image embeddings, so its target drifts."
    student, teacher, processor = pair
    moved = copy.deepcopy(teacher)
    anatomy(moved).projector.linear_2.weight.data *= 2
    labels, _, own = whole_batch((student, teacher, processor), data)
    _, other, _ = whole_batch((moved, teacher, processor), data)
    where = labels[:, 1:] != -100
    expected = (other.hidden_states[-1] - own.hidden_states[-1])[:, :-1][where].square().mean()
    found = run(
        (moved, teacher, processor),
        data,
        RecoveryConfig(losses={"hidden_kd": 1}, turns="sequential", **ONE_STEP),
    ).history
    assert expected > 1e-4 and found.hidden_kd[0] == pytest.approx(expected.item(), rel=1e-4)


def test_lora_is_merged(pair, data):
    student = pair[0]
    model = run(
        pair, data, RecoveryConfig(lora={"r": 4, "lora_alpha": 8}, batch_size=4, lr=1e-2)
    ).model
    moved = changed(student, model)
    linears = {n + ".weight" for n in lora_targets(student)}
    projector = {n for n, _ in student.named_parameters() if "projector" in n}
    assert type(model) is type(student) and moved == linears | projector
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in student.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi", "phi3"])
def test_lora_reaches_every_linear_layer_of_every_family(tiny_lm, family):
    model = tiny_lm(family)
    inner = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]
    assert sorted(lora_targets(model)) == sorted(inner)
    ids = torch.arange(6)[None]
    before = model(ids).logits
    adapted = add_lora(model, {"r": 2})
    assert torch.equal(adapted(ids).logits, before)  # an adapter starts at zero
    for n, p in adapted.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    after = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, after, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(after, before)


def test_samples_without_an_image(pair, data):
    mixed = InstructionData(
        [
            {k: v for k, v in s.items() if k != "image"} if i % 2 else s
            for i, s in enumerate(data.samples)
        ],
        images=data.images,
    )
    ahead = run(pair, mixed, RecoveryConfig(batch_size=4, lr=1e-3))
    now = run(pair, mixed, RecoveryConfig(batch_size=4, lr=1e-3), cache=TeacherCache(limit=0))
    torch.testing.assert_close(
        torch.tensor(ahead.history.loss), torch.tensor(now.history.loss), rtol=1e-4, atol=1e-5
    )
    text = InstructionData([{k: v for k, v in s.items() if k != "image"} for s in data.samples])
    assert (
        changed(pair[0], run(pair, text, RecoveryConfig(train="projector", **ONE_STEP)).model)
        == set()
    )


def test_fractions_are_nested_and_counted(pair, data):
    few = run(pair, data, RecoveryConfig(losses={"sft": 1}, fraction=0.25, seed=3, lr=1e-3))
    assert few.samples == 2 and {s["id"] for s in data.fraction(0.25, 3).samples} <= {
        s["id"] for s in data.fraction(0.5, 3).samples
    }


# -- the same numbers again --------------------------------------------------------------------


def test_a_seed_decides_everything(pair, data):
    config = RecoveryConfig(batch_size=4, lr=1e-3, lora={"r": 2, "lora_dropout": 0.1})
    one, two = run(pair, data, config), run(pair, data, config)
    other = run(
        pair,
        data,
        RecoveryConfig(batch_size=4, lr=1e-3, lora={"r": 2, "lora_dropout": 0.1}, seed=1),
    )
    assert weights_hash(one.model) == weights_hash(two.model) != weights_hash(other.model)


def test_passes_and_checkpointing_do_not_change_a_step(pair, data):
    plain = run(pair, data, RecoveryConfig(batch_size=4, lr=1e-3)).history
    for option in (
        {"passes": 2},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw_torch_fused"},
    ):
        other = run(pair, data, RecoveryConfig(batch_size=4, lr=1e-3, **option)).history
        torch.testing.assert_close(
            torch.tensor(other[["loss", "sft", "hidden_kd", "grad_norm"]].values),
            torch.tensor(plain[["loss", "sft", "hidden_kd", "grad_norm"]].values),
            rtol=2e-4,
            atol=1e-5,
        )


def test_bf16_follows_float32(pair, data):
    full, half = (
        run(pair, data, RecoveryConfig(batch_size=4, lr=1e-3, precision=p))
        for p in ("fp32", "bf16")
    )
    torch.testing.assert_close(
        torch.tensor(half.history.loss), torch.tensor(full.history.loss), rtol=2e-2, atol=1e-2
    )
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert (
        anatomy(half.model).text_config._attn_implementation
        == anatomy(pair[0]).text_config._attn_implementation
    )


def test_teacher_outputs_are_computed_once(pair, data, tmp_path, monkeypatch):
    calls, compute = [], training.compute_teacher_outputs
    counted = lambda *a, **k: calls.append(1) or compute(*a, **k)
    monkeypatch.setattr(training, "compute_teacher_outputs", counted)
    cache = TeacherCache(folder=tmp_path)
    first = run(pair, data, RecoveryConfig(batch_size=4, lr=1e-3), cache=cache)
    run(pair, data, RecoveryConfig(batch_size=4, lr=1e-2, seed=1), cache=cache)  # another run
    again = run(
        pair, data, RecoveryConfig(batch_size=4, lr=1e-3), cache=TeacherCache(folder=tmp_path)
    )  # another process
    assert len(calls) == 1 and weights_hash(first.model) == weights_hash(again.model)
    run(
        pair, data, RecoveryConfig(batch_size=4, lr=1e-3, turns="sequential"), cache=cache
    )  # other rows, other outputs
    assert len(calls) == 2


def test_batches_share_similar_lengths_and_lose_nothing():
    lengths = [i % 17 for i in range(100)]
    grouped = list(Batches(lengths, 10, seed=1))
    assert sorted(sum(grouped, [])) == list(range(100)) and grouped != list(
        Batches(lengths, 10, seed=2)
    )
    spread = lambda batches: (
        sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    )
    assert spread(grouped) < 3 < spread(list(Batches([1] * 100, 10)))
    three = [list(Batches(lengths, 12, passes=2, processes=3, rank=r)) for r in range(3)]
    assert len({len(part) for part in three}) == 1 and sorted(
        i for part in three for b in part for i in b
    ) == list(range(100))


def test_every_epoch_has_its_own_order(pair, data, monkeypatch):
    seen, compute_loss = [], RecoveryTrainer.compute_loss
    monkeypatch.setattr(
        RecoveryTrainer,
        "compute_loss",
        lambda self, model, inputs, **k: (
            seen.append(inputs["index"].tolist()) or compute_loss(self, model, inputs, **k)
        ),
    )
    run(pair, data, RecoveryConfig(losses={"sft": 1}, batch_size=4, lr=1e-3, epochs=2))
    assert seen[:2] != seen[2:] and all(
        sorted(sum(part, [])) == list(range(N)) for part in (seen[:2], seen[2:])
    )


# -- safety ------------------------------------------------------------------------------------


TWO = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 --standalone".split()


def process(tmp_path, launcher=(), name="result.json", **options):
    "tests/recovery_run.py in its own process; its result."
    result = tmp_path / name
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = subprocess.run(
        [
            *(launcher or (sys.executable,)),
            str(Path(__file__).parent / "recovery_run.py"),
            json.dumps(options | {"result": str(result)}),
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    return code, json.loads(result.read_text()) if result.exists() else None


def test_killed_and_resumed_is_bit_identical(tmp_path):
    config = {"batch_size": 4, "epochs": 3, "lr": 1e-3, "lora": {"r": 4, "lora_dropout": 0.1}}
    _, whole = process(tmp_path, name="whole.json", config=config)
    folder = tmp_path / "run"
    killed, nothing = process(tmp_path, config=config, folder=str(folder), save_every=2, kill_at=5)
    assert (
        killed.returncode == -9
        and nothing is None
        and [p.name for p in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    )
    assert not [
        p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")
    ]  # nothing pickled
    _, resumed = process(tmp_path, config=config, folder=str(folder), save_every=2)
    assert resumed == whole


def test_two_processes_follow_the_loss_curve_of_one(tmp_path):
    config = {"batch_size": 4, "epochs": 2, "lr": 1e-3}
    _, one = process(tmp_path, name="one.json", config=config, n=14)
    code, two = process(tmp_path, TWO, name="two.json", config=config, n=14)
    assert two is not None, code.stderr[-2000:]
    for column in ("loss", "sft", "hidden_kd"):
        assert two["history"][column] == pytest.approx(one["history"][column], rel=1e-4, abs=1e-6)


def test_fsdp(tmp_path):
    "The losses of one process; the same bits when killed and resumed; a whole model at the end."
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {"config": {"batch_size": 4, "epochs": 2, "lr": 1e-3}, "n": 14}
    options_of_two = options | {"fsdp": True, "trainer": {"fsdp": True, "fsdp_config": sharding}}
    _, one = process(tmp_path, name="one.json", **options)
    code, two = process(tmp_path, TWO, name="two.json", **options_of_two)
    assert two is not None, code.stderr[-2000:]
    assert one["sharded"] == 0 and two["sharded"] > 0
    # before 2.10, torch got the norm of gradients in slices wrong
    right = torch.__version__ >= torch.torch_version.TorchVersion("2.10")
    for column in ("loss", "grad_norm") if right else ("loss",):
        assert two["history"][column] == pytest.approx(one["history"][column], rel=1e-4, abs=1e-6)
    folder = {"folder": str(tmp_path / "run"), "save_every": 2}
    _, nothing = process(tmp_path, TWO, **options_of_two, **folder, kill_at=5)
    assert nothing is None and [p.name for p in checkpoints(folder["folder"])] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    code, resumed = process(tmp_path, TWO, **options_of_two, **folder)
    assert resumed is not None, code.stderr[-2000:]
    assert (
        resumed["weights"] == two["weights"]
        and resumed["history"]["loss"] == two["history"]["loss"]
    )
    checkpoint = load_file(checkpoints(folder["folder"])[-1] / "weights.safetensors")
    assert checkpoint and all(
        list(tensor.shape) == two["shapes"][name] for name, tensor in checkpoint.items()
    )


def test_accelerate_launch_shards_adapters_on_half_precision(tmp_path):
    "As the real models: frozen bfloat16, float32 adapters and projector, gradient checkpointing."
    options = {
        "config": {
            "batch_size": 4,
            "epochs": 2,
            "lr": 1e-3,
            "lora": {"r": 4, "lora_alpha": 8},
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
        "n": 14,
        "dtype": "bfloat16",
    }
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


def test_a_full_disk_keeps_the_previous_checkpoint(pair, data, tmp_path, monkeypatch):
    import mllm_compress.recovery.training as module

    save, calls = module.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(
            pair, data, RecoveryConfig(batch_size=2, lr=1e-3), folder=tmp_path / "run", save_every=1
        )
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"] and not list(
        (tmp_path / "run").glob(".checkpoint-*")
    )
    monkeypatch.setattr(module, "save_file", save)
    resumed = run(
        pair, data, RecoveryConfig(batch_size=2, lr=1e-3), folder=tmp_path / "run", save_every=1
    )
    assert weights_hash(resumed.model) == weights_hash(
        run(pair, data, RecoveryConfig(batch_size=2, lr=1e-3)).model
    )


def test_another_runs_folder_is_refused(pair, data, tmp_path):
    run(pair, data, RecoveryConfig(losses={"sft": 1}, **ONE_STEP), folder=tmp_path, save_every=1)
    with pytest.raises(ValueError, match="another run .different config"):
        run(
            pair,
            data,
            RecoveryConfig(losses={"sft": 1}, batch_size=N, lr=2e-3),
            folder=tmp_path,
            save_every=1,
        )


def test_a_loss_that_is_no_number_stops_the_run(pair, data, tmp_path):
    "So high a learning rate destroys the weights in step 1; the loss of step 2 shows it."
    with pytest.raises(NonFiniteLoss) as error:
        run(
            pair,
            data,
            RecoveryConfig(losses={"sft": 1}, batch_size=4, lr=1e30, warmup=0.0, epochs=2),
            folder=tmp_path,
            save_every=1,
        )
    assert (
        error.value.step == 1
        and len(error.value.ids) == 4
        and set(error.value.ids) <= {s["id"] for s in data.samples}
    )
    assert "checkpoint-1" in str(error.value) and checkpoints(tmp_path)


# -- wrong input -------------------------------------------------------------------------------


def test_models_that_do_not_fit(pair, data, tiny_llava):
    from mllm_compress.zoo.tiny_models import tiny_model

    student, teacher, processor = pair
    with pytest.raises(ValueError, match="differ in hidden_size .48 and 96"):
        run(
            (tiny_model("llava", 2, hidden=48), teacher, processor),
            data,
            RecoveryConfig(**ONE_STEP),
        )
    smaller = copy.deepcopy(student)
    smaller.resize_token_embeddings(len(processor.tokenizer) - 5)
    with pytest.raises(ValueError, match="differ in vocab_size"):
        run((smaller, teacher, processor), data, RecoveryConfig(**ONE_STEP))
    blind = copy.deepcopy(student)
    anatomy(blind).vision_tower.requires_grad_(False)
    next(anatomy(blind).vision_tower.parameters()).data += 1
    with pytest.raises(ValueError, match="different vision towers"):
        run((blind, teacher, processor), data, RecoveryConfig(**ONE_STEP))
    with pytest.raises(ValueError, match="hidden_kd needs a teacher"):
        run((student, None, processor), data, RecoveryConfig(**ONE_STEP))


def test_no_supervised_token(pair, data):
    empty = InstructionData(
        [
            s | {"conversations": [s["conversations"][0], {"from": "gpt", "value": ""}]}
            for s in data.samples
        ],
        images=data.images,
    )
    with pytest.raises(ValueError, match="no supervised token in samples .*scene-train"):
        run(pair, empty, RecoveryConfig(losses={"sft": 1}, max_length=18, **ONE_STEP))


@pytest.mark.parametrize(
    "values, says",
    [
        ({"fraction": 0}, "outside"),
        ({"fraction": 1.5}, "outside"),
        ({"losses": {"mse": 1}}, "Unknown loss 'mse'"),
        ({"train": "lm"}, "use one of"),
        ({"positions": "answers"}, "use one of"),
        ({"lora": {"r": 2}, "train": "projector"}, "lora adapts"),
        ({"rank": 8}, "Unknown recovery option"),
        ({"batch_size": 0}, "must be positive"),
        ({"precision": "fp16"}, "use one of"),
    ],
)
def test_wrong_configs(values, says):
    with pytest.raises(ValueError, match=says):
        config_from_dict(values)


def test_lora_without_targets(tiny_lm, monkeypatch):
    monkeypatch.setattr(Anatomy, "linears", lambda self, i: [])
    with pytest.raises(ValueError, match="no LoRA targets for family 'llama'"):
        lora_targets(tiny_lm("llama"))


# -- small things ------------------------------------------------------------------------------


def test_layers_follow_the_plan():
    assert layer_pairs((3, 5), kept=(0, 1, 2, 5, 6)) == ((2, 3), (3, 5))
    assert layer_pairs({"0": 1, "final": "final"}, kept=(0, 1)) == ((0, 1), ("final", "final"))
    with pytest.raises(ValueError, match="none at or before"):
        layer_pairs((0,), kept=(1, 2))


def test_learning_rates_are_data():
    table = {
        "projector": {"default": 1.0, "sft+hidden_kd": 2.0},
        "projector+lm": {"default": 3.0},
        "lora": {"default": 4.0},
    }
    assert learning_rate(RecoveryConfig(train="projector"), table) == 2.0
    assert learning_rate(RecoveryConfig(train="projector", losses={"sft": 1}), table) == 1.0
    assert (
        learning_rate(RecoveryConfig(lora={"r": 2}), table) == 4.0
        and learning_rate(RecoveryConfig(**PAPER["internvl"])) == 4e-5
    )
