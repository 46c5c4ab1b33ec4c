"""A small random model per row of WRAPPERS and per family of text models, with its processor."""

import importlib.util
import re
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import transformers
from pruning_cases import random_weights
from small_texts import sizes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

IMAGE, PAD, LAYERS = 3, 0, 6
TEXT = sizes(32, 40, LAYERS, 4, 2, 96, 256) | {"head_dim": 8}
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
)
SLIDING = dict(
    layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2), sliding_window=64
)
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
multi = lambda kind: text(kind, rope_parameters=MROPE)
QWEN_EYES = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)


def text(model_type: str, **more) -> dict:
    "A text config as a dict."
    return TEXT | {"model_type": model_type} | more


CLIP, SIGLIP = (
    VISION | {"model_type": "clip_vision_model"},
    VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
)
PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 8}
INTERN = VISION | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [7, 7]}
CONVOLVED = dict(model_type="efficientnet", image_size=64, hidden_dim=256, hidden_size=256)
CONVOLVED |= dict(width_coefficient=0.2, depth_coefficient=0.1)
GRID = dict(image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])


def row(kind: str, decoder, eyes: dict, **options) -> tuple:
    "(model_type, options of its config)."
    decoder = text(decoder) if isinstance(decoder, str) else decoder
    return kind, options | dict(text_config=decoder, vision_config=eyes)


def of_type(eyes: dict, model_type: str) -> dict:
    "The config of a tower, of another class."
    return eyes | {"model_type": model_type}


LAST, BOTH = dict(vision_feature_layer=-2), [-2, -1]
GEMMA = dict(query_pre_attn_scalar=8, **SLIDING)
SHARED = dict(num_kv_shared_layers=2, use_double_wide_mlp=True, final_logit_softcapping=5.0)
SHARED |= dict(hidden_size_per_layer_input=4, vocab_size_per_layer_input=96, global_head_dim=16)
GEMMA4_EYES = VISION | dict(head_dim=8, num_key_value_heads=2, patch_size=4, pooling_kernel_size=2)
MERGED = QWEN_EYES | dict(hidden_size=16, intermediate_size=24, out_hidden_size=32)
QWEN2_EYES = QWEN_EYES | dict(embed_dim=16, hidden_size=32)
QWEN25_EYES = MERGED | dict(window_size=16, fullatt_block_indexes=[1])
QWEN3_EYES = MERGED | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
QWEN3 = text("qwen3_vl_text", rope_parameters=MROPE | {"mrope_interleaved": True})
PARTIAL = MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
QWEN35 = dict(layer_types=LINEAR, linear_num_key_heads=2, linear_num_value_heads=2)
QWEN35 |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
QWEN35_EYES = MERGED | dict(num_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
EXPERTS |= dict(shared_expert_intermediate_size=16, n_routed_experts=4)
GEMMA4_MOE = EXPERTS | dict(enable_moe_block=True, top_k_experts=2, num_attention_heads=8)
GEMMA4_MOE |= dict(num_key_value_heads=4, num_global_key_value_heads=2, attention_k_eq_v=True)
GEMMA4_MOE |= dict(hidden_size_per_layer_input=0, global_head_dim=16)
GEMMA4_MOE |= dict(use_bidirectional_attention="vision")
GEMMA4, GEMMA4_MOE = (text("gemma4_text", **SLIDING | more) for more in (SHARED, GEMMA4_MOE))
GLM_MOE = EXPERTS | dict(rope_parameters=MROPE | {"partial_rotary_factor": 1.0})
QWEN3_MOE, QWEN35_MOE = "qwen3_vl_moe_text", "qwen3_5_moe_text"
NEXT, QWEN35 = QWEN35 | EXPERTS, text("qwen3_5_text", rope_parameters=PARTIAL, **QWEN35)
ARIA = text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
OVIS = dict(hidden_size=32, vocab_size=96, visual_indicator_token_ids=[90, 91, 92, 93, 94])
OVIS_EYES = of_type(VISION, "ovis2_vision") | dict(vocab_size=24)
LATENT = EXPERTS | dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
LATENT |= dict(v_head_dim=8, n_group=1, topk_group=1, num_key_value_heads=4, head_dim=4)
LATENT |= dict(first_k_dense_replace=1)
GLM_EYES = MERGED | dict(image_size=28)
LFM = dict(layer_types=["conv", "full_attention"] * (LAYERS // 2), block_multiple_of=8)
SIGLIP2 = of_type(VISION, "siglip2_vision_model") | dict(num_patches=16, vision_use_head=False)
LFM_EYES = dict(projector_hidden_size=24)
JANUS = of_type(VISION, "janus_vision_model") | dict(projection_dim=32, num_image_tokens=16)
DRAWING = dict(embed_dim=4, num_embeddings=8, latent_channels=8, base_channels=32)
DRAWING |= dict(channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=32)
DRAWING |= dict(image_token_embed_dim=32)
PALI = dict(projection_dim=32, hidden_size=32)
FEATURES = dict(vision_feature_layers=BOTH, vision_feature_layer=BOTH)
FULL = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
MLLMS = {
    "llava-llama": row("llava", "llama", CLIP, **LAST),
    "llava-phi3": row("llava", text("phi3", sliding_window=8), CLIP, **LAST),
    "llava-pixtral": row("llava", "mistral", PIXTRAL, **FULL),
    "fast-vlm": row("fast_vlm", "llama", CONVOLVED, image_seq_length=4),
    "vipllava": row("vipllava", "llama", CLIP, **FEATURES),
    "llava-next": row("llava_next", "mistral", CLIP, **LAST, **GRID),
    "llava-onevision": row("llava_onevision", "qwen2", SIGLIP, **GRID),
    "internvl-qwen2": row("internvl", "qwen2", INTERN, downsample_ratio=0.5),
    "internvl-qwen3": row("internvl", "qwen3", INTERN, downsample_ratio=0.5),
    "paligemma": row("paligemma", "gemma", SIGLIP, **PALI),
    "paligemma2": row("paligemma", text("gemma2", **GEMMA), SIGLIP, **PALI),
    "mistral3": row("mistral3", "mistral", PIXTRAL, spatial_merge_size=2),
    "idefics3": row("idefics3", "llama", of_type(VISION, "idefics3_vision"), scale_factor=2),
    "smolvlm": row("smolvlm", "llama", of_type(VISION, "smolvlm_vision"), scale_factor=2),
    "aya-vision": row("aya_vision", text("cohere2", **SLIDING), SIGLIP, downsample_factor=2),
    "qwen2-vl": row("qwen2_vl", multi("qwen2_vl_text"), QWEN2_EYES),
    "qwen2.5-vl": row("qwen2_5_vl", multi("qwen2_5_vl_text"), QWEN25_EYES),
    "qwen3-vl": row("qwen3_vl", QWEN3, QWEN3_EYES),
    "gemma3": row("gemma3", text("gemma3_text", **GEMMA), SIGLIP, mm_tokens_per_image=4),
    "gemma4": row("gemma4", GEMMA4, of_type(GEMMA4_EYES, "gemma4_vision")),
    "gemma4-moe": row("gemma4", GEMMA4_MOE, of_type(GEMMA4_EYES, "gemma4_vision")),
    "qwen3.5": row("qwen3_5", QWEN35, QWEN35_EYES),
    "glm4v": row("glm4v", multi("glm4v_text"), GLM_EYES),
    "glm46v": row("glm46v", multi("glm4v_text"), of_type(GLM_EYES, "glm4v_vision")),
    "qwen3-vl-moe": row("qwen3_vl_moe", QWEN3 | EXPERTS | {"model_type": QWEN3_MOE}, QWEN3_EYES),
    "qwen3.5-moe": row("qwen3_5_moe", QWEN35 | EXPERTS | {"model_type": QWEN35_MOE}, QWEN35_EYES),
    "glm4v-moe": row("glm4v_moe", text("glm4v_moe_text", **GLM_MOE), GLM_EYES),
    "aria-moe": row(
        "aria", ARIA, of_type(VISION, "idefics3_vision"), projector_patch_to_query_dict={16: 4}
    ),
    "ovis2": row("ovis2", "qwen2", OVIS_EYES, **OVIS),
    "lfm2-vl": row("lfm2_vl", text("lfm2", **LFM), SIGLIP2, **LFM_EYES),
    "cohere2-vision": row(
        "cohere2_vision", text("cohere2", **SLIDING), SIGLIP, alignment_intermediate_size=24
    ),
    "perception-lm": row("perception_lm", "llama", CLIP | dict(model_args=dict(embed_dim=16))),
    "deepseek-vl": row("deepseek_vl", "llama", SIGLIP),
    "janus": row("janus", "llama", JANUS, vq_config=DRAWING),
    "video-llama-3": row("video_llama_3", "qwen2", of_type(VISION, "video_llama_3_vision")),
}
GRANITE = dict(embedding_multiplier=2.0, logits_scaling=3.0)
GRANITE |= dict(residual_multiplier=0.5, attention_multiplier=0.3)
LMS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "smollm3": dict(no_rope_layer_interval=3),
    "granite": GRANITE,
    "ministral3": dict(sliding_window=None),
    "olmo2": {},
    "olmo3": SLIDING,
    "glm4": {},
    "lfm2": LFM,
    "gemma4_text": SLIDING | SHARED,
    "mixtral": dict(num_local_experts=4),
    "glm4_moe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_next": NEXT,
    "deepseek_v3": LATENT,
    "gpt_oss": SLIDING | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt_neox": {},
    "cohere": dict(use_qk_norm=True),
    "cohere2": dict(**SLIDING),
    "phi": {},
    "phi3": {},
}


def build(name: str, dtype=torch.float64, **more):
    "A random model."
    torch.manual_seed(0)  # for what a class draws and `random_weights` only moves
    if name in LMS:
        return random_weights(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**text(name, **LMS[name] | more)))
        ).to(dtype)
    kind, options = MLLMS[name]
    options = options | {"text_config": options["text_config"] | more}
    config = AutoConfig.for_model(kind, image_token_id=IMAGE, image_token_index=IMAGE, **options)
    config.pad_token_id = PAD
    return random_weights(AutoModelForImageTextToText.from_config(config)).to(dtype)


# Processors

MARKS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "<video>", "<picture>", "<boi>", "<eoi>"]
MARKS += ["[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>"]
MARKS += ["<end_of_utterance>", "<img>", "</img>", "TILE_GLOBAL", "<row_1_col_1>", "<row_1_col_2>"]
WORDS = "USER: ASSISTANT: what is in the picture ? yes no red blue a b c d e f g h i j k".split()
TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ 'MARK' if c.type == 'image' else c.text }}{% endfor %}{% endif %}"
    "{{ ' ' if m.role == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(mark: str | None = None):
    "A word-level tokenizer; `mark` is what stands for a picture in the chat template."
    words = MARKS + WORDS
    words += [f"w{i}" for i in range(96 - len(words))]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>"}
    names |= {"eoi_token": "<eoi>", "context_image_token": "<image>"}
    names |= {"audio_token": "<video>", "boa_token": "<boi>", "eoa_token": "<eoi>"}
    names |= {"start_image_token": "<img>", "end_image_token": "</img>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names if mark else {},
        additional_special_tokens=MARKS,
    )
    fast.chat_template = TEMPLATE.replace("MARK", mark or "")
    fast.padding_side = "left"
    return fast


def image_processor(kind: str, **more):
    "An image processor that needs no torchvision."
    return getattr(transformers, f"{kind}ImageProcessorPil")(**more)


def processor(name: str):
    "The processor of a row, or a tokenizer; None where it cannot be made here."
    if name in LMS:
        return tokenizer()
    side = {"height": 28, "width": 28}
    clip = dict(size={"shortest_edge": 28}, crop_size=side)
    plain = dict(patch_size=7, vision_feature_select_strategy="default")
    clipped = plain | dict(num_additional_image_tokens=1)
    grid = GRID["image_grid_pinpoints"]
    merged = dict(patch_size=4, temporal_patch_size=2, merge_size=2)
    merged |= dict(size={"shortest_edge": 64, "longest_edge": 1024})
    patched = dict(patch_size=7, size={"shortest_edge": 196, "longest_edge": 1024})
    pixtral = dict(size={"longest_edge": 42}, patch_size={"height": 7, "width": 7})
    idefics = dict(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    got = dict(size=side, crop_to_patches=True, max_patches=4)
    square = dict(size=side)
    large = dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    full, silent = dict(vision_feature_select_strategy="full"), dict(video_processor=None)
    joined = dict(patch_size=7, image_token="<image>")
    aya = dict(patch_size=7, downsample_factor=2, img_size=28)
    aya |= dict(image_token="<picture>", img_patch_token="<image>")
    one_frame = dict(video_processor=SimpleNamespace(num_frames=1, fps=1))
    tiles = dict(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    pinned = dict(image_grid_pinpoints=grid)
    kinds = {
        "llava": ("Llava", ("CLIP", clip), clipped),
        "llava-pixtral": ("Pixtral", ("Pixtral", pixtral), joined),
        "fast-vlm": ("Llava", ("CLIP", large), dict(patch_size=32) | full),
        "vipllava": ("Llava", ("CLIP", clip), clipped),
        "llava-next": ("LlavaNext", ("LlavaNext", clip | pinned), clipped),
        "llava-onevision": (
            "LlavaOnevision",
            ("LlavaOnevision", square | pinned),
            dict(num_image_tokens=16) | full | silent,
        ),
        "internvl": ("InternVL", ("GotOcr2", got), dict(image_seq_length=4) | silent),
        "paligemma": ("PaliGemma", ("Siglip", square), {}),
        "mistral3": ("Pixtral", ("Pixtral", pixtral), joined | dict(spatial_merge_size=2)),
        "idefics3": ("Idefics3", ("Idefics3", idefics), dict(image_seq_len=4)),
        "smolvlm": ("SmolVLM", ("SmolVLM", idefics), dict(image_seq_len=4) | one_frame),
        "aya": ("AyaVision", ("GotOcr2", got), aya),
        "qwen2-vl": ("Qwen2VL", ("Qwen2VL", merged), silent),
        "qwen2.5-vl": ("Qwen2_5_VL", ("Qwen2VL", merged), silent),
        "qwen3-vl": ("Qwen3VL", ("Qwen2VL", merged), silent),
        "gemma3": ("Gemma3", ("Gemma3", square), dict(image_seq_length=4)),
        "gemma4": ("Gemma4", ("Gemma4", tiles), silent | dict(feature_extractor=None)),
        "qwen3.5": ("Qwen3VL", ("Qwen2VL", merged), silent),
        "glm4v": ("Glm4v", ("Glm4v", merged), silent),
        "glm46v": ("Glm46V", ("Glm46V", merged), silent),
        "deepseek-vl": ("DeepseekVL", ("DeepseekVL", square), dict(num_image_tokens=16)),
        "janus": ("Janus", ("Janus", square), dict(num_image_tokens=16)),
        "video-llama-3": ("VideoLlama3", ("VideoLlama3", patched), silent),
    }
    if not (names := [kind for kind in kinds if name.startswith(kind)]):
        return None  # it needs torchvision
    kind, (eyes, sizes), options = kinds[max(names, key=len)]
    mark = {"aya-vision": "<picture>", "gemma3": "<boi>"}.get(name, "<image>")
    mark = f"<img>{mark}</img>" if re.match("qwen|glm", name) else mark  # as its template has it
    images, words = image_processor(eyes, **sizes), tokenizer(mark)
    if kind == "PaliGemma":
        images.image_seq_length = 16
    with without_torchvision():
        made = processor_class(f"{kind}Processor")
        template = dict(chat_template=words.chat_template)
        return made(image_processor=images, tokenizer=words, **options, **template)


@contextmanager
def without_torchvision():
    "Processors of pictures and videos are made for pictures alone; their videos need torchvision."
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.processing_utils import ProcessorMixin

    check = ProcessorMixin.check_argument_for_proper_class

    def lenient(self, name, value):
        absent = name in ("video_processor", "feature_extractor")
        return None if absent else check(self, name, value)

    with (
        patch.object(ProcessorMixin, "check_argument_for_proper_class", lenient),
        patch.object(processing_smolvlm, "num2words", object()),
    ):
        yield


def processor_class(name: str):
    "A processor's class, also where `transformers` does not offer it without torchvision."
    if name != "PixtralProcessor" or importlib.util.find_spec("torchvision"):
        return getattr(transformers, name)
    names = [".".join(("torchvision", "transforms", "v2")[:n]) for n in (1, 2, 3)]
    absent = {name: ModuleType(name) for name in names}
    absent[names[-1]].functional = None
    with patch.dict(sys.modules, absent):
        return importlib.import_module(
            "transformers.models.pixtral.processing_pixtral"
        ).PixtralProcessor
