"""Tiny random models of Transformers and prompts for them; an attention module and its inputs, without a model.

Import it where Transformers is known to be there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CompileConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

VOCAB, PAD = 97, 0
NUM_LAYERS = 2
PROMPT_LEN, NEW_TOKENS, WINDOW = 19, 10, 12
PADDING = 6

# Large initial weights: with the usual 0.02 attention hardly moves the logits, and a wrong mask is not seen.
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    initializer_range=0.2,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
# Model, configuration, and what the configuration has beyond SHAPE.
FAMILIES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}
# Transformers' SDPA knows neither the soft cap nor sinks: there, its eager attention is the truth.
_TRUTH = {"gemma2": "eager", "gpt_oss": "eager"}


def make_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """The family's model with SHAPE and `changes`: the same weights in every call. Its attention is the truth."""
    torch.manual_seed(0)
    model_class, config_class, own = FAMILIES[family]
    model = model_class(config_class(**SHAPE | own | changes)).eval()
    model.set_attn_implementation(_TRUTH.get(family, "sdpa"))
    return model


def make_prompt(length: int = PROMPT_LEN, *, batch: int = 2, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts; the last is shorter by `padding` and filled up on the left."""
    input_ids = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    input_ids[-1, :padding], attention_mask[-1, :padding] = PAD, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def fullgraph_on_cpu() -> CompileConfig:
    # Dynamo's capture is what the integration can break; Inductor would only add compile time.
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


def generate(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, NEW_TOKENS] and their logits [batch, NEW_TOKENS, VOCAB]."""
    torch.compiler.reset()
    result = model.generate(
        **prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return result.sequences[:, prompt["input_ids"].shape[1] :], torch.stack(result.logits, dim=1)


def generate_static_compiled(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return generate(model, prompt, cache_implementation="static", compile_config=fullgraph_on_cpu())


def generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], **settings: Any
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of continuous batching, NEW_TOKENS of each prompt, and their log-probabilities. A step has 24
    tokens at most: long prompts come in chunks, beside requests that decode already."""
    version = Version(transformers.__version__)
    if model.device.type == "cpu" and version < Version("5.21") and importlib.util.find_spec("psutil") is None:
        pytest.skip("before 5.21, Transformers needs psutil for continuous batching on the CPU")
    page_size = "page_size" if version >= Version("5.18") else "block_size"
    settings = {page_size: 8, "num_blocks": 64, "max_batch_tokens": 24, "return_logprobs": True} | settings
    found = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
    )
    outputs = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
    assert len(outputs) == len(prompts) and not any(output.error for output in outputs)
    return [output.generated_tokens for output in outputs], [output.logprobs for output in outputs]


class FakeAttention(torch.nn.Module):
    """What `attention` reads from a module: calls it without a model."""

    def __init__(self, layer_idx: int | None = 0, is_causal: bool = True, num_key_value_groups: int = 4) -> None:
        super().__init__()
        if layer_idx is not None:
            self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.num_key_value_groups = num_key_value_groups
        self.eval()


def layer_qkv(q_len: int = 1, kv_len: int = 24, batch: int = 2, head_dim: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, 8, q_len, head_dim), (batch, 2, kv_len, head_dim), (batch, 2, kv_len, head_dim)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return out.transpose(1, 2)
