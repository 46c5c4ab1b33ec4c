"""Models whose weights stay in files: the scores of a model in memory, in little memory."""

import json
import shutil
import signal
from collections import Counter

import contract_cases as contract
import pruning_cases as cases
import pytest
import torch
import transformers
from commands import stop_at_the_second_write
from test_recipes import ask, shop  # noqa: F401  the fixture
from test_refit_files import Peak

from mllm_compress.anatomy.families import anatomy
from mllm_compress.anatomy.streaming import is_streamed
from mllm_compress.cli.check import noise_batch
from mllm_compress.importance import block_influence, load_scores, width_importance
from mllm_compress.importance.criteria import CRITERIA, Criterion, measure
from mllm_compress.importance.scores import model_record
from mllm_compress.pruning import apply_plan, plan_widthwise
from mllm_compress.zoo.models import load_model
from mllm_compress.zoo.tiny_models import tiny_processor
from mllm_compress.zoo.weight_files import FileModel, open_files

transformers.utils.logging.disable_progress_bar()
MODELS = {  # name -> (case, options)
    "tiny-llava": ("tiny-llava", {}),
    "tiny-bunny": ("tiny-bunny", {}),
    "grouped queries": ("qwen2-3x2", {}),
    "tied embedding": ("llama-4x1", {"tie_word_embeddings": True}),
}
OPTIONS = {"angular_distance": [{"n": 1}, {"n": 3}], "block_influence": [{}, {"mode": "reference"}]}
OPTIONS |= {"gauss_newton": [{"of": "states", "draws": 2}, {"of": "labels"}, {"of": "logits"}]}
OPTIONS |= {"taylor": [{}, {"mode": "reference"}]}
DENSE = [key for key, row in CRITERIA.items() if not row.mixtures]
ROWS = [(*key, o) for key in DENSE for o in OPTIONS.get(key[1], [{}])]


def calibration(model, count=3):
    "Batches of two prompts, the second padded, whose last tokens are the answers."
    found = []
    for seed in range(count):
        batch = cases.inputs(model, seed)
        answers = torch.arange(batch["input_ids"].shape[1]) >= 21
        found.append(batch | {"labels": batch["input_ids"].masked_fill(~answers, -100)})
    return found


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    "The same checkpoint in memory and in its files."
    name, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp("dense")
    model = cases.build(name, torch.float32, **options)
    model.save_pretrained(folder, max_shard_size="300KB")
    dense = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    return dense, open_files(folder).model


def values(scores) -> torch.Tensor:
    "All numbers of some scores."
    if hasattr(scores, "values"):
        return scores.values
    return torch.cat([*scores.heads.values(), *scores.neurons.values()])


@pytest.mark.parametrize("prunes, method, options", ROWS, ids=lambda v: str(v))
def test_the_scores_of_the_model_in_memory(pair, prunes, method, options):
    dense, streamed = pair
    one, two = (measure(prunes, method, m, calibration(dense), **options) for m in pair)
    losses = [s.meta.pop("loss", 0) for s in (one, two)]
    if method.startswith("taylor"):  # sums over batches and blocks in another order
        assert values(one).allclose(values(two), rtol=1e-4, atol=1e-7)
    else:
        assert torch.equal(values(one), values(two))
    assert one.meta == two.meta and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert is_streamed(streamed) and all(p.is_meta for p in streamed.parameters())


HALF = [("block_influence", 0), ("activation", 1e-6), ("gauss_newton", 0.02), ("taylor", 0.02)]


@pytest.mark.parametrize("method, tolerance", HALF)
def test_half_precision(tmp_path, method, tolerance):
    model = cases.build("qwen2-3x2", torch.bfloat16)
    model.save_pretrained(tmp_path)
    dense = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    prunes = next(p for p, name in CRITERIA if name == method)
    pair = (measure(prunes, method, m, calibration(m)) for m in (dense, open_files(tmp_path).model))
    one, two = map(values, pair)
    assert (one - two).abs().max() <= tolerance * one.abs().max()


@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3", "phi3", "granite", "gemma4_text"])
def test_families_that_add_or_scale_between_layers(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_compress.cost.arithmetic.SIDE", 48)
    own = {"num_kv_shared_layers": 0} if name == "gemma4_text" else {}  # shared ones stay together
    model = contract.build(name, torch.float32, **own)
    model.save_pretrained(tmp_path)
    dense = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    batch = noise_batch(dense)
    for score in (block_influence, lambda m, b: width_importance(m, b, "gauss_newton")):
        one, two = (values(score(m, [batch])) for m in (dense, open_files(tmp_path).model))
        assert one.allclose(two, rtol=1e-4, atol=1e-6)


# What is read, and what is held


@pytest.fixture
def reads(monkeypatch):
    "How often each weight is read."
    found, tensor = Counter(), FileModel.tensor

    def counting(source, name):
        found[name] += 1
        return tensor(source, name)

    monkeypatch.setattr(FileModel, "tensor", counting)
    return found


def test_each_weight_is_read_once_per_direction(pair, reads):
    _, streamed = pair
    parts = anatomy(streamed)
    block_influence(streamed, calibration(streamed, 5))
    forward = dict(reads)
    assert set(forward.values()) == {1}
    assert not any("lm_head" in name for name in forward)
    reads.clear()
    width_importance(streamed, calibration(streamed, 5), "gauss_newton")
    layers = [n for n in reads if ".layers." in n and "vision" not in n]
    assert len(layers) == sum(1 for _ in parts.layers.named_parameters())
    assert {reads[n] for n in layers} == {2} and {reads[n] for n in set(reads) - set(layers)} == {1}


@pytest.mark.parametrize("method", ["activation", "gauss_newton", "taylor", "magnitude"])
def test_one_layer_is_in_memory(tmp_path, method):
    deep = dict(num_hidden_layers=30, intermediate_size=800)  # most weights are in its layers
    cases.build("llama-4x1", torch.float32, **deep).save_pretrained(tmp_path)
    model = open_files(tmp_path).model
    layer = sum(p.nbytes for p in anatomy(model).layers[0].parameters())
    batches = [{"input_ids": torch.randint(3, 64, (1, 8))} for _ in range(2)]
    with Peak() as memory:
        width_importance(model, batches, method)
    assert layer < memory.peak < 6 * layer < 0.3 * sum(p.nbytes for p in model.parameters())


def test_the_record_reads_a_few_numbers(pair, reads):
    dense, streamed = pair
    assert model_record(streamed) == model_record(dense) and not reads


# Bad input


def test_a_criterion_that_needs_the_whole_model(pair, monkeypatch):
    _, streamed = pair
    row = Criterion(lambda model, batches=None: 1 / 0, None, help="Another one.", streams=False)
    monkeypatch.setitem(CRITERIA, ("widthwise", "whole"), row)
    with pytest.raises(ValueError, match="layer by layer: taylor, magnitude.*gauss_newton"):
        width_importance(streamed, method="whole")


def test_what_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="no files of its own"):
        load_model("smoke-llava", stream=True)
    with pytest.raises(ValueError, match="Unknown model"):
        load_model("tiny-lava", stream=True)
    cases.build("llama-4x1", torch.float32).save_pretrained(tmp_path / "lm")
    tiny_processor("llava").tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm/model.safetensors").rename(tmp_path / "lm/kept")
    (tmp_path / "lm/pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pickled weights"):
        load_model(tmp_path / "lm", stream=True)
    (tmp_path / "lm/pytorch_model.bin").unlink()
    (tmp_path / "lm/kept").rename(tmp_path / "lm/model.safetensors")
    config = json.loads((tmp_path / "lm/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "lm/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized: load it as a whole"):
        load_model(tmp_path / "lm", stream=True)


def test_a_disk_too_small_for_the_states_is_found_first(pair, reads, monkeypatch):
    _, streamed = pair
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="Give fewer samples"):
        width_importance(streamed, calibration(streamed), "taylor")
    assert not any(".layers." in n and "vision" not in n for n in reads)


def test_a_copy_that_was_pruned_does_not_read_the_files_of_the_dense_model(pair):
    dense, streamed = pair
    plan = plan_widthwise(streamed, width_importance(streamed, method="magnitude"), ratio=0.2)
    assert plan == plan_widthwise(dense, width_importance(dense, method="magnitude"), ratio=0.2)
    assert not is_streamed(apply_plan(streamed, plan)) and is_streamed(streamed)


# The commands

TEXT = ("--data", "text.jsonl")


@pytest.mark.parametrize("method", ["block_influence", "gauss_newton", "taylor", "magnitude"])
def test_score_from_files(here, method):
    for out, more in (("one", "--no-stream"), ("two", "--stream")):
        asked = TEXT if method != "magnitude" else ()  # which reads no data
        assert ask("score", "lm", "-o", out, "--method", method, *asked, more)[0] == 0
    one, two = load_scores("one"), load_scores("two")
    near = {k: pytest.approx(v) if isinstance(v, float) else v for k, v in two.meta.items()}
    assert torch.equal(values(one), values(two)) and one.meta == near
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == []


def test_a_model_larger_than_the_memory_is_streamed(here, monkeypatch):
    from mllm_compress.importance import scores as memory

    read, tensor = [], FileModel.tensor
    monkeypatch.setattr(FileModel, "tensor", lambda s, n: read.append(n) or tensor(s, n))
    code, _, error = ask("score", "lm", "-o", "whole", *TEXT)
    assert code == 0 and not read and "layer by layer" not in error
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    code, _, error = ask("score", "lm", "-o", "parts", *TEXT)
    assert code == 0 and read and "are read layer by layer (--no-stream loads the model)" in error
    assert torch.equal(load_scores("whole").values, load_scores("parts").values)


@pytest.mark.parametrize("recipe", ["recommended", "paper"])
def test_prune_from_files(here, recipe):
    from safetensors.torch import load_file

    for out, more in (("one", "--no-stream"), ("two", "--stream")):
        options = ("--ratio", 0.3, "--recipe", recipe, *TEXT, more)
        code, _, error = ask("prune", "lm", "-o", out, *options)
        assert code == 0, error
    one, two = (next((here / n).glob("*.safetensors")) for n in ("one", "two"))
    assert one.name == two.name
    both = [load_file(one), load_file(two)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize("method", ["block_influence", "activation", "gauss_newton", "taylor"])
def test_stopped_streaming_goes_on_to_the_same_bits(here, monkeypatch, method, reads):
    args = ("score", "lm", "--method", method, *TEXT, "--stream")
    assert ask(*args, "-o", "whole")[0] == 0
    all_reads = sum(reads.values())
    reads.clear()
    stop_at_the_second_write(monkeypatch, signal.SIGINT)
    assert ask(*args, "-o", "parts")[0] == 130
    kept = [path.name for path in (here / ".parts.unfinished").rglob("*.safetensors")]
    gradients = method in ("gauss_newton", "taylor")
    assert "sums.safetensors" in kept and ("0.safetensors" in kept) == gradients
    first = sum(reads.values())
    assert ask(*args, "-o", "parts")[0] == 0
    front_and_end = 8  # embedding, norm and head, which are read again
    assert sum(reads.values()) <= all_reads + front_and_end and first < all_reads
    assert torch.equal(values(load_scores("whole")), values(load_scores("parts")))
    assert not (here / ".parts.unfinished").exists()
