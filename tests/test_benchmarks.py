"""Adapters on fabricated rows in the exact layout of the public sets."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm_compress.evaluation import benchmarks


def png(color="red", size=(6, 4)):
    Image.new("RGB", size, color).save(out := io.BytesIO(), "PNG")
    return {"bytes": out.getvalue(), "path": f"{color}.png"}


SETS = {  # folder, file -> rows as the hub has them
    ("GQA/testdev_balanced_instructions", "testdev-00000-of-00001"): [
        {
            "id": "201",
            "imageId": "n1",
            "question": "Is it red?",
            "answer": "yes",
            "fullAnswer": "Yes.",
            "isBalanced": True,
        },
        {
            "id": "202",
            "imageId": "n1",
            "question": "What is it?",
            "answer": "square",
            "fullAnswer": "A square.",
            "isBalanced": True,
        },
    ],
    ("GQA/testdev_balanced_images", "testdev-00000-of-00001"): [
        {"id": "n1", "image": png()},
        {"id": "n2", "image": png("blue")},
    ],
    ("POPE/data", "test-00000-of-00002"): [
        {
            "id": "0",
            "question_id": "1",
            "question": "Is there a dog in the image?",
            "answer": "yes",
            "image_source": "a",
            "image": png(),
            "category": "random",
        }
    ],
    ("POPE/data", "test-00001-of-00002"): [
        {
            "id": "1",
            "question_id": "1",
            "question": "Is there a cat in the image?",
            "answer": "no",
            "image_source": "a",
            "image": png(),
            "category": "adversarial",
        }
    ],
    ("MME/data", "test-00000-of-00001"): [
        {
            "question_id": f"{c}/{i}.png",
            "image": png(),
            "question": f"Is it {a}? Please answer yes or no.",
            "answer": a,
            "category": c,
        }
        for c in ("existence", "OCR", "code_reasoning")
        for i in range(2)
        for a in ("Yes", "No")
    ],
    ("ScienceQA/ScienceQA-FULL", "test-00000-of-00001"): [
        {
            "image": None,
            "question": "Which is a solid?",
            "choices": ["water", "ice"],
            "answer": 1,
            "hint": "Think.",
            "task": "closed choice",
        },
        {
            "image": png(),
            "question": "Which letter?",
            "choices": list("tuvwxyz"),
            "answer": 6,
            "hint": "",
            "task": "closed choice",
        },
    ],
    ("ScienceQA/ScienceQA-IMG", "test-00000-of-00001"): [
        {
            "image": png(),
            "question": "Which letter?",
            "choices": list("tuvwxyz"),
            "answer": 6,
            "hint": "",
            "task": "closed choice",
        }
    ],
    ("MMMU/data", "validation-00000-of-00001"): [
        {
            "id": "validation_Art_1",
            "question": "<image 1> beside <image 2>?",
            "options": "['red', '<image 3>']",
            "answer": "B",
            "question_type": "multiple-choice",
            **{f"image_{i}": png(c) for i, c in ((1, "red"), (2, "blue"), (3, "green"))},
            "image_4": None,
        },
        {
            "id": "validation_Math_2",
            "question": "How many in <image 1>?",
            "options": "[]",
            "answer": "['5', 'five']",
            "question_type": "open",
            "image_1": png(),
            "image_2": None,
            "image_3": None,
            "image_4": None,
        },
    ],
    ("ai2d/data", "test-00000-of-00001"): [
        {"question": "Which?", "options": ["a", "b", "c"], "answer": "2", "image": png()}
    ],
    ("MathVista/data", "testmini-00000-of-00001"): [
        {
            "pid": "1",
            "question": "How long?",
            "image": "images/1.jpg",
            "decoded_image": png(),
            "choices": None,
            "unit": "cm",
            "precision": 1.0,
            "answer": "1.2",
            "question_type": "free_form",
            "answer_type": "float",
            "metadata": {"split": "testmini"},
            "query": "",
        },
        {
            "pid": "2",
            "question": "Which part?",
            "image": "images/2.jpg",
            "decoded_image": png(),
            "choices": ["3/11", "8/11"],
            "unit": None,
            "precision": None,
            "answer": "8/11",
            "question_type": "multi_choice",
            "answer_type": "text",
            "metadata": {"split": "testmini"},
            "query": "",
        },
        {
            "pid": "3",
            "question": "How many?",
            "image": "images/2.jpg",
            "decoded_image": png(),
            "choices": None,
            "unit": None,
            "precision": None,
            "answer": "4",
            "question_type": "free_form",
            "answer_type": "integer",
            "metadata": {"split": "testmini"},
            "query": "",
        },
        {
            "pid": "4",
            "question": "Which years?",
            "image": "images/2.jpg",
            "decoded_image": png(),
            "choices": None,
            "unit": None,
            "precision": None,
            "answer": "[2007, 2008]",
            "question_type": "free_form",
            "answer_type": "list",
            "metadata": {"split": "testmini"},
            "query": "",
        },
    ],
    ("DocVQA/DocVQA", "validation-00000-of-00001"): [
        {
            "questionId": "7",
            "question": "What is the date?",
            "question_types": ["layout"],
            "image": png(),
            "docId": 1,
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": ["May 5", "5 May"],
            "data_split": "val",
        }
    ],
}


SOURCES = [
    b.source for b in benchmarks.BENCHMARKS.values() if isinstance(b.source, benchmarks.Source)
]


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


def test_gqa_joins_images(root):
    first, second = load("gqa", root)
    assert (first.id, first.answer, first.prompt) == (
        "201",
        "yes",
        "Is it red?\nAnswer the question using a single word or phrase.",
    )
    assert first.images[0] is second.images[0] and benchmarks.open_image(first.images[0]).getpixel(
        (3, 3)
    ) == (255, 0, 0)


def test_pope_reads_all_files_and_keeps_categories_apart(root):
    questions = load("pope", root)
    assert [(q.id, q.answer, q.extra["subtask"]) for q in questions] == [
        ("random/1", "yes", "random"),
        ("adversarial/1", "no", "adversarial"),
    ]
    assert (
        questions[0].candidates == ("Yes", "No")
        and questions[0].images[0] is questions[1].images[0]
    )  # one picture, kept once


def test_mme_halves_pairs_and_prompt(root):
    perception, cognition = load("mme_perception", root), load("mme_cognition", root)
    assert (
        len(perception) == 8
        and len(cognition) == 4
        and {q.extra["subtask"] for q in cognition} == {"code_reasoning"}
    )
    assert perception[0].prompt == "Is it Yes?\nAnswer the question using a single word or phrase."
    assert perception[0].group == perception[1].group and perception[0].id != perception[1].id


@pytest.mark.parametrize(
    "limit, taken",
    [
        (1, ["existence"] * 2),
        (3, ["existence"] * 2 + ["OCR"] * 2),
        (5, ["existence"] * 2 + ["OCR"] * 2 + ["existence"] * 2),
    ],
)
def test_mme_limit_takes_whole_pairs_of_all_subtasks(root, limit, taken):
    assert [q.extra["subtask"] for q in load("mme_perception", root, limit)] == taken


def test_mme_with_a_missing_row_is_an_error(tmp_path):
    key = ("MME/data", "test-00000-of-00001")
    with pytest.raises(ValueError, match="two questions about an image; 'OCR/OCR/1.png' has 1"):
        load(
            "mme_perception",
            write(
                tmp_path,
                {
                    key: [
                        r
                        for r in SETS[key]
                        if (r["question_id"], r["answer"]) != ("OCR/1.png", "No")
                    ]
                },
            ),
        )


def test_scienceqa_context_and_letters_beyond_e(root):
    text, picture = load("sqa", root)
    assert (
        text.prompt == "Context: Think.\nWhich is a solid?\nA. water\nB. ice\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (
        text.images == ()
        and text.answer == "B"
        and picture.answer == "G"
        and picture.candidates == tuple("ABCDEFG")
    )
    assert not picture.prompt.startswith("Context") and [
        q.answer for q in load("sqa_img", root)
    ] == ["G"]


def test_mmmu_images_options_and_open_answers(root):
    choice, free = load("mmmu", root)
    assert [benchmarks.open_image(i).getpixel((3, 3)) for i in choice.images] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 128, 0),
    ]
    assert (
        choice.prompt == "<image 1> beside <image 2>?\nA. red\nB. <image 3>\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (
        free.options == ()
        and free.answer == ["5", "five"]
        and free.prompt.endswith("\n\nAnswer the question using a single word or phrase.")
    )


def test_ai2d(root):
    (question,) = load("ai2d", root)
    assert (
        question.answer == "C"
        and question.options == ("a", "b", "c")
        and question.prompt.startswith("Which?\nA. a\nB. b\nC. c\nAnswer")
    )


def test_mathvista_hints(root):
    length, part, count, years = load("mathvista", root)
    assert (
        length.prompt == "How long? (Unit: cm)\n"
        "Answer the question using a single floating-point number with one decimal place."
    )
    assert length.extra == {"answer_type": "float", "precision": 1.0}
    assert (
        part.prompt
        == "Which part?\nA. 3/11\nB. 8/11\n"
        "Answer with the option's letter from the given choices directly."
        and part.candidates == ("A", "B")
    )
    assert count.prompt.endswith("a single integer number.") and years.prompt.endswith(
        "a Python list."
    )


def test_docvqa(root):
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
    with pytest.raises(ValueError, match="scenes/open"):
        benchmarks.benchmark("vqav2")
    with pytest.raises(ValueError, match="evaluation split"):
        benchmarks.benchmark("gqa").load(split="train", limit=1, root=".")


def test_padding_is_the_mean_colour():
    picture = benchmarks.open_image(
        benchmarks.StoredImage(png(size=(10, 4))["bytes"]), (0.48145466, 0.4578275, 0.40821073)
    )
    assert (
        picture.size == (10, 10)
        and picture.getpixel((0, 0)) == (122, 116, 104)
        and picture.getpixel((0, 5)) == (255, 0, 0)
    )
    assert benchmarks.open_image(
        benchmarks.StoredImage(png(size=(10, 4))["bytes"], square=False)
    ).size == (10, 4)


def test_small_suite_has_its_answers_among_its_candidates():
    for name in benchmarks.SMALL_SUITE:
        for q in benchmarks.load_questions(name, "test", 30):
            assert q.answer in q.candidates and len(q.images) == 1
    pairs = benchmarks.load_questions("scenes/cognition", "test", 7)
    assert (
        len(pairs) == 8
        and {q.answer for q in pairs[:2]} == {"yes", "no"}
        and pairs[0].group == pairs[1].group
    )


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


def test_the_hash_of_questions_loads_none(monkeypatch):
    monkeypatch.setattr(benchmarks.scenes, "questions", None)
    monkeypatch.setattr(benchmarks.scenes, "easy_vqa", None)
    assert len({benchmarks.questions_hash(name) for name in benchmarks.SMALL_SUITE}) == len(
        benchmarks.SMALL_SUITE
    )
