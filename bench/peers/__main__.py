"""Pruning SmolLM2-135M by a third with the rivals' own code; see README.md beside this file.

    python bench/peers [--checkouts FOLDER] [--only ours flap] [--text essay=FILE]

Writes figures/bench/peers.csv; rows of methods that do not run here stay as they are.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

BENCH = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCH))
from machine import facts, text  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from drivers import PEERS  # noqa: E402

from mllm_compress.study.texts import documents  # noqa: E402

OUT = BENCH.parent / "figures" / "bench" / "peers.csv"
RATIO, WINDOW, TESTED = 0.3, 128, 256  # TESTED: tokens of a window of the test


def token_windows(tokenizer, texts, width: int, n: int) -> torch.Tensor:  # [n, width]
    "The first windows of some texts behind each other."
    ids, end = [], tokenizer.eos_token_id
    for one in texts:
        ids += [*tokenizer(one, verbose=False)["input_ids"], end]
        if len(ids) >= n * width:
            return torch.tensor(ids[: n * width]).view(n, width)
    raise ValueError(
        f"{len(ids)} tokens are fewer than {n} windows of {width}: give a longer text."
    )


def calibration(tokenizer, windows: int) -> torch.Tensor:  # [windows, 128]
    "Half glosses, half quotes, of the calibration part."
    parts = ([d.text for d in documents(name, "calibration")] for name in text.TEXTS)
    return torch.cat([token_windows(tokenizer, texts, WINDOW, windows // 2) for texts in parts])


@torch.inference_mode()
def perplexity(model, windows: torch.Tensor) -> float:
    "By plain PyTorch, whatever the model is."
    losses = [model(ids[None], labels=ids[None], use_cache=False).loss.item() for ids in windows]
    return math.exp(statistics.mean(losses))


@torch.inference_mode()
def decode_ratio(models: list, ids: torch.Tensor, tokens: int = 12, rounds: int = 5) -> float:
    "Processor seconds per decoded token of the second model over the first, in turn."
    seconds = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, seconds):
            out = model(ids, use_cache=True)
            start = time.process_time()
            for _ in range(tokens):
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                out = model(token, past_key_values=cache, use_cache=True)
            times.append(time.process_time() - start)
    first, second = map(statistics.median, seconds)
    return second / first


def counted(model) -> int:
    "Parameters, without added biases, and a head that equals the embedding once."
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    twice = head is not embedding and torch.equal(head, embedding)
    weights = sum(p.numel() for k, p in model.named_parameters() if not k.endswith("bias"))
    return weights - twice * head.numel()


def measured(name: str, folder: Path | None, texts: dict, windows: int, calibrated: int) -> dict:
    "One method, in this process."
    torch.set_num_threads(1)
    dense, tokenizer = text.load()
    tested = {
        kind: token_windows(tokenizer, documents_of, TESTED, windows)
        for kind, documents_of in texts.items()
    }
    if name == "dense":
        return {k: perplexity(dense, ids) for k, ids in tested.items()}
    tokens, total = calibration(tokenizer, calibrated), sum(p.numel() for p in dense.parameters())
    model = text.load()[0]
    model.set_attn_implementation("eager" if name in ("torch-pruning", "llm-pruner") else "sdpa")
    model.config.use_cache = False
    start = time.process_time()
    model = PEERS[name].run(model, tokens, RATIO, folder).eval()
    row = dict(cpu_seconds=time.process_time() - start)
    model.config.use_cache = True
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    row["removed"] = 1 - counted(model) / total
    row |= {k: perplexity(model, ids) for k, ids in tested.items()}
    try:
        row["decode"] = decode_ratio([dense, model], tokens[:1, :64])
    except Exception as error:  # some results cannot use a cache
        print(f"{name}: no decoding ({error})", file=sys.stderr)
    return row


def runnable(checkouts: Path | None) -> dict:  # name -> folder or None
    "The methods whose code is here."
    found = {"dense": None}
    for name, peer in PEERS.items():
        folder = checkouts / peer.folder if checkouts and peer.folder else None
        if peer.folder and not (folder and folder.is_dir()):
            continue
        if peer.package and importlib.util.find_spec(peer.package) is None:
            continue
        found[name] = folder
    return found


def texts_of(named: list) -> dict:  # kind -> texts
    "Quotes and a manual that nothing calibrates on, and texts from files."
    texts = {name: [d.text for d in documents(name, "test")] for name in ("quotes", "technical")}
    for one in named:
        kind, _, path = one.partition("=")
        texts[kind] = [Path(path).read_text(encoding="utf-8")]
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=Path, help="folder with the rivals' checkouts")
    parser.add_argument("--only", nargs="+", help="methods to run")
    parser.add_argument("--text", nargs="+", default=[], help="further texts, as essay=FILE")
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--calibration", type=int, default=64, help="windows; fewer for a check")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--in-this-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if missing := text.missing():
        return print(f"nothing measured: {missing}")
    if unknown := set(args.only or ()) - {"dense", *PEERS}:
        return print(f"unknown: {', '.join(sorted(unknown))}; use {', '.join(PEERS)}")
    here = runnable(args.checkouts and args.checkouts.resolve())
    if name := args.in_this_process:
        about = dict(windows=args.windows, calibrated=args.calibration)
        return print(json.dumps(measured(name, here[name], texts_of(args.text), **about)))
    texts = texts_of(args.text)
    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    for name in here if args.only is None else [n for n in here if n in args.only]:
        command = [sys.executable, __file__, "--in-this-process", name, "--windows"]
        command += [str(args.windows), "--calibration", str(args.calibration)]
        command += [*(["--text", *args.text] if args.text else [])]
        command += ["--checkouts", str(args.checkouts)] if args.checkouts else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        peer = PEERS.get(name)
        row |= dict(name=name, method=peer.label if peer else "dense")
        row |= dict(version=peer.version if peer else "", source="this script")
        row |= dict(predictions=args.windows * (TESTED - 1), calibrated=args.calibration)
        row |= facts("cpu")
        rows = [r for r in rows if (r["name"], r["source"]) != (name, row["source"])] + [row]
        dense = [r for r in rows if (r["name"], r["source"]) == ("dense", row["source"])]
        if dense:
            logs = [math.log(row[kind] / dense[0][kind]) for kind in texts]
            row["over_dense"] = math.exp(statistics.mean(logs))
        frame = pd.DataFrame(rows)
        first = ["name", "method", "version", "source"]
        frame = frame[first + [c for c in frame if c not in first]]
        frame.to_csv(args.out, index=False, float_format="%.5g")
        print(frame.tail(1).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
