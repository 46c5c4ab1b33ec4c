"""Adapters on fabricated rows in the exact layout of the public sets."""

import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm_compress.evaluation import benchmarks


def png(color="red", size=(6, 4)):
    Image.new("RGB", size, color).save(out := io.BytesIO(), "PNG")
    return {"bytes": out.getvalue(), "path": f"{color}.png"}


def math(pid, question, answer, kind, choices=None, unit=None, precision=None) -> dict:
    row = {"pid": pid, "question": question, "answer": answer, "answer_type": kind, "query": ""}
    row |= {"choices": choices, "unit": unit, "precision": precision, "decoded_image": png()}
    more = {"question_type": "multi_choice" if choices else "free_form"}
    return row | more | {"image": "images/2.jpg", "metadata": {"split": "testmini"}}


def exam(question, options, answer, kind, *images) -> dict:
    name = {"multiple-choice": "validation_Art_1", "open": "validation_Math_2"}[kind]
    row = {"id": name, "question": question, "options": options, "answer": answer}
    pictures = [*map(png, images), None, None, None, None][:4]
    return row | {"question_type": kind} | {f"image_{i + 1}": p for i, p in enumerate(pictures)}


LETTER = {"question": "Which letter?", "choices": list("tuvwxyz"), "answer": 6, "hint": ""}
SOLID = {"question": "Which is a solid?", "choices": ["water", "ice"], "answer": 1}
POPE = {"image_source": "a", "question_id": "1"}
SETS = {  # folder, file -> rows as the hub has them
    ("GQA/testdev_balanced_instructions", "testdev-00000-of-00001"): [
        {"id": "201", "imageId": "n1", "question": "Is it red?", "answer": "yes"},
        {"id": "202", "imageId": "n1", "question": "What is it?", "answer": "square"},
    ],
    ("GQA/testdev_balanced_images", "testdev-00000-of-00001"): [
        {"id": "n1", "image": png()},
        {"id": "n2", "image": png("blue")},
    ],
    ("POPE/data", "test-00000-of-00002"): [
        POPE
        | {"id": "0", "question": "Is there a dog in the image?", "answer": "yes"}
        | {"image": png(), "category": "random"}
    ],
    ("POPE/data", "test-00001-of-00002"): [
        POPE
        | {"id": "1", "question": "Is there a cat in the image?", "answer": "no"}
        | {"image": png(), "category": "adversarial"}
    ],
    ("MME/data", "test-00000-of-00001"): [
        {"question_id": f"{c}/{i}.png", "image": png(), "answer": a, "category": c}
        | {"question": f"Is it {a}? Please answer yes or no."}
        for c in ("existence", "OCR", "code_reasoning")
        for i in range(2)
        for a in ("Yes", "No")
    ],
    ("ScienceQA/ScienceQA-FULL", "test-00000-of-00001"): [
        SOLID | {"image": None, "hint": "Think.", "task": "closed choice"},
        LETTER | {"image": png(), "task": "closed choice"},
    ],
    ("ScienceQA/ScienceQA-IMG", "test-00000-of-00001"): [
        LETTER | {"image": png(), "task": "closed choice"}
    ],
    ("MMMU/data", "validation-00000-of-00001"): [
        exam(
            "<image 1> beside <image 2>?",
            "['red', '<image 3>']",
            "B",
            "multiple-choice",
            *("red", "blue", "green"),
        ),
        exam("How many in <image 1>?", "[]", "['5', 'five']", "open", "red"),
    ],
    ("ai2d/data", "test-00000-of-00001"): [
        {"question": "Which?", "options": ["a", "b", "c"], "answer": "2", "image": png()}
    ],
    ("MathVista/data", "testmini-00000-of-00001"): [
        math("1", "How long?", "1.2", "float", unit="cm", precision=1.0),
        math("2", "Which part?", "8/11", "text", ["3/11", "8/11"]),
        math("3", "How many?", "4", "integer"),
        math("4", "Which years?", "[2007, 2008]", "list"),
    ],
    ("DocVQA/DocVQA", "validation-00000-of-00001"): [
        {"questionId": "7", "question": "What is the date?", "question_types": ["layout"]}
        | {"image": png(), "answers": ["May 5", "5 May"], "data_split": "val"}
    ],
}


SOURCES = [b.source for b in benchmarks.BENCHMARKS.values()]
SOURCES = [source for source in SOURCES if isinstance(source, benchmarks.Source)]


def write(root, sets=SETS):
    for (folder, name), rows in sets.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / folder / f"{name}.parquet")
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sets"))


def load(name, root, limit=None):
    return benchmarks.benchmark(name).load(split="test", limit=limit, root=root)


SHORT = "\nAnswer the question using a single word or phrase."
LETTERED = "\nAnswer with the option's letter from the given choices directly."


def pixel(image) -> tuple:
    return benchmarks.open_image(image).getpixel((3, 3))


def test_gqa_joins_images(root):
    first, second = load("gqa", root)
    assert (first.id, first.answer, first.prompt) == ("201", "yes", "Is it red?" + SHORT)
    assert first.images[0] is second.images[0] and pixel(first.images[0]) == (255, 0, 0)


def test_pope_reads_all_files_and_keeps_categories_apart(root):
    first, second = load("pope", root)
    assert (first.id, first.answer, first.extra["subtask"]) == ("random/1", "yes", "random")
    assert (second.id, second.answer) == ("adversarial/1", "no")
    in_turn = benchmarks.take([replace(first, id=k) for k in "abc"] + [second], 2)
    assert [q.extra["subtask"] for q in in_turn] == ["random", "adversarial"]
    assert first.candidates == ("Yes", "No")
    assert first.images[0] is second.images[0]  # one picture, kept once


def test_mme_halves_pairs_and_prompt(root):
    perception, cognition = load("mme_perception", root), load("mme_cognition", root)
    assert len(perception) == 8 and len(cognition) == 4
    assert {q.extra["subtask"] for q in cognition} == {"code_reasoning"}
    assert perception[0].prompt == "Is it Yes?" + SHORT
    assert perception[0].group == perception[1].group and perception[0].id != perception[1].id
    turns = [q.extra["subtask"] for q in load("mme_perception", root, 5)]
    assert turns == ["existence"] * 2 + ["OCR"] * 2 + ["existence"] * 2
    for limit, taken in ((1, 2), (3, 4)):
        assert [q.extra["subtask"] for q in load("mme_perception", root, limit)] == turns[:taken]


def test_letters_beyond_e_and_context(root):
    text, picture = load("sqa", root)
    asked = "Context: Think.\nWhich is a solid?\nA. water\nB. ice"
    assert text.prompt == asked + LETTERED and text.images == () and text.answer == "B"
    assert picture.answer == "G" and picture.candidates == tuple("ABCDEFG")
    assert not picture.prompt.startswith("Context")
    assert [q.answer for q in load("sqa_img", root)] == ["G"]
    (question,) = load("ai2d", root)
    assert question.answer == "C" and question.options == ("a", "b", "c")
    assert question.prompt == "Which?\nA. a\nB. b\nC. c" + LETTERED


def test_mmmu_images_options_and_open_answers(root):
    choice, free = load("mmmu", root)
    assert [pixel(i) for i in choice.images] == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert choice.prompt == "<image 1> beside <image 2>?\nA. red\nB. <image 3>\n" + LETTERED
    assert free.options == () and free.answer == ["5", "five"]
    assert free.prompt.endswith("\n" + SHORT)


def test_mathvista_hints(root):
    length, part, count, years = load("mathvista", root)
    hint = "Answer the question using a single floating-point number with one decimal place."
    assert length.prompt == f"How long? (Unit: cm)\n{hint}"
    assert length.extra == {"answer_type": "float", "precision": 1.0}
    assert part.prompt == "Which part?\nA. 3/11\nB. 8/11" + LETTERED
    assert part.candidates == ("A", "B") and count.prompt.endswith("a single integer number.")
    assert years.prompt.endswith("a Python list.")
    (question,) = load("docvqa", root)
    assert question.answer == ["May 5", "5 May"] and question.id == "7"


@pytest.mark.parametrize(
    "name, column",
    [
        (b.name, c)
        for b in benchmarks.BENCHMARKS.values()
        if b.source in SOURCES
        for c in b.source.columns
    ],
)
def test_a_missing_column_is_named(name, column, tmp_path):
    source = benchmarks.benchmark(name).source
    folder = f"{source.repo.split('/')[-1]}/{source.config}"
    sets = {
        k: [{c: v for c, v in r.items() if c != column} for r in rows] if k[0] == folder else rows
        for k, rows in SETS.items()
    }
    with pytest.raises(ValueError, match=f"{source.repo} has no column '{column}'"):
        load(name, write(tmp_path, sets))


def test_a_missing_set_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="lmms-lab/MME"):
        load("mme_cognition", tmp_path)
    monkeypatch.setenv("MLLM_COMPRESS_BENCHMARKS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="AI4Math/MathVista"):
        load("mathvista", None)


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match="evaluation split"):
        benchmarks.benchmark("gqa").load(split="train", limit=1, root=".")


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_the_hash_of_questions_follows_what_is_asked(name, root):
    ask = lambda **kw: benchmarks.questions_hash(name, **{"root": str(root)} | kw)
    assert ask() == ask() and len({ask(), ask(limit=3), ask(split="validation")}) == 3


def test_the_hash_of_questions_follows_the_files(root, tmp_path):
    before = {n: benchmarks.questions_hash(n, root=root) for n in ("gqa", "ai2d")}
    assert len(set(before.values())) == 2
    key = ("GQA/testdev_balanced_images", "testdev-00000-of-00001")
    other = write(tmp_path, SETS | {key: [r | {"image": png(size=(60, 40))} for r in SETS[key]]})
    assert benchmarks.questions_hash("ai2d", root=other) == before["ai2d"]
    assert benchmarks.questions_hash("gqa", root=other) != before["gqa"]
    with pytest.raises(FileNotFoundError, match="lmms-lab/GQA"):
        benchmarks.questions_hash("gqa", root=tmp_path / "elsewhere")
