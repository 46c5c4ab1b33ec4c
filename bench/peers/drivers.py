"""How each rival prunes SmolLM2-135M: its own functions, called as its own scripts call them.

A driver takes the dense model, calibration tokens [64, 128], the ratio and the folder of the
rival's checkout (None for a package), and returns a model that plain PyTorch can run. Drivers
replace modules and change `sys.path`, so each runs in a process of its own.
"""

import importlib.util
import os
import sys
import tempfile
import types
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

HEAD, QUERIES, GROUPS, NEURONS = 64, 3, 3, 1536  # of SmolLM2-135M; QUERIES per group
UNIT = HEAD * QUERIES  # query channels of a key/value group


def gradients(model, tokens) -> None:
    "Gradients of the mean loss, as Taylor scores need them."
    model.requires_grad_(True)
    for batch in tokens.split(4):
        (model(batch, labels=batch).loss * len(batch) / len(tokens)).backward()


def layer_share(model, ratio: float) -> float:
    "The part of the layers' own weights that `ratio` of all parameters is."
    body = sum(p.numel() for p in model.model.layers.parameters())
    return ratio * sum(p.numel() for p in model.parameters()) / body


def ours(**options) -> Callable:
    "This package, by a recipe."

    def run(model, tokens, ratio, folder):
        from mllm_compress import prune

        ones = torch.ones_like
        batches = [
            dict(input_ids=b, attention_mask=ones(b), labels=b.clone()) for b in tokens.split(8)
        ]
        return prune(model, batches, ratio=ratio, **options)[0]

    return run


def torch_pruning(model, tokens, ratio, folder):
    "prune_llm.py: BasePruner, Taylor importance, grouped-query attention, hidden size pruned."
    import torch_pruning as tp

    gradients(model, tokens)
    total = sum(p.numel() for p in model.parameters())
    body = sum(p.numel() for p in model.model.layers.parameters())
    rest, target = total - body, (1 - ratio) * total  # rest * q + body * q² = target
    q = (-rest + (rest**2 + 4 * body * target) ** 0.5) / (2 * body)
    heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads |= {attention.q_proj: GROUPS * QUERIES}
        heads |= {attention.k_proj: GROUPS, attention.v_proj: GROUPS}
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=tokens[:1, :8],
        importance=tp.importance.GroupTaylorImportance(group_reduction="mean"),
        global_pruning=False,
        output_transform=lambda out: out.logits,
        pruning_ratio=1 - q,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=1 - q,
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for layer in model.model.layers:
        attention = layer.self_attn
        shares = attention.q_proj.out_features // attention.k_proj.out_features
        attention.num_key_value_groups = shares
    return model


def llm_pruner(model, tokens, ratio, folder):
    "llama3.py: block-wise, Taylor param_first, layers 4 to 27, key/value heads grouped."
    sys.path.insert(0, str(folder))
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner import hf_llama_pruner
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layers = model.model.layers[4:28]
    head, mlp = (
        sum(p.numel() for p in m.parameters()) for m in (layers[0].self_attn, layers[0].mlp)
    )
    needed = ratio * sum(p.numel() for p in model.parameters()) / len(layers)
    removed = lambda s: int(GROUPS * s) * head / GROUPS + s * mlp
    share = min((s / 1000 for s in range(1, 990)), key=lambda s: abs(removed(s) - needed))
    gradients(model, tokens)
    grads = {name: p.grad for name, p in model.named_parameters()}
    pruner = tp.pruner.MetaPruner(
        model,
        tokens[:2, :8],
        importance=hf_llama_pruner.TaylorImportance(group_reduction="sum", taylor="param_first"),
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=share,
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={x.self_attn.k_proj: HEAD for x in model.model.layers},
        customized_pruners={LlamaRMSNorm: hf_llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[m for x in layers for m in (x.self_attn.k_proj, x.mlp.gate_proj)],
    )
    for name, p in model.named_parameters():
        p.grad = grads[name]
    pruner.step()
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = QUERIES
    return model


def flap(model, tokens, ratio, folder):
    "main.py: WIFV, AL-AM; biases compensate for what went."
    sys.path.insert(0, str(folder))
    import lib.prune

    lib.prune.get_loaders = lambda *a, **k: ([(x[None], x[None]) for x in tokens], None)
    share = layer_share(model, ratio)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = Parameter(torch.zeros(linear.out_features))
    model.seqlen = tokens.shape[1]
    args = Namespace(nsamples=len(tokens), seed=0, metrics="WIFV", structure="AL-AM")
    args.pruning_ratio, args.unstr, args.remove_heads = share, False, 0
    with torch.no_grad():
        lib.prune.prune_flap(args, model, None, torch.device("cpu"))
    return model


def first_inputs(model, tokens) -> tuple:  # states in front of the first layer, its arguments
    "What the first layer is called with."
    states, calls = [], []

    class Reached(Exception):
        pass

    def stop(_, args, kwargs):
        states.append(args[0])
        calls.append(kwargs)
        raise Reached

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for batch in tokens.split(8):
        try:
            model(batch, use_cache=False)
        except Reached:
            pass
    handle.remove()
    return states, calls


def cut(linear, index, axis: int) -> None:
    "Keep some rows or columns of a linear layer."
    linear.weight = Parameter(linear.weight.index_select(axis, index).contiguous())
    linear.out_features, linear.in_features = linear.weight.shape


@torch.no_grad()
def osscar(model, tokens, ratio, folder):
    "Local search on the sums of each layer, in order, on the pruned stream; one group a layer."
    package = "llmcompressor"
    for name in ("", ".modifiers", ".modifiers.obcq", ".modifiers.obcq.sgpt_sparsify"):
        sys.modules[package + name] = types.ModuleType(package + name)
    sys.modules["llmcompressor.modifiers.obcq.sgpt_sparsify"].SGPT_PRECISION = torch.float32
    root = importlib.util.find_spec("fmchisel").submodule_search_locations[0]
    file = f"{root}/pruning/osscar/utils/osscar_sparsify.py"
    spec = importlib.util.spec_from_file_location("osscar", file)
    spec.loader.exec_module(code := importlib.util.module_from_spec(spec))
    total, layers = sum(p.numel() for p in model.parameters()), model.model.layers
    attention = sum(p.numel() for p in layers[0].self_attn.parameters())
    neuron = sum(p.numel() for p in layers[0].mlp.parameters()) // NEURONS
    drop = round((ratio * total / len(layers) - attention / GROUPS) / neuron)
    states, calls = first_inputs(model, tokens)
    for layer in layers:
        block, mlp = layer.self_attn, layer.mlp
        sums = {m: torch.zeros(m.in_features, m.in_features) for m in (mlp.down_proj, block.o_proj)}
        add = lambda m, args, _: [code.accumulate_hessian(args[0], m, sums[m], 0), None][1]
        handles = [m.register_forward_hook(add) for m in sums]
        for state, call in zip(states, calls):
            layer(state, **call)
        for handle in handles:
            handle.remove()
        for linear, left, step, units in (
            (block.o_proj, GROUPS - 1, 1, GROUPS),
            (mlp.down_proj, NEURONS - drop, 16, NEURONS),
        ):
            linear.weight.copy_(code.sparsify_weight(linear, sums, left, step, units)[1])
        neurons = mlp.down_proj.weight.norm(dim=0).nonzero()[:, 0]
        groups = block.o_proj.weight.unflatten(1, (GROUPS, UNIT)).norm(dim=(0, 2)).nonzero()
        queries = (groups * UNIT + torch.arange(UNIT)).flatten()
        keys = (groups * HEAD + torch.arange(HEAD)).flatten()
        cut(mlp.up_proj, neurons, 0)
        cut(mlp.gate_proj, neurons, 0)
        cut(mlp.down_proj, neurons, 1)
        cut(block.q_proj, queries, 0)
        cut(block.k_proj, keys, 0)
        cut(block.v_proj, keys, 0)
        cut(block.o_proj, queries, 1)
        states = [layer(state, **call) for state, call in zip(states, calls)]
    return model


@torch.no_grad()
def modegpt(model, tokens, ratio, folder):
    "Nyström for the MLP, CR for queries and keys, SVD for values; zero-padded to whole heads."
    sys.path.insert(0, str(folder))
    os.chdir(tempfile.mkdtemp())
    from src.adapters.LlamaAdapter import LlamaAdapter
    from src.calibration import load_calibs
    from src.compression.compress_mlp import compress_nystrom
    from src.compression.compress_qk import compress_qk
    from src.compression.compress_vo import compress_vo
    from src.compression_utils import allocate_global_sparsity

    adapter, saved, share = LlamaAdapter(model), {}, layer_share(model, ratio)
    adapter.calibs = list(tokens.split(8))
    adapter.save_layer = lambda output_dir, suffix, weights, layer_idx: saved.update(
        {(suffix, layer_idx): weights}
    )
    head = model.lm_head.forward
    model.lm_head.forward = lambda h: h[..., :1]  # calibration needs no logits
    sums = load_calibs(adapter, len(tokens), 8)
    model.lm_head.forward = head
    options = dict(smoothing=0.15, max_sparsity=0.8, adapter=adapter)
    keep, places = allocate_global_sparsity(sums[4], share, **options), list(range(30))
    compress_nystrom(adapter, sums[0], keep, places)
    masks = compress_qk(adapter, (sums[1], sums[2]), keep, target_layers=places)
    compress_vo(adapter, sums[3], keep, target_layers=places)
    for i, layer in enumerate(model.model.layers):
        block, heads, width = layer.self_attn, GROUPS * QUERIES, model.config.hidden_size
        for name in ("up", "gate", "down"):
            weight = Parameter(saved["mlp", i][name].float().contiguous())
            getattr(layer.mlp, f"{name}_proj").weight = weight
        mask, turned = masks[i].cpu(), saved["qk", i]
        queries, keys = torch.zeros(heads, HEAD, width), torch.zeros(GROUPS, HEAD, width)
        for new, name, shared in ((queries, "q_proj", QUERIES), (keys, "k_proj", 1)):
            parts = turned[name].view(len(new), mask.shape[1], width).float()
            for h, part in enumerate(parts):
                new[h, mask[h // shared]] = part
        value, output = (saved["vo", i][name].float() for name in ("v_proj", "o_proj"))
        rank = len(value) // GROUPS
        values, outputs = torch.zeros(GROUPS, HEAD, width), torch.zeros(width, heads, HEAD)
        values[:, :rank] = value.view(GROUPS, rank, width)
        outputs[:, :, :rank] = output.view(width, heads, rank)
        for name, new in (("q", queries), ("k", keys), ("v", values)):
            getattr(block, f"{name}_proj").weight.copy_(new.flatten(0, 1))
        block.o_proj.weight.copy_(outputs.flatten(1))
    return model


def replaceme(model, tokens, ratio, folder):
    "A linear map in place of a block of layers, by least squares."
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(folder))
    package = types.ModuleType("ReplaceMe")
    package.__path__ = [str(folder / "ReplaceMe")]
    sys.modules["ReplaceMe"] = package
    from ReplaceMe import distance, lstsq

    class Tokens:
        "Batches of token ids, where a tokenizer is expected."

        pad_token = "x"

        @classmethod
        def from_pretrained(cls, path):
            return cls()

        def __call__(self, batch, **options):
            return dict(input_ids=batch, attention_mask=torch.ones_like(batch))

        def save_pretrained(self, path):
            pass

    for module in (distance, lstsq):
        module.AutoTokenizer = Tokens
        module.get_calib_dataloader = lambda *a: list(tokens.split(8))
    os.chdir(tempfile.mkdtemp())
    model.save_pretrained("dense")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    skipped = round(ratio * sum(p.numel() for p in model.parameters()) / layer)
    about = dict(model_path="dense", dataset="common", dataset_column="text", batch_size=8)
    about |= dict(max_length=tokens.shape[1], layers_to_skip=skipped, dataset_size=len(tokens))
    distance.profile_distances(**about)
    out = lstsq.lstsq(**about, distances_path="distances.pth", save_path="replaced")
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@dataclass(frozen=True)
class Peer:
    "A method of the benchmark."

    label: str
    version: str
    run: Callable  # (model, tokens, ratio, folder) -> model
    package: str = ""  # that has to be installed
    folder: str = ""  # below the folder of checkouts


HALF = dict(layer_method="block_influence", layer_share=0.5)
PEERS = {
    "ours": Peer("ours, recommended", "this checkout", ours()),
    "ours-layers": Peer("ours, whole layers refitted", "this checkout", ours(recipe="layers")),
    "ours-half": Peer("ours, half by layers", "this checkout", ours(**HALF)),
    "torch-pruning": Peer("Torch-Pruning, Taylor", "1.6.1", torch_pruning, "torch_pruning"),
    "osscar": Peer("OSSCAR", "fmchisel 0.1.2", osscar, "fmchisel"),
    "llm-pruner": Peer("LLM-Pruner", "128a07d", llm_pruner, folder="LLM-Pruner"),
    "flap": Peer("FLAP", "3bb57db", flap, folder="FLAP"),
    "modegpt": Peer("MoDeGPT (unofficial)", "2a76ae8", modegpt, folder="MoDeGPT"),
    "replaceme": Peer("ReplaceMe, least squares", "5bb71d9", replaceme, folder="ReplaceMe"),
}
