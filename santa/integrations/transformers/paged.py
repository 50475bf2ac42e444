"""The attention of one layer in Transformers' continuous batching (`generate_batch`), over its paged cache.

A step holds the tokens of many requests, packed: one of each request that decodes, a chunk of each prompt. Requests of
one token are rows of one `santa.decode_paged`, which reads the cache where it lies. Chunks are exact: Transformers'
SDPA, chunk by chunk. How many tokens each request has is on the device; it is read on the host once per step, unless
all have one. A CUDA graph cannot do that, and is replayed for steps of any composition: there chunks are exact through
`santa.decode_paged` too, 8 tokens a row.

Transformers hands over, per layer type or group of layers (L tokens in the step, N keys that it reads, S requests):
    cu_seq_lens_q, cu_seq_lens_k    int32 [S + 1]: where the tokens, and the keys, of each request begin
    write_index                     int64 [L]: slots of the new tokens in the cache
    read_index                      int64 [N]: slots of the keys, request by request; empty if no request has a past.
                                    Layers with a sliding window have a placeholder for each new token at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import santa
from santa.prefill import BLOCK as PREFILL_BLOCK

from .attention import (
    check_inference,
    check_supported,
    decode_options,
    dense_attention,
    recorder_of,
    sparse_prefill,
)
from .layers import PAGED_NAME, settings_of
from .masks import MAX_QUERIES

# Rows of chunks that a captured step attends to at once: bounds the operator's workspace.
_CAPTURED_ROWS = 64

_HOOKED_ATTRIBUTE = "_santa_leaves_cache_unread"

_T = TypeVar("_T")


def leave_cache_unread(module: torch.nn.Module) -> None:
    """For releases whose attention modules update the cache themselves, from 5.19 on: `update` would copy all keys and
    values of the step."""
    if not getattr(module, _HOOKED_ATTRIBUTE, False):
        setattr(module, _HOOKED_ATTRIBUTE, True)
        module.register_forward_pre_hook(_hand_over_unread, with_kwargs=True)


def _hand_over_unread(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if getattr(module.config, "_attn_implementation", None) == PAGED_NAME:
        kwargs = {
            name: _UnreadCache(value) if isinstance(value, PagedAttentionCache) else value
            for name, value in kwargs.items()
        }
    return args, kwargs


class _UnreadCache:
    """A paged cache whose update is left to `paged_attention`, which it hands the cache over to."""

    def __init__(self, cache: PagedAttentionCache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kwargs["cache"] = self._cache
        return key, value


@dataclass(frozen=True)
class _Layer:
    """One layer's cache and what its step does with it.

    Attributes:
        k_cache, v_cache: [slots, num_kv_heads, head_dim].
        read_index, write_index, cu_q, cu_k: as above.
        max_q, max_k: bounds of the tokens and the keys of a request; of a padded step's tokens, all there are.
        window: keys that a token sees, its own among them; None: all.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    read_index: torch.Tensor
    write_index: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    window: int | None

    @classmethod
    def of(cls, cache: PagedAttentionCache, layer_idx: int, arguments: dict[str, Any]) -> _Layer:
        if hasattr(cache, "layer_to_allocator"):  # from 5.18 on
            allocator = cache.layer_to_allocator[layer_idx]
            group, k_cache, v_cache = allocator.index, *allocator._kv_token_views[layer_idx]
            window = getattr(allocator, "sliding_window", None)
            # Views of one tensor from different places on.
            slots = min(k_cache.shape[0], v_cache.shape[0])
            k_cache, v_cache = k_cache[:slots], v_cache[:slots]
        else:
            group, index = cache.layer_index_to_group_indices[layer_idx]
            k_cache, v_cache = cache.key_cache[index], cache.value_cache[index]
            window = cache.sliding_windows[layer_idx]
            window = None if window == 1 else window
        layer_type = "full_attention" if window is None else "sliding_attention"

        def of_layer_type(*names: str) -> Any:
            value = next(arguments[name] for name in names if name in arguments)
            return value[layer_type] if isinstance(value, dict) else value

        return cls(
            k_cache=k_cache,
            v_cache=v_cache,
            read_index=arguments["read_index"][group],
            write_index=arguments["write_index"][group],
            cu_q=arguments["cu_seq_lens_q"],
            cu_k=of_layer_type("cu_seq_lens_k"),
            max_q=of_layer_type("max_length_q", "max_seqlen_q"),  # the name until 5.18 is the latter
            max_k=of_layer_type("max_length_k", "max_seqlen_k"),
            window=window,
        )

    @property
    def num_requests(self) -> int:
        return self.cu_q.shape[0] - 1


@dataclass(frozen=True)
class _Rows:
    """Requests of one token each, as rows of `santa.decode_paged`.

    Attributes:
        tokens: int64 [rows], which tokens of the step; None: all, in order.
        kv_indices, kv_indptr, kv_last_page_len: int32, the slots of their keys, which are pages of one key.
    """

    tokens: torch.Tensor | None
    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor
    kv_last_page_len: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor | None, kv_indices: torch.Tensor, kv_indptr: torch.Tensor) -> _Rows:
        kv_indices, kv_indptr = kv_indices.to(torch.int32), kv_indptr.to(torch.int32)
        return cls(tokens, kv_indices, kv_indptr, torch.ones_like(kv_indptr[1:]))


@dataclass(frozen=True)
class _Chunk:
    """A request's tokens [first_q, end_q) of the step, and where its keys begin in read_index; num_old of them are not
    the tokens' own."""

    first_q: int
    end_q: int
    first_k: int
    num_old: int


@torch.compiler.disable  # as is Transformers' own update of this cache
def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cache: PagedAttentionCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the requests of a step; writes the new keys and values to the cache.

    Requests of one token are sampled as decode steps are, the others exact, or `santa.prefill`'s where SantaConfig says
    so and the chunk allows it. Draws are keyed by the position of the token: requests of the same length share them.

    Args:
        module: the attention module.
        query, key, value: [1, heads, L, head_dim], of the new tokens alone.
        attention_mask: not read; Transformers makes none.
        scaling, softcap, s_aux: as in `attention`.
        position_ids: [1, L]; layers with a sliding window need them to sample.
        cache, and what is in kwargs: see the top of this file.

    Returns:
        ([1, L, num_qo_heads, head_dim], None).

    Raises:
        ValueError: no paged cache: outside of continuous batching, or of a model that `attach` has not seen.
        NotImplementedError: what `attention` raises it for; a layer that is not santa's, position biases and indexers.
    """
    check_inference(module, query, dropout, output_attentions)
    _check_no_more_is_asked(module, kwargs)
    if cache is None:
        raise ValueError(
            f"santa: {type(module).__name__} got no paged cache; attn_implementation={PAGED_NAME!r} needs one: it is "
            "for generate_batch, of a model after attach(model, config, paged=True); for generate, attach without it"
        )
    check_supported(module, query, key, value)
    options = decode_options(module, key.shape[1], scaling, softcap, s_aux)
    layer = _Layer.of(cache, module.layer_idx, kwargs)
    if layer.window is not None and options["num_samples"] > 0 and position_ids is None:
        raise NotImplementedError(
            f"santa: {type(module).__name__} hands over no position_ids; its sliding window needs them to be sampled, "
            "or full windows would draw the same numbers in every step"
        )
    num_tokens = query.shape[2]
    q, k_new, v_new = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, head_dim]
    positions = None if position_ids is None or layer.window is None else (position_ids[0] + 1).to(torch.int32)

    if layer.max_q == 1 and layer.num_requests == num_tokens and layer.read_index.numel() > 0:
        _write(layer, k_new, v_new)
        rows = _noted(layer.read_index, "rows", lambda: _all_rows(layer))
        return _decode_rows(module, layer, q, rows, positions, options).unsqueeze(0), None
    if _is_capturing(query):
        return _captured_step(layer, q, k_new, v_new, positions, options).unsqueeze(0), None

    chunks = _noted(layer.cu_k, "chunks", lambda: _chunks(layer))
    is_row = layer.read_index.numel() > 0
    out = q.new_zeros(q.shape)
    # Before the new keys are written, which may be where the oldest of a window lie.
    old = [
        None if is_row and chunk.end_q - chunk.first_q == 1 else _old_keys_and_values(layer, chunk) for chunk in chunks
    ]
    _write(layer, k_new, v_new)
    rows = _noted(layer.read_index, "rows", lambda: _rows_among(layer, chunks)) if is_row else None
    if rows is not None:
        out[rows.tokens] = _decode_rows(module, layer, q[rows.tokens], rows, _take(positions, rows.tokens), options)
    for chunk, past in zip(chunks, old, strict=True):
        if past is not None:
            tokens = slice(chunk.first_q, chunk.end_q)
            new = [x[:, :, tokens] for x in (query, key, value)]
            out[tokens] = _chunk_attention(module, *new, past, layer.window, scaling, softcap, s_aux)[0]
    return out.unsqueeze(0), None


def _check_no_more_is_asked(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    settings, refused = settings_of(module), None
    if settings.reason is not None:
        refused = settings.reason
    elif settings.config.draws_scores(getattr(module, "layer_idx", None)):
        refused = "is to draw its scores (score='bernoulli')"
    elif settings.config.keys == "proposal":
        refused = "is to have proposal keys (keys='proposal')"
    for name in ("position_bias", "indices", "block_indices", "block_table"):
        if arguments.get(name) is not None:
            refused = f"hands over {name}"
    if refused is not None:
        raise NotImplementedError(
            f"santa: {type(module).__name__} {refused}, which continuous batching with santa does not do"
        )


def _write(layer: _Layer, k_new: torch.Tensor, v_new: torch.Tensor) -> None:
    count = layer.write_index.shape[0]
    layer.k_cache.index_copy_(0, layer.write_index, k_new[:count])
    layer.v_cache.index_copy_(0, layer.write_index, v_new[:count])


def _noted(tensor: torch.Tensor, name: str, make: Callable[[], _T]) -> _T:
    """What `make` returns, kept in an attribute of a tensor that all layers of one kind get in a step, and no other
    step: worked out once. A captured step's is its own, since the same tensors were run before they were captured."""
    name = f"_santa_{name}_captured" if _is_capturing(tensor) else f"_santa_{name}"
    if not hasattr(tensor, name):
        setattr(tensor, name, make())
    return getattr(tensor, name)


def _take(x: torch.Tensor | None, indices: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or indices is None else x[indices]


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# Requests of one token ----------------------------------------------------------------------------------------


def _all_rows(layer: _Layer) -> _Rows:
    # The own key of a token is its last. Layers with a window have a placeholder there.
    kv_indices = layer.read_index.index_copy(0, layer.cu_k[1:].long() - 1, layer.write_index)
    return _Rows.of(None, kv_indices, layer.cu_k)


def _rows_among(layer: _Layer, chunks: list[_Chunk]) -> _Rows | None:
    chosen = [chunk for chunk in chunks if chunk.end_q - chunk.first_q == 1]
    if not chosen:
        return None
    device, slots, ends = layer.cu_q.device, [], [0]
    tokens = torch.tensor([chunk.first_q for chunk in chosen], device=device)
    for chunk in chosen:
        slots += [
            layer.read_index[chunk.first_k : chunk.first_k + chunk.num_old],
            layer.write_index[chunk.first_q : chunk.end_q],
        ]
        ends.append(ends[-1] + chunk.num_old + 1)
    return _Rows.of(tokens, torch.cat(slots), torch.tensor(ends, device=device))


def _decode_rows(
    module: torch.nn.Module,
    layer: _Layer,
    q: torch.Tensor,
    rows: _Rows,
    positions: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """q [rows, num_qo_heads, head_dim] -> the same of the output."""
    record = None if _is_capturing(q) else recorder_of(module)
    result = santa.decode_paged(
        q,
        layer.k_cache.unsqueeze(1),
        layer.v_cache.unsqueeze(1),
        kv_indptr=rows.kv_indptr,
        kv_indices=rows.kv_indices,
        kv_last_page_len=rows.kv_last_page_len,
        max_kv_len=layer.max_k,
        positions=positions,
        return_rows_read=record is not None,
        **options,
    )
    if record is not None:
        record.rows_read[module.layer_idx].append(result[2])
        record.kv_lens[module.layer_idx].append(rows.kv_indptr.diff())
    return result[0]


# Chunks of prompts ----------------------------------------------------------------------------------------------


def _chunks(layer: _Layer) -> list[_Chunk]:
    """What each request has in the step, read on the host. Padding is no request."""
    bounds = zip(*(x.unfold(0, 2, 1).tolist() for x in (layer.cu_q, layer.cu_k)), strict=True)
    return [
        _Chunk(first_q, end_q, first_k, (end_k - first_k) - (end_q - first_q))
        for (first_q, end_q), (first_k, end_k) in bounds
        if end_q > first_q and end_k > first_k
    ]


def _old_keys_and_values(layer: _Layer, chunk: _Chunk) -> tuple[torch.Tensor, ...]:
    """Those of a chunk's earlier tokens, 0 to 2 tensors of [1, num_kv_heads, num_old, head_dim]."""
    if chunk.num_old == 0:
        return ()
    slots = layer.read_index[chunk.first_k : chunk.first_k + chunk.num_old]
    return tuple(cache[slots].transpose(0, 1).unsqueeze(0) for cache in (layer.k_cache, layer.v_cache))


def _chunk_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: tuple[torch.Tensor, ...],
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Exact attention of one chunk, [1, heads, tokens, head_dim] -> [1, tokens, num_qo_heads, head_dim]."""
    if past:
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
    q_len, kv_len = query.shape[2], key.shape[2]
    config, has_extras = settings_of(module).config, softcap is not None or s_aux is not None
    is_plain = window is None and not has_extras and q_len >= PREFILL_BLOCK and (kv_len - q_len) % PREFILL_BLOCK == 0
    if is_plain and config.prefills_sparsely(module.layer_idx):
        return sparse_prefill(query, key, value, config, scaling)
    mask = None
    if past or (window is not None and q_len > window):
        full = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        mask = full.tril(kv_len - q_len)
        mask = mask[None, None] if window is None else mask.triu(kv_len - q_len - window + 1)[None, None]
    if has_extras:
        return dense_attention(query, key, value, mask, scaling, True, softcap, s_aux)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=True)[0]


# Captured steps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CapturedRows:
    """A step of any composition, in tensors whose shapes depend on nothing but its bounds.

    Attributes:
        single: int64 [S], the token of each request that has one; L where it has not.
        single_starts, single_lens: int32 [S]: its keys in the list of all keys.
        eights: int64 [rows, 8], tokens of chunks; those before a chunk, which fill the first row up, are not its own.
        eights_own: the same, L for those.
        eights_starts, eights_lens: int32 [rows]: keys up to the last of a row's tokens.
    """

    single: torch.Tensor
    single_starts: torch.Tensor
    single_lens: torch.Tensor
    eights: torch.Tensor
    eights_own: torch.Tensor
    eights_starts: torch.Tensor
    eights_lens: torch.Tensor


def _captured_rows(layer: _Layer, num_tokens: int, has_past: bool) -> _CapturedRows:
    first_q, end_q = layer.cu_q[:-1].long(), layer.cu_q[1:].long()
    q_lens = end_q - first_q
    cu_k = layer.cu_k.long() if has_past else layer.cu_q.long()
    starts, k_lens = cu_k[:-1], cu_k.diff()
    is_single = q_lens == 1
    # Rows of chunks: as many as there can be, of which the first sum(rows_of) are.
    rows_of = torch.where(is_single, 0, (q_lens + MAX_QUERIES - 1) // MAX_QUERIES)
    ends = rows_of.cumsum(0)
    row = torch.arange(num_tokens // MAX_QUERIES + layer.num_requests, device=first_q.device)
    request = torch.searchsorted(ends, row, right=True).clamp(max=layer.num_requests - 1)
    first_token = MAX_QUERIES * (row - (ends - rows_of)[request])
    end_token = torch.minimum(first_token + MAX_QUERIES, q_lens[request])
    is_used = row < ends[-1]
    own = end_token[:, None] - MAX_QUERIES + torch.arange(MAX_QUERIES, device=row.device)
    tokens = (first_q[request][:, None] + own).clamp(0, num_tokens - 1)
    lens = k_lens[request] - q_lens[request] + end_token
    return _CapturedRows(
        single=torch.where(is_single, first_q, num_tokens),
        single_starts=starts.int(),
        single_lens=torch.where(is_single, k_lens, 0).int(),
        eights=tokens,
        eights_own=torch.where(is_used[:, None] & (own >= first_token[:, None]), tokens, num_tokens),
        eights_starts=starts[request].int(),
        eights_lens=torch.where(is_used, lens, 0).int(),
    )


def _captured_step(
    layer: _Layer,
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    positions: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """The step without a look at how many tokens each request has: q [L, num_qo_heads, head_dim] -> the same."""
    num_tokens, has_past = q.shape[0], layer.read_index.numel() > 0
    rows = _noted(layer.cu_k, "rows", lambda: _captured_rows(layer, num_tokens, has_past))
    k_cache, v_cache, slots = layer.k_cache, layer.v_cache, layer.read_index
    if not has_past:
        k_cache, v_cache, slots = k_new, v_new, torch.arange(num_tokens, device=q.device)
    elif layer.window is not None:
        # New keys may be written where the oldest of a window lie: attend to a copy.
        slots = torch.arange(layer.read_index.shape[0] + 1, device=q.device)
        own = _noted(layer.cu_k, "own", lambda: _own_places(layer, num_tokens, slots.shape[0] - 1))
        k_cache, v_cache = (_with_own(cache, layer, own, new) for cache, new in ((k_cache, k_new), (v_cache, v_new)))
    _write(layer, k_new, v_new)
    slots = slots.to(torch.int32)

    def attend(q: torch.Tensor, starts: torch.Tensor, lens: torch.Tensor, **others: Any) -> torch.Tensor:
        # One list of keys for all rows, each with a part of it. No row has more than max_k keys: a window as long as
        # that hides none, and says how much a row can take.
        return santa.decode_paged(
            q,
            k_cache.unsqueeze(1),
            v_cache.unsqueeze(1),
            page_table=slots.expand(q.shape[0], -1),
            kv_starts=starts,
            kv_lens=lens,
            **options | others,
        )[0]

    # One more than there are takes what is nobody's.
    out = q.new_zeros(num_tokens + 1, *q.shape[1:])
    single = rows.single.clamp(max=num_tokens - 1)
    out[rows.single] = attend(
        q[single],
        rows.single_starts,
        rows.single_lens,
        positions=_take(positions, single),
        window_left=layer.max_k - 1,
    )
    for first in range(0, rows.eights.shape[0], _CAPTURED_ROWS):
        part = slice(first, first + _CAPTURED_ROWS)
        out[rows.eights_own[part]] = attend(
            q[rows.eights[part]],
            rows.eights_starts[part],
            rows.eights_lens[part],
            num_samples=0,
            window_left=(layer.max_k if layer.window is None else layer.window) - 1,
        )
    return out[:num_tokens]


def _own_places(layer: _Layer, num_tokens: int, nowhere: int) -> torch.Tensor:
    """int64 [L]: where each token's own key is in read_index; `nowhere` of padding."""
    token = torch.arange(num_tokens, device=layer.cu_q.device)
    request = torch.searchsorted(layer.cu_q[1:].long(), token, right=True)
    is_padding = request >= layer.num_requests
    request = request.clamp(max=layer.num_requests - 1)
    place = layer.cu_k.long()[1:][request] - layer.cu_q.long()[1:][request] + token
    return torch.where(is_padding, nowhere, place)


def _with_own(cache: torch.Tensor, layer: _Layer, own: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The keys, or values, that read_index lists, with those of the new tokens in their places, and one more."""
    copy = cache.new_zeros(layer.read_index.shape[0] + 1, *cache.shape[1:])
    copy[:-1] = cache[layer.read_index]
    copy[own] = new
    return copy
