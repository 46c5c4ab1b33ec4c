"""Every mistake ends with exit code 2 and a line that names the cure, and nothing on disk moves."""

import json
import math
import re
import shutil
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from commands import save_models
from peft import LoraConfig, get_peft_model
from PIL import Image
from pruning_cases import build
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mllm_compress.checkpoint.formats import checksum
from mllm_compress.cli import app
from mllm_compress.pruning.pruning_plan import make_plan

Case = namedtuple("Case", "args says")


def pair(question="<image>\nwhat?", answer="red", **more) -> dict:
    "An entry with one picture."
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "e", "image": "0.png", "conversations": said} | more


def said(*turns) -> dict:
    "An entry without a picture from (speaker, text) pairs."
    return {"id": "e", "conversations": [{"from": who, "value": text} for who, text in turns]}


# Entries that cannot be read, and what the message must say.
ENTRIES = {
    "null": (None, "not an object"),
    "no-keys": ({}, "has neither 'conversations'"),
    "null-conversations": ({"id": "e", "conversations": None}, "write a list of objects"),
    "empty-text": ({"id": "e", "text": " "}, "leave it out"),
    "no-turns": ({"id": "e", "conversations": []}, "alternate"),
    "no-answer": (said(("human", "hi")), "end with an answer"),
    "answer-first": (said(("gpt", "hi"), ("human", "ho")), "start with a question"),
    "two-questions": (said(("human", "a"), ("human", "b")), "alternate"),
    "boolean-answer": (said(("human", "a"), ("gpt", True)), "bool where a turn should be text"),
    "unknown-speaker": (said(("bot", "a"), ("gpt", "b")), "use human, user, gpt"),
    "late-system": (said(("human", "a"), ("system", "x"), ("gpt", "b")), "put it first"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "leave it out"),
    "audio-part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "use parts of type text or image",
    ),
    "marker-in-answer": (
        {**said(("human", "a"), ("gpt", "<image>\nb")), "image": "0.png"},
        "put it into a question",
    ),
    "swapped-markers": (pair("<|image_2|> or <|image_1|>?"), "number them 1, 2"),
    "two-image-keys": (pair(images=["1.png"]), "name all of them in 'images'"),
    "no-answers": ({"question": "a?", "answers": []}, "end with an answer"),
    "two-markers": (pair("<image><image>\nwhat?"), "write one marker per image"),
    "marker-without-image": (said(("human", "<image>\na"), ("gpt", "b")), "remove the marker"),
    "null-among-images": (pair("<image><image>?", image=["0.png", None]), "leave it out"),
    "missing-among-images": (pair("<image><image>?", image=["0.png", "gone.png"]), "Complete"),
    "unread-key": ({"question": "a?", "answer": "b", "history": [["c?", "d"]]}, "is not read"),
    "unread-picture": ({"question": "a?", "answer": "b", "image_file": "c.png"}, "is not read"),
    "choices": ({"question": "a?", "choices": ["b"], "answer": 0}, "has 'choices', which is not"),
    "system-of-text": ({"text": "a b c", "system": "d"}, "has 'system', which is not read"),
    "system-list": (pair(system=["a"]), "a part of type None|should be text"),
    "empty-answer": ({"question": "a?", "answer": " "}, "leave the entry out"),
    "url": (pair(image="https://example.org/a.jpg"), "download it"),
    "number-image": (pair(image=5), "name the file"),
    "empty-image": (pair(image=""), "name the file"),
    "missing-image": (pair(image="gone.png"), "check|Complete the folder"),
    "traversal": (pair(image="../outside.png"), "--image-root"),
    "absolute": (pair(image="/etc/hostname"), "--image-root"),
    "surrogate": (pair(answer="\ud800"), "repair its encoding"),
}
READ_LATER = {  # the file of a picture is opened when the entry is used
    "broken-image": (pair(image="broken.png"), "Replace it"),
    "text-as-image": (pair(image="mine.json"), "Replace it"),
    "bomb": (pair(image="bomb.png"), "more than 100 million|decompression bomb"),
}
FILES = {  # bytes of a data file, and what the message must say
    "empty.json": (b"", "is empty"),
    "empty-list.json": (b"[]", "is empty"),
    "object.json": (b'{"data": []}', "a list or one a line"),
    "cut.json": (b'[{"id": 1', "not valid JSON"),
    "cut.jsonl": (b'{"text": "a b c"}\n{"text": ', "Line 2 of"),
    "utf16.json": ('[{"id": 1}]'.encode("utf-16"), "save it as UTF-8"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
}


# Models that cannot be loaded, and what the message must say.
MODELS = {
    "bad/cut": "is truncated",
    "bad/pointer": "a Git LFS pointer",
    "bad/header": "damaged header",
    "bad/half-config": "config.json is damaged",
    "bad/code": "contains custom code",  # is not run, nor asked for
    "bad/no-type": "check its config.json",
    "bad/list-type": "check its config.json",
    "bad/generation": "generation_config.json is damaged",
    "bad/adapter": "merge the adapter into its model",
    "bad/token": "copy both from the same checkpoint",
    "bad/default": "Copy config.json again",
    "bad/vit": "no anatomy for model_type .vit",
    "bad/mark": "save it as UTF-8 without one",
    "bad/half-processor": "check its config.json, processor",
    "bad/word-processor": "has no processor of pictures",
    "bad/no-shards": "missing shards",
    "bad/half-index": "is damaged",
    "bad/missing": "missing keys",
    "bad/extra": "unexpected keys",
    "bad/shape": "does not fit|cannot be loaded",
    "bad/pickles": "Make safetensors of it",
    "bad/empty": "folder of a checkpoint",
    "bad/weightless": "folder of a checkpoint",
    "bad/edited": "config.json: truncated",
    "bad/manifest": "is damaged",
    "bad/no-manifest": "was not written by save_pruned",
    "bad/no-class": "is of another format",
    "bad/feature-layer": "the vision tower has 3 layers",
    "bad/no-weights": "model.safetensors: missing",
    "bad/emty": "did you mean empty",
    "./lama": "did you mean",
    "mine.json": "give the folder",
    "lava": "Unknown model",
    "tiny-lava": "tiny-llava",
}


def make_damaged(folder: Path) -> None:
    "Checkpoints of MODELS."
    dense, bad, text = folder / "llava", folder / "bad", lambda value: json.dumps(value).encode()
    weights = (dense / "model.safetensors").read_bytes()
    tensors = load_file(dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    first = next(iter(tensors))
    pointer = b"version https://git-lfs.github.com/spec/v1\n" * 3
    shard = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    for name, file, content in (
        ("cut", "model.safetensors", weights[:-10]),
        ("pointer", "model.safetensors", pointer),
        ("header", "model.safetensors", weights[:9] + b"!!!!" + weights[13:]),
        ("half-config", "config.json", b'{"model_type": '),
        ("code", "config.json", text({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}})),
        ("no-type", "config.json", text({"vocab_size": 4})),
        ("list-type", "config.json", text({**config, "model_type": ["llava"]})),
        ("feature-layer", "config.json", text({**config, "vision_feature_layer": -99})),
        ("generation", "generation_config.json", b"[1]"),
        ("adapter", "adapter_config.json", b"{}"),
        ("vit", "config.json", text({"model_type": "vit"})),
        ("mark", "config.json", b"\xef\xbb\xbf" + text(config)),
        ("token", "config.json", text({**config, "image_token_index": 9, "image_token_id": 9})),
        ("default", "config.json", text({k: v for k, v in config.items() if "text" not in k})),
        ("half-processor", "processor_config.json", b"{"),
        ("word-processor", "processor_config.json", text({"processor_class": "Luck"})),
        ("no-shards", "model.safetensors.index.json", text(shard)),
        ("half-index", "model.safetensors.index.json", b'{"weight'),
    ):
        shutil.copytree(dense, bad / name)
        (bad / name / file).write_bytes(content)
    for name, changed_tensors in (
        ("missing", {k: v for k, v in tensors.items() if k != first}),
        ("extra", {**tensors, "odd.weight": torch.ones(2)}),
        ("shape", {**tensors, first: torch.ones(3)}),
        ("nan", {**tensors, first: tensors[first] * math.nan}),
    ):
        shutil.copytree(dense, bad / name)
        save_file(changed_tensors, bad / name / "model.safetensors", {"format": "pt"})
    shutil.copytree(dense, bad / "pickles")
    (bad / "pickles/model.safetensors").rename(bad / "pickles/pytorch_model.bin")
    (bad / "adapter/config.json").unlink()
    (bad / "empty").mkdir()
    shutil.copytree(dense, bad / "weightless")
    (bad / "weightless/model.safetensors").unlink()
    for name in ("edited", "manifest", "no-class", "no-manifest", "no-weights"):
        shutil.copytree(folder / "small", bad / name)
    files = json.loads((bad / "no-class/mllm_compress.json").read_text())["files"]
    manifest = {"format": 1, "files": files, "checksum": checksum({"format": 1, "files": files})}
    (bad / "no-class/mllm_compress.json").write_text(json.dumps(manifest))
    (bad / "edited/config.json").write_text("{}")
    (bad / "manifest/mllm_compress.json").write_text("{")
    (bad / "no-manifest/mllm_compress.json").unlink()
    (bad / "no-weights/model.safetensors").unlink()


MINE = ("--data", "mine.json", "--samples", "2")
WITH_MODEL = {
    "score": lambda m: ("score", m, "-o", "out", *MINE),
    "prune": lambda m: ("prune", m, "-o", "out", "--ratio", ".3", "--method", "magnitude"),
    "prune-layers": lambda m: ("prune", m, "-o", "out", "--layers", "1"),
    "recover-teacher": lambda m: ("recover", "small", "--teacher", m, "-o", "out", *MINE[:2]),
    "evaluate": lambda m: ("evaluate", m, "--questions", "mine.json"),
    "evaluate-dense": lambda m: ("evaluate", "llava", "--questions", "mine.json", "--dense", m),
    "compare": lambda m: ("compare", m, "llava", "--questions", "mine.json"),
    "cost": lambda m: ("cost", m),
}
WITH_DATA = {
    "score": lambda d: ("score", "llava", "-o", "out", "--data", d),
    "prune": lambda d: ("prune", "llava", "-o", "out", "--ratio", ".3", "--data", d),
    "recover": lambda d: ("recover", "small", "--teacher", "llava", "-o", "out", "--data", d),
    "perplexity": lambda d: ("evaluate", "llava", "--benchmark", "perplexity", "--data", d),
    "questions": lambda d: ("evaluate", "llava", "--questions", d),
}
PRUNE, SCORE = (("prune", "llava", "-o", "out"), ("score", "llava", "-o", "out"))
LAYERWISE = (*PRUNE, "--pruning", "layerwise", *MINE)
RECOVER = ("recover", "small", "--teacher", "llava", "-o", "out", *MINE[:2])
EVALUATE = ("evaluate", "llava", "--questions", "mine.json")
OTHERS = ("cost", "llava"), ("compare", "llava", "small")
DRAWN = "--samples=0 --samples=99999999 --scenes=0 --max-length=0 --seed=-1"  # wrong numbers
TRAINED = "--batch-size=-1 --passes=-2 --max-length=-5 --seed=-1 --save-every=-1 --lora=-4"
YAML_VALUES = [
    *(("lr", v) for v in ("fast", "-1", ".inf", ".nan", "2", "true", "[1]")),
    *(("epochs", v) for v in ("'3'", "x", "-1", "[]")),
    *(("batch_size", v) for v in ("1.5", "0", "-3", "x", "true")),
    *(("passes", v) for v in ("0", "1.5", "x")),
    *(("patience", v) for v in ("0", "x")),
    *(("seed", v) for v in ("x", "-1", "1.5", "99999999999")),
    *((name, v) for name in ("warmup", "weight_decay", "max_grad_norm") for v in ("x", "-1")),
    *(("max_length", v) for v in ("x", "0", "1.5")),
    *(("losses", v) for v in ("luck", "[sft]", "{sft: abc}", "{luck: 1}", "3", "{}")),
    *(("losses", f"{{sft: {weight}}}") for weight in ("0", "-1", ".nan", ".inf")),
    *(("lora", v) for v in ("x", "-5", "{foo: 1}", "{r: 0}", "{r: 2, lora_alpha: x}")),
    *(("train", v) for v in ("[projector]", "luck", "3")),
    *(("precision", v) for v in ("fp8", "16")),
    *(("turns", v) for v in ("3", "luck")),
    *(("positions", v) for v in ("luck",)),
    *(("gradient_checkpointing", v) for v in ("maybe", "1")),
    *(("hidden_layers", v) for v in ("x", "[99]", "[-1]", "[a]", "3")),
    ("fraction", "x"),
    ("temperature", "x"),
    ("learning_rate", "1"),
]
CASES = [
    # what to remove
    Case((*PRUNE,), "--ratio 0.3"),
    Case((*PRUNE, "--ratio", "0"), "nothing would be removed"),
    *(
        Case((*PRUNE, "--ratio", r), r"outside \[0, 0.95\)")
        for r in ("-0.1", "0.95", "1", "30", "nan")
    ),
    Case((*LAYERWISE, "--ratio", ".01"), "removes nothing: the smallest step is one layer"),
    Case((*LAYERWISE, "--ratio", ".94"), "add widthwise pruning or request less"),
    Case((*PRUNE, "--ratio", ".3", "--layers", "1"), "not several"),
    Case((*PRUNE, "--plan", "plan.json", "--layers", "1"), "not several"),
    *(
        Case((*PRUNE, "--layers", x), "numbers such as 3,5-7")
        for x in ("a", "1,", "3-1", "-1", "1.5")
    ),
    Case((*PRUNE, "--layers", "9"), "0 … 3"),
    Case((*PRUNE, "--layers", "0-3"), "fewer than 4"),
    Case((*PRUNE, "--plan", "gone.json"), "gone.json holds no.*that plan.save wrote"),
    Case((*PRUNE, "--plan", "mine.json"), "give a file that plan.save wrote"),
    Case((*PRUNE, "--plan", "other-plan.json"), "Make a plan for this model"),
    Case((*PRUNE, "--ratio", ".3", "--shape", "round"), "use one of uniform, blockwise"),
    *(Case((*PRUNE, "--ratio", ".3", "--protect", p), "such as 1,1") for p in ("1", "a,b", "-1,1")),
    Case((*PRUNE, "--ratio", ".3", "--shape", "uniform", "--protect", "1,1"), "blockwise"),
    Case((*PRUNE, "--ratio", ".3", "--round-to", "0"), "--round-to is '0': give auto"),
    Case((*PRUNE, "--ratio", ".3", "--method", "luck"), "use one of block_influence"),
    Case((*PRUNE, "--ratio", ".3", "--pruning", "depth"), "use one of"),
    Case((*PRUNE, "--ratio", ".3", "--method", "taylor", "--pruning", "layerwise"), "use one of"),
    Case((*LAYERWISE, "--ratio", ".3", "--method", "angular_distance"), "use one of block_infl"),
    # budgets
    *(
        Case((*PRUNE, "--budget", b), says)
        for b, says in (
            ("kv", "such as latency=0.6"),
            ("kv=", "such as latency=0.6"),
            ("kv=half", "such as latency=0.6"),
            ("kv=-1", "such as latency=0.6"),
            ("0.5", "such as latency=0.6"),
            ("kv=0", "between 0 and 1"),
            ("bytes=1.5", "between 0 and 1"),
            ("ram=0.5", "use one of latency, bytes, kv"),
        )
    ),
    Case((*PRUNE, "--budget", "kv=.5", "--ratio", ".3"), "not several"),
    Case((*PRUNE, "--budget", "kv=.5", "--costs", "mine.json"), "without a budget such as"),
    Case((*PRUNE, "--budget", "latency=.5", "--costs", "mine.json"), "is no table of costs"),
    Case((*PRUNE, "--budget", "kv=.5", "--shape", "uniform"), "ranks the units of all layers"),
    Case((*PRUNE, "--budget", "kv=.5", "--method", "taylor"), "ranks the units of all layers"),
    Case((*PRUNE, "--budget", "kv=.5", "--protect", "1,1"), "--protect has no effect"),
    Case((*PRUNE, "--budget", "kv=.5", "--layer-share", ".5"), "--layer-share has no effect"),
    Case((*PRUNE, "--budget", "kv=.5", "--scores", "scores"), "of method gauss_newton"),
    Case((*PRUNE, "--budget", "kv=.01", "--no-reconstruct", *MINE), "cannot be met: the least"),
    Case(("cost", "llava", "--units", "notes.txt"), "was not written by this command"),
    Case(("cost", "llava", "--units", "gone/costs.json"), "There is no folder gone"),
    Case(("cost", "llava", "--units", "c.json", "--ratio", ".3"), "--units has no effect"),
    # scores
    Case((*PRUNE, "--ratio", ".3", "--scores", "gone"), "There are no scores in gone"),
    Case((*PRUNE, "--ratio", ".3", "--scores", "cut-scores"), "score again"),
    Case((*PRUNE, "--ratio", ".3", "--scores", "lm-scores"), "another model: heads differ|another"),
    Case((*PRUNE, "--ratio", ".3", "--scores", "other-scores"), "weights differ. Score this model"),
    Case((*PRUNE, "--ratio", ".3", "--scores", "scores", "--scores", "scores"), "one of each"),
    # numbers
    *(
        Case((*command, option), f"{option.replace('=', ' is ')}: give a number from")
        for command, options in (
            (SCORE, DRAWN),
            ((*PRUNE, "--ratio", ".3"), DRAWN),
            (RECOVER, TRAINED),
        )
        for option in options.split()
    ),
    Case((*SCORE, "--data", "mine.json", "--samples", "9"), "have only 2 entries"),
    *(Case((*RECOVER, "--lr", lr), "a number above 0 and below 1") for lr in ("-1", "1", "nan")),
    *(Case((*RECOVER, "--epochs", n), "a number above 0 to 10,000") for n in ("0", "inf", "nan")),
    Case((*RECOVER, "--epochs", "1e-9"), "less than one sample"),
    Case((*RECOVER, "--warmup", "5"), "a number from 0 to 1"),
    Case((*RECOVER, "--losses", "sft+sft"), "a loss twice"),
    Case((*RECOVER[:3], "small", *RECOVER[4:]), "is its own teacher"),
    *(
        Case((*command, *args.split()), f"{args.split()[-2]} has no effect {why}")
        for command, args, why in (
            (RECOVER, "--scenes 9", "on the data 'mine.json'"),
            (RECOVER, "--train projector --lora 4", "where the projector alone"),
            (RECOVER, "--losses sft --temperature 3", "without a logits_kd"),
            (RECOVER, "--held-out 0 --patience 3", "without held-out data"),
            (RECOVER, "--schedule constant --warmup 0.2", "with the schedule constant"),
            (PRUNE, "--layers 1 --shape uniform", "where whole layers"),
            (PRUNE, "--layers 1 --samples 4", "where no calibration data"),
            (PRUNE, "--ratio .3 --method magnitude --data mine.json", "where no calibration"),
            (EVALUATE, "--data mine.json", "without --benchmark perplexity"),
            (EVALUATE[:2], "--benchmark scenes/open --scorer anls", "without --questions"),
        )
    ),
    *(Case((*RECOVER, "--fraction", f), "a number above 0 to 1") for f in ("0", "-1", "2", "nan")),
    Case((*RECOVER, "--passes", "5"), "use fewer, or more data"),
    Case((*EVALUATE, "--limit", "-1"), "--limit is -1"),
    Case(("compare", "llava", "small", "--examples", "-1"), "--examples is -1"),
    # names of methods
    Case((*RECOVER, "--losses", "luck"), "use one of"),
    Case((*RECOVER, "--train", "everything"), "use one of projector"),
    Case((*RECOVER, "--recipe", "gpt"), "use one of llava, bunny, internvl"),
    Case(("evaluate", "llava", "--benchmark", "luck"), "use one of scenes/open"),
    Case(("evaluate", "llava", "--benchmark", "pope"), "in MLLM_COMPRESS_BENCHMARKS"),
    Case((*EVALUATE, "--scorer", "luck"), "use one of exact, anls, letter, yes_no"),
    Case((*EVALUATE, "--scorer", "letter"), "needs a list of texts"),
    Case((*EVALUATE[:3], "odd_options.json"), "needs a list of texts"),
    Case((*EVALUATE, "--scorer", "yes_no"), "needs one of yes, no"),
    Case((*EVALUATE[:3], "options.json", "--scorer", "letter"), "needs one of A, B"),
    Case(("evaluate", "llava", "--questions", "text.jsonl"), "is plain text"),
    *(
        Case((*command, "--device", device), says)
        for command in (SCORE, (*PRUNE, "--ratio", ".3"), RECOVER, EVALUATE, *OTHERS)
        for device, says in (
            ("gpu", "use auto, cpu"),
            ("cuda:64", "There is no cuda:64 here"),
            ("mps", "There is no mps here"),
            ("meta", "use auto, cpu"),
        )
    ),
    Case((*RECOVER, "--report-to", "paper"), "use one of tensorboard, wandb, trackio"),
    Case((*EVALUATE, "--record"), "leave --record out"),
    Case((*RECOVER, "--lr", "search", "--held-out", "0"), "compares rates on held-out data"),
    Case((*RECOVER, "--held-out", "1"), "a number from 0 and below 1"),
    Case(("score", "llava", "-o", "out", "--data", "self", "--stream"), "without --stream"),
    Case((*RECOVER[:7], "self:no.json"), "no.json"),
    Case((*RECOVER[:7], "self:"), "give text, such as mine.json"),
    *(
        Case((*command, "--chat-template", file), says)
        for command in (RECOVER, EVALUATE, ("score", "llava", "-o", "out", *MINE))
        for file, says in (("gone", "check --chat-template"), ("mine.json", "does not render"))
    ),
    # options of a file
    Case((*RECOVER, "--config", "gone.yaml"), "check --config"),
    Case((*RECOVER, "--config", "list.yaml"), "write lines such as"),
    Case((*RECOVER, "--config", "bad.yaml"), "not valid YAML"),
    Case((*RECOVER, "--config", "unknown.yaml"), "Unknown recovery option 'learning_rate'"),
    *(
        Case(
            (*RECOVER, "--config", f"option-{k}.yaml"),
            f"(?i){name}.* (give|use one of)|Unknown loss|must be|no loss given",
        )
        for k, (name, _) in enumerate(YAML_VALUES)
    ),
    Case((*RECOVER, "--config", "notes"), "check --config"),
    # where results go
    *(
        Case((*command, "-o", out), says)
        for command in (
            ("prune", "llava", "--ratio", ".3"),
            ("recover", "small", "--teacher", "llava", *MINE[:2]),
            ("score", "llava", *MINE),
        )
        for out, says in (
            ("notes", "choose a|another folder"),
            ("notes.txt", "is a file|choose another|was not written"),
            ("notes.txt/out", "is a file, so nothing can be written"),
            ("/sys/out", "cannot be written .*choose another folder"),
            ("small", "overwrite|other files|small"),
            ("llava", "choose another folder"),
            ("llava/out", "choose another folder"),
            (".", "choose another folder|choose a new"),
            ("..", "holds the current folder|choose another folder"),
            ("unreadable/../notes.txt", "choose|is a file"),
        )
    ),
    Case(("prune", "small", "-o", "small", "--layers", "0", "--overwrite"), "is the model small"),
    Case((*RECOVER[:5], "small", *MINE[:2], "--overwrite"), "is the model small"),
    Case((*RECOVER[:3], "other", "-o", "other", *MINE[:2]), "is the teacher other"),
    Case((*PRUNE[:2], "-o", "extra-weights", "--ratio", ".3", "--overwrite"), "move them away"),
    Case(("score", "llava", "-o", "scores", *MINE), "replace it with --overwrite"),
    Case(("score", "llava", "-o", "small", *MINE, "--overwrite"), "was not written by this"),
    *(
        Case((*command, "-o", f"x/{command[0]}"), "training|unfinished|answers exists and was not")
        for command in ((*RECOVER[:4], *MINE[:2]), ("score", "llava", *MINE), EVALUATE)
    ),
    Case((*EVALUATE, "-o", "gone/rows.csv"), "make it first"),
    Case((*EVALUATE, "-o", "notes"), "name a file to write"),
    Case((*EVALUATE, "-o", "notes.txt"), "was not written by this command"),
    Case((*EVALUATE, "-o", "null", "--overwrite"), "was not written by this command"),
    Case((*EVALUATE, "--answers", "mine.json"), "is a file, so nothing can be written"),
    Case((*EVALUATE, "-o", "mine.json", "--overwrite"), "was not written by this command"),
    Case(("evaluate", "llava", "--questions", "long.json"), "context of the model 512"),
    Case((*PRUNE, "--ratio", ".3", "--recipe", "paper", "--method", "flap"), "leave the method or"),
    Case(("export", "bad/nan", "--to", "transformers", "-o", "out"), "infinite or not a number"),
    Case(("prune", "bad/nan", "--layers", "1", "-o", "out"), "infinite or not a number"),
    Case(("check", "llava", "--chat-template", "mine.json"), "does not render"),
    Case(("check", "llava", "--only", "luck"), "use one of parts, cost"),
    Case(("compare", "llava", "small", "-o", "notes"), "was not written by this command"),
    Case(("compare", "llava", "small", "-o", "small"), "choose another folder"),
    # models without pictures, and the like
    Case(("score", "lm", "-o", "out"), "give --data FILE"),
    Case(("score", "lm", "-o", "out", *MINE), "use entries without images"),
    Case(("evaluate", "lm"), "give --data FILE for its perplexity"),
    Case(("evaluate", "lm", "--benchmark", "easy-vqa"), "--benchmark perplexity"),
    Case(("evaluate", "lm", "--benchmark", "text/quotes/no-picture"), "none with pictures"),
    Case(("recover", "llava", "--teacher", "llava", "-o", "out"), "is not a checkpoint of prune"),
    Case(("recover", "small", "--teacher", "lm", "-o", "out", *MINE[:2]), "dense model"),
    Case((*RECOVER, "--image-root", "gone"), "check --image-root"),
    Case((*RECOVER[:6], "--data", "missing-all.json", "--skip-missing"), "none of the images"),
    # looking
    Case(("show", "gone"), "check the path"),
    Case(("show", "notes"), "was not written by mllm-compress"),
    Case(("show", "notes.txt"), "There is no folder"),
    Case(("show", "llava"), "mllm-compress cost"),
    Case(("show", "bad/edited"), "truncated"),
    Case(("show", "cut-scores"), "score again"),
    Case(("cost", "gpt", "--memory"), "use one of LLaVA-v1.5-7B"),
    Case(("cost", "small", "--ratio", ".3"), "small is pruned: give the dense model"),
    Case(("advise", "--model", "m", "--ratio", "1.5"), r"outside \(0, 0.95\)"),
    Case(("advise", "--model", "m", "--ratio", ".3", "--profile", "huge"), "use|huge"),
    Case(("push", "small", "small"), "give text, such as owner/name"),
    Case(("push", "llava", "me/llava"), "was not written by save_pruned"),
    Case(("push", "bad/edited", "me/x"), "truncated"),
    *(Case(make("notes"), "without parquet files|is a folder") for make in WITH_DATA.values()),
    *(Case(make("gone.json"), "There is no file gone.json") for make in WITH_DATA.values()),
    # converting
    Case(("convert", "gone", "out"), "is not a folder. Download"),
    Case(("convert", "llava", "notes"), "was not written by this"),
    Case(("convert", "llava", "out"), "the original layouts that can be read"),
    Case(("convert", "llava", "out", "--dtype", "int8"), "use one of float32, bfloat16, float16"),
    Case(("convert", "llava", "/sys/out"), "cannot be written"),
    Case(("convert", "llava", "llava/out"), "choose another folder"),
    Case(("convert", "a", "b", "--dtype=int8", "--dtype", "int8"), "--dtype is given 2 times"),
    Case(("prune", "a", "--reconstruct", "--no-reconstruct"), "or --no-reconstruct is given 2"),
    # the study
    Case(("study", "--profile", "huge"), "use authors, eyes, families, gpu, larger, llava-small"),
    Case(("study", "--profile", "gone.yaml"), "gone.yaml"),
    *(
        Case(("study", "--profile", "smoke", "--dry-run", *args.split()), says)
        for args, says in (
            ("-p seeds", "NAME=VALUE"),
            ("-p ratios=[0.3", "The value of ratios cannot be read"),
            ("-p profile=tiny", "given by --profile"),
            ("-p ratios=[0.3]", "01_models: Unknown parameter"),
            ("-p seeds=[0]", "Name the notebook that the parameter is for with --only"),
            ("--executor slrm", "Unknown executor 'slrm': use one of local, inline, slurm"),
            ("--executor slurm --workers 4", "jobs_at_once"),
            ("--only 99_none", "01_models, 02_pruning"),
            ("--only 02_pruning --workers -1", "workers is -1"),
            ("--only 02_pruning -p ratio=[0.3]", r"ratios: list = \[\]"),
            ("--only 02_pruning -p seeds=0", "seeds must be of type list"),
            ("--only 02_pruning -p ratios=[a]", "ratio must be a number"),
            ("--only 02_pruning -p seeds=[a]", "seed must be a whole number"),
            ("--only 02_pruning -p seeds=[0] -p seeds=[1]", "seeds is given twice"),
            (
                "--only 05_data -p fewer={0.05:{ratio:[0.3]}}",
                "fewer: 0.05 must hold ratios or seeds",
            ),
        )
    ),
    Case(
        ("study", "--profile", "tiny", "--only", "06_best", "-p", "compare=false", "--dry-run"),
        "an empty compare means 'as the profile says', and profile tiny says True",
    ),
    # requests
    Case(("score", "llava"), "--out is missing: give it"),
    Case(("score", "-o", "out"), "MODEL is missing: give it"),
    Case(("score", "llava", "-o", "out", "--config", "unknown.yaml"), "Unknown option 'learning"),
    Case(("score", "llava", "-o", "out", "--config", "text-samples.yaml"), "samples is 'many'"),
]


def changed(folder: Path) -> dict:
    "What a change on disk would change: the paths, and size and time of every file."
    stats = {p: p.lstat() for p in folder.rglob("*")}
    return {p: p.is_dir() or (s.st_size, s.st_mtime_ns) for p, s in stats.items()}


def make_data(folder: Path) -> None:
    "Data files, good and bad, and pictures."
    for k in range(2):
        Image.new("RGB", (32, 32), (80 * k, 0, 200)).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    bomb = bytearray((folder / "0.png").read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bytes(bomb))
    entries = [pair(id=k, image=f"{k}.png") for k in range(2)]
    (folder / "mine.json").write_text(json.dumps(entries))
    (folder / "missing-all.json").write_text(json.dumps([pair(image="gone.png")]))
    (folder / "long.json").write_text(json.dumps([pair("<image>\n" + 40_000 * "word ")]))
    (folder / "text.jsonl").write_text('{"text": "the circle is red"}\n' * 4)
    letters = [pair(options=["red", "blue"], answer="green")]
    (folder / "options.json").write_text(json.dumps(letters))
    (folder / "odd_options.json").write_text(json.dumps([pair(options=5, answer="red")]))
    for name, (entry, _) in {**ENTRIES, **READ_LATER}.items():
        (folder / f"entry-{name}.json").write_text(json.dumps([entry, entry]))
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    for k, (name, value) in enumerate(YAML_VALUES):
        (folder / f"option-{k}.yaml").write_text(f"{name}: {value}\n")
    yamls = {
        "list": "- a\n- b\n",
        "bad": "lr: [1\n",
        "unknown": "learning_rate: 1\n",
        "text-samples": "samples: many\n",
    }
    for name, text in yamls.items():
        (folder / f"{name}.yaml").write_text(text)


def make_scores(folder: Path) -> None:
    "Scores, good and bad."
    from mllm_compress.importance.criteria import measure
    from mllm_compress.zoo import load_model

    def score(name, out):
        measure("layerwise", "random", load_model(folder / name)[0]).save(folder / out)

    score("llava", "scores")
    score("other", "other-scores")
    score("lm", "lm-scores")
    shutil.copytree(folder / "scores", folder / "cut-scores")
    weights = folder / "cut-scores/scores.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_llava, tiny_lm):
    "A folder with models, checkpoints, scores and data, good and bad; the current folder."
    from mllm_compress.checkpoint import save_pruned
    from mllm_compress.pruning.plans import plan_layerwise
    from mllm_compress.pruning.slicing import apply_plan

    folder = tmp_path_factory.mktemp("shop") / "shop"
    folder.mkdir()
    lm = save_models(folder, tiny_llava, tiny_lm)
    shutil.copytree(folder / "llava", folder / "other")
    tensors = load_file(folder / "other/model.safetensors")
    tensors = {k: v + 0.01 if "up_proj" in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "other/model.safetensors", {"format": "pt"})
    plan = plan_layerwise(tiny_llava[0], layers=[1])
    plan.save(folder / "plan.json")
    plan_layerwise(lm, layers=[1]).save(folder / "other-plan.json")
    save_pruned(apply_plan(tiny_llava[0], plan), plan, folder / "small", tiny_llava[1])
    shutil.copytree(folder / "small", folder / "extra-weights")
    (folder / "extra-weights/adapter_model.safetensors").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes/thesis.txt").write_text("years of work")
    (folder / "notes.txt").write_text("years of work")
    (folder / "null").symlink_to("/dev/null")
    for name in (".recover.training", ".score.unfinished", ".evaluate.answers"):
        shutil.copytree(folder / "notes", folder / "x" / name)
    make_data(folder)
    make_scores(folder)
    make_damaged(folder)
    return folder


def rotated(commands, problems) -> list:
    "Every command with every problem; the first case of a problem is of another command each."
    makes, cases = [*commands], []
    for problem, says in problems:
        cases += [Case(make(problem), says) for make in makes]
        makes.append(makes.pop(0))
    return cases


def entries(table: dict) -> list:
    "The files of some entries, and what the message must say."
    return [(f"entry-{name}.json", says) for name, (_, says) in table.items()]


BUILT = [
    *CASES,
    *rotated(WITH_MODEL.values(), MODELS.items()),
    *rotated(WITH_DATA.values(), entries(ENTRIES)),
    *rotated(WITH_DATA.values(), entries(READ_LATER)),
    *rotated(WITH_DATA.values(), ((name, says) for name, (_, says) in FILES.items())),
]


def tiers() -> list:
    "One quick case per message; its further cases run in `make test-all`."
    params, met = [], set()
    for case in BUILT:
        marks = [pytest.mark.slow] if case.says in met else []
        met.add(case.says)
        params.append(pytest.param(*case, marks=marks, id=" ".join(case.args)))
    return params


LAST = {}  # folder -> its state after the last case, which is that before the next


@pytest.mark.parametrize("args, says", tiers())
def test_a_mistake_is_answered_in_one_line(shop, monkeypatch, args, says):
    monkeypatch.chdir(shop)
    monkeypatch.setenv("MLLM_COMPRESS_CHECKOUT", str(Path(__file__).parents[1]))  # of the study
    monkeypatch.setenv("MLLM_COMPRESS_BENCHMARKS", "gone")
    before = LAST.get(shop) or changed(shop.parent)
    result = CliRunner().invoke(app, list(args))
    after = LAST[shop] = changed(shop.parent)
    if after != before:
        LAST.clear()
    for new in set(after) - set(before):  # so that one failure stays one failure
        shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink(missing_ok=True)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [x for x in result.stderr.splitlines() if x and not x.startswith("Note: ")]
    assert lines[0].startswith("Error: "), result.stderr
    listed = re.search("Unknown model|The notebook has:", lines[0])  # a line per model, parameter
    assert len(lines) == 1 or listed, lines
    assert re.search(says, result.stderr), result.stderr
    assert "Traceback" not in result.output
    assert after == before


def test_a_missing_package_is_named_with_its_extra(shop, monkeypatch):
    from mllm_compress.zoo import models

    def fail(*args):
        raise ImportError("InternVLProcessor requires the Torchvision library but it was not found")

    monkeypatch.chdir(shop)
    monkeypatch.setattr(models, "quiet_loading", fail)
    result = CliRunner().invoke(app, ["cost", "llava"])
    assert result.exit_code == 2 and "pip install 'mllm_compress[vision]'" in result.stderr


BATCHES = [{"input_ids": torch.tensor([[1, 30, 2]])}]
ADAPTERS = LoraConfig(r=2, target_modules=["q_proj"])
OTHER = make_plan(build("llama-4x1", num_hidden_layers=9))  # of a model of nine layers
SFT = {"losses": {"sft": 1}}
coded = lambda model: setattr(model, "is_quantized", True) or model
PYTHON = [  # calls that are refused, and what the message must say
    (lambda m, p, mc, lm: mc.prune(m, [], rato=0.3), "unexpected keyword argument 'rato'"),
    (lambda m, p, mc, lm: mc.prune(m, [], layer_share=3), "outside"),
    (lambda m, p, mc, lm: mc.prune(m, method="random", shape="uniform"), "have no effect where"),
    (lambda m, p, mc, lm: mc.prune(m, method="magnitude", ridge=1), "no effect without a refit"),
    (lambda m, p, mc, lm: mc.evaluate(m, p, ["easy-vqa"], {"easy": 3}), "use one of easy-vqa"),
    (lambda m, p, mc, lm: mc.evaluate(lm("llama"), p, ["easy-vqa"], 1), "takes no pictures"),
    (lambda m, p, mc, lm: mc.data.calibration_batches("mine.json", p, n=0), "number from 1"),
    (lambda m, p, mc, lm: mc.data.calibration_batches([{"image": b""}], p), "has neither"),
    (lambda m, p, mc, lm: mc.recovery.RecoveryConfig(warmup=5), "a number from 0 to 1"),
    (lambda m, p, mc, lm: mc.recovery.RecoveryConfig(lora={"rank": 4}), "Unknown LoRA option"),
    (lambda m, p, mc, lm: mc.recover(m, None, [3], SFT, p), "not an object"),
    (lambda m, p, mc, lm: mc.evaluate(m, p, []), "benchmarks is 0"),
    (lambda m, p, mc, lm: mc.evaluate(m, p.tokenizer), "no processor of pictures"),
    (lambda m, p, mc, lm: mc.load_model("llava", device_map="cuda:64"), "There is no cuda:64"),
    (lambda m, p, mc, lm: mc.recover(m, m, "mine.json", {}, p), "is its own teacher"),
    (lambda m, p, mc, lm: mc.recover(m, None, "gone.json", SFT, p), "There is no file gone.json"),
    (lambda m, p, mc, lm: mc.load_model("llava", device_map={"": 0}), "Unknown device"),
    (lambda m, p, mc, lm: mc.load_pruned("small", attention="eager"), "is not supported"),
    (lambda m, p, mc, lm: mc.prune(get_peft_model(lm("llama"), ADAPTERS), BATCHES), "merge_and"),
    (lambda m, p, mc, lm: mc.prune(lm("llama", vocab=9), BATCHES), "embeddings of 9"),
    (lambda m, p, mc, lm: mc.prune("llava", BATCHES), "'llava' is no model"),
    (lambda m, p, mc, lm: mc.prune(coded(lm("llama")), BATCHES), "neither pruned nor trained"),
    (
        lambda m, p, mc, lm: mc.recover(m, m, "mine.json", {}, p, OTHER),
        "and the plan is of a model",
    ),
    (lambda m, p, mc, lm: mc.recover(coded(lm("llama")), m, "mine.json", {}, p), "nor trained"),
    (lambda m, p, mc, lm: mc.prune(m, ["a"], ratio=0.3), "batch 0 has no input_ids"),
    (lambda m, p, mc, lm: mc.prune(m, method="magnitude", ratio="0.3"), "ratio .0.3. is outside"),
    (lambda m, p, mc, lm: mc.pruning.apply_plan(m, {"layers": [1]}), "is no PruningPlan"),
    (lambda m, p, mc, lm: mc.recover(m, "llava", "mine.json", {}, p), "'llava' is no model"),
    (lambda m, p, mc, lm: mc.recover(m, None, "mine.json", SFT, p, save_every=-1), "save_every"),
    (lambda m, p, mc, lm: mc.recover(m, None, "mine.json", "sft", p), "recovery option 's'"),
    (lambda m, p, mc, lm: mc.cost.latency(lm("llama").to("meta"), {}), "load the weights"),
    (lambda m, p, mc, lm: mc.recovery.RecoveryConfig("projector", lora={"r": 2}), "lora adapts"),
]


@pytest.mark.parametrize("call, says", PYTHON)
def test_a_mistake_in_python_is_a_clear_error(shop, monkeypatch, tiny_llava, tiny_lm, call, says):
    import mllm_compress

    monkeypatch.chdir(shop)
    with pytest.raises((ValueError, TypeError, OSError), match=says):
        call(*tiny_llava, mllm_compress, tiny_lm)
