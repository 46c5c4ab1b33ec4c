"""The engine says what `generate` says, whatever the batch."""
import pytest

from mllm_compress.benchmarks import SMALL_SUITE, load_questions
from mllm_compress.evaluation import avg_percent, evaluate
from mllm_compress.generation import ask

FAMILIES = ["tiny_llava", "tiny_bunny"]


@pytest.fixture(params=FAMILIES)
def mllm(request):
    return request.getfixturevalue(request.param)


def generated(model, processor, question, max_new_tokens):
    "transformers' own greedy answer, one question at a time."
    content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=question.images[0], return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


def mixed(n=4):
    return [q for name in SMALL_SUITE for q in load_questions(name, "test", n)]


def test_same_words_as_generate(mllm):
    questions = mixed()
    answers = ask(*mllm, questions, max_new_tokens=6)
    assert [a.text for a in answers] == [generated(*mllm, q, 6) for q in questions]
    assert len({a.text for a in answers}) > 3


def test_same_answers_at_any_batch_size(mllm):
    questions = mixed(8)
    assert ask(*mllm, questions, 6, batch_size=1) == ask(*mllm, questions, 6, batch_size=32)


def test_evaluate_has_a_row_a_benchmark(tiny_llava):
    rows = evaluate(*tiny_llava, limit=20)
    assert rows.benchmark.tolist() == list(SMALL_SUITE) and (rows.n == 20).all()
    assert ((rows.low <= rows.score) & (rows.score <= rows.high)).all()
    assert avg_percent(rows.assign(score=45.0), rows.assign(score=50.0)) == pytest.approx(90)
