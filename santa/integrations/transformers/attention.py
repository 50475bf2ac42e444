"""The attention of one layer, as Transformers' AttentionInterface calls it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import santa
from santa.config import SantaConfig
from santa.prefill import BLOCK as PREFILL_BLOCK

from .layers import head_dim_error, keeps_codes, settings_of, supports_head_dims
from .masks import (
    as_mask,
    derive_ranges,
    is_causal_mask,
    ranges_of,
    ranges_of_several,
    select_keys,
    tokens_of,
    valid_keys,
)
from .parallel import first_kv_head_of
from .proposals import codes_of
from .recording import RECORD_ATTRIBUTE, RowsRead

_DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float16, torch.float32)}

# Query rows scored at once by `dense_attention`: bounds its memory at 256 * kv_len scores per head.
_DENSE_QUERY_BLOCK = 256


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer. A decode step is sampled; what that means is decided here and nowhere else:

    one query per row, in a layer that says that it is causal (`is_causal` is True) or with a mask that Transformers'
    causal mask functions made for this step (a prefix-LM's layers say that they are not causal, its decode steps are).
    With `max_sampled_q_len`, also several queries that are the last tokens of their rows, under such a mask.

    Args:
        module: the attention module; read are layer_idx, is_causal, training, the indexer's block size and what
            `attach` put there.
        query: [batch, num_qo_heads, q_len, head_dim].
        key, value: [batch, num_kv_heads, kv_len, head_dim], not expanded to the query heads.
        attention_mask: from `step_mask`, or any [batch, 1, q_len, kv_len]: bool, or of another dtype and added to the
            logits; or None.
        scaling: None is 1 / sqrt(head_dim).
        softcap: logits become softcap * tanh(logits / softcap).
        s_aux: [num_qo_heads], a logit per head that takes attention mass and has no value row.
        position_bias: added to the logits.
        indices, block_indices: the keys, or blocks of keys, that the model's own indexer selected: see `select_keys`.
            Transformers hides the others in the mask for "eager" and "sdpa", and hands over the selection else.

    Returns:
        ([batch, q_len, num_qo_heads, head_dim], None).

    Raises:
        NotImplementedError: dropout; training with gradients; attention weights asked for.
        ValueError: unsupported head_dim; a decode step in a module without layer_idx; proposal keys of keys that are
            not a cache's.
        TypeError: a dtype that the device has no kernels for (float32 on CUDA).
    """
    check_inference(module, query, dropout, output_attentions)
    settings = settings_of(module)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    q_len, kv_len = query.shape[2], key.shape[2]
    tokens, ranges, noted_mask = tokens_of(attention_mask), ranges_of(attention_mask), attention_mask
    if attention_mask is not None and attention_mask.shape[-1] != kv_len:
        ranges = noted_mask = None  # a mask of other keys than these: SDPA says so
    codes = codes_of(key)
    if codes is not None and keeps_codes(module):
        codes.fill(key, functools.partial(valid_keys, noted_mask, ranges, query.shape[0]))
    if is_causal_mask(attention_mask):
        attention_mask, is_causal = None, True
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, query.dtype):
        attention_mask = _as_addend(attention_mask, query.dtype)
    selection = _selection(module, kv_len, indices, block_indices)
    if selection is not None:
        attention_mask = as_mask(attention_mask, query, key, is_causal is not False)
        attention_mask = select_keys(attention_mask, query.shape[1], **selection)
        tokens = ranges = None
    if settings.reason is None and (is_causal is True or ranges is not None):
        # Of a model that was switched by name, vision towers may come this way: they have no layer_idx.
        if q_len == 1 or hasattr(module, "layer_idx"):
            check_supported(module, query, key, value)
        config = settings.config
        is_plain = position_bias is None and selection is None
        if q_len == 1 and is_plain:
            if ranges is None:
                ranges = derive_ranges(attention_mask, query.shape[0], kv_len, query.device)
        elif 1 < q_len <= config.max_sampled_q_len and is_plain and noted_mask is not None:
            ranges = ranges_of_several(noted_mask) if noted_mask.shape[2] == q_len else None
        else:
            ranges = None
        if ranges is not None:
            return _sampled_attention(module, query, key, value, ranges, scaling, softcap, s_aux), None
        is_plain = is_plain and softcap is None and s_aux is None
        is_long = tokens is not None and q_len >= PREFILL_BLOCK
        if is_plain and is_long and config.prefills_sparsely(getattr(module, "layer_idx", None)):
            # A static cache is longer than what it holds so far.
            return sparse_prefill(query, key[:, :, :tokens], value[:, :, :tokens], config, scaling), None
    if softcap is not None or s_aux is not None:
        is_causal = is_causal is not False
        return dense_attention(query, key, value, attention_mask, scaling, is_causal, softcap, s_aux), None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        **kwargs,
    )


def check_inference(
    module: torch.nn.Module, query: torch.Tensor, dropout: float, output_attentions: bool | None
) -> None:
    if dropout > 0.0:
        raise NotImplementedError(f"santa: dropout is {dropout}; it needs to be 0: call model.eval()")
    if module.training and torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError(
            "santa: the model is in training mode with gradients on; it needs to be in inference: call "
            'model.eval(), or train with attn_implementation="sdpa"'
        )
    if output_attentions:
        raise NotImplementedError(
            "santa: output_attentions is True; it needs to be False, since santa computes no attention weights: call "
            'model.set_attn_implementation("eager") to get them'
        )


def _selection(
    module: torch.nn.Module, kv_len: int, indices: torch.Tensor | None, block_indices: torch.Tensor | None
) -> dict[str, Any] | None:
    """The keys that the model's indexer selected, as `select_keys` takes them; None where it selected all."""
    if indices is not None and indices.shape[-1] < kv_len:
        return dict(indices=indices, block_indices=None, block_size=None)
    if block_indices is not None:
        block_size = module.indexer.block_size
        if block_indices.shape[-1] < -(-kv_len // block_size):
            return dict(indices=None, block_indices=block_indices, block_size=block_size)
    return None


def _as_addend(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that is not bool, as eager attention has it: added to the logits, which are of `dtype`.

    What is finite stays finite, so that a row without keys is a mean and not NaN.
    """
    addend = mask.to(dtype)
    if not mask.is_floating_point():
        return addend
    lowest = torch.finfo(dtype).min
    return torch.where(torch.isneginf(mask), addend, addend.clamp(min=lowest))


def check_supported(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if not supports_head_dims(head_dim, value_dim):
        raise ValueError(head_dim_error(type(module).__name__, head_dim, value_dim))
    supported = _DTYPES.get(query.device.type)
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)  # santa.decode casts as SDPA does
    if supported is not None and dtype not in supported:
        got, *needed = (str(dtype).removeprefix("torch.") for dtype in (dtype, *supported))
        raise TypeError(
            f"santa: {type(module).__name__} runs in {got} on {query.device.type}; it needs to be "
            f"{' or '.join(needed)} there: load the model with dtype=torch.bfloat16"
        )


def decode_options(
    module: torch.nn.Module,
    num_kv_heads: int,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> dict[str, Any]:
    """What a layer's steps have in common, as `santa.decode` and `santa.decode_paged` take it. num_kv_heads: those that
    are here."""
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None:
        raise ValueError(
            f"santa: {type(module).__name__} has no layer_idx; it needs one, or all layers would draw the "
            "same random numbers"
        )
    config = settings_of(module).config
    return dict(
        num_samples=config.samples_in_layer(layer_idx),
        sampler=config.sampler,
        budget=config.budget,
        sm_scale=scaling,
        seed=config.seed + layer_idx,
        min_sampled_len=config.min_sampled_len,
        logits_soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float().contiguous(),
        first_kv_head=first_kv_head_of(module, num_kv_heads),
    )


def recorder_of(module: torch.nn.Module) -> RowsRead | None:
    """What the layer's steps are to be noted in, if they are."""
    record = getattr(module, RECORD_ATTRIBUTE, None)
    if record is not None and torch.compiler.is_compiling():
        raise RuntimeError("santa: record_rows_read needs an eager model; disable compilation to record")
    return record


def _sampled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """One step: query [batch, num_qo_heads, q_len, head_dim] -> [batch, q_len, num_qo_heads, head_dim]."""
    options = decode_options(module, key.shape[1], scaling, softcap, s_aux)
    layer_idx, config, record = module.layer_idx, settings_of(module).config, recorder_of(module)
    kv_starts, kv_lens, position = ranges.unbind(0)
    one_query = query.shape[2] == 1
    draws_scores = config.draws_scores(layer_idx)
    if draws_scores:
        # Transformers keeps keys row by row: they are all read and copied here, which costs more than the draws save.
        key = key.transpose(-1, -2).contiguous()
        for name in ("logits_soft_cap", "sinks", "first_kv_head"):
            del options[name]  # Bernoulli scores have none of these: `attach` refuses the first and the last
        options |= dict(score=config.score, num_draws=config.num_draws, score_sampler=config.score_sampler)
        options |= dict(return_features_read=record is not None)
    elif keeps_codes(module):
        options |= _proposal_options(module, query, key)
    result = santa.decode(
        query.squeeze(2) if one_query else query.transpose(1, 2),
        key,
        value,
        kv_lens=kv_lens,
        kv_starts=kv_starts,
        kv_layout=santa.KvLayout.HND,
        positions=position,
        return_rows_read=record is not None,
        **options,
    )
    out, lse = result[0], result[1]
    if record is not None:
        record.rows_read[layer_idx].append(result[2])
        record.kv_lens[layer_idx].append(kv_lens)
        if draws_scores:
            record.features_read[layer_idx].append(result[3])
            record.head_dims[layer_idx] = query.shape[-1]
    if draws_scores and s_aux is not None:
        # A sink adds exp(s_aux) to the softmax's denominator, which is estimated too, and no value row.
        out = (out.float() * torch.sigmoid(lse - s_aux.float()).unsqueeze(-1)).to(out.dtype)
    return out.unsqueeze(1) if one_query else out


def _proposal_options(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    codes = codes_of(key)
    if codes is not None:
        return dict(proposal=codes.keys(key.shape[2]))
    # Without a cache there are no keys but the new ones, which are too few to draw from.
    if key.shape[2] == query.shape[2]:
        return {}
    raise ValueError(
        f"santa: keys is 'proposal' while {type(module).__name__}, layer {module.layer_idx}, changes the keys that its "
        "cache returns, or has none of Transformers' caches; keys needs to be 'exact' for this layer: see layers"
    )


def sparse_prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: SantaConfig, scaling: float | None
) -> torch.Tensor:
    """One step of prefill: query [batch, num_qo_heads, q_len, head_dim] -> [batch, q_len, num_qo_heads, head_dim]."""
    out, _ = santa.prefill(query, key, value, alpha=config.alpha, sm_scale=scaling, backend=config.prefill_backend)
    return out.transpose(1, 2).contiguous()


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    is_causal: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Exact attention with a soft cap or sinks, which PyTorch's SDPA lacks. Shapes as in `attention`.

    mask None means causal for more than one query, aligned to the first key, as SDPA's is_causal is.
    """
    num_qo_heads, q_len, head_dim = query.shape[1:]
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    grouped_query = query.unflatten(1, (num_kv_heads, num_qo_heads // num_kv_heads))
    if mask is None and is_causal and q_len > 1:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()[None, None]
    blocks = []
    for first in range(0, q_len, _DENSE_QUERY_BLOCK):
        rows = slice(first, first + _DENSE_QUERY_BLOCK)
        scores = (grouped_query[..., rows, :] @ key.unsqueeze(2).transpose(-1, -2)).float() * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            # [batch, 1 or num_qo_heads, q_len, kv_len] -> the same with the heads split into groups.
            block_mask = mask[:, :, rows, :]
            heads = (num_kv_heads, -1) if block_mask.shape[1] > 1 else (1, 1)
            block_mask = block_mask.unflatten(1, heads)
            if block_mask.dtype == torch.bool:
                # The lowest finite value, not -inf: a padding query sees no key and must not become NaN.
                scores = scores.masked_fill(~block_mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + block_mask
        if s_aux is not None:
            sinks = s_aux.float().view(1, num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            probabilities = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            probabilities = scores.softmax(-1)
        blocks.append((probabilities.to(value.dtype) @ value.unsqueeze(2)).flatten(1, 2))
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous()
