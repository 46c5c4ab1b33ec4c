"""A pruned model as the draft of its dense parent: what is accepted, and how much faster it is.

SmolLM2-135M in bfloat16 is pruned at 15 to 60 % by the recommended recipe and by whole layers, both
refitted and not trained, and drafts for the dense model through transformers' assisted generation
(greedy, a constant number of drafted tokens). Accepted tokens do not depend on the machine. Beside
them stand the speed-up of a decoder that is bound by memory, in closed form from the accepted
tokens and the bytes of the draft (a pass of the dense model over a few tokens costs what a pass
over one does), and the measured one: processor time, with and without the draft in turn for every
of the first prompts, the median of the ratios, because other programs run on the machine.

    python bench/drafts.py [--quick] [--prompts 16] [--timed 4] [--tokens 48]

It needs the package of SmolLM2 and the texts of profile smol (`make study PROFILE=smol`).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import facts, text
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from mllm_compress.data.batches import Collator
from mllm_compress.importance.criteria import measure
from mllm_compress.pruning.allocation import weight_costs
from mllm_compress.pruning.one_step import prune
from mllm_compress.pruning.pruning_plan import make_plan

OUT = Path(__file__).resolve().parent.parent / "figures" / "bench"
RATIOS = (0.15, 0.30, 0.45, 0.60)
DRAFTS = (1, 2, 3, 5)  # tokens of a draft
TIMED = 3  # of these, the length that is timed


def prompts_of(
    data,  # InstructionData
    processor,  # or tokenizer
    n: int,
    max_length: int | None = 512,  # tokens
) -> list:  # of inputs of one question each; a plain text is cut in the middle
    "What a model is given before it answers, for the first entries of some data."
    collate, prompts = Collator(processor, data, turns="sequential", max_length=max_length), []
    for k in range(min(n, len(data))):
        batch = collate([data[k]])
        labels, shape = batch.pop("labels")[0], batch["input_ids"].shape
        first = int((labels != -100).nonzero()[0]) if (labels != -100).any() else 0
        end = first if first > 1 else shape[1] // 2
        if end:
            prompts.append({k: v[:, :end] if v.shape[:2] == shape else v for k, v in batch.items()})
    return prompts


def continued(inputs: dict, tokens: torch.Tensor) -> dict:
    "Inputs that go on with more tokens [1, tokens]."
    shape, more = inputs["input_ids"].shape, tokens.shape[1]
    longer = {
        k: pad(v, (0, more), value=int(k == "attention_mask"))
        for k, v in inputs.items()
        if v.shape == shape and k != "input_ids"
    }
    return inputs | longer | {"input_ids": torch.cat([inputs["input_ids"], tokens], 1)}


def greedy(model: PreTrainedModel, inputs: dict, new_tokens: int, **options) -> torch.Tensor:
    "The tokens that a model adds, [1, tokens]."
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.update(do_sample=False, max_new_tokens=new_tokens, temperature=None, top_p=None)
    config.update(top_k=None, max_length=None)
    tokens = model.generate(**inputs, generation_config=config, **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


def drafted_passes(
    agrees: list,  # of bool
    drafted: int,  # tokens of a draft
) -> tuple:  # (passes of the dense model, tokens drafted, of them accepted)
    "What speculative decoding does with an answer: each pass checks a draft and adds a token."
    passes = total = accepted = place = 0
    while place < len(agrees):
        draft = agrees[place : min(place + drafted, len(agrees) - 1)]
        matches = next((k for k, same in enumerate(draft) if not same), len(draft))
        passes, total, accepted = passes + 1, total + len(draft), accepted + matches
        place += matches + 1
    return passes, total, accepted


def draft_settings(small: PreTrainedModel, drafted: int) -> None:
    "A constant number of drafted tokens per pass, whatever the draft's confidence."
    config = small.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafted, "constant"
    config.assistant_confidence_threshold = 0.0


def drafts_of(dense, batches: list, ratios) -> iter:  # of (way, plan, model)
    "Pruned and refitted models, one at a time."
    scores = {
        "ours": measure("widthwise", "gauss_newton", dense, batches),
        "layerwise": measure("layerwise", "block_influence", dense, batches),
    }
    options = {"ours": dict(allocation="global", shape="blockwise"), "layerwise": {}}
    for way, found in scores.items():
        for ratio in ratios:
            kind = dict(scores=found, ratio=ratio, reconstruct=True, **options[way])
            small, plan = prune(dense, batches, **kind)
            yield way, plan, small


def modelled(per_pass: float, drafted: int, share: float) -> float:
    "Speed-up where a pass costs its model's bytes: tokens of a pass over its cost."
    return per_pass / (1 + drafted * share)


def accepted_rows(agrees: list, share: float) -> list:
    "A row per length of a draft; nothing of it depends on a clock."
    rows, tokens = [], sum(map(len, agrees))
    for drafted in DRAFTS:
        passes, total, accepted = map(sum, zip(*(drafted_passes(a, drafted) for a in agrees)))
        row = dict(drafted=drafted, tokens=tokens, accepted=accepted / total)
        row |= dict(tokens_per_pass=tokens / passes)
        rows.append(row | dict(modelled_speedup=modelled(tokens / passes, drafted, share)))
    return rows


@torch.no_grad()
def agreements(small, prompts: list, answers: list) -> list:
    "Whether the draft would choose each token of the dense model's answers."
    found = []
    for inputs, answer in zip(prompts, answers):
        logits = small(**continued(inputs, answer[:, :-1]), use_cache=False).logits
        found.append((logits[:, -answer.shape[1] :].argmax(-1) == answer)[0].tolist())
    return found


@torch.no_grad()
def timed(dense, small, prompts: list, new_tokens: int) -> dict:
    "Processor seconds of every prompt with and without the draft, and of the draft, in turn."
    draft_settings(small, TIMED)
    turns = {"alone": (dense, {}), "drafted": (dense, {"assistant_model": small})}
    turns["draft"] = (small, {})  # what the draft costs by itself
    seconds, same = {name: [] for name in turns}, []
    for inputs in prompts:
        texts = []
        for name, (model, options) in turns.items():
            start = time.process_time()
            texts.append(greedy(model, inputs, new_tokens, **options))
            seconds[name].append(time.process_time() - start)
        same.append(torch.equal(*texts[:2]))
    ratios = np.divide(seconds["alone"], seconds["drafted"])
    quantiles = {"": 0.5, "_low": 0.25, "_high": 0.75}
    found = {f"measured_speedup{end}": np.quantile(ratios, q) for end, q in quantiles.items()}
    found |= dict(draft_seconds=np.median(np.divide(seconds["draft"], seconds["alone"])))
    tokens = len(prompts) * new_tokens
    return found | dict(seconds_per_token=sum(seconds["alone"]) / tokens, same_text=np.mean(same))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one ratio: checks the script")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--timed", type=int, default=4, help="prompts with a clock, the first ones")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if missing := text.missing():
        return print(f"nothing measured: {missing}")
    torch.set_num_threads(1)
    ratios, n, tokens = args.ratios, args.prompts, args.tokens
    if args.quick:
        ratios, n, tokens = ratios[:1], 2, 8
    dense, tokenizer = text.load()
    dense = dense.to(torch.bfloat16)
    dense.generation_config.eos_token_id = None  # every answer has the same length
    prompts = prompts_of(text.held_out(tokenizer), tokenizer, n, max_length=text.WINDOW)
    answers = [greedy(dense, inputs, tokens) for inputs in prompts]
    whole, rows = weight_costs(dense).total(make_plan(dense)), []
    about = dict(model=text.NAME, dtype="bfloat16", windows=args.windows, prompts=n)
    about |= dict(prompts_timed=min(n, args.timed), new_tokens=tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    for way, plan, small in drafts_of(dense, text.calibration(tokenizer, 0, args.windows), ratios):
        share = weight_costs(small).total(make_plan(small)) / whole
        agrees = agreements(small, prompts, answers)
        at = dict(way=way, achieved_ratio=plan.achieved_ratio, draft_bytes=share)
        clock = timed(dense, small, prompts[: args.timed], tokens)
        found = accepted_rows(agrees, share)
        rows += [at | row | (clock if row["drafted"] == TIMED else {}) for row in found]
        print({k: round(v, 3) for k, v in rows[-2].items() if k != "way"}, way, flush=True)
        table = pd.DataFrame(rows).assign(**about, **facts("cpu"))
        name = "drafts-quick.csv" if args.quick else "drafts.csv"
        table.to_csv(args.out / name, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
