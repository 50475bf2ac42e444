"""Sampled decoding, and sparse prefill, for Hugging Face Transformers.

    import santa
    from santa.integrations.transformers import attach

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cuda")
    attach(model, santa.SantaConfig(num_samples=128))
    model.generate(...)

`register()` and then `attn_implementation="santa"` does the same with the default settings. What runs:

    more than one query: prefill (chunked too),   Transformers' own SDPA attention
        speculative verification
    the same with SantaConfig(prefill="sample"),  `santa.prefill`
        where the mask is causal and no more
    one query per row in causal self-attention    `santa.decode`
    attention that is not causal: encoders,       Transformers' own SDPA attention
        cross-attention
    logit soft cap (Gemma 2)                      exact, in plain PyTorch, with a warning
    attention sinks (gpt-oss)                     one query: `santa.decode`, rescaled by the sink;
                                                  more: exact, in plain PyTorch

The mask function runs once per step and mask type and reduces the mask to one range of valid keys per row
(left padding, a static cache's unused tail, a sliding window), so that no layer reads a mask. A mask that is
no contiguous range takes the exact path. Where prefill is sparse, it also finds out whether the mask of a
prefill step is causal and no more. Settings live on the model's attention modules, where a compiled graph sees
them as constants. Inference only.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

import santa
from santa.config import SantaConfig
from santa.prefill import BLOCK as PREFILL_BLOCK
from santa.prefill import HEAD_DIMS as PREFILL_HEAD_DIMS

__all__ = ["NAME", "SPARSE_PREFILL_NAME", "RowsRead", "attach", "record_rows_read", "register"]

# The first release whose mask functions are told the query's length and offset instead of its positions.
_MIN_TRANSFORMERS = "5.4.0"
if Version(transformers.__version__) < Version(_MIN_TRANSFORMERS):
    raise ImportError(f"santa: transformers is {transformers.__version__}; it needs to be at least {_MIN_TRANSFORMERS}")

NAME = "santa"
# What `attach` calls a model whose prefill is sparse: its mask function is another one, since mask functions do not get
# to see a model's settings.
SPARSE_PREFILL_NAME = "santa_sparse_prefill"

# The head dimensions that `santa.decode` is built for.
_HEAD_DIMS = (64, 96, 128, 192, 256)
_DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float16, torch.float32)}

_DEFAULT_CONFIG = SantaConfig()
# Plain attributes of an attention module: they are in no state_dict, and torch.compile guards on them.
_CONFIG_ATTRIBUTE = "_santa_config"
_RECORD_ATTRIBUTE = "_santa_rows_read"

# Query rows scored at once by `_dense_attention`: bounds its memory at 256 * kv_len scores per head.
_DENSE_QUERY_BLOCK = 256


def register() -> None:
    """Make `attn_implementation="santa"` known to Transformers. Calling it again changes nothing."""
    for name, mask_function in ((NAME, decode_ranges), (SPARSE_PREFILL_NAME, sparse_prefill_ranges)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask_function)


def attach(model: PreTrainedModel, config: SantaConfig | None = None) -> PreTrainedModel:
    """Switch a model to `santa` and set how it samples; may be called again to change the settings.

    Args:
        model: a Transformers model whose attention goes through AttentionInterface.
        config: the settings; None is `SantaConfig()`. A compiled model recompiles when they change.

    Returns:
        The same model.

    Raises:
        TypeError: config is no SantaConfig.
        ValueError: the model cannot change its attention, has no causal attention layer or a head_dim
            without kernels, or config.layers names a layer the model does not have.
    """
    config = _DEFAULT_CONFIG if config is None else config
    if not isinstance(config, SantaConfig):
        raise TypeError(f"santa: config is a {type(config).__name__}; it needs to be a santa.SantaConfig")
    modules = _decoder_attention_modules(model)
    layer_indices = {module.layer_idx for module in modules}
    if unknown := sorted(set(config.layers or ()) - layer_indices):
        raise ValueError(
            f"santa: layers has {unknown}; it needs to name attention layers of {type(model).__name__}, "
            f"which are {sorted(layer_indices)}"
        )
    for module in modules:
        head_dim = getattr(module, "head_dim", None)
        if isinstance(head_dim, int) and head_dim not in _HEAD_DIMS:
            raise ValueError(_head_dim_error(module, head_dim))
        if config.prefill == "sample" and isinstance(head_dim, int) and head_dim not in PREFILL_HEAD_DIMS:
            raise ValueError(
                f"santa: {type(module).__name__} has head_dim {head_dim}; prefill 'sample' needs one of "
                f"{PREFILL_HEAD_DIMS}: use prefill='dense' for this model"
            )
    register()
    name = SPARSE_PREFILL_NAME if config.prefill == "sample" else NAME
    if model.config._attn_implementation != name:
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"santa: model is a {type(model).__name__}, whose attention is fixed; it needs to call its "
                "attention through AttentionInterface"
            )
        model.set_attn_implementation(name)
    for module in modules:
        setattr(module, _CONFIG_ATTRIBUTE, config)
    return model


@dataclass
class RowsRead:
    """What `santa.decode` read, step by step, for each layer; filled by `record_rows_read`.

    Attributes:
        rows_read: layer index -> one int32 [batch, num_kv_heads] tensor of distinct V rows read per step.
        kv_lens: layer index -> one int32 [batch] tensor of valid keys per step.
        features_read: layer index -> one int32 [batch, num_kv_heads] tensor of distinct key features read per step;
            of layers with Bernoulli scores alone.
        head_dims: layer index -> head_dim; of the same layers.
    """

    rows_read: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    kv_lens: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    features_read: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    head_dims: dict[int, int] = field(default_factory=dict)

    def share(self, layer_idx: int | None = None) -> float:
        """V rows read over V rows there were, in all layers or in one; NaN if `santa.decode` did not run."""
        layers = list(self.rows_read) if layer_idx is None else [layer_idx]
        read = available = 0
        for layer in layers:
            for rows, lens in zip(self.rows_read[layer], self.kv_lens[layer], strict=True):
                read += int(rows.sum(dtype=torch.int64))
                available += int(lens.sum(dtype=torch.int64)) * rows.shape[1]
        return read / available if available else float("nan")

    def feature_share(self, layer_idx: int | None = None) -> float:
        """Key features read over those there were, in all layers with Bernoulli scores or in one; NaN without any."""
        layers = list(self.features_read) if layer_idx is None else [layer_idx]
        read = available = 0
        for layer in layers:
            for features in self.features_read[layer]:
                read += int(features.sum(dtype=torch.int64))
                available += features.numel() * self.head_dims[layer]
        return read / available if available else float("nan")


@contextmanager
def record_rows_read(model: PreTrainedModel) -> Iterator[RowsRead]:
    """Collect the V rows that the decode steps inside the `with` block read. For eager models.

    Steps that do not go through `santa.decode` (prefill, soft cap, masks with holes) are not recorded. The
    counts stay on the model's device until they are asked for, so that recording does not synchronise.

    Raises:
        ValueError: the model has no causal attention layer.
        RuntimeError: from the forward pass, if it runs compiled: a graph cannot append to a Python list.
    """
    record = RowsRead()
    modules = _decoder_attention_modules(model)
    for module in modules:
        setattr(module, _RECORD_ATTRIBUTE, record)
    try:
        yield record
    finally:
        for module in modules:
            delattr(module, _RECORD_ATTRIBUTE)


def decode_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of one step, as Transformers' AttentionMaskInterface asks for it.

    Args: those of `transformers.masking_utils.sdpa_mask`; attention_mask is bool [batch, tokens so far].

    Returns:
        For more than one query: what `sdpa_mask` returns. For one query, int32 [batch, 1, 1, 3]: (first valid
        key, number of valid keys, tokens of the row so far). The third column keys the random stream: the
        number of valid keys alone would repeat from step to step once a sliding window is full. Where the
        valid keys of a row are no contiguous range, and in a traced graph where a padding mask cannot be
        looked at, the bool [batch, 1, 1, kv_length] mask, which decodes exactly.
    """
    if q_length != 1:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=1,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    # Causal, sliding and chunked patterns leave one range; padding and custom patterns may leave holes.
    if (attention_mask is not None or use_vmap) and not _is_contiguous(mask):
        return mask
    if attention_mask is None:
        position = torch.zeros(batch_size, dtype=torch.int32, device=device) + (q_offset + 1)
    else:
        seen = torch.arange(attention_mask.shape[-1], device=attention_mask.device) <= q_offset
        position = (attention_mask & seen).sum(-1)
    return _pack_ranges(mask[:, 0, 0], position)


def sparse_prefill_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """`decode_ranges`, but for the masks that `santa.prefill` implies.

    Returns:
        int32 [1, 1, 1, 1] on the CPU, the number of tokens so far, for a step of at least 128 queries whose mask is
        causal and no more (no padding, window or packed sequences) and that starts at a multiple of 128 tokens. For
        any other step, and in a traced graph, what `decode_ranges` returns.
    """
    if (
        q_length >= PREFILL_BLOCK
        and mask_function is causal_mask_function
        and kv_offset == 0
        and not torch.compiler.is_compiling()
        and int(q_offset) % PREFILL_BLOCK == 0
    ):
        tokens = int(q_offset) + q_length
        # Queries past the end of a sliding cache, or keys that are padding, are not `santa.prefill`'s.
        is_whole = attention_mask is None or (
            attention_mask.shape[-1] >= tokens and bool(attention_mask[:, :tokens].all())
        )
        if tokens <= kv_length and is_whole:
            return torch.tensor([[[[tokens]]]], dtype=torch.int32)
    return decode_ranges(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **kwargs,
    )


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as Transformers' AttentionInterface calls it.

    Args:
        module: the attention module; read are layer_idx, is_causal, training and what `attach` put there.
        query: [batch, num_qo_heads, q_len, head_dim].
        key, value: [batch, num_kv_heads, kv_len, head_dim], not expanded to the query heads.
        attention_mask: from `decode_ranges` or `sparse_prefill_ranges`, or bool / additive
            [batch, 1, q_len, kv_len], or None.
        scaling: None is 1 / sqrt(head_dim).
        softcap: logits become softcap * tanh(logits / softcap).
        s_aux: [num_qo_heads], a logit per head that takes attention mass and has no value row.

    Returns:
        ([batch, q_len, num_qo_heads, head_dim], None).

    Raises:
        NotImplementedError: dropout, or training with gradients.
        ValueError: unsupported head_dim; a decode step in a module without layer_idx.
        TypeError: a dtype that the device has no kernels for (float32 on CUDA).
    """
    if dropout > 0.0:
        raise NotImplementedError(f"santa: dropout is {dropout}; it needs to be 0: call model.eval()")
    if module.training and torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError(
            "santa: the model is in training mode with gradients on; it needs to be in inference: call "
            'model.eval(), or train with attn_implementation="sdpa"'
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.shape[2] > 1 and attention_mask is not None and attention_mask.dtype == torch.int32:
        # A static cache is longer than what it holds so far.
        tokens = int(attention_mask)
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        config = getattr(module, _CONFIG_ATTRIBUTE, _DEFAULT_CONFIG)
        is_plain = is_causal and softcap is None and s_aux is None and position_bias is None
        if is_plain and config.prefills_sparsely(getattr(module, "layer_idx", None)):
            return _sparse_prefill(query, key, value, config, scaling), None
        attention_mask = None if is_causal and query.shape[2] == tokens else _causal_mask(query, key)
    if is_causal:
        _check_supported(module, query, key, value)
        if query.shape[2] == 1 and softcap is None and position_bias is None:
            ranges = _as_ranges(attention_mask, query.shape[0], key.shape[2], query.device)
            if ranges is not None:
                return _sampled_attention(module, query, key, value, ranges, scaling, s_aux), None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        attention_mask = _ranges_to_mask(attention_mask, key.shape[2])
    if softcap is not None or s_aux is not None:
        if softcap is not None and not torch.compiler.is_compiling():
            warnings.warn(
                f"santa: {type(module).__name__} caps its attention logits (softcap={softcap}), which "
                "santa.decode does not do: these layers run exactly, in plain PyTorch, and are not sampled",
                stacklevel=2,
            )
        return _dense_attention(query, key, value, attention_mask, scaling, is_causal, softcap, s_aux), None
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


def _sampled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: torch.Tensor,
    scaling: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """One decode step: query [batch, num_qo_heads, 1, head_dim] -> [batch, 1, num_qo_heads, head_dim]."""
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None:
        raise ValueError(
            f"santa: {type(module).__name__} has no layer_idx; it needs one, or all layers would draw the "
            "same random numbers"
        )
    config = getattr(module, _CONFIG_ATTRIBUTE, _DEFAULT_CONFIG)
    record = getattr(module, _RECORD_ATTRIBUTE, None)
    # Columns of their own as `_pack_ranges` made them, unless something copied the mask on the way here.
    kv_starts, kv_lens, position = (column.contiguous() for column in ranges[:, 0, 0].unbind(-1))
    draws_scores = config.draws_scores(layer_idx)
    score_options: dict[str, Any] = {}
    if draws_scores:
        # Transformers keeps keys row by row: they are all read and copied here, which costs more than the draws save.
        key = key.transpose(-1, -2).contiguous()
        score_options = dict(score=config.score, num_draws=config.num_draws, score_sampler=config.score_sampler)
        score_options |= dict(return_features_read=record is not None)
    result = santa.decode(
        query.squeeze(2),
        key,
        value,
        kv_lens=kv_lens,
        kv_starts=kv_starts,
        num_samples=config.samples_in_layer(layer_idx),
        sampler=config.sampler,
        budget=config.budget,
        kv_layout=santa.KvLayout.HND,
        sm_scale=scaling,
        seed=config.seed + layer_idx,
        positions=position,
        min_sampled_len=config.min_context,
        return_rows_read=record is not None,
        **score_options,
    )
    out, lse = result[0], result[1]
    if record is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError("santa: record_rows_read needs an eager model; disable compilation to record")
        record.rows_read[layer_idx].append(result[2])
        record.kv_lens[layer_idx].append(kv_lens)
        if draws_scores:
            record.features_read[layer_idx].append(result[3])
            record.head_dims[layer_idx] = query.shape[-1]
    if s_aux is not None:
        # A sink adds exp(s_aux) to the softmax's denominator, exp(lse), and no value row. lse is exact for
        # every sampler, so the rescaled estimate stays unbiased. Bernoulli scores have an estimated lse.
        out = (out.float() * torch.sigmoid(lse - s_aux.float()).unsqueeze(-1)).to(out.dtype)
    return out.unsqueeze(1)


def _sparse_prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: SantaConfig, scaling: float | None
) -> torch.Tensor:
    """One step of prefill: query [batch, num_qo_heads, q_len, head_dim] -> [batch, q_len, num_qo_heads, head_dim]."""
    out, _ = santa.prefill(query, key, value, alpha=config.alpha, sm_scale=scaling, backend=config.prefill_backend)
    return out.transpose(1, 2).contiguous()


def _dense_attention(
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


def _as_ranges(mask: torch.Tensor | None, batch_size: int, kv_len: int, device: torch.device) -> torch.Tensor | None:
    """Any mask of one query as `decode_ranges` packs it, or None where it is no contiguous range."""
    if mask is None:
        # No mask means that all keys are valid; the row's position is then its length.
        full = torch.full((batch_size,), kv_len, dtype=torch.int32, device=device)
        return torch.stack([torch.zeros_like(full), full, full]).t()[:, None, None]
    if mask.dtype == torch.int32:
        return mask
    # Additive masks carry biases, and masks per head no single range.
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[-1] != kv_len or not _is_contiguous(mask):
        return None
    mask = mask.expand(batch_size, -1, -1, -1)[:, 0, 0]
    return _pack_ranges(mask, mask.sum(-1))


def _pack_ranges(mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """bool [batch, kv_len] of one range per row and [batch] -> int32 [batch, 1, 1, 3]."""
    kv_starts = mask.to(torch.int8).argmax(-1)
    columns = torch.stack([kv_starts, mask.sum(-1), position.to(mask.device)]).to(torch.int32)
    # Columns stay contiguous in memory, so that a layer takes them as [batch] tensors without a copy.
    return columns.t()[:, None, None]


def _ranges_to_mask(ranges: torch.Tensor, kv_len: int) -> torch.Tensor:
    """int32 [batch, 1, 1, 3] -> bool [batch, 1, 1, kv_len]."""
    positions = torch.arange(kv_len, device=ranges.device)
    kv_starts, kv_lens = ranges[..., 0:1], ranges[..., 1:2]
    return (positions >= kv_starts) & (positions < kv_starts + kv_lens)


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """bool [1, 1, q_len, kv_len]: the queries are the last of the tokens."""
    q_len, kv_len = query.shape[2], key.shape[2]
    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
    return mask.tril(kv_len - q_len)[None, None]


def _is_contiguous(mask: torch.Tensor) -> bool:
    """Whether every row of a bool [batch, 1, 1, kv_len] mask is one range, or empty.

    Reads the mask on the host, once per step. False while tracing or capturing a graph, which cannot do that:
    exact attention is right for every mask.
    """
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    range_starts = mask[..., 0].int() + (mask[..., 1:] & ~mask[..., :-1]).sum(-1)
    return bool((range_starts <= 1).all())


def _decoder_attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The causal attention modules: those that carry a layer index and the scale or heads of an attention."""
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", True)
        and "attention" in type(module).__name__.lower()
    ]
    if not modules:
        raise ValueError(
            f"santa: model is a {type(model).__name__}; it needs to have causal attention layers with a layer_idx"
        )
    return modules


def _check_supported(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    head_dim = query.shape[-1]
    if head_dim not in _HEAD_DIMS or value.shape[-1] != head_dim:
        raise ValueError(_head_dim_error(module, head_dim, value.shape[-1]))
    supported = _DTYPES.get(query.device.type)
    if supported is not None and query.dtype not in supported:
        got, *needed = (str(dtype).removeprefix("torch.") for dtype in (query.dtype, *supported))
        raise TypeError(
            f"santa: {type(module).__name__} runs in {got} on {query.device.type}; it needs to be "
            f"{' or '.join(needed)} there: load the model with dtype=torch.bfloat16"
        )


def _head_dim_error(module: torch.nn.Module, head_dim: int, value_dim: int | None = None) -> str:
    got = f"head_dim {head_dim}" if value_dim in (None, head_dim) else f"head_dim {head_dim} with values of {value_dim}"
    return (
        f"santa: {type(module).__name__} has {got}; it needs one of {_HEAD_DIMS}, for queries, keys and "
        'values alike: use attn_implementation="sdpa" for this model'
    )
