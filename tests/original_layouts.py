"""The golden checkpoints in their original layouts, with a tokenizer as the real ones have."""

import shutil
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NAMES = ["llava", "bunny", "internvl"]
SPECIALS = {
    "llava": ["<unk>", "<s>", "</s>"],
    "bunny": ["<|pad|>", "<|x|>", "<|endoftext|>"],
    "internvl": ["<unk>", "<s>", "</s>", "<|system|>", "<|end|>", "<|user|>", "<|assistant|>"],
}
SIZE = {
    "llava": 320,
    "bunny": 320,
    "internvl": 311,
}  # of the vocabulary, as in the fixtures' config.json
HAN = sorted(
    set("你是由上海人工智能实验室联合商汤科技开发的书生多模态大型英文名叫个有用无害助手，。")
)


def toy_tokenizer(scheme, specials, vocab):
    "One token per character, sentencepiece's word mark, and a BOS: a Llama tokenizer in small."
    pieces = (
        [(s, 0.0) for s in specials]
        + [("▁", -1.0)]
        + [(chr(c), -2.0) for c in [10, *range(33, 127)]]
        + [(c, -2.0) for c in HAN]
    )
    pieces += [(f"<fill{i}>", -90.0) for i in range(vocab - len(pieces))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if "<s>" in specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", specials.index("<s>"))]
        )
    kwargs = {"bos_token": "<s>"} if "<s>" in specials else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=specials[0],
        pad_token=specials[0],
        eos_token=specials[2],
        additional_special_tokens=list(specials),
        **kwargs,
    )


def copy_of(layouts: Path, name: str, into: Path) -> Path:
    "A fixture's checkpoint alone, in a folder of its own."
    return Path(
        shutil.copytree(
            layouts / name, into / name, ignore=shutil.ignore_patterns("inputs*", "outputs*")
        )
    )


def with_tokenizer(layouts: Path, name: str, into: Path) -> Path:
    "A fixture's checkpoint with the tokenizer that a real release has."
    folder = copy_of(layouts, name, into)
    tokenizer = toy_tokenizer("first", SPECIALS[name], SIZE[name])
    if name == "internvl":
        (folder / "token_ids.json").unlink()
        tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def instruction_json(folder: Path, n: int = 12) -> list:
    "LLaVA entries with one or two turns, with and without an image; images go to `folder`."
    colors, entries = ["red", "green", "blue", "white"], []
    for i in range(n):
        color, path = colors[i % 4], f"coco/train2017/{i:06}.jpg"
        said = [("<image>\nWhat color is it?", color)] + (
            [("Is it dark?", "no")] if i % 3 == 1 else []
        )
        entry = {"id": f"{i:06}", "image": path}
        if i % 6 == 5:
            entry, said = {"id": f"{i:06}"}, [("Say hi.", "hi")]
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", [(64, 40), (30, 70), (50, 50)][i % 3], color).save(folder / path)
        entries.append(
            entry
            | {
                "conversations": [
                    t
                    for q, a in said
                    for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a})
                ]
            }
        )
    return entries
