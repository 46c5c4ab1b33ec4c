"""Whatever a JSON file holds, the reader returns entries in one form or an error in one line."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mllm_compress.data.batches import Collator, Renderer
from mllm_compress.data.instructions import (
    EntryError,
    InstructionData,
    as_data,
    from_rows,
    load_json,
    read_entry,
    read_image,
    turns,
)
from mllm_compress.evaluation.benchmarks import Question, open_image, own_benchmark
from mllm_compress.evaluation.generation import answer_questions, prepare

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = "id image images conversations messages question answer answers text prompt completion"
KEYS = (*KEYS.split(), "instruction", "input", "output")
TURN_KEYS = ("from", "value", "role", "content", "type", "image_url", "text")
words = st.sampled_from(
    ["human", "gpt", "user", "assistant", "system", "<image>", "hi", "text", "image"]
)
turn = st.dictionaries(st.sampled_from(TURN_KEYS), words | json_values, max_size=4)
near_entries = st.dictionaries(
    st.sampled_from(KEYS), json_values | words | st.lists(turn, max_size=4), max_size=5
)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda t: "<image>" not in t
)
quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def is_entry(entry) -> bool:
    "Whether an entry is in the form that is trained on."
    pairs = turns(entry)
    image = entry.get("image")
    texts = [t for pair in pairs for t in pair if t is not None]
    several = isinstance(image, list) and len(image) > 1
    known = image is None or isinstance(image, (str, dict)) or several
    return pairs and all(isinstance(t, str) for t in texts) and "id" in entry and known


@quick
@given(json_values | near_entries)
def test_any_value_is_an_entry_or_an_error(value):
    try:
        entry = read_entry(value, 3)
    except EntryError as error:
        assert str(error).startswith("Entry ") and "\n" not in str(error).replace("\\n", "")
    else:
        assert is_entry(entry) and read_entry(entry, 3) == entry


@quick
@given(st.binary(max_size=200) | st.lists(near_entries, max_size=3).map(json.dumps).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        entries = load_json(path, path.parent).samples
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error) or isinstance(error, EntryError)
    else:
        assert entries and all(map(is_entry, entries))


@quick
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=4), st.booleans(), plain)
def test_all_forms_say_the_same(pairs, picture, system):
    pairs[0] = pairs[0][0], f"a{pairs[0][1]}"  # an entry has some answer
    flat = [t for pair in pairs for t in pair]
    roles, llava = ("user", "assistant") * len(pairs), ("human", "gpt") * len(pairs)
    image = {"image": "0.png"} if picture else {}
    marked = ["<image>\n" * picture + flat[0], *flat[1:]]
    one = {**image, "conversations": [{"from": w, "value": t} for w, t in zip(llava, marked)]}
    messages = [{"role": r, "content": t} for r, t in zip(roles, flat)]
    if picture:
        part = {"type": "image_url", "image_url": {"url": "0.png"}}
        messages[0]["content"] = [part, {"type": "text", "text": flat[0]}]
    two = {"messages": messages}
    first, second = (turns(read_entry(e, 0)) for e in (one, two))
    assert first == second == [(q.strip(), a.strip()) for q, a in pairs]
    said = [{"from": "Developer", "value": system}, *one["conversations"]]
    for form in (one | {"conversations": said}, one | {"system": system}):
        entry = read_entry(form, 0)
        assert entry.get("system", "") == system and turns(entry) == first
    chat = [{"role": role, "content": text} for role, text in zip(("User", "GPT"), marked)]
    other_marker = marked[0].replace("<image>", "<|image_1|>")
    for form in (
        {"prompt": marked[0], "completion": flat[1]},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"instruction": marked[0], "input": "", "output": flat[1]},
        {"question": other_marker, "answers": [flat[1], "", flat[1]]},
    ):
        assert turns(read_entry(image | form, 0)) == first[:1]
    votes = {"question": "How many?", "answers": [{"answer": a} for a in (3, 4, 4)]}
    assert turns(read_entry(votes, 0)) == [("How many?", "4")]
    alpaca = {"instruction": "Add.", "input": "1 and 2"}
    assert turns(read_entry(alpaca, 0, answered=False)) == [("Add.\n1 and 2", "")]


def test_files_of_text(tmp_path):
    lines = [{"question": "hi\u2028there?", "answer": "ho"}] * 2
    texts = {
        "bom.json": "\ufeff" + json.dumps(lines),
        "lines.jsonl": "\r\n".join(json.dumps(e, ensure_ascii=False) for e in lines),
        "book.txt": "One paragraph\r\nof two lines.\r\n\r\nAnother.\r\n",
        "sentences.txt": "One sentence.\nAnother.\n",
        "wrapped.txt": "A sentence that goes\non in a second line\nand a third.\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    read = lambda name: [turns(e)[0] for e in load_json(tmp_path / name, "").samples]
    assert read("bom.json") == read("lines.jsonl") == [("hi\u2028there?", "ho")] * 2
    assert [t for _, t in read("book.txt")] == ["One paragraph\nof two lines.", "Another."]
    assert [t for _, t in read("sentences.txt")] == ["One sentence.", "Another."]
    assert len(list(read("wrapped.txt"))) == 1


def test_pictures_are_read_as_they_are_meant(tmp_path):
    grey = np.linspace(0, 1, 12).reshape(3, 4)
    stored = {
        "png": (grey * 65535).astype(np.uint16),
        "tiff": grey.astype(np.float32),
        "bmp": (grey * 255).astype(np.uint8),
    }
    for suffix, values in stored.items():
        Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
        read = np.asarray(read_image(tmp_path / f"grey.{suffix}"), int)
        assert read.shape == (3, 4, 3) and abs(read - 255 * grey[..., None]).max() <= 1, suffix
    Image.fromarray(1000 * stored["tiff"]).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match="grey values are 0 … 1000: save it with 8 bits"):
        read_image(tmp_path / "depth.tiff")
    for name, white in (("dark.png", 65535), ("stated.tiff", 4095)):
        Image.fromarray((grey * 4095).astype(np.uint16)).save(tmp_path / name, tiffinfo={281: 4095})
        with warnings.catch_warnings(record=True) as notes:
            brightest = np.asarray(read_image(tmp_path / name)).max()
        assert brightest == round(255 * 4095 / white) and len(notes) == (white == 65535)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(stored["bmp"]).save(tmp_path / "side.jpg", exif=exif)
    assert read_image(tmp_path / "side.jpg").size == (3, 4)
    assert read_image(Image.open(tmp_path / "side.jpg")).size == (3, 4)
    edges = np.tile(np.float32([0, 0, 1, 1]), (4, 2000))  # wider than is kept
    Image.fromarray(edges).save(tmp_path / "wide.tiff")
    reduced = np.asarray(read_image(tmp_path / "wide.tiff"))
    assert reduced.shape[1] == 4096 and reduced.max() > 200


pieces = st.text(st.sampled_from("aB1 :\n<|é"), max_size=6)
templates = st.tuples(*[pieces] * 4, st.sampled_from(["", "<thought>"]))  # of the last turn
sentences = ["the red circle is large", "A: yes", "Assistant: no. 12"] * 4


@pytest.fixture(scope="module")
def byte_level():
    "A tokenizer that joins a space with the word behind it."
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences, vocab_size=330, special_tokens=["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="</s>")


@quick
@given(templates, st.lists(st.tuples(plain, plain), min_size=1))
@example(("", "\n", "Assistant: ", "</s>", ""), [("is it red?", "yes")])
@example(("", "\n", "A: ", "</s>", "<thought>"), [("is it red?", "yes"), ("large?", "no")])
def test_every_answer_is_supervised(byte_level, template, pairs):
    before, behind, begin, end, thought = map(json.dumps, template)
    byte_level.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        f"{{{{ {before} + m.content + {behind} }}}}{{% else %}}"
        f"{{{{ {begin} + ({thought} if loop.last else '') + m.content + {end} }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {begin} }}}}{{% endif %}}"
    )
    pairs = [(question, answer.strip() or "no") for question, answer in pairs]
    ids, supervised = Renderer(byte_level).encode(tuple(pairs), ())
    rest = byte_level.decode([i for i, trained in zip(ids, supervised) if trained])
    for _, answer in pairs:
        _, matched, rest = rest.partition(answer)
        assert matched == answer


def test_an_answer_that_the_template_drops_is_an_error(byte_level):
    byte_level.chat_template = "{% for m in messages %}{{ m.role }}: {% endfor %}assistant: "
    with pytest.raises(ValueError, match="No token belongs to the answer 'yes'"):
        Renderer(byte_level).encode((("is it red?", "yes"),), ())


def test_a_system_text_is_a_turn_where_the_template_has_one(byte_level, tiny_lm):
    data = from_rows([{"system": "Be brief.", "question": "is it red?", "answer": "yes"}])
    question = Question("0", "is it red?", "yes", extra={"system": "Be brief."})
    for begin, end, asked in (
        ("", "", "system: Be brief. user: is it red? assistant:"),
        ("{% if m.role != 'system' %}", "{% endif %}", "user: Be brief.\nis it red? assistant:"),
    ):
        turn = f"{begin}{{{{ m.role }}}}: {{{{ m.content }}}} {end}"
        loop = "{% for m in messages %}" + turn + "{% endfor %}"
        byte_level.chat_template = f"{loop}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
        ids = Collator(byte_level, data)([data[0]])["input_ids"][0]
        assert byte_level.decode(ids) == f"{asked} yes "
        _, (prompt,), _ = prepare(tiny_lm("llama", vocab=len(byte_level)), byte_level, [question])
        assert byte_level.decode(prompt.own) == asked


def test_plain_text_is_supervised_but_for_its_first_token(tiny_llava):
    tokenizer = tiny_llava[1].tokenizer
    data = InstructionData([{"id": 0, "text": "the circle is red"}, {"id": 1, "text": "the"}])
    batch = Collator(tokenizer, data, turns="sequential")([data[0], data[1]])
    ids = tokenizer("the circle is red")["input_ids"]
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == [-100, *ids[1:]]


def test_a_link_inside_the_image_folder_may_lead_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere/1.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/coco").symlink_to(tmp_path / "elsewhere")
    entry = {"id": 1, "image": "coco/1.png", "question": "a?", "answer": "b"}
    (tmp_path / "one.json").write_text(json.dumps([entry]))
    assert load_json(tmp_path / "one.json", tmp_path / "images").image(0).size == (8, 8)
    for path in ("../elsewhere/1.png", str(tmp_path / "elsewhere/1.png")):
        (tmp_path / "one.json").write_text(json.dumps([entry | {"image": path}]))
        with pytest.raises(ValueError, match="outside of the image folder"):
            load_json(tmp_path / "one.json", tmp_path / "images")
    inside = entry | {"image": str(tmp_path / "images/coco/1.png")}
    (tmp_path / "one.json").write_text(json.dumps([inside]))
    assert len(load_json(tmp_path / "one.json", tmp_path / "images")) == 1


def test_rows_with_pictures_and_parquet_files(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(encoded, "PNG")
    rows = [
        {"image": {"bytes": encoded.getvalue(), "path": None}, "question": "red?", "answer": "yes"},
        {"image": None, "question": "is one two?", "answer": "no"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for data in (
        from_rows(rows),
        load_json(tmp_path, tmp_path),
        load_json(tmp_path / "rows.parquet", ""),
    ):
        assert data.image(0).getpixel((0, 0)) == (255, 0, 0) and data.image(1) is None
        assert [turns(e) for e in data.samples] == [[("red?", "yes")], [("is one two?", "no")]]
    asked = own_benchmark(tmp_path / "rows.parquet", scorer="yes_no").load()
    assert open_image(asked[0].images[0]).size == (8, 8) and not asked[1].images
    named = [{"question": "w?", "answer": ["12", "twelve"]}]
    (tmp_path / "a.json").write_text(json.dumps(named))
    assert own_benchmark(tmp_path / "a.json", scorer="anls").load()[0].answer == ["12", "twelve"]
    path = [{"image": "../secret.png", "question": "a?", "answer": "b"}]
    with pytest.raises(ValueError, match="decode it"):
        from_rows(path)
    with pytest.raises(ValueError, match="one marker per image"):
        from_rows([{"images": [rows[0]["image"]] * 2, "question": "a?", "answer": "b"}])
    with pytest.raises(ValueError, match="is empty"):
        from_rows([])
    for splits_or_stream in ({"train": rows}, iter(rows)):
        with pytest.raises(ValueError, match="one split"):
            as_data(splits_or_stream)


def test_a_prompt_leaves_its_last_space_to_the_answer(byte_level, tiny_lm):
    byte_level.chat_template = "{{ messages[0].content }} A: "
    model = tiny_lm("llama", vocab=len(byte_level))
    question = Question("0", "is it red?", "yes", candidates=("yes", "no"))
    _, (prompt,), _ = prepare(model, byte_level, [question])
    for answer, ids in zip(question.candidates, prompt.candidates):
        assert [*prompt.own, *ids] == byte_level(f"is it red? A: {answer}")["input_ids"]
    assert answer_questions(model, byte_level, [question])[0].candidate in question.candidates
