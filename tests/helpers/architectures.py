"""A tiny random model of every causal architecture of the installed Transformers, and what santa does with it.

The lists here are the support table of docs/transformers.md. Import it where Transformers is known to be there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, PAD, LAYERS, HEAD_DIM = 97, 0, 2, 64

_ABSENT = object()

# What configurations call the same thing; applied where one has the field. Large initial weights: with the usual 0.02
# attention hardly moves the logits, and a wrong mask is not seen.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "is_decoder": True,
    "max_position_embeddings": 256,
    "n_positions": 256,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 2 * HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads"), 2),
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    "num_experts_per_tok": 1,
}
# Multi-head latent attention, with one width for K and V.
_MLA = {
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "n_group": 1,
    "topk_group": 1,
}
# An indexer that selects fewer keys than the prompt has.
_DSA = _MLA | {"index_topk": 5, "index_n_heads": 2, "index_head_dim": 128}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
# Layers that share keys, and full attention with twice the head_dim of santa's widest.
_GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {"01": {"head_dim": 512}, "03": {"head_dim": 512}},
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
}
_QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# What an architecture needs beside or instead of that.
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu"), _MLA),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _DSA),
    "bailing_hybrid": _MLA | _LINEAR | {"linear_num_heads": 2, "linear_head_dim": 64, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 64},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 1, "clip_qkv": 8.0}},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 0, "n_output_layers": 0},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    **dict.fromkeys(
        ("dots3_note", "dots3_note_text"),
        _DSA | {"per_layer_config": None, "layer_types": ["indexed_attention"] * LAYERS, "head_dim": 128},
    ),
    "falcon": {"num_kv_heads": 2, "head_dim": _ABSENT},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "granitemoehybrid": _LINEAR | {"mamba_n_heads": 4, "mamba_d_head": 64},
    # Its layers run many times over: rounding grows with the weights, in SDPA too.
    "hrm_text": {"initializer_range": 0.05},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": _MLA | _LINEAR | {"linear_num_heads": 2, "linear_head_dim": 64, "num_experts_per_token": 1},
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONVOLUTION),
    "mimo_v2_flash": {"v_head_dim": HEAD_DIM},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 1, "index_head_dim": 64}
    | {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mamba2": {"num_heads": 4, "head_dim": 64, "n_groups": 1},
    "prophetnet": {
        "num_encoder_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_decoder_attention_heads": 2,
        "num_encoder_attention_heads": 2,
        "num_hidden_layers": _ABSENT,
        "num_attention_heads": _ABSENT,
    },
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _LINEAR),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _LINEAR | _QWEN4_INDEXER),
    "reformer": {"axial_pos_embds_dim": [64, 64], "axial_pos_shape": [16, 16], "attn_layers": ["local", "local"]},
    "xlnet": {"max_position_embeddings": _ABSENT},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 2,
        "attention_head_dim": 128,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 2},
}

# Why `attach` refuses an architecture: what its message says, and what the table says.
_ITSELF, _NONE = "computes its attention itself", "no attention layers"
_BIAS = "adds a position bias"
_NOT_CAUSAL, _NO_INDEX = "does not say that it is causal", "has no layer_idx"
REFUSED: dict[str, str] = {
    "big_bird": _ITSELF,
    "bigbird_pegasus": _NOT_CAUSAL,
    "bloom": _ITSELF,
    "cpmant": _ITSELF,
    "doge": _NOT_CAUSAL,
    "falcon": _ITSELF,
    "falcon_mamba": _NONE,
    "git": _ITSELF,
    "gpt_neo": _ITSELF,
    "gpt_neox_japanese": _ITSELF,
    "inkling2_loop_text": _BIAS,
    "inkling2_text": _BIAS,
    "inkling_text": _BIAS,
    "mamba": _NONE,
    "mamba2": _NONE,
    "megatron-bert": _ITSELF,
    "mpt": _ITSELF,
    "mvp": _ITSELF,
    "openai-gpt": _ITSELF,
    "prophetnet": _ITSELF,
    "reformer": _ITSELF,
    "rembert": _ITSELF,
    "roformer": _ITSELF,
    "rwkv": _ITSELF,
    "trocr": _ITSELF,
    "xglm": _ITSELF,
    "xlm": _ITSELF,
    "xlnet": _ITSELF,
    "xlstm": _NONE,
    "zamba": _NO_INDEX,
}
# Of these some causal layers are not santa's: why. Linear attention, encoders and cross-attention are never.
_WIDE = "head_dim 512, which full attention layers have"
PARTLY = dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _WIDE)
# Their own indexer leaves keys out: exact wherever it does, and so at the sizes tested here.
SELECTING = (
    "axk2",
    "deepseek_v32",
    "dots3_note",
    "dots3_note_text",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl_text",
    "qwen4_exp",
    "qwen4_exp_text",
)
# What Transformers cannot build or run in tiny, or without a package that is not there.
NOT_TRIED: dict[str, str] = {
    "blt": "no tiny configuration was found",
    **dict.fromkeys(
        (
            "cohere_compass_text",
            "gemma4_assistant",
            "gemma4_unified_assistant",
            "longcat_flash",
            "musicgen",
            "musicgen_melody",
        ),
        "Transformers fails on the tiny configuration",
    ),
    "gemma3n": "needs timm",
}
# Without a static cache of their own.
NO_STATIC_CACHE = ("deepseek_v4",)
# Beside left padding a query may be left with no key at all. There SDPA gives zeros, eager attention a mean of values
# that nobody may see.
SDPA_IS_THE_TRUTH = ("minimax_m3_vl_text",)
# In every run of the tests; the others are slow.
SAMPLE = (
    "bart",
    "bloom",
    "deepseek_v3",
    "deepseek_v32",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm_moe_dsa",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoehybrid",
    "llama",
    "llama4_text",
    "minimax_m3_vl_text",
    "mistral",
    "mixtral",
    "mllama",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3_moe",
    "qwen3_next",
    "whisper",
)


def architectures() -> list[str]:
    """The model types that Transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """The same weights in every call, float32, eager attention; `changes` are fields of the configuration."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    # Not that of the model type, where a model of several parts lends its text model.
    config_class, own = model_class.config_class, _OWN.get(model_type, {}) | changes
    # A model may change its configuration: another one counts the parameters.
    with torch.device("meta"):
        counted = model_class._from_config(_tiny_config(config_class, own), attn_implementation="eager")
    if (count := sum(x.numel() for x in counted.parameters())) > 40_000_000:
        raise ValueError(f"{model_type} has {count} parameters, which is not tiny")
    torch.manual_seed(0)
    config = _tiny_config(config_class, own)
    return model_class._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def _tiny_config(config_class: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    fields = {name: value for name, value in _SIZES.items() if _has(default, name)}
    for name in config_class.sub_configs:
        if isinstance(sub := getattr(default, name, None), PreTrainedConfig):
            fields[name] = _tiny_config(type(sub), own.get(name, {}))
    fields |= {name: value for name, value in own.items() if name not in config_class.sub_configs}
    return config_class(**{name: value for name, value in fields.items() if value is not _ABSENT})


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # per-layer attributes raise what is no AttributeError
        return True


def support_table() -> str:
    """The table of docs/transformers.md."""
    sampled = [name for name in architectures() if name not in {*REFUSED, *NOT_TRIED, *SELECTING, *PARTLY}]
    rows: list[tuple[str, list[str]]] = [
        ("sampled", sampled),
        ("sampled where their own indexer keeps all keys, exact elsewhere", list(SELECTING)),
        *_by_reason("sampled, but not with ", PARTLY),
        *_by_reason("refused: ", REFUSED),
        *_by_reason("not tried: ", NOT_TRIED),
    ]
    lines = [f"| {what} | {', '.join(f'`{name}`' for name in sorted(names))} |" for what, names in rows]
    return "\n".join(["| | model types |", "|---|---|", *lines])


def _by_reason(prefix: str, reasons: dict[str, str]) -> list[tuple[str, list[str]]]:
    return [
        (prefix + reason, [name for name in reasons if reasons[name] == reason])
        for reason in dict.fromkeys(reasons.values())
    ]
