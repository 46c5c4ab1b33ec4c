"""The texts of `study.texts`, made up here and small, in the layout of their packages."""

import gzip
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

SIZES = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
vocab_size max_position_embeddings""".split()
NOUNS = """anchor basket candle desert engine feather glove harbour island jacket kettle ladder
mirror needle orchard pocket quarry ribbon saddle tunnel""".split()
VERBS = """carry gather follow open borrow repair measure polish whisper scatter balance
stretch wander invent hammer""".split()
MANUAL = "usr/share/doc/debian-reference-common/docs/debian-reference.en.txt.gz"
WEBSTER, FOLDOC = "usr/share/dictd/gcide.dict.dz", "usr/share/dictd/foldoc.dict.dz"
ESSAYS = "usr/share/doc/anarchism/markdown/secA.md.gz"
PLACES = "near the river|under the old bridge|before the winter|in a quiet street|at the harbour"
PARTS = "made of iron|used by sailors|kept for the night|that is never finished|of small value"


def _glosses(words: list, letter: str, draw: random.Random) -> list:  # of lines
    "Lines of WordNet about made-up meanings."
    lines = ["  1 This line belongs to the licence."]
    for k in range(8 * len(words)):
        word, part = words[k % len(words)], draw.choice(PARTS.split("|"))
        thing, place = draw.choice(["a thing", "a tool", "a way"]), draw.choice(PLACES.split("|"))
        gloss = f'{thing} {part}, number {k}; "they saw the {word} {place}"'
        lines.append(f"{k:08d} 00 {letter} 01 {word} 0 000 | {gloss}  ")
    return lines


def write_texts(
    root: Path,  # becomes what MLLM_COMPRESS_TEXTS names
) -> Path:
    "Write the files of the packages; the same ones at every call."
    draw = random.Random(0)
    wordnet, fortunes = root / "usr/share/wordnet", root / "usr/share/games/fortunes"
    for folder in (wordnet, fortunes):
        folder.mkdir(parents=True, exist_ok=True)
    for kind, words in (("noun", NOUNS), ("verb", VERBS)):
        lines = _glosses(words, kind[0], draw)
        (wordnet / f"data.{kind}").write_text("\n".join(lines) + "\n")
    counts = [f"{w}%1:00:00:: 1 {5 + k}" for k, w in enumerate(NOUNS + VERBS)]
    (wordnet / "cntlist.rev").write_text("\n".join(counts) + "\n")
    places = PLACES.split("|")
    quotes = [
        f"Whoever will {draw.choice(VERBS)} the {draw.choice(NOUNS)} {draw.choice(places)}"
        f"\nshould {draw.choice(VERBS)} it {n} times.\n\t\t-- nobody"
        for n in range(300)
    ]
    (fortunes / "wisdom").write_text("\n%\n".join(quotes) + "\n%\n")
    (fortunes / "wisdom.dat").write_bytes(b"\0\0\0\2")
    (fortunes / "ascii-art").write_text("/\\_/\\ a drawing of five words or more\n%\n")
    sections = [
        f"{1 + n // 10}.{n % 10}. Of the {draw.choice(NOUNS)}\n\n"
        + " ".join(f"First {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for _ in range(12))
        + "\n\n+----+\n| a table |\n+----+\n"
        for n in range(60)
    ]
    text = "Contents\n\n" + "\n".join(sections)
    kinds, part = PARTS.title().split("|"), dict.fromkeys(NOUNS, "n") | dict.fromkeys(VERBS, "v. t")
    webster = [
        f"{word.title()} \\{word}\\, {part[word]}. [L.]\n   1. {draw.choice(kinds)}, number {k}."
        for k, word in enumerate(2 * [*part])
    ]
    articles = [f"term{k}\n\n   <of it> " + f"a {{{NOUNS[k % 20]}}} " * 10 for k in range(60)]
    said = [quote.split("\t")[0].replace("the", "_the_") for quote in quotes]
    essays = "\n\n".join(map(" ".join, zip(said[::2], said[1::2])))
    files = (MANUAL, text), (WEBSTER, "\n\n".join(webster)), (FOLDOC, "\n\n".join(articles))
    for path, text in (*files, (ESSAYS, essays)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(root / path, "wb", mtime=0) as file:
            file.write(text.encode())
    return root


def byte_tokenizer() -> PreTrainedTokenizerFast:
    "A tokenizer to which every character of ASCII is a token."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    plain = Tokenizer(models.BPE(vocab, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.model_max_length = 600
    return fast


def sizes(*values) -> dict:
    "The options of a config that SIZES names, and the ids of special tokens."
    return dict(zip(SIZES, values)) | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def write_language_model(folder: Path) -> Path:
    "A random Llama of six layers with that tokenizer, as a checkpoint."
    set_seed(0)
    config = LlamaConfig(**sizes(32, 64, 6, 4, 2, 260, 600), tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
