"""Answers equal those of `generate` at any batch size; evaluations are stored and resumed."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_benchmarks import root  # noqa: F401  (a fixture)

from mllm_compress.anatomy.families import anatomy
from mllm_compress.data.batches import SizedCache, stop_tokens
from mllm_compress.evaluation import benchmarks, generation, scoring
from mllm_compress.evaluation.benchmarks import REAL_SUITE, SMALL_SUITE, Question, load_questions
from mllm_compress.evaluation.generation import answer_questions

FAMILIES = ["tiny_llava", "tiny_bunny"]


@pytest.fixture(params=FAMILIES)
def mllm(request):
    return request.getfixturevalue(request.param)


def inputs_of(processor, question, more=""):
    content = [{"type": "image"}] * len(question.images)
    content += [{"type": "text", "text": question.prompt}]
    turns = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True) + more
    return processor(text=text, images=list(question.images) or None, return_tensors="pt")


def generated(model, processor, question, max_new_tokens):
    "transformers' own greedy answer, one question at a time."
    inputs, stop = inputs_of(processor, question), stop_tokens(model, processor.tokenizer)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((i for i, t in enumerate(new) if t in stop), len(new))
    return processor.tokenizer.decode(new[:end], skip_special_tokens=True).strip()


def mixed(n=4):
    "Questions of all kinds, one without an image and one about two."
    questions = [q for name in SMALL_SUITE for q in load_questions(name, "test", n)]
    images = questions[0].images + questions[-1].images
    none = Question("none", "what color is a circle?", "red", (), ("red", "blue"))
    two = Question("two", "are these the same color?", "no", images, ("yes", "no"))
    return [*questions, none, two]


def with_early_stops(model, processor):
    "A copy of a random model whose frequent words end an answer, so that answers differ in length."
    model = copy.deepcopy(model)
    words = [a.text.split() for a in answer_questions(model, processor, mixed(), 6)]
    liked = sorted({w[k] for k, w in zip((1, 2, 3, 4), words[::7]) if len(w) > k})
    model.generation_config.eos_token_id = [2, *processor.tokenizer.convert_tokens_to_ids(liked)]
    return model


def test_answers_equal_those_of_generate_at_any_batch_size(mllm):
    model, processor, questions = with_early_stops(*mllm), mllm[1], mixed()
    expected = [generated(model, processor, q, 6) for q in questions]
    answers = answer_questions(model, processor, questions, 6, batch_size=32)
    assert [a.text for a in answers] == expected and len(set(expected)) > 1
    assert answer_questions(model, processor, questions, 6, batch_size=1) == answers


def test_candidates_are_ranked_by_their_likelihood(mllm):
    model, processor = mllm
    choices = ("red", "large blue circle", "yes no", "square")
    questions = [replace(q, candidates=choices) for q in mixed(1)]
    answers = answer_questions(model, processor, questions, 2)
    for question, answer in zip(questions, answers):
        start, scores = inputs_of(processor, question)["input_ids"].shape[1], []
        for choice in choices:
            inputs = inputs_of(processor, question, " " + choice)
            ids = inputs["input_ids"][0, start:]
            with torch.inference_mode():
                logp = model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
            scores.append(logp.gather(1, ids[:, None]).mean())
        assert answer.candidate == choices[int(torch.stack(scores).argmax())]
    plain = [replace(q, candidates=()) for q in questions]
    texts = [a.text for a in answer_questions(model, processor, plain, 2)]
    assert [a.text for a in answers] == texts


def use_cache(monkeypatch, cache: SizedCache, batch_size: int) -> None:
    monkeypatch.setattr(generation, "FEATURES", cache)
    monkeypatch.setattr(generation, "IMAGES", batch_size)


def test_each_image_is_encoded_once(tiny_llava, monkeypatch):
    seen, encode = [], generation.encode_images
    listening = lambda m, p, images: (seen.extend(images), encode(m, p, images))[1]
    monkeypatch.setattr(generation, "encode_images", listening)
    use_cache(monkeypatch, SizedCache(2**29), 64)
    questions = load_questions("easy-vqa", "test", 20)
    distinct = len({q.images[0].tobytes() for q in questions})
    answer_questions(*tiny_llava, questions, 1)
    assert len(seen) == distinct < len(questions)
    student = copy.deepcopy(tiny_llava[0])
    with torch.no_grad():
        student.lm_head.weight.neg_()
    answer_questions(student, tiny_llava[1], questions, 1)
    assert len(seen) == distinct  # the tower is shared, and so are its features
    with torch.no_grad():
        next(anatomy(student).vision_tower.parameters()).add_(0.1)
    answer_questions(student, tiny_llava[1], questions, 1)
    assert len(seen) == 2 * distinct


def test_a_small_cache_gives_the_same_answers(tiny_llava, monkeypatch):
    questions, cache = mixed(4), SizedCache(10_000)
    expected = answer_questions(*tiny_llava, questions, 3)
    use_cache(monkeypatch, cache, 2)
    assert answer_questions(*tiny_llava, questions, 3) == expected
    assert cache.used <= 10_000 and len(cache.held) == 1


def test_memory_back_off(tiny_llava, monkeypatch):
    questions, tried, read = mixed(4), [], generation.read_prefixes

    def tight(parts, prompts, features):
        tried.append(len({(p.shared, p.images) for p in prompts}))
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(parts, prompts, features)

    expected = answer_questions(*tiny_llava, questions, 3)
    monkeypatch.setattr(generation, "read_prefixes", tight)
    assert answer_questions(*tiny_llava, questions, 3, batch_size=16) == expected
    assert tried[0] > 3 >= tried[-1]
    errors = (torch.OutOfMemoryError("no"), RuntimeError("shapes differ"))
    for error, message in zip(errors, ("no", "shapes differ")):
        failing = lambda *_, error=error: (_ for _ in ()).throw(error)
        monkeypatch.setattr(generation, "read_prefixes", failing)
        with pytest.raises(RuntimeError, match=message):
            answer_questions(*tiny_llava, questions, 3)


def test_an_image_token_in_a_question_is_dropped(tiny_llava):
    question = load_questions("scenes/open", "test", 2)[0]
    odd = replace(question, prompt="<image>" + question.prompt)
    assert answer_questions(*tiny_llava, [odd], 3) == answer_questions(*tiny_llava, [question], 3)
    unknown = replace(question, answer=None)
    assert answer_questions(*tiny_llava, [unknown], 1)[0].log_likelihood is None


def test_evaluate_has_a_row_a_benchmark_and_is_deterministic(tiny_llava):
    rows, answers = scoring.evaluate(*tiny_llava, limit=20, return_predictions=True)
    assert rows.benchmark.tolist() == list(SMALL_SUITE) and (rows.n == 20).all()
    assert ((rows.low <= rows.score) & (rows.score <= rows.high)).all()
    assert answers.groupby("benchmark").id.nunique().eq(20).all()
    again, kept = scoring.evaluate(*tiny_llava, limit=20, batch_size=3, return_predictions=True)
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


def test_a_perfect_and_a_half_model(tiny_llava):
    _, answers = scoring.evaluate(*tiny_llava, limit=20, return_predictions=True)
    perfect = scoring.judge(answers.assign(prediction=answers.answer))
    rows = scoring.score_all(perfect)
    assert (rows.score == 100).all() and (rows.unparseable == 0).all()
    first = answers.groupby("benchmark").cumcount() < 10
    half = scoring.judge(answers.assign(prediction=np.where(first, answers.answer, "?")))
    assert (scoring.score_all(half).score == 50).all()
    gaps = scoring.compare(perfect, half)
    assert (gaps.difference == 50).all()
    expected = [2 * 0.5**n for n in (10, 10, 5, 5, 10, 10, 10)]  # five pairs
    assert gaps.p.tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="easy-vqa"):
        scoring.compare(perfect, half[half.benchmark != "easy-vqa"])


def said(words: str, end: str = "", **columns) -> pd.DataFrame:
    "Judged answers to questions of easy-VQA whose right answers are abcd, abcd and so on."
    asked = {"benchmark": f"easy-vqa{end}", "id": range(len(words)), "group": None}
    asked |= {"answer": list("abcd" * (len(words) // 4)), "prediction": list(words)}
    frame = pd.DataFrame(asked | {"candidate": "a"} | columns)
    return scoring.judge(frame.assign(options=[[]] * len(frame), extra=[{}] * len(frame)))


def test_grounding_by_hand():
    wrong, none = "/wrong-picture", "/no-picture"
    dense = pd.concat([said("abcd", confidence=0.5), said("aaaa", wrong), said("xxxx", none)])
    pruned = pd.concat([said("abxd"), said("abxx", wrong), said("aaxx", none)])
    was, own = scoring.grounding(dense, pruned).to_dict("records")
    assert [was[k] for k in ("right", "wrong", "none", "agreement")] == [100, 25, 0, 100]
    assert [own[k] for k in ("right", "wrong", "none", "agreement")] == [75, 50, 25, 75]
    assert [own[k] for k in ("lost", "gained", "p")] == [1, 0, 1]
    # |1 - 0.5| once and |0 - 0.5| three times, each in a bin of its own; no answer is yes or no
    assert was["calibration_error"] == 50 and np.isnan(own["calibration_error"] + own["yes_bias"])
    with pytest.raises(ValueError, match="Only one of two models"):
        scoring.grounding(dense, pruned[1:])
    dense, blind = (said(words * 10) for words in ("abcd", "abxx"))
    shown = said("xxxx" * 10, wrong), said("abxx" * 10, wrong)
    dense, blind = (pd.concat(pair) for pair in zip((dense, blind), shown))
    (sentence,) = scoring.say_grounding(table := scoring.grounding(dense, blind))
    assert "0.0 points to the pruned model, which keeps 50 %" in sentence
    assert table.lost.tolist() == [0, 20] and scoring.compare(blind, dense).difference.item() == -50


def test_an_interrupted_evaluation_resumes(tiny_llava, tmp_path, monkeypatch):
    kinds, options = ["scenes/open", "scenes/cognition"], dict(limit=20, return_predictions=True)
    run = lambda **more: scoring.evaluate(*tiny_llava, kinds, **options, **more)
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
    assert len(scoring.load_predictions(tmp_path).drop_duplicates(["benchmark", "id"])) == 16
    later = []
    counting = lambda m, p, asked, *more: later.extend(asked) or answered(m, p, asked, *more)
    monkeypatch.setattr(scoring, "answer_questions", counting)
    rows, answers = run(folder=tmp_path, save_every=8)
    assert len(later) == 24
    # other batches sum in another order: likelihoods differ in their last digits, answers do not
    pd.testing.assert_frame_equal(rows, expected, rtol=0, atol=1e-4)
    columns = ["benchmark", "id", "prediction", "candidate", "value"]
    assert answers[columns].equals(uninterrupted[columns])
    assert np.allclose(answers.log_likelihood, uninterrupted.log_likelihood, atol=1e-4)
    for what, part in zip(("config", "processor"), (tiny_llava[0].config, tiny_llava[1])):
        with monkeypatch.context() as other, pytest.raises(ValueError, match=f"different {what}"):
            other.setattr(part, "chat_template", "another", raising=False)
            run(folder=tmp_path)
    with monkeypatch.context() as other, pytest.raises(ValueError, match="different generation"):
        other.setattr(scoring, "GENERATION_VERSION", 0)
        run(folder=tmp_path)
    again = scoring.score_all(scoring.load_predictions(tmp_path)).set_index("benchmark").score
    assert again.to_dict() == expected.set_index("benchmark").score.to_dict()
    for field, n in {"prompt": 24 + 40, "answer": 24 + 80}.items():  # changed, and changed back
        with monkeypatch.context() as other:
            more = lambda q: replace(q, **{field: f"{getattr(q, field)}!"})
            other.setattr(scoring, "load_questions", lambda *a: [*map(more, load_questions(*a))])
            assert run(folder=tmp_path)[1][field].str.endswith("!").all() and len(later) == n
        assert run(folder=tmp_path)[1].equals(answers) and len(later) == n


def test_the_nine_benchmarks_run_end_to_end(tiny_llava, root, tmp_path):  # noqa: F811
    rows, _ = scoring.evaluate(
        *tiny_llava, REAL_SUITE, root=root, folder=tmp_path, return_predictions=True
    )
    assert rows.benchmark.tolist() == list(REAL_SUITE)
    assert rows.n.tolist() == [2, 2, 4, 1, 4, 8, 2, 1, 2]
    first = lambda answer: answer[0] if isinstance(answer, list) else answer
    right = scoring.judge(
        scoring.load_predictions(tmp_path).assign(prediction=lambda f: f.answer.map(first))
    )
    scores = scoring.score_all(right).set_index("benchmark").score
    assert scores.pop("mme_perception") == 400 and scores.pop("mme_cognition") == 200
    assert (scores == 100).all()
    bare = right[right.benchmark == "pope"].assign(prediction=lambda f: f.prediction + ".")
    assert scoring.score_all(scoring.judge(bare)).score[0] == 100


def test_questions_with_one_id_are_refused(monkeypatch):
    twice = benchmarks.Benchmark("twice", "exact", lambda **_: [Question("1", "?", "a", ())] * 2, 4)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "twice", twice)
    with pytest.raises(ValueError, match="twice: two questions have one id"):
        load_questions("twice")


def test_likelihoods_are_not_read_without_the_picture(tiny_llava, monkeypatch):
    blind = replace(benchmarks.benchmark("scenes/open"), name="blind", max_new_tokens=0)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "blind", blind)
    with pytest.raises(ValueError, match="blind: likelihoods see no pictures"):
        scoring.evaluate(*tiny_llava, "blind", limit=2)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "blind", replace(blind, scorer="exakt"))
    with pytest.raises(ValueError, match="scorer of blind.*'exakt'.*exact"):
        scoring.evaluate(*tiny_llava, "blind", limit=2)
