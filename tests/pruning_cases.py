"""Models and plans of the pruning tests; tests/test_contract.py has every family and wrapper."""

import torch
from small_texts import sizes
from transformers import AutoConfig, AutoModelForCausalLM

from mllm_compress.anatomy.families import anatomy
from mllm_compress.importance.scores import WidthScores
from mllm_compress.pruning import plan_layerwise, plan_widthwise
from mllm_compress.zoo.tiny_models import tiny_model

LMS = ["llama-4x1", "mistral-3x2", "qwen2-3x2", "qwen3-3x2", "gemma-4x1", "phi-4x1", "phi3-3x2"]
MLLMS = ["tiny-llava", "tiny-bunny"]
KINDS = ["layerwise", "uniform", "blockwise", "combined"]


def random_weights(model, seed=0):
    "Weights, norms and biases far from their initial values, so that every slip shows."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.2 if p.ndim > 1 else p + 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4 scales what each layer returns
                buffer.fill_(0.8)
    return model.eval()


def lm_config(name, **kw):
    family, shape = name.split("-")
    groups, queries = map(int, shape.split("x"))
    heads = groups * queries
    usual = sizes(heads * 8, 40, 4, heads, groups, 64, 128)
    return AutoConfig.for_model(family, **usual | dict(head_dim=8, tie_word_embeddings=False) | kw)


def build(name, dtype=torch.float64, **kw):
    "A random model: a plain LM such as 'qwen2-3x2' (3 groups of 2 query heads), or a tiny MLLM."
    if name in MLLMS:
        model = tiny_model(name.removeprefix("tiny-"), layers=4)
    else:
        model = AutoModelForCausalLM.from_config(lm_config(name, **kw))
    return random_weights(model).to(dtype)


def width_scores(model, seed=0):
    parts, generator = anatomy(model), torch.Generator().manual_seed(seed)
    return WidthScores(
        *(
            {i: torch.rand(count(i), generator=generator) for i in range(parts.num_layers)}
            for count in (parts.groups, parts.neurons)
        ),
        "random",
        {},
    )


def plan(model, kind):
    scores = width_scores(model)
    if kind == "layerwise":
        return plan_layerwise(model, layers=[1])
    if kind == "combined":
        return plan_widthwise(
            model, scores, ratio=0.4, protect=(1, 0), base=plan_layerwise(model, layers=[1])
        )
    return plan_widthwise(model, scores, ratio=0.25, shape=kind)


def inputs(model, seed=0):
    "Two prompts, the second padded on the left; an MLLM sees two images."
    generator = torch.Generator().manual_seed(seed)
    config, text = model.config, model.config.get_text_config()
    ids = torch.randint(5, text.vocab_size, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    if config is text:
        return {"input_ids": ids, "attention_mask": mask}
    ids[:, 4:20] = config.image_token_id
    pixels = torch.randn(2, 3, 64, 64, generator=generator).to(model.dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.no_grad()
def logits(model, batch):
    "Logits at the tokens that are not padding."
    return model(**batch).logits[batch["attention_mask"].bool()]


def greedy(model, batch, use_cache):
    "Greedy tokens; never an image token, which would need another image."
    image = getattr(model.config, "image_token_id", None)
    return model.generate(
        **batch,
        use_cache=use_cache,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=None if image is None else [image],
    )
