"""Proposal keys beside Transformers' caches: `SantaConfig(keys="proposal")`.

Attention modules update their cache and hand attention what it returns. A hook in front of each module makes its
cache layer a `_FollowedLayer`: of the same class, and whatever is done to its rows is done to their codes. The keys
that its update returns carry the codes in an attribute, as masks carry their notes: an operation on the keys makes
another tensor, which has none. `attention` finds the codes there and fills in those of the new keys.

A layer whose keys were replaced by something else (a cache filled before `attach`, keys written to `layer.keys`) has
keys without that attribute, and gets its codes anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

import santa
from santa.proposal import _statistics

from .layers import keeps_codes

# center and channel_scale are made anew by steps of several tokens until a cache holds so many.
SETTLED_LEN = 256
# Rows of fewer keys have a channel_scale of 1. The spread of two keys says little of that of others: on the bundled
# model, at 4,096 keys, it makes the error of estimates 3.2 times that of exact scores. A scale of 1 makes it 1.4 times,
# the spread of 16 keys or more 1.1 to 1.3.
_LEAST_SPREAD = 16
# Codes of a growing cache have room for a multiple of so many keys.
_ROOM = 256

# Plain attributes: of the keys that a cache returned and of a cache layer, their codes; of an attention module.
_CODES = "_santa_codes"
_HOOKED_ATTRIBUTE = "_santa_follows_cache"


def follow_cache(module: torch.nn.Module) -> None:
    """Have the caches that an attention module is given followed, for as long as its settings ask for that."""
    if not getattr(module, _HOOKED_ATTRIBUTE, False):
        setattr(module, _HOOKED_ATTRIBUTE, True)
        module.register_forward_pre_hook(_follow, with_kwargs=True)


def _follow(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if not keeps_codes(module):
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            _follow_layer(getattr(value, "self_attention_cache", value), module)


def _follow_layer(cache: Cache, module: torch.nn.Module) -> None:
    # A cache that gets its layers one by one. The codes of those that nobody asks for take no memory.
    kind = cache.layer_class_to_replicate
    if kind is DynamicLayer:
        cache.layer_class_to_replicate = _followed(kind)
    # A layer that takes the keys of an earlier one has none of its own.
    if module.layer_idx >= len(cache.layers):
        return
    layer = cache.layers[module.layer_idx]
    if isinstance(layer, _FollowedLayer):
        return
    kind = type(layer)
    # Other updates return keys that are not those of the update before with some more: windows, quantized caches.
    if getattr(kind, "update", None) not in (DynamicLayer.update, StaticLayer.update):
        raise ValueError(
            f"santa: keys is 'proposal' while the cache of {type(module).__name__}, layer {module.layer_idx}, is a "
            f"{kind.__name__}; it needs to be a DynamicLayer or a StaticLayer, those of DynamicCache and StaticCache"
        )
    layer.__class__ = _followed(kind)


def codes_of(key: torch.Tensor | None) -> CacheCodes | None:
    """The codes of keys that a followed cache returned; None of other keys."""
    return getattr(key, _CODES, None)


class CacheCodes:
    """Proposal keys of one layer of a cache, HND, [batch, num_kv_heads, ...], with room for as many keys as it has.

    Attributes:
        proposal: None before the first step.
        pending: keys at the end of the cache whose codes are not written yet, or more: those before are written again.
        length: of a static cache, its count of tokens, a tensor; None: all keys are tokens.
        is_fresh: center and channel_scale are to be made; all keys are pending.
        is_settled: center and channel_scale stay as they are.
    """

    def __init__(self) -> None:
        self.proposal: santa.ProposalKeys | None = None
        self.pending = 0
        self.length: torch.Tensor | None = None
        self.is_fresh = True
        self.is_settled = False

    def keys(self, kv_len: int) -> santa.ProposalKeys:
        """Those of the first kv_len keys, views."""
        made = self.proposal
        codes, scales = made.codes[:, :, :kv_len], made.scales[:, :, :kv_len]
        return santa.ProposalKeys(codes, scales, made.center, made.channel_scale, "HND")

    def forget(self) -> None:
        """The cache is empty."""
        self.pending = 0
        self.is_fresh, self.is_settled = True, False

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What was done to the first dimension of the keys."""
        if self.proposal is not None:
            with torch.inference_mode(False), torch.no_grad():
                changed = {name: change(x) for name, x in self.proposal.tensors().items()}
            self.proposal = santa.ProposalKeys(**changed, kv_layout="HND")

    def fill(self, key: torch.Tensor, valid: Callable[[], torch.Tensor | None]) -> None:
        """Write the codes that are pending.

        Args:
            key: [batch, num_kv_heads, kv_len, head_dim], all keys of the cache.
            valid: bool [batch, kv_len], the keys that are no padding, or None for all: for center and channel_scale.
                Codes are written of padding too: other masks may come.
        """
        key, kv_len, count = key.detach(), key.shape[2], min(self.pending, key.shape[2])
        if count == 0:
            return
        self.pending = 0
        self._make_room(key)
        start = 0 if self.is_fresh else self._start(kv_len, count)
        if not self.is_settled and isinstance(start, int):
            if start == 0 or (count > 1 and start < SETTLED_LEN):
                start, count = 0, start + count
                self._make_statistics(key[:, :, :count], valid())
            self.is_settled = start >= SETTLED_LEN
        self.is_fresh = False
        places = torch.arange(count, device=key.device) + start
        new = key[:, :, start : start + count] if isinstance(start, int) else key.index_select(2, places)
        santa.append_proposal_keys(self.proposal, new.transpose(1, 2), places.expand(key.shape[0], -1).contiguous())

    def _start(self, kv_len: int, count: int) -> int | torch.Tensor:
        """How many keys there were before the pending ones.

        A static cache counts on the device. One token at a time nobody needs to know; several are looked at on the host
        until there are SETTLED_LEN, but in a graph.
        """
        if self.length is None:
            return kv_len - count
        start = (self.length.reshape(()) - count).clamp(min=0)
        if count == 1 or self.is_settled or torch.compiler.is_compiling():
            return start
        return int(start)

    def _make_statistics(self, key: torch.Tensor, valid: torch.Tensor | None) -> None:
        batch, _, count, _ = key.shape
        there = torch.ones(batch, count, dtype=torch.bool, device=key.device) if valid is None else valid[:, :count]
        if self.length is not None:
            there = there & (torch.arange(count, device=key.device) < self.length)
        center, channel_scale = _statistics(key.transpose(1, 2), there, shared=False)
        few = there.sum(dim=1) < _LEAST_SPREAD
        channel_scale = torch.where(few[:, None, None], 1.0, channel_scale)
        self.proposal.center.copy_(center)
        self.proposal.channel_scale.copy_(channel_scale)

    def _make_room(self, key: torch.Tensor) -> None:
        batch, num_kv_heads, kv_len, head_dim = key.shape
        made, is_static = self.proposal, self.length is not None
        room = kv_len if is_static else -(-kv_len // _ROOM) * _ROOM
        if made is not None:
            same = made.codes.shape[:2] == key.shape[:2] and 2 * made.codes.shape[3] == head_dim
            same = same and made.codes.device == key.device
            if same and made.codes.shape[2] >= kv_len:
                return
            if not same:
                made = None
        # Not in inference mode, which would make them tensors that a later step outside of it cannot write to.
        with torch.inference_mode(False), torch.no_grad():
            codes = key.new_zeros((batch, num_kv_heads, room, head_dim // 2), dtype=torch.uint8)
            scales = key.new_zeros((batch, num_kv_heads, room), dtype=torch.float16)
            if made is None:
                self.is_fresh, self.is_settled = True, False
                center = key.new_zeros((batch, num_kv_heads, head_dim), dtype=torch.float32)
                channel_scale = torch.ones_like(center)
            else:
                codes[:, :, : made.codes.shape[2]] = made.codes
                scales[:, :, : made.scales.shape[2]] = made.scales
                center, channel_scale = made.center, made.channel_scale
        self.proposal = santa.ProposalKeys(codes, scales, center, channel_scale, "HND")
        if is_static and not torch.compiler.is_compiling():
            # As the keys of a static cache: a graph writes to them where they are.
            for tensor in self.proposal.tensors().values():
                torch._dynamo.mark_static_address(tensor)


class _FollowedLayer(CacheLayerMixin):
    """What a layer of a followed cache does beside its own class, which comes after it.

    Its codes are in an attribute of the layer, made by its first update, and of its keys, which do not refer to the
    layer: a cycle would keep a cache alive until the garbage collector runs.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = getattr(self, _CODES, None)
        if codes is None:
            codes = CacheCodes()
            setattr(self, _CODES, codes)
        if self.keys is None or self.keys.numel() == 0:
            codes.forget()
        elif codes_of(self.keys) is not codes:
            codes.forget()
            codes.pending = self.keys.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        codes.pending += key_states.shape[2]
        if isinstance(self, StaticLayer):
            codes.length = self.cumulative_length
        _note(keys, codes)
        return keys, values

    def reset(self) -> None:
        super().reset()
        if (codes := getattr(self, _CODES, None)) is not None:
            codes.forget()
            if not isinstance(self, StaticLayer) and self.keys is not None:
                codes.pending = self.keys.shape[-2]  # early releases make zeros of them

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(super().reorder_cache, beam_idx, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(super().batch_select_indices, indices, lambda x: x[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(super().batch_repeat_interleave, repeats, lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens: int) -> None:
        self._change(super().crop, tokens)
        # A static cache says nowhere on the host how many tokens are left.
        if (codes := getattr(self, _CODES, None)) is not None:
            codes.is_settled = False

    def offload(self) -> None:
        self._change(super().offload)

    def prefetch(self) -> None:
        self._change(super().prefetch)

    def _change(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method that may put other keys in the place of the layer's, and do to the codes what it does to rows.

        arguments: its own, and last, what to do to codes, if anything.
        """
        change = arguments[-1] if arguments and callable(arguments[-1]) else None
        codes, before = codes_of(self.keys), self.keys
        method(*(arguments if change is None else arguments[:-1]))
        if codes is None or self.keys is before or codes is not getattr(self, _CODES, None):
            return
        if change is not None:
            codes.change_rows(change)
        _note(self.keys, codes)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, (type(self).__mro__[2],), self.__dict__


def _note(keys: torch.Tensor, codes: CacheCodes) -> None:
    if codes_of(keys) is not codes:
        setattr(keys, _CODES, codes)


@functools.cache
def _followed(kind: type) -> type:
    # Transformers registers classes of a _layer_type, which this one is not to take the place of.
    return type(f"Followed{kind.__name__}", (_FollowedLayer, kind), {"_layer_type": None, "__module__": __name__})


def _restore(kind: type) -> Any:
    """An empty layer, for `copy` and `pickle`."""
    made = _followed(kind)
    return made.__new__(made)
