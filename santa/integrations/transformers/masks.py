"""The masks of the Transformers integration: real masks, with what is known of them noted beside their values.

Model code slices, combines and inspects masks (indexers, layers that share keys, models with a mask of their own), so
what the mask function returns always has the shape, dtype and values that `sdpa_mask` would give it. What saves work
later is noted in attributes of that tensor object. Any operation makes another tensor, which has no notes: a mask that
anything has touched, and a mask of the user's, is a mask and nothing else.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.masking_utils import causal_mask_function, sdpa_mask

from santa.prefill import BLOCK as PREFILL_BLOCK

# New tokens of a row that `santa.decode` takes in one call.
MAX_QUERIES = 8

# Notes on a mask. Plain attributes of a tensor: torch.compile reads them, on graph inputs and on intermediates.
#   _RANGES         int32 [3, batch], of one query: first valid key, number of valid keys, tokens of the row so far
#   _RANGES_VERSION the mask's version counter when it was noted: a mask written to in place has another
#   _SEVERAL        of 2 to 8 queries, the last of the row's tokens, under a mask that is causal and no more but for
#                   padding: how to get the same ranges (`ranges_of_several`), which may take a look at the padding
#   _IS_CAUSAL      True: SDPA's is_causal does the same, so that nobody needs the values
#   _TOKENS         the queries are the last of so many tokens, and the mask is causal and no more; None: that is not so
_RANGES, _RANGES_VERSION = "_santa_ranges", "_santa_ranges_version"
_SEVERAL = "_santa_several"
_IS_CAUSAL, _TOKENS = "_santa_is_causal", "_santa_tokens"


def step_mask(
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
    """The mask of one step, as Transformers' AttentionMaskInterface asks for it: once per step and mask type.

    Args: those of `transformers.masking_utils.sdpa_mask`; attention_mask is bool [batch, tokens so far].

    Returns:
        bool [batch, 1, q_length, kv_length], the values of `sdpa_mask`. None only where Transformers asks for a
        bidirectional mask and `sdpa_mask` gives None. Of a causal mask is noted, for one query, the range of valid keys
        of each row, unless they are no contiguous range or, in a traced graph, a padding mask cannot be looked at; for
        2 to 8 queries behind earlier tokens, how to get these ranges; for more queries, that SDPA's is_causal does the
        same, and that `santa.prefill` does. Such a mask of many queries holds no values until somebody asks for them.
    """
    options = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    # Transformers' functions for bidirectional masks, and they alone, say whether they may be skipped.
    if "allow_is_bidirectional_skip" in kwargs:
        return sdpa_mask(allow_is_causal_skip=False, **options)
    if q_length == 1:
        # Contiguous, so that `generate`, which asks for that, gets this very tensor.
        mask = _versioned(sdpa_mask(allow_is_causal_skip=False, **options).contiguous())
        # Causal, sliding and chunked patterns leave one range; padding and custom patterns may leave holes.
        if (attention_mask is None and not use_vmap) or is_contiguous(mask):
            note_ranges(mask, attention_mask, q_offset)
        return mask
    if _continues_causally(q_length, q_offset, kv_offset, mask_function, use_vmap):
        mask = _versioned(sdpa_mask(allow_is_causal_skip=False, **options).contiguous())
        offset = _as_it_is(q_offset)
        _set_notes(mask, {_SEVERAL: functools.partial(_ranges_of_last, mask.shape, offset, attention_mask)})
        return mask
    tokens = _tokens_of_causal_prefill(q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    if tokens is not None:
        mask, is_causal = None, tokens == q_length
    else:
        mask = sdpa_mask(allow_is_causal_skip=allow_is_causal_skip, **options)
        is_causal = mask is None
    if mask is None:
        build = functools.partial(sdpa_mask, allow_is_causal_skip=False, **options | {"q_offset": _as_it_is(q_offset)})
        # In a graph the values cost nothing: the compiler drops what nobody uses.
        if torch.compiler.is_compiling():
            mask = build()
        else:
            mask = LazyMask.of(build, (batch_size, 1, q_length, kv_length), torch.device(device))
        setattr(mask, _IS_CAUSAL, is_causal)
        setattr(mask, _TOKENS, tokens)
    return mask


def _as_it_is(offset: int | torch.Tensor) -> int | torch.Tensor:
    """For what is computed when somebody asks: by then a static cache, which counts its tokens in place, will have
    counted those of this step."""
    return offset.clone() if isinstance(offset, torch.Tensor) else offset


class LazyMask(torch.Tensor):
    """A bool mask that is computed when somebody first uses it: one of 131,072 queries and keys has 16 GiB.

    It is a tensor on the meta device, which has a shape and no memory. Every operation, and every attribute that is
    not about its shape and type, gets the computed mask in its place, and takes the notes away: from then on model code
    may have written to it.
    """

    _build: Callable[[], torch.Tensor]
    _real: torch.Tensor | None
    _real_device: torch.device

    @classmethod
    def of(cls, build: Callable[[], torch.Tensor], shape: tuple[int, ...], device: torch.device) -> LazyMask:
        mask = torch.empty(shape, dtype=torch.bool, device="meta").as_subclass(cls)
        mask._build, mask._real, mask._real_device = build, None, device
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.device.__get__:
            return args[0]._real_device
        if func == torch.Tensor.contiguous:
            return args[0]
        if func == torch.Tensor.to:
            return _move_lazily(*args, **(kwargs or {}))
        if func in _ABOUT_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


_ABOUT_THE_SHAPE = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.shape.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.dtype.__get__,
}


def _computed(x: Any) -> Any:
    if not isinstance(x, LazyMask):
        return x
    setattr(x, _IS_CAUSAL, False)
    setattr(x, _TOKENS, None)
    if x._real is None:
        x._real = x._build()
    return x._real


def _move_lazily(mask: LazyMask, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`mask.to(...)`: models on several GPUs move the mask in front of every layer."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype not in (None, torch.bool):
        return _computed(mask).to(*args, **kwargs)
    if device in (None, mask._real_device):
        return mask
    moved = LazyMask.of(lambda: _computed(mask).to(device), tuple(mask.shape), device)
    for note in (_IS_CAUSAL, _TOKENS):
        setattr(moved, note, getattr(mask, note))
    return moved


def is_causal_mask(mask: torch.Tensor | None) -> bool:
    """Whether SDPA's is_causal does what the mask does."""
    return getattr(mask, _IS_CAUSAL, False)


def tokens_of(mask: torch.Tensor | None) -> int | None:
    """Of a mask that is causal and no more, and that starts where `santa.prefill` can: the tokens so far."""
    return getattr(mask, _TOKENS, None)


def ranges_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """int32 [3, batch], as `step_mask` noted it of one query; None of any other mask, and of one written to since."""
    ranges = getattr(mask, _RANGES, None)
    if ranges is None or torch.compiler.is_compiling():
        return ranges
    return ranges if _is_as_noted(mask) else None


def ranges_of_several(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The same of 2 to 8 queries, the last tokens of their rows: the keys up to the last of them, of which each query
    sees those up to its own.

    With a padding mask, looks at it on the host, once per step.
    """
    if torch.compiler.is_compiling() or getattr(mask, _SEVERAL, None) is None or not _is_as_noted(mask):
        return None
    ranges = getattr(mask, _SEVERAL)
    if callable(ranges):
        ranges = ranges()
        if ranges is not None:
            ranges = ranges.to(mask.device)
        setattr(mask, _SEVERAL, ranges)
    return ranges


def _is_as_noted(mask: torch.Tensor) -> bool:
    return mask._version == getattr(mask, _RANGES_VERSION)


def derive_ranges(mask: torch.Tensor | None, batch_size: int, kv_len: int, device: torch.device) -> torch.Tensor | None:
    """The same of any mask of one query, from its values; None where it is no contiguous range.

    How many tokens a row has had is not in the values: the number of valid keys stands for it.
    """
    if mask is None:
        full = torch.full((batch_size,), kv_len, dtype=torch.int32, device=device)
        return torch.stack([torch.zeros_like(full), full, full])
    # Other dtypes are added to the logits, and masks per head have no single range.
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[-1] != kv_len or not is_contiguous(mask):
        return None
    mask = mask.expand(batch_size, -1, -1, -1)[:, 0, 0]
    return _pack_ranges(mask, mask.sum(-1))


def valid_keys(mask: torch.Tensor | None, ranges: torch.Tensor | None, batch_size: int) -> torch.Tensor | None:
    """bool [batch, kv_len]: the keys that the last query sees; None where they are all there are, and of masks that are
    not bool, or per head. ranges: of `ranges_of`, if there are any."""
    if mask is None or is_causal_mask(mask) or tokens_of(mask) is not None:
        return None
    if ranges is not None:
        starts, lens, _ = ranges[:, :, None].unbind(0)
        positions = torch.arange(mask.shape[-1], device=mask.device)
        return (positions >= starts) & (positions < starts + lens)
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    return mask[:, 0, -1].expand(batch_size, -1)


def note_ranges(mask: torch.Tensor, attention_mask: torch.Tensor | None, q_offset: int | torch.Tensor) -> None:
    """Note the ranges of a bool [batch, 1, 1, kv_len] mask of one range per row.

    The third row keys the random stream: the number of valid keys alone would repeat from step to step once a
    sliding window is full.
    """
    if attention_mask is None:
        position = torch.zeros(mask.shape[0], dtype=torch.int32, device=mask.device) + (q_offset + 1)
    else:
        seen = torch.arange(attention_mask.shape[-1], device=attention_mask.device) <= q_offset
        position = (attention_mask & seen).sum(-1)
    _set_notes(mask, {_RANGES: _pack_ranges(mask[:, 0, 0], position)})


def _set_notes(mask: torch.Tensor, notes: dict[str, Any]) -> None:
    for name, note in notes.items():
        setattr(mask, name, note)
    if torch.compiler.is_compiling():
        return
    setattr(mask, _RANGES_VERSION, mask._version)
    # Models on several GPUs move the mask in front of every layer: a copy on another device keeps the notes. The
    # reference is weak, since a mask that referred to itself would wait for the garbage collector.
    reference = weakref.ref(mask)

    def to(*args: Any, **kwargs: Any) -> torch.Tensor:
        source = reference()
        moved = torch.Tensor.to(source, *args, **kwargs)
        if moved is not source and moved.dtype == torch.bool and _is_as_noted(source):
            noted = {name: getattr(source, name) for name in notes}
            _set_notes(moved, {n: x.to(moved.device) if isinstance(x, torch.Tensor) else x for n, x in noted.items()})
        return moved

    mask.to = to


def is_contiguous(mask: torch.Tensor) -> bool:
    """Whether every row of a bool [batch, 1, 1, kv_len] mask is one range, or empty.

    Reads the mask on the host, once per step. False while tracing or capturing a graph, which cannot do that:
    exact attention is right for every mask.
    """
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    range_starts = mask[..., 0].int() + (mask[..., 1:] & ~mask[..., :-1]).sum(-1)
    return bool((range_starts <= 1).all())


def as_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """A mask of values, also where there was none: causal, aligned to the first key as SDPA's is_causal is."""
    if mask is not None:
        return mask
    q_len, kv_len = query.shape[2], key.shape[2]
    full = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
    return (full.tril() if is_causal and q_len > 1 else full)[None, None]


def select_keys(
    mask: torch.Tensor,
    num_qo_heads: int,
    indices: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    block_size: int | None,
) -> torch.Tensor:
    """The mask without the keys that the model's own indexer did not select.

    Args:
        mask: bool, or added to the logits, [batch or 1, heads or 1, q_len, kv_len].
        indices: [batch, q_len, k]: positions of the selected keys.
        block_indices: [batch, index_heads, q_len, k]: blocks of block_size keys, -1 for none; a head of the indexer
            selects for num_qo_heads / index_heads query heads.
    """
    kv_len = mask.shape[-1]
    if indices is not None:
        selected = _scatter(indices[:, None], kv_len)
    else:
        num_blocks = -(-kv_len // block_size)
        # One block more than there are takes what selects none.
        blocks = _scatter(block_indices.masked_fill(block_indices < 0, num_blocks), num_blocks + 1)[..., :num_blocks]
        selected = blocks.repeat_interleave(block_size, dim=-1)[..., :kv_len]
        selected = selected.repeat_interleave(num_qo_heads // selected.shape[1], dim=1)
    if mask.dtype == torch.bool:
        return mask & selected
    return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)


def _versioned(mask: torch.Tensor) -> torch.Tensor:
    """The mask, as a tensor that counts how often it was written to; one made in inference mode does not."""
    if torch.compiler.is_compiling() or not mask.is_inference():
        return mask
    with torch.inference_mode(False):
        return mask.clone()


def _scatter(indices: torch.Tensor, size: int) -> torch.Tensor:
    """[..., k] positions below size -> bool [..., size]."""
    selected = torch.zeros(*indices.shape[:-1], size, dtype=torch.bool, device=indices.device)
    return selected.scatter(-1, indices.long(), True)


def _tokens_of_causal_prefill(
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: torch.Tensor | None,
) -> int | None:
    """Tokens so far in a step that `santa.prefill` takes, None in any other and in a traced graph.

    It takes at least 128 queries from a multiple of 128 on, and a mask that is causal and no more (no padding, window
    or packed sequences).
    """
    if (
        q_length < PREFILL_BLOCK
        or mask_function is not causal_mask_function
        or kv_offset != 0
        or torch.compiler.is_compiling()
        or int(q_offset) % PREFILL_BLOCK != 0
    ):
        return None
    tokens = int(q_offset) + q_length
    # Queries past the end of a sliding cache, or keys that are padding, are not `santa.prefill`'s.
    is_whole = attention_mask is None or (attention_mask.shape[-1] >= tokens and bool(attention_mask[:, :tokens].all()))
    return tokens if tokens <= kv_length and is_whole else None


def _continues_causally(
    q_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable,
    use_vmap: bool,
) -> bool:
    """Whether a step has 2 to 8 queries behind tokens that the cache holds, and a mask that is causal and no more."""
    return (
        1 < q_length <= MAX_QUERIES
        and mask_function is causal_mask_function
        and not use_vmap
        and kv_offset == 0
        and not (isinstance(q_offset, int) and q_offset == 0)
        and not torch.compiler.is_compiling()
    )


def _ranges_of_last(
    shape: tuple[int, ...], q_offset: int | torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """int32 [3, batch] of a mask [batch, 1, q_length, kv_length] that `_continues_causally` has let through; None if
    there are no earlier tokens, if the cache has not kept them all, or if padding leaves holes."""
    batch_size, _, q_length, kv_length = shape
    earlier = int(q_offset)
    tokens = earlier + q_length
    if not 0 < earlier <= kv_length - q_length:
        return None
    if attention_mask is None:
        full = torch.full((batch_size,), tokens, dtype=torch.int32)
        return torch.stack([torch.zeros_like(full), full, full])
    valid = attention_mask[:, :tokens]
    if valid.shape[1] < tokens or not bool(valid[:, -1].all()) or not is_contiguous(valid[:, None, None]):
        return None
    return _pack_ranges(valid, valid.sum(-1))


def _pack_ranges(mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """bool [batch, kv_len] of one range per row and [batch] -> int32 [3, batch]."""
    kv_starts = mask.to(torch.int8).argmax(-1)
    return torch.stack([kv_starts, mask.sum(-1), position.to(mask.device)]).to(torch.int32)
