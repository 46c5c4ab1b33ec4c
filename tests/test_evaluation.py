"""Answers equal those of `generate` at any batch size; evaluations are stored and resumed."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_benchmarks import root  # noqa: F401  (a fixture)

from mllm_compress.anatomy.families import anatomy
from mllm_compress.data.batches import SizedCache
from mllm_compress.evaluation import generation, scoring
from mllm_compress.evaluation import generation as features
from mllm_compress.evaluation.benchmarks import REAL_SUITE, SMALL_SUITE, Question, load_questions
from mllm_compress.evaluation.generation import answer_questions
from mllm_compress.evaluation.scoring import (
    compare,
    disagreements,
    evaluate,
    judge,
    load_predictions,
    retained,
    score_all,
)
from mllm_compress.zoo.models import load_model

FAMILIES = ["tiny_llava", "tiny_bunny"]


@pytest.fixture(params=FAMILIES)
def mllm(request):
    return request.getfixturevalue(request.param)


def inputs_of(processor, question, more=""):
    content = [{"type": "image"}] * len(question.images) + [
        {"type": "text", "text": question.prompt}
    ]
    text = (
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        + more
    )
    return processor(text=text, images=list(question.images) or None, return_tensors="pt")


def generated(model, processor, question, max_new_tokens):
    "transformers' own greedy answer, one question at a time."
    inputs, stop = (
        inputs_of(processor, question),
        generation.stop_tokens(model, processor.tokenizer),
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    end = next((i for i, t in enumerate(out) if t in stop), len(out))
    return processor.tokenizer.decode(out[:end], skip_special_tokens=True).strip()


def mixed(n=4):
    "Questions of all kinds, one without an image and one about two."
    questions = [q for name in SMALL_SUITE for q in load_questions(name, "test", n)]
    two = Question(
        "two",
        "are these the same color?",
        "no",
        questions[0].images + questions[-1].images,
        ("yes", "no"),
    )
    return questions + [
        Question("none", "what color is a circle?", "red", (), ("red", "blue")),
        two,
    ]


def with_early_stops(model, processor):
    "A copy of a random model whose frequent words end an answer, so that answers differ in length."
    model = copy.deepcopy(model)
    words = [a.text.split() for a in answer_questions(model, processor, mixed(), 6)]
    liked = {w[k] for k, w in zip((1, 2, 3, 4), words[::7]) if len(w) > k}
    model.generation_config.eos_token_id = [2] + processor.tokenizer.convert_tokens_to_ids(
        sorted(liked)
    )
    return model


def test_answers_equal_those_of_generate(mllm):
    model, processor = with_early_stops(*mllm), mllm[1]
    questions = mixed()
    expected = [generated(model, processor, q, 6) for q in questions]
    assert [
        a.text for a in answer_questions(model, processor, questions, max_new_tokens=6)
    ] == expected
    assert len(set(expected)) > 1


def test_a_trained_model_answers_as_generate_and_rightly():
    model, processor = load_model("tiny-llava")
    questions = [q for name in SMALL_SUITE for q in load_questions(name, "test", 6)]
    answers = answer_questions(model, processor, questions, 4)
    assert [a.text for a in answers] == [generated(model, processor, q, 4) for q in questions]
    assert answers == answer_questions(model, processor, questions, 4, batch_size=1)
    assert np.mean([a.text == q.answer for a, q in zip(answers, questions)]) > 0.8
    assert np.mean([a.candidate == q.answer for a, q in zip(answers, questions)]) > 0.8


def test_same_answers_at_any_batch_size(mllm):
    model, questions = with_early_stops(*mllm), mixed(8)
    assert answer_questions(model, mllm[1], questions, 6, batch_size=1) == answer_questions(
        model, mllm[1], questions, 6, batch_size=32
    )


def test_candidates_are_ranked_by_their_likelihood(mllm):
    model, processor = mllm
    choices = ("red", "large blue circle", "yes no", "square")
    questions = [Question(q.id, q.prompt, q.answer, q.images, choices) for q in mixed(2)]
    answers = answer_questions(model, processor, questions, 2)
    for question, answer in zip(questions, answers):
        scores = []
        for choice in choices:
            inputs, start = (
                inputs_of(processor, question, " " + choice),
                inputs_of(processor, question)["input_ids"].shape[1],
            )
            with torch.inference_mode():
                logp = model(**inputs).logits[0].log_softmax(-1)
            scores.append(
                np.mean(
                    [
                        logp[i - 1, inputs["input_ids"][0, i]].item()
                        for i in range(start, inputs["input_ids"].shape[1])
                    ]
                )
            )
        assert answer.candidate == choices[int(np.argmax(scores))]
    assert [a.text for a in answers] == [
        a.text
        for a in answer_questions(
            model, processor, [Question(q.id, q.prompt, q.answer, q.images) for q in questions], 2
        )
    ]


def test_each_image_is_encoded_once(tiny_llava, monkeypatch):
    seen, encode = [], features.encode_images
    monkeypatch.setattr(
        features,
        "encode_images",
        lambda m, p, images: (seen.extend(images), encode(m, p, images))[1],
    )
    monkeypatch.setattr(features, "FEATURES", SizedCache(2**29))
    monkeypatch.setattr(features.ImageEncoder.__init__, "__defaults__", (features.FEATURES, 64))
    questions = load_questions("easy-vqa", "test", 20)
    answer_questions(*tiny_llava, questions, 1)
    assert len(seen) == len({q.images[0].tobytes() for q in questions}) < len(questions)
    student = copy.deepcopy(tiny_llava[0])
    with torch.no_grad():
        student.lm_head.weight.neg_()
    answer_questions(student, tiny_llava[1], questions, 1)
    assert len(seen) == len(
        {q.images[0].tobytes() for q in questions}
    )  # the tower is shared, and so are its features
    with torch.no_grad():
        anatomy(student).vision_tower.get_parameter(
            next(n for n, _ in anatomy(student).vision_tower.named_parameters())
        ).add_(0.1)
    answer_questions(student, tiny_llava[1], questions, 1)
    assert len(seen) == 2 * len({q.images[0].tobytes() for q in questions})


def test_a_small_cache_gives_the_same_answers(tiny_llava, monkeypatch):
    questions = mixed(4)
    expected = answer_questions(*tiny_llava, questions, 3)
    cache = SizedCache(10_000)
    monkeypatch.setattr(features.ImageEncoder.__init__, "__defaults__", (cache, 2))
    assert (
        answer_questions(*tiny_llava, questions, 3) == expected
        and cache.used <= 10_000
        and len(cache.held) == 1
    )


def test_memory_back_off(tiny_llava, monkeypatch):
    questions, tried, real = mixed(4), [], generation.read_prefixes

    def tight(parts, prompts, found):
        tried.append(len({(p.shared, p.images) for p in prompts}))
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(parts, prompts, found)

    expected = answer_questions(*tiny_llava, questions, 3)
    monkeypatch.setattr(generation, "read_prefixes", tight)
    assert (
        answer_questions(*tiny_llava, questions, 3, batch_size=16) == expected
        and tried[0] > 3
        and tried[-1] <= 3
    )
    monkeypatch.setattr(
        generation, "read_prefixes", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(RuntimeError, match="single question"):
        answer_questions(*tiny_llava, questions, 3)
    monkeypatch.setattr(
        generation, "read_prefixes", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    )
    with pytest.raises(RuntimeError, match="shapes differ"):
        answer_questions(*tiny_llava, questions, 3)


def test_images_back_off_too(tiny_llava, monkeypatch):
    questions, sizes, encode = mixed(4), [], features.encode_images

    def tight(model, processor, images):
        sizes.append(len(images))
        if len(images) > 1:
            raise MemoryError
        return encode(model, processor, images)

    expected = answer_questions(*tiny_llava, questions, 3)
    monkeypatch.setattr(features, "encode_images", tight)
    monkeypatch.setattr(features.ImageEncoder.__init__, "__defaults__", (SizedCache(2**29), 16))
    assert answer_questions(*tiny_llava, questions, 3) == expected
    assert sizes == [3, 3, 3, 2, 1, 1, 1]  # sixteen, eight, four and two at a time are too many


def test_the_bar_counts_the_missing_answers(tiny_llava, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.steps = total, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            self.steps.append(n)

    monkeypatch.setattr(scoring, "tqdm", Bar)
    evaluate(*tiny_llava, "scenes/open", limit=12, folder=tmp_path, batch_size=4)
    evaluate(*tiny_llava, ["scenes/open", "scenes/choice"], limit=12, folder=tmp_path)
    assert [(b.total, sum(b.steps)) for b in bars] == [(12, 12), (12, 12)] and len(
        bars[0].steps
    ) > 1


def test_an_image_token_in_a_question_is_dropped(tiny_llava):
    question = load_questions("scenes/open", "test", 2)[0]
    odd = Question(
        "odd", "<image>" + question.prompt, question.answer, question.images, question.candidates
    )
    assert answer_questions(*tiny_llava, [odd], 3) == answer_questions(*tiny_llava, [question], 3)


def test_evaluate_has_a_row_a_benchmark_and_is_deterministic(tiny_llava):
    rows, answers = evaluate(*tiny_llava, limit=20, return_predictions=True)
    assert rows.benchmark.tolist() == list(SMALL_SUITE) and (rows.n == 20).all()
    assert ((rows.low <= rows.score) & (rows.score <= rows.high)).all()
    assert answers.groupby("benchmark").id.nunique().eq(20).all()
    again, kept = evaluate(*tiny_llava, limit=20, batch_size=3, return_predictions=True)
    assert kept.prediction.tolist() == answers.prediction.tolist()
    assert np.allclose(again.log_likelihood, rows.log_likelihood, atol=1e-4)
    own = ["benchmark", "score", "low", "high", "candidate_score", "unparseable"]
    assert again[own].equals(rows[own])


@pytest.mark.parametrize("change", [{}, {"candidates": ()}, {"answer": ["red circle", "red"]}])
def test_log_likelihood_is_that_of_a_plain_forward_pass(tiny_llava, change):
    model, processor = tiny_llava
    questions = [replace(q, **change) for q in load_questions("scenes/open", "test", 3)]
    for q, answer in zip(questions, answer_questions(model, processor, questions, 1)):
        right = change.get("answer", [q.answer])[0]
        asked, told = (inputs_of(processor, q, more) for more in ("", f" {right}"))
        ids = told["input_ids"][0]
        n = len(ids) - asked["input_ids"].shape[1]
        with torch.inference_mode():
            logp = model(**told).logits[0, -n - 1 : -1].float().log_softmax(-1)
        expected = logp.gather(1, ids[-n:, None]).mean()
        assert n >= 1 and abs(answer.log_likelihood - float(expected)) < 1e-4


def test_without_a_right_answer_there_is_no_likelihood(tiny_llava):
    question = replace(load_questions("scenes/open", "test", 2)[0], answer=None)
    assert answer_questions(*tiny_llava, [question], 1)[0].log_likelihood is None


def test_a_perfect_and_a_half_model(tiny_llava):
    _, answers = evaluate(*tiny_llava, limit=20, return_predictions=True)
    perfect = judge(answers.assign(prediction=answers.answer))
    rows = score_all(perfect)
    assert (rows.score == 100).all() and (rows.unparseable == 0).all()
    half = judge(
        answers.assign(
            prediction=np.where(answers.groupby("benchmark").cumcount() < 10, answers.answer, "?")
        )
    )
    assert (score_all(half).score == 50).all()
    value, low, high = retained(half, perfect)
    assert value == pytest.approx(50) and low < 50 < high
    gaps = compare(perfect, half)
    assert (gaps.difference == 50).all() and gaps.p.tolist() == pytest.approx(
        [2 * 0.5**n for n in (10, 10, 5, 5, 10, 10, 10)]
    )  # five pairs
    assert len(disagreements(perfect, half)) == 10 * len(SMALL_SUITE)
    with pytest.raises(ValueError, match="easy-vqa"):
        compare(perfect, half[half.benchmark != "easy-vqa"])


def test_an_interrupted_evaluation_resumes(tiny_llava, tmp_path, monkeypatch):
    run = lambda **more: evaluate(
        *tiny_llava, ["scenes/open", "scenes/cognition"], limit=20, return_predictions=True, **more
    )
    expected, uninterrupted = run()
    asked, answered = [], scoring.answer_questions

    def dies_later(model, processor, questions, *more):
        if len(asked) >= 16:
            raise KeyboardInterrupt
        asked.extend(questions)
        return answered(model, processor, questions, *more)

    monkeypatch.setattr(scoring, "answer_questions", dies_later)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, save_every=8)
    stored = load_predictions(tmp_path)
    assert len(stored.drop_duplicates(["benchmark", "id"])) == 16
    later = []
    counting = lambda m, p, questions, *more: (
        later.extend(questions) or answered(m, p, questions, *more)
    )
    monkeypatch.setattr(scoring, "answer_questions", counting)
    rows, answers = run(folder=tmp_path, save_every=8)
    assert len(later) == 24
    # other batches sum in another order: likelihoods differ in their last digits, answers do not
    pd.testing.assert_frame_equal(rows, expected, rtol=0, atol=1e-4)
    columns = ["benchmark", "id", "prediction", "candidate", "value"]
    assert answers[columns].equals(uninterrupted[columns])
    assert np.allclose(answers.log_likelihood, uninterrupted.log_likelihood, atol=1e-4)
    again = score_all(load_predictions(tmp_path)).set_index("benchmark").score
    assert again.to_dict() == expected.set_index("benchmark").score.to_dict()


def test_a_folder_belongs_to_one_model(tiny_llava, tiny_bunny, tmp_path):
    evaluate(*tiny_llava, "scenes/open", limit=2, folder=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        evaluate(*tiny_bunny, "scenes/open", limit=2, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="no predictions"):
        load_predictions(tmp_path / "elsewhere")


def test_two_devices_answer_as_one(tiny_llava):
    one, two = (
        evaluate(
            *tiny_llava, ["scenes/open", "easy-vqa"], limit=12, devices=d, return_predictions=True
        )[1]
        for d in (None, ("cpu", "cpu"))
    )
    assert (
        one.prediction.tolist() == two.prediction.tolist()
        and one.candidate.tolist() == two.candidate.tolist()
    )


def test_the_nine_benchmarks_run_end_to_end(tiny_llava, root, tmp_path):  # noqa: F811
    rows, answers = evaluate(
        *tiny_llava, REAL_SUITE, root=root, folder=tmp_path, return_predictions=True
    )
    assert rows.benchmark.tolist() == list(REAL_SUITE) and rows.n.tolist() == [
        2,
        2,
        4,
        1,
        4,
        8,
        2,
        1,
        2,
    ]
    right = judge(
        load_predictions(tmp_path).assign(
            prediction=lambda f: f.answer.map(lambda a: a[0] if isinstance(a, list) else a)
        )
    )
    scores = score_all(right).set_index("benchmark").score
    assert (
        scores.pop("mme_perception") == 400
        and scores.pop("mme_cognition") == 200
        and (scores == 100).all()
    )


def test_compat_is_the_harness(tiny_llava):
    _, answers = evaluate(*tiny_llava, "scenes/hallucination", limit=10, return_predictions=True)
    said = answers.assign(prediction=answers.answer.str.title() + ".")
    assert (
        score_all(judge(said)).score[0] == 100 and score_all(said, compat="lmms-eval").score[0] == 0
    )


@pytest.fixture(scope="module")
def tiny_internvl():
    "A random InternVL with a Phi-3 decoder: an image becomes several tiles."
    pytest.importorskip(
        "torchvision",
        reason="InternVL's processor of transformers needs it: pip install mllm_compress[vision]",
    )
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        PreTrainedTokenizerFast,
    )

    from mllm_compress.zoo.tiny_models import tiny_tokenizer

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    template = (
        "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}"
        "<IMG_CONTEXT>\n{% else %}{{ c.text }}{% endif %}"
        "{% endfor %} {% endfor %}ASSISTANT:"
    )
    images = GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [32, 32],
        "patch_size": [8, 8],
    }
    text = {
        "model_type": "phi3",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)  # so that answers depend on what is asked
    return model, processor


def test_images_in_tiles(tiny_internvl):
    model, processor = tiny_internvl
    wide = [q.images[0].resize((128, 64)) for q in load_questions("scenes/open", "test", 4)]
    questions = [
        Question(str(n), q.prompt, q.answer, (image,), q.candidates)
        for n, image in enumerate(wide + [load_questions("scenes/open", "test", 4)[0].images[0]])
        for q in load_questions("scenes/open", "test", 3)
    ]
    answers = answer_questions(model, processor, questions, 4)
    assert [a.text for a in answers] == [generated(model, processor, q, 4) for q in questions]
    assert (
        answers == answer_questions(model, processor, questions, 4, batch_size=1)
        and len({a.text for a in answers}) > 1
    )
    assert [
        len(s.features)
        for s in features.encode_images(model, processor, [wide[0], wide[0].resize((64, 64))])
    ] == [3, 1]  # two tiles and an overview
