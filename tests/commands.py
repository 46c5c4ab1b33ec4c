"""Commands in this process, what they print, and a folder with models for them."""

import json
import os
import re
from pathlib import Path

from typer.testing import CliRunner

from mllm_compress.cli import app
from mllm_compress.data import scenes
from mllm_compress.utils import files


def run(*args, code=0) -> str:
    "Run a command and return what it prints."
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def facts(*args, code=0) -> dict:
    "What a command prints with --json."
    result = CliRunner().invoke(app, ["-q", *map(str, args), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


def stop_at_the_second_write(monkeypatch, how: int) -> list:  # counts of batches, as written
    "Send this process a signal when it writes sums for the second time."
    write, done = files.write_sums, []

    def write_and_stop(path, count, totals):
        write(path, count, totals)
        done.append(count)
        if len(done) == 2:
            os.kill(os.getpid(), how)

    monkeypatch.setattr(files, "PAUSE", 0)
    monkeypatch.setattr(files, "write_sums", write_and_stop)
    return done


def options_of(command: str) -> set:
    "The options that the help of a command names."
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    return set(re.findall(r"--[\w-]+", text))


def save_models(folder: Path, mllm: tuple, tiny_lm):
    "Save an MLLM with its processor as `llava`, and a language model of its words as `lm`."
    for part in mllm:
        part.save_pretrained(folder / "llava")
    lm = tiny_lm("llama", vocab=len(mllm[1].tokenizer))
    for part in (lm, mllm[1].tokenizer):
        part.save_pretrained(folder / "lm")
    return lm


def save_data(folder: Path, entries: list, texts: list):
    "Write mine.json, with a picture for each entry, and text.jsonl."
    for k, entry in enumerate(entries):
        entry |= {"id": k, "image": f"{k}.png"}
        scenes.image(k, "train").save(folder / entry["image"])
    (folder / "mine.json").write_text(json.dumps(entries))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
