"""Whatever a JSON file holds, the reader returns entries in one form or an error in one line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_compress.data.batches import Collator
from mllm_compress.data.instructions import (
    EntryError,
    InstructionData,
    from_rows,
    load_json,
    read_entries,
    read_entry,
    turns,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = ("id", "image", "images", "conversations", "messages", "question", "answer", "text")
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
        entries = read_entries(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert entries and all(map(is_entry, entries))


@quick
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=4), st.booleans(), plain)
def test_all_forms_say_the_same(pairs, picture, system):
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
    said = [{"from": "system", "value": system}, *one["conversations"]]
    with_system = turns(read_entry(one | {"conversations": said}, 0))
    assert with_system[1:] == first[1:] and with_system[0][0].startswith(system.strip())


def test_a_byte_order_mark_and_plain_text(tmp_path):
    entry = {"id": 1, "question": "hi?", "answer": "ho"}
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([entry]).encode())
    assert turns(read_entries(tmp_path / "bom.json")[0]) == [("hi?", "ho")]
    (tmp_path / "book.txt").write_text("One paragraph\nof two lines.\n\nAnother.\n")
    texts = [e["text"] for e in read_entries(tmp_path / "book.txt")]
    assert texts == ["One paragraph\nof two lines.", "Another."]


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
    path = [{"image": "../secret.png", "question": "a?", "answer": "b"}]
    with pytest.raises(ValueError, match="decode it"):
        from_rows(path).image(0)
    with pytest.raises(ValueError, match="one marker per image"):
        from_rows([{"images": [rows[0]["image"]] * 2, "question": "a?", "answer": "b"}])
    with pytest.raises(ValueError, match="is empty"):
        from_rows([])
