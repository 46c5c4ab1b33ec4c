"""The store of stages: nothing lost, nothing believed without its seal, nothing made twice."""

import json
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from mllm_compress.study import store
from mllm_compress.study.store import Store
from mllm_compress.utils import files


def inputs(k: int = 0, stage: str = "plan") -> dict:
    return {"stage": stage, "version": 1, "k": k}


def test_store_refuses_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a results store"):
        Store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_new_store_may_be_opened_by_many_at_once(tmp_path):
    for k in range(20):
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(lambda _: Store(tmp_path / f"s{k}"), range(16)))) == 16
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".store.json.1234").touch()  # a run was killed while it marked the folder
    assert Store(tmp_path / "t").keys("score") == []


@pytest.mark.parametrize("found", [1, 99])
def test_store_refuses_another_format(tmp_path, found):
    (tmp_path / "store.json").write_text(json.dumps({"mllm_compress store": found}))
    with pytest.raises(ValueError, match=f": {found}}}, not .*: 2}}: move .* away"):
        Store(tmp_path)


OTHER = "the text of another result"


@pytest.mark.parametrize("damage", ["", "{", '{"seal": 1}', "[]", '"text"', "null", "\x00", OTHER])
def test_corrupt_result_is_named_moved_and_missing(tmp_path, damage):
    s = Store(tmp_path / "s")
    key, other = (store.write(s, inputs(k), {"score": k}) for k in (2, 3))
    s.path("plan", key).write_text(s.path("plan", other).read_text() if damage is OTHER else damage)
    with pytest.warns(UserWarning, match=key):
        assert store.read(s, "plan", key) is None
    assert s.keys("plan") == [other] and len(list((s.folder / "corrupt").iterdir())) == 1
    store.write(s, inputs(2), {"score": 2})
    assert [store.read(s, "plan", k)["value"]["score"] for k in (key, other)] == [2, 3]


def test_a_result_that_changes_is_read_again(tmp_path):
    "A process keeps what it has parsed, as long as the file does not change."
    s = Store(tmp_path / "s")
    key = store.write(s, inputs(), {"score": 1})
    assert store.read(s, "plan", key) is store.read(s, "plan", key)
    s.path("plan", key).unlink()
    assert store.read(s, "plan", key) is None
    store.write(s, inputs(), {"score": 2})
    assert store.read(s, "plan", key)["value"] == {"score": 2}


def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError):
        files.write_atomically(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())


# ---- results with files


def test_damaged_files_are_made_again(tmp_path):
    s, fill = (
        Store(tmp_path / "s"),
        lambda folder: (folder / "scores.bin").write_bytes(b"00") and {},
    )
    key = store.write(s, inputs(stage="scores"), fill=fill)
    (store.folder_of(s, "scores", key) / "scores.bin").write_bytes(b"0")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.folder_of(s, "scores", key) is None
    assert list((s.folder / "corrupt").glob("scores-*"))
    assert store.write(s, inputs(stage="scores"), fill=fill) == key
    assert (store.folder_of(s, "scores", key) / "scores.bin").stat().st_size == 2


def test_failed_work_leaves_nothing_and_is_made_again(tmp_path):
    s = Store(tmp_path / "s")

    def broken(folder):
        (folder / "half").touch()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        store.write(s, inputs(stage="scores"), fill=broken)
    assert s.keys("scores") == [] and not list((s.folder / "scores").iterdir())
    key = store.write(s, inputs(stage="scores"), fill=lambda f: (f / "whole").touch())
    assert [p.name for p in store.folder_of(s, "scores", key).iterdir()] == ["whole"]


def test_lock_ends_with_its_process(tmp_path):
    s = Store(tmp_path / "s")
    code = (
        "import sys, time; from mllm_compress.study import store\n"
        "with store.lock(store.Store(sys.argv[1]), 'x') as holder: print([holder], flush=True); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(s.folder)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == "['']"
    with store.lock(s, "x") as holder:
        assert f"process {other.pid}" in holder
    other.kill()
    other.wait()
    with store.lock(s, "x") as holder:
        assert not holder


# ---- results that travel


def packed(tmp_path, text: str, stage: str = "plan"):
    "A file of results with these lines."
    path = tmp_path / "results.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(f"{stage}.jsonl", text)
    return path


FORGERIES = {
    "whole": (lambda t: t, True),
    "another stage": (lambda t: t, False),
    "another score": (lambda t: t.replace('"score":2.0', '"score":3.0'), False),
    "half": (lambda t: t[:20], False),
    "a list": (lambda t: "[]", False),
    "deep": (lambda t: "[" * 100_000, False),
    "no utf-8": (lambda t: t.replace("score", "sc\udcff"), False),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_results_travel_and_are_believed_only_with_their_seal(tmp_path, name):
    forge, kept = FORGERIES[name]
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    key = store.write(ours, inputs(), {"score": 2.0})
    text = forge(ours.path("plan", key).read_text()).encode("utf-8", "surrogateescape")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        stage = "score" if name == "another stage" else "plan"
        taken = store.unpack(packed(tmp_path, text, stage), theirs)
    assert sum(taken.values(), []) == theirs.keys("plan") == [key] * kept
    assert kept or "is corrupt" in str(told[0].message)


def test_what_is_no_file_of_results_is_refused(tmp_path, monkeypatch):
    s = Store(tmp_path / "s")
    (tmp_path / "notes.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="not a file of results"):
        store.unpack(tmp_path / "notes.zip", s)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        store.unpack(tmp_path / "gone.zip", s)
    monkeypatch.setattr(store, "LIMIT", 1000)
    with pytest.raises(ValueError, match="would take more than"):
        store.unpack(packed(tmp_path, "0" * 1001), s)


def test_a_packed_result_stays_when_its_store_is_gone(tmp_path):
    s, path = Store(tmp_path / "s"), tmp_path / "results.zip"
    keys = [store.write(s, inputs(k), {"score": float(k)}) for k in range(3)]
    store.pack(s, {"plan": keys[:2]}, path)
    store.pack(Store(tmp_path / "new"), {"plan": keys[1:]}, path)  # the third is nowhere to be had
    assert store.unpack(path, Store(tmp_path / "again"))["plan"] == keys[1:2]
    store.pack(s, {"plan": keys[2:]}, path, keep=True)  # where some keys are unknown
    assert store.unpack(path, Store(tmp_path / "both"))["plan"] == keys[1:]
    other = Store(tmp_path / "of another day")  # whose result of the same key is not published
    assert store.write(other, inputs(1), {"score": 9.0}) == keys[1]
    store.pack(other, {"plan": keys[1:]}, path)
    assert b'"score":9.0' not in zipfile.ZipFile(path).read("plan.jsonl")
    before = path.stat().st_ino  # of another file as soon as it is written again
    store.pack(s, {"plan": keys[1:]}, path)
    assert path.stat().st_ino == before
    store.pack(s, {"plan": keys[1:], "score": []}, path)
    assert path.stat().st_ino != before


def test_equal_results_make_an_equal_file(tmp_path):
    s = Store(tmp_path / "s")
    keys = [store.write(s, inputs(k), {"score": float(k)}) for k in range(50)]
    for name in ("a.zip", "b.zip"):
        store.pack(s, {"plan": keys if name == "a.zip" else keys[::-1]}, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
