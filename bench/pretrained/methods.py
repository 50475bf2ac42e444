"""The attention of one decode step, by method, as Transformers' AttentionInterface calls it.

All rows of a batch are texts of one length, so that a layer's keys are the first `position` of its static cache, or a
window's of the last ones. Rows draw from random streams of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import santa
from santa.integrations.transformers import attention as santa_attention
from santa.integrations.transformers import step_mask
from santa.integrations.transformers.masks import ranges_of

NAME = "santa-real-models"


@dataclass(frozen=True)
class Method:
    """name: as tables have it. options: of `santa.decode`, beside those of every call. keys: what scores are of,
    "exact", "float8", "proposal", or "codes": 4 bits that nothing corrects. top_k: exact softmax over the best rows."""

    name: str
    options: dict[str, str] = field(default_factory=dict, hash=False)
    keys: str = "exact"
    top_k: bool = False

    def bytes_per_key(self, head_dim: int, share: float) -> float:
        """Bytes read per key and KV head, of a cache in 16 bits; share: of V rows."""
        row = 2 * head_dim
        if self.keys == "float8":
            return head_dim + share * row
        if self.keys == "proposal":  # of the rows drawn K is read too
            return head_dim / 2 + 2 + share * 2 * row
        if self.keys == "codes":
            return head_dim / 2 + 2 + share * row
        return row + share * row

    def bytes_share(self, head_dim: int, share: float) -> float:
        """The same, of what dense attention reads."""
        return self.bytes_per_key(head_dim, share) / (4 * head_dim)


EXACT = Method("exact")
GROUPED = Method("grouped", {"sampler": "grouped"})
METHODS = (
    GROUPED,
    Method("grouped, proportional", {"sampler": "grouped", "budget": "proportional"}),
    Method("grouped, uniform", {"sampler": "grouped", "budget": "uniform"}),
    Method("systematic", {"sampler": "systematic"}),
    Method("stratified", {"sampler": "stratified", "budget": "proportional"}),
    Method("multinomial", {"sampler": "multinomial", "budget": "proportional"}),
    Method("grouped, K float8", {"sampler": "grouped"}, keys="float8"),
    Method("grouped, proposal keys", {"sampler": "grouped"}, keys="proposal"),
    Method("grouped, 4-bit keys uncorrected", {"sampler": "grouped"}, keys="codes"),
    Method("top-k", top_k=True),
)


def rounded_to_4_bits(k: Tensor, center: Tensor, channel_scale: Tensor) -> Tensor:
    """What the codes of proposal keys say that k is: the format of docs/proposals.md, on any device.

    k: [..., head_dim]; center and channel_scale broadcast.
    """
    centred = (k.float() - center) / channel_scale
    scale = (centred.abs().amax(dim=-1, keepdim=True) / 7).half().float()
    codes = torch.where(scale > 0, (centred / scale).round().clamp(-8, 7), 0.0)
    return (codes * scale * channel_scale + center).to(k.dtype)


def top_k_attention(
    q: Tensor, k: Tensor, v: Tensor, num_rows: int, scaling: float | None, is_valid: Tensor | None = None
) -> Tensor:
    """Exact softmax over `num_rows` rows alone: those of the largest probability, on average over the query heads of a
    group, which share them.

    q: [batch, num_qo_heads, head_dim]; k, v: [batch, num_kv_heads, kv_len, head_dim]; is_valid: [batch, kv_len], which
    rows there are, all without it. Returns q's shape.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if is_valid is not None:
        scores = scores.masked_fill(~is_valid[:, None, None], -torch.inf)
    p = scores.softmax(-1)
    rows = p.mean(dim=2).topk(min(num_rows, k.shape[2]), dim=-1).indices
    kept = p.gather(-1, rows[:, :, None].expand(*p.shape[:3], -1))
    values = v.gather(2, rows[..., None].expand(-1, -1, -1, v.shape[-1]))
    return ((kept / kept.sum(-1, keepdim=True)).to(v.dtype) @ values).flatten(1, 2)


# Copies of a layer's keys. `append` adds the key at place `at`, a tensor [1], and nothing of it runs on the host.


class Float8Keys:
    """A layer's keys in float8. The scale is that of the first `tokens` keys, as of a prompt's."""

    def __init__(self, key: Tensor, tokens: int) -> None:
        codes, self.scale = santa.quantize_kv(key[:, :, :tokens], kv_layout="HND")
        self.codes = torch.zeros(key.shape, dtype=codes.dtype, device=key.device)
        self.codes[:, :, :tokens] = codes

    def append(self, key: Tensor, at: Tensor) -> None:
        row = key.index_select(2, at).float() / self.scale[:, None, None]
        codes = row.clamp(-448, 448).to(self.codes.dtype)
        self.codes.view(torch.uint8).index_copy_(2, at, codes.view(torch.uint8))

    def options(self) -> dict[str, Any]:
        return {"k": self.codes, "k_scale": self.scale}


class ProposedKeys:
    """A layer's keys beside their copy in 4 bits, whose statistics are those of the first `tokens` keys."""

    def __init__(self, key: Tensor, tokens: int) -> None:
        lens = torch.full(key.shape[:1], tokens, dtype=torch.int32, device=key.device)
        self.proposal = santa.make_proposal_keys(key, lens, kv_layout="HND")

    def append(self, key: Tensor, at: Tensor) -> None:
        positions = at.expand(key.shape[0], 1).contiguous()
        santa.append_proposal_keys(self.proposal, key.index_select(2, at).transpose(1, 2), positions)

    def options(self) -> dict[str, Any]:
        return {"proposal": self.proposal}


class CodedKeys:
    """A layer's keys as 4 bits have them, in the place of the keys."""

    def __init__(self, key: Tensor, tokens: int) -> None:
        keys = key[:, :, :tokens].float()
        self.center = keys.mean(dim=2, keepdim=True)
        std = keys.std(dim=2, keepdim=True, correction=0)
        scale = torch.maximum(std, std.amax(-1, keepdim=True) * 2.0**-12).sqrt()
        self.channel_scale = torch.where(scale > 0, scale, 1.0)
        self.keys = torch.zeros_like(key)
        self.keys[:, :, :tokens] = rounded_to_4_bits(keys, self.center, self.channel_scale).to(key.dtype)

    def append(self, key: Tensor, at: Tensor) -> None:
        row = rounded_to_4_bits(key.index_select(2, at), self.center, self.channel_scale)
        self.keys.index_copy_(2, at, row)

    def options(self) -> dict[str, Any]:
        return {"k": self.keys}


COPIES = {"float8": Float8Keys, "proposal": ProposedKeys, "codes": CodedKeys}


def reason_not_to_run(method: Method, device: str) -> str | None:
    """Why the method cannot run on a device; None if it can."""
    if method.keys == "proposal":
        try:
            santa.make_proposal_keys(torch.zeros(1, 1, 1, 64, device=device))
        except ValueError as error:
            return str(error)
    return None


@dataclass
class Layer:
    """What the steps of a layer read, of `heads` KV heads (of all rows) whose cache is `width` keys wide.

    rows_read: rows of V, summed over steps and heads, on the device: [].
    available: keys that there were, summed in the same way; steps: of which there are so many.
    """

    heads: int
    width: int
    rows_read: Tensor
    available: int = 0
    steps: int = 0

    def share(self) -> float:
        return int(self.rows_read) / self.available

    def mean_rows(self) -> float:
        """Rows of V that one step read for one KV head."""
        return int(self.rows_read) / (self.steps * self.heads)


@dataclass
class Run:
    """One method with one S.

    seed: layer i draws from stream seed + i.
    exact_layers: layers that do not sample.
    windows: whether layers with a sliding window sample too.
    copies: other forms of the keys, by kind and layer. Runs from the same prefilled cache share them: what a run
        appends, the next one overwrites before it reads it.
    num_rows: of top-k: by layer, how many.
    position: tokens of a row so far, that of the step included; whoever decodes counts them.
    observe: is told of each layer's (layer_idx, query, key, value, options of santa.decode).
    """

    method: Method
    num_samples: int = 0
    seed: int = 0
    exact_layers: frozenset[int] = frozenset()
    windows: bool = False
    copies: dict[tuple[str, int], Any] = field(default_factory=dict)
    num_rows: dict[int, int] = field(default_factory=dict)
    position: int = 0
    observe: Callable[[int, Tensor, Tensor, Tensor, dict[str, Any]], None] | None = None
    layers: dict[int, Layer] = field(default_factory=dict)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, the model's decode steps are this run's; its prefill is dense."""
        AttentionInterface.register(NAME, self.attention)
        AttentionMaskInterface.register(NAME, step_mask)
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)

    def advance(self) -> None:
        """To be called after each step. A captured step adds up what it reads; what there was is counted here."""
        for layer in self.layers.values():
            layer.available += min(self.position, layer.width) * layer.heads
            layer.steps += 1

    def share(self) -> float:
        """V rows read over those there were, in the layers that count: all, or without windows those without."""
        available = sum(layer.available for layer in self.layers.values())
        return sum(layer.share() * layer.available for layer in self.layers.values()) / available

    def rows_by_layer(self) -> dict[int, int]:
        """What top-k has to read as many of: `num_rows` of another run."""
        return {index: max(1, round(layer.mean_rows())) for index, layer in self.layers.items()}

    def bytes_share(self, head_dim: int) -> float:
        """Bytes of K and V read, of those of dense attention, in the same layers."""
        available = sum(layer.available for layer in self.layers.values())
        read = 0.0
        for index, layer in self.layers.items():
            method = EXACT if index in self.exact_layers else self.method
            read += method.bytes_share(head_dim, layer.share()) * layer.available
        return read / available

    def attention(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Shapes as in santa.integrations.transformers.attention."""
        ranges = ranges_of(attention_mask) if query.shape[2] == 1 else None
        if ranges is None:
            options = dict(scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs)
            return santa_attention(module, query, key, value, attention_mask, **options)
        index, has_window = module.layer_idx, kwargs.get("sliding_window") is not None
        is_exact = self.num_samples == 0 or index in self.exact_layers or (has_window and not self.windows)
        kv_starts, kv_lens, positions = ranges.unbind(0)
        options = dict(
            kv_lens=kv_lens,
            kv_starts=kv_starts,
            positions=positions,
            kv_layout="HND",
            sm_scale=scaling,
            logits_soft_cap=softcap,
            sinks=None if s_aux is None else s_aux.float().contiguous(),
            num_samples=0 if is_exact else self.num_samples,
            seed=self.seed + index,
            row_seeds=torch.arange(query.shape[0], device=query.device),
            min_sampled_len=0,
            return_rows_read=True,
        )
        q = query.squeeze(2)
        if self.observe is not None:
            self.observe(index, q, key, value, options)
        if is_exact:
            out, _, rows = santa.decode(q, key, value, **options)
        elif self.method.top_k:
            if softcap is not None or s_aux is not None:
                raise ValueError(f"{type(module).__name__} has a soft cap or sinks; top-k here has none")
            places = torch.arange(key.shape[2], device=key.device)
            is_valid = (places >= kv_starts[:, None]) & (places < (kv_starts + kv_lens)[:, None])
            out = top_k_attention(q, key, value, self.num_rows[index], scaling, is_valid)
            rows = kv_lens.clamp(max=self.num_rows[index])[:, None].expand(key.shape[:2])
        else:
            options |= self.method.options | self._copy_of(index, key, kv_starts + kv_lens, has_window)
            out, _, rows = santa.decode(q, options.pop("k", key), value, **options)
        if not has_window or self.windows:
            if index not in self.layers:
                none = torch.zeros((), dtype=torch.int64, device=key.device)
                self.layers[index] = Layer(rows.numel(), key.shape[2], none)
            self.layers[index].rows_read += rows.sum()
        return out.unsqueeze(1), None

    def _copy_of(self, index: int, key: Tensor, ends: Tensor, has_window: bool) -> dict[str, Any]:
        """Options of `santa.decode` that hand over the other form of a layer's keys, with the new one."""
        if self.method.keys == "exact":
            return {}
        make = COPIES[self.method.keys]
        if has_window:  # its cache moves
            return make(key, min(self.position, key.shape[2])).options()
        place = (self.method.keys, index)
        if place not in self.copies:
            self.copies[place] = make(key, self.position - 1)
        self.copies[place].append(key, (ends[:1] - 1).long())
        return self.copies[place].options()
