"""Models that read, slice or replace the mask, or that choose keys themselves: equal to their eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.architectures import make_tiny
from helpers.models import VOCAB, FakeAttention, layer_qkv, make_model
from transformers import (
    DynamicCache,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers import attach, masks, report
from santa.integrations.transformers.layers import LayerSettings, set_settings

EXACT = santa.SantaConfig(num_samples=0)
ONE_DRAW = santa.SantaConfig(num_samples=1, min_sampled_len=0)


def token_ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_equal_to_eager(model: PreTrainedModel, run: Callable[[], torch.Tensor]) -> None:
    """`run` gives logits: with eager attention, then attached."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = run()
        attach(model, EXACT)
        error = (run() - expected).abs().max()
    assert error < 1e-3 * expected.std()


def generated_logits(model: PreTrainedModel, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    result = model.generate(
        input_ids=token_ids(8) if ids is None else ids,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **options,
    )
    return torch.stack(result.logits, dim=1)


# Masks that model code reads ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("index_topk", [5, 64], ids=["selecting", "keeping all"])
def test_glm5_slices_the_mask_for_its_indexer(cache: dict[str, str], index_topk: int) -> None:
    model = make_tiny("glm_moe_dsa", qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, index_topk=index_topk)
    assert_equal_to_eager(model, lambda: generated_logits(model, **cache))


def test_gemma4_drops_queries_from_layers_that_share_keys() -> None:
    model = make_tiny("gemma4_text", per_layer_config=None)
    for keep in (1, 4):
        assert_equal_to_eager(model, lambda keep=keep: model(token_ids(20), logits_to_keep=keep).logits)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_gemma4_drops_queries_of_a_later_chunk_too(cache_class: type) -> None:
    model = make_tiny("gemma4_text", per_layer_config=None)

    def run() -> torch.Tensor:
        cache = DynamicCache(config=model.config) if cache_class is DynamicCache else StaticCache(model.config, 32)
        model(token_ids(20)[:, :12], past_key_values=cache)
        return model(token_ids(20)[:, 12:], past_key_values=cache, logits_to_keep=4).logits

    assert_equal_to_eager(model, run)


def test_gemma4_with_prompt_lookup() -> None:
    model = make_tiny("gemma4_text", per_layer_config=None)
    # Repeats itself, so that there is something to look up: the first step verifies tokens beside the prefill.
    ids = token_ids(6).repeat(1, 3)
    assert_equal_to_eager(model, lambda: generated_logits(model, ids, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("kv_len", [3, 24])
def test_a_users_integer_mask_is_added_as_eager_attention_adds_it(kv_len: int) -> None:
    """With kv_len 3 it has the shape and dtype that packed ranges once had."""
    query, key, value = layer_qkv(kv_len=kv_len)
    mask = torch.arange(kv_len, dtype=torch.int32).view(1, 1, 1, kv_len) % 3
    scores = query @ key.repeat_interleave(4, 1).transpose(-1, -2) / 8 + mask
    expected = (scores.softmax(-1) @ value.repeat_interleave(4, 1)).transpose(1, 2)
    module = FakeAttention()
    set_settings(module, LayerSettings(EXACT))
    torch.testing.assert_close(integration.attention(module, query, key, value, mask)[0], expected)


@pytest.mark.parametrize("lowest", ["min", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_users_float_mask_of_another_dtype_is_added_too(dtype: torch.dtype, lowest: str) -> None:
    """Keys that are masked by the lowest number of the mask's dtype, or by -inf, are not attended to."""
    query, key, value = layer_qkv(kv_len=24)
    mask = torch.zeros(1, 1, 1, 24, dtype=dtype)
    mask[..., :7] = torch.finfo(dtype).min if lowest == "min" else -torch.inf
    mask[..., 9] = 1.5
    scores = (query @ key.repeat_interleave(4, 1).transpose(-1, -2) / 8 + mask.float())[..., 7:]
    expected = (scores.softmax(-1) @ value[:, :, 7:].repeat_interleave(4, 1)).transpose(1, 2)
    module = FakeAttention()
    set_settings(module, LayerSettings(EXACT))
    torch.testing.assert_close(integration.attention(module, query, key, value, mask)[0], expected)


def test_a_row_that_a_wider_mask_hides_entirely_is_a_mean() -> None:
    """As in eager attention: the lowest float64 is no infinity in float32."""
    query, key, value = layer_qkv(kv_len=24)
    mask = torch.full((1, 1, 1, 24), torch.finfo(torch.float64).min, dtype=torch.float64)
    module = FakeAttention()
    set_settings(module, LayerSettings(EXACT))
    out = integration.attention(module, query, key, value, mask)[0]
    torch.testing.assert_close(out, value.mean(2, keepdim=True).repeat_interleave(4, 1).transpose(1, 2))


def test_a_users_integer_mask_in_a_model() -> None:
    model = make_model()

    def run() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(token_ids(2), past_key_values=cache)
        mask = torch.tensor([[[[0, 5, 1]]]], dtype=torch.int32)
        return model(token_ids(1), past_key_values=cache, attention_mask=mask).logits

    assert_equal_to_eager(model, run)


# What is noted on a mask, and when it is lost ---------------------------------------------------------------

STEPS = {
    "prefill": dict(q_length=6, kv_length=6),
    "prefill of a static cache": dict(q_length=6, kv_length=9),
    "later chunk": dict(q_length=3, kv_length=9, q_offset=6),
    "sparse chunk": dict(q_length=130, kv_length=300, q_offset=128),
    "decode": dict(q_length=1, kv_length=9, q_offset=7),
}


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("allow_skip", [True, False])
def test_masks_are_those_of_sdpa(step: str, allow_skip: bool) -> None:
    options = dict(batch_size=2, allow_is_causal_skip=allow_skip, **STEPS[step])
    expected = sdpa_mask(**options | {"allow_is_causal_skip": False})
    mask = integration.step_mask(**options)
    assert mask.shape == expected.shape and mask.dtype == torch.bool and mask.device == expected.device
    assert type(mask[:, :, -1:]) is torch.Tensor and torch.equal(mask[:, :, -1:], expected[:, :, -1:])
    assert torch.equal(mask, expected)


def test_a_bidirectional_mask_is_left_to_transformers() -> None:
    options = dict(batch_size=1, q_length=1, kv_length=5, allow_is_bidirectional_skip=True)
    assert integration.step_mask(**options) is None
    mask = integration.step_mask(**options | {"attention_mask": torch.tensor([[True, True, False, True, True]])})
    assert mask.shape == (1, 1, 1, 5) and masks.ranges_of(mask) is None


def test_a_mask_of_many_queries_has_no_memory_until_it_is_used() -> None:
    mask = integration.step_mask(batch_size=1, q_length=1 << 20, kv_length=1 << 20, mask_function=causal_mask_function)
    assert mask.shape == (1, 1, 1 << 20, 1 << 20) and masks.is_causal_mask(mask)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_writing_to_a_mask_takes_its_notes_away(inference_mode: bool) -> None:
    with torch.inference_mode(inference_mode):
        mask = integration.step_mask(batch_size=1, **STEPS["decode"])
        assert masks.ranges_of(mask).tolist() == [[0], [8], [8]]
        mask[..., 3:5] = False
        assert masks.ranges_of(mask) is None
        mask = integration.step_mask(batch_size=1, **STEPS["prefill"])
        assert masks.is_causal_mask(mask)
        mask[..., 3:5] = False
        assert not masks.is_causal_mask(mask) and not mask[..., 3:5].any() and mask[..., -1, 2]


def test_a_mask_that_is_moved_to_another_device_keeps_its_notes() -> None:
    """The meta device stands for another GPU."""
    mask = integration.step_mask(batch_size=2, **STEPS["decode"])
    moved = mask.to("meta", non_blocking=True)
    assert moved.device.type == masks.ranges_of(moved).device.type == "meta"
    assert mask.to("cpu") is mask and masks.ranges_of(mask.to(torch.float32)) is None
    mask[..., 2] = False
    assert masks.ranges_of(mask.to("meta")) is None

    mask = integration.step_mask(batch_size=2, **STEPS["prefill"])
    moved = mask.to(torch.device("meta"))
    assert moved.device.type == "meta" and masks.is_causal_mask(moved) and masks.is_causal_mask(mask)
    assert mask.to("cpu") is mask and torch.equal(
        mask.to(torch.float32), sdpa_mask(2, 6, 6, allow_is_causal_skip=False).float()
    )
    assert not masks.is_causal_mask(mask)


def test_a_compiled_forward_pass_takes_a_mask_without_memory() -> None:
    """`generate` makes the masks of a static cache outside of the forward pass."""
    model = make_model()
    expected = generated_logits(model, cache_implementation="static")
    attach(model, EXACT)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(generated_logits(model, cache_implementation="static"), expected, rtol=1e-3, atol=1e-3)


# Models that hand their selection over ----------------------------------------------------------------------


def test_minimax_m3_attends_to_the_blocks_that_its_indexer_selects() -> None:
    model = make_tiny("minimax_m3_vl_text", index_block_size=128, index_topk_blocks=2, max_position_embeddings=1024)
    assert_equal_to_eager(model, lambda: model(token_ids(600)).logits)
    assert_equal_to_eager(model, lambda: generated_logits(model, token_ids(600)))


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_prefill_attends_to_the_keys_that_the_indexer_selects(model_type: str) -> None:
    model = make_tiny(model_type, index_topk=8)
    assert_equal_to_eager(model, lambda: model(token_ids(40)).logits)
    # The selection matters: without it the logits are others.
    with torch.no_grad():
        selecting, everything = (make_tiny(model_type, index_topk=k)(token_ids(40)).logits for k in (8, 40))
    assert (selecting - everything).abs().max() > 0.1 * selecting.std()


def test_an_indexer_that_keeps_all_keys_leaves_decode_sampled(decode_calls: list[dict[str, Any]]) -> None:
    model = attach(make_tiny("deepseek_v32", index_topk=64), ONE_DRAW)
    assert "exact where its indexer leaves keys out" in repr(report(model))
    generated_logits(model)
    assert len(decode_calls) == 2 * 3 and all(call["num_samples"] == 1 for call in decode_calls)


# Layers that do not say that they are causal ------------------------------------------------------------------


def make_mllama() -> PreTrainedModel:
    """A vision tower of head_dim 80 and a cross-attention layer between two of self-attention."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        cross_attention_layers=[1],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    vision = dict(
        hidden_size=160,
        attention_heads=2,
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_size=64,
        image_size=28,
        patch_size=14,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0],
        vision_output_dim=320,
    )
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=96))
    return model.eval()


def test_cross_attention_and_vision_towers_are_left_to_sdpa(decode_calls: list[dict[str, Any]]) -> None:
    model = make_mllama()
    for name, parameter in model.named_parameters():
        if name.endswith("gate") or "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            parameter.data.fill_(1.0)
    image = dict(
        pixel_values=torch.randn(1, 1, 1, 3, 28, 28, generator=torch.Generator().manual_seed(2)),
        aspect_ratio_mask=torch.ones(1, 1, 1, dtype=torch.int64),
        aspect_ratio_ids=torch.ones(1, 1, dtype=torch.int64),
        cross_attention_mask=torch.ones(1, 8, 1, 1, dtype=torch.int64),
    )
    assert_equal_to_eager(model, lambda: generated_logits(model, **image))
    assert len(decode_calls) == 2 * 3  # two layers, three steps
    layers = report(model).layers
    assert {layer.module_class for layer in layers if layer.status == "exact"} == {"MllamaTextSelfAttention"}
    assert {layer.module_class for layer in layers if layer.status == "other"} >= {
        "MllamaTextCrossAttention",
        "MllamaVisionAttention",
    }


def make_paligemma() -> PreTrainedModel:
    torch.manual_seed(0)
    text = dict(
        model_type="gemma",
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.2,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=128,
    )
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=96, vocab_size=VOCAB, projection_dim=128, hidden_size=128
    )
    return PaliGemmaForConditionalGeneration(config).eval()


def test_decode_steps_of_a_prefix_lm_are_sampled(decode_calls: list[dict[str, Any]]) -> None:
    model = make_paligemma()
    assert not any(module.is_causal for module in model.modules() if type(module).__name__ == "GemmaAttention")
    inputs = dict(pixel_values=torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2)))
    ids = token_ids(8)
    ids[ids == 96] = 2
    ids[:, :4] = 96  # four patches

    def run() -> torch.Tensor:
        return generated_logits(model, ids, attention_mask=torch.ones_like(ids), **inputs)

    assert_equal_to_eager(model, run)
    assert len(decode_calls) == 2 * 3
    attach(model, ONE_DRAW)
    assert {layer.module_class for layer in report(model).with_status("sampled")} == {"GemmaAttention"}
    run()
    assert len(decode_calls) == 2 * 2 * 3 and decode_calls[-1]["num_samples"] == 1


def test_a_module_that_says_nothing_of_causality_is_not_sampled(decode_calls: list[dict[str, Any]]) -> None:
    module = FakeAttention()
    del module.is_causal
    query, key, value = layer_qkv()
    integration.attention(module, query, key, value, None)
    integration.attention(module, query, key, value, torch.ones(2, 1, 1, 24, dtype=torch.bool))
    assert not decode_calls
