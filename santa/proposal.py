"""Proposal keys: a copy of K in 4 bits, from which `santa.decode` draws the rows that it then reads exactly.

Making and filling them, and the fake kernel of the operator that does. docs/proposals.md has the format and the laws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from santa._dispatch import call, register
from santa.arguments import KvLayout, check_same_device, check_tensor, value_of
from santa.shapes import DECODE_HEAD_DIMS

# A channel's standard deviation counts as at least this part of the largest of its head: a channel that the prompt
# holds constant would otherwise be all that the codes of a later key, in which it is not, have room for.
LEAST_STD = 2.0**-12


@dataclass(frozen=True, eq=False)
class ProposalKeys:
    """Keys in 4 bits: 66 bytes a key and KV head at head_dim 128, 12.9% of K and V in 16 bits.

    codes: uint8, shape of k but for its last dimension, head_dim / 2: byte j has feature j in its low 4 bits and
        feature j + head_dim / 2 in its high ones, each a number from -8 to 7, plus 8. Any strides with a contiguous
        last dimension; `make_proposal_keys` has what belongs to a KV head side by side in either layout.
    scales: float16, the shape of codes without its last dimension. NaN for keys that are not finite.
    center, channel_scale: float32 [batch or 1, num_kv_heads, head_dim], frozen when first made. A key is about
        ``codes * scale * channel_scale + center``.
    kv_layout: "NHD" or "HND" (or `KvLayout`): that of k.
    """

    codes: Tensor
    scales: Tensor
    center: Tensor
    channel_scale: Tensor
    kv_layout: KvLayout | int | str = "NHD"

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            check_tensor(name, tensor)

    def layout(self) -> int:
        return value_of("kv_layout of proposal", self.kv_layout, KvLayout)

    def tensors(self) -> dict[str, Tensor]:
        """As the operators take them."""
        return {
            "codes": self.codes,
            "scales": self.scales,
            "center": self.center,
            "channel_scale": self.channel_scale,
        }


def make_proposal_keys(
    k: Tensor,
    kv_lens: Tensor | None = None,
    *,
    kv_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    kv_layout: KvLayout | int | str = KvLayout.NHD,
    center: Tensor | None = None,
    channel_scale: Tensor | None = None,
    shared: bool = False,
) -> ProposalKeys:
    """Proposal keys of a cache, with room for as many keys as it has.

    Args:
        k: [batch, max_kv_len, num_kv_heads, head_dim] for NHD, [batch, num_kv_heads, max_kv_len, head_dim] for HND, or
            with page_table pages, as `santa.decode_paged` takes them; bfloat16, float16, float32 or float8_e4m3fn, any
            strides with a contiguous last dimension. head_dim 64, 96, 128, 192 or 256. float8 keys are taken as they
            are stored, without the k_scale that `santa.decode` multiplies all logits with.
        kv_lens, kv_starts: int32 [batch]: which keys there are, as in `santa.decode`. Others are not read.
        page_table: int32 [batch, max_pages], as in `santa.decode_paged`; with kv_lens.
        center, channel_scale: float32 [batch or 1, num_kv_heads, head_dim]: instead of statistics of k, those of an
            earlier prompt; both or neither. They are taken as they are, not copied.
        shared: one center and channel_scale for all rows, [1, ...], as for pages, which rows can share.

    Returns:
        ProposalKeys: center is the mean of the row's keys and channel_scale the square root of their standard
        deviation, channel by channel (1 without two different keys). They stay as they are when keys are appended;
        where keys move on so far that they no longer fit, estimates get noisier, never wrong.

    Raises:
        ValueError: an argument has an unusable value, dtype, shape, stride or device; the message names it.
        TypeError: an argument is of the wrong Python type.
    """
    check_tensor("k", k)
    for name, tensor in (
        ("kv_lens", kv_lens),
        ("kv_starts", kv_starts),
        ("page_table", page_table),
        ("center", center),
        ("channel_scale", channel_scale),
    ):
        check_tensor(name, tensor, optional=True)
    layout = value_of("kv_layout", kv_layout, KvLayout)
    if k.dim() != 4:
        raise ValueError(f"santa: k has shape {list(k.shape)}; it needs 4 dimensions, those of k in santa.decode")
    if k.shape[-1] not in DECODE_HEAD_DIMS:
        widths = ", ".join(map(str, DECODE_HEAD_DIMS))
        raise ValueError(f"santa: k has head_dim {k.shape[-1]}; it needs to be one of {widths}")
    if (center is None) != (channel_scale is None):
        given, missing = ("channel_scale", "center") if center is None else ("center", "channel_scale")
        raise ValueError(f"santa: {given} is given without {missing}; they need each other")
    if page_table is not None and kv_lens is None:
        raise ValueError("santa: kv_lens is None; page_table needs it")
    check_same_device(
        k, "k", kv_lens=kv_lens, kv_starts=kv_starts, page_table=page_table, center=center, channel_scale=channel_scale
    )

    nhd = k.transpose(1, 2) if layout == KvLayout.HND else k
    valid = _valid_keys(nhd, kv_lens, kv_starts, page_table)
    if center is None or channel_scale is None:
        center, channel_scale = key_statistics(nhd, valid, shared=shared or page_table is not None)
    codes = _zeros((*k.shape[:-1], k.shape[-1] // 2), torch.uint8, layout, k.device)
    scales = _zeros(k.shape[:-1], torch.float16, layout, k.device)
    proposal = ProposalKeys(codes, scales, center, channel_scale, "HND" if layout == KvLayout.HND else "NHD")
    if page_table is None:
        positions = torch.arange(valid.shape[1], device=k.device)
        append_proposal_keys(proposal, nhd, torch.where(valid, positions, -1))
    else:
        slots = torch.arange(valid.numel(), device=k.device).view(valid.shape)
        append_proposal_keys(proposal, nhd, slots=torch.where(valid, slots, -1))
    return proposal


def _zeros(shape: Sequence[int], dtype: torch.dtype, layout: int, device: torch.device) -> Tensor:
    """Of a layout, but with what belongs to a KV head side by side in either: so CUDA kernels copy it fastest."""
    if layout == KvLayout.HND:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.zeros((shape[0], shape[2], shape[1], *shape[3:]), dtype=dtype, device=device).transpose(1, 2)


def append_proposal_keys(
    proposal: ProposalKeys, k_new: Tensor, positions: Tensor | None = None, *, slots: Tensor | None = None
) -> None:
    """Write the codes and scales of new keys, as a model makes them, in place: one at each decode step, or a prefill's.

    Args:
        proposal: written in place, with its center and channel_scale.
        k_new: [batch, n, num_kv_heads, head_dim], any strides with a contiguous last dimension; what is appended to k.
        positions: int32 or int64 [batch, n]: where each key of its row goes; negative: nowhere.
        slots: instead of positions, for pages: page * page_size + offset; negative: nowhere. With one list of new
            tokens for all rows batch is 1.

    On the CPU a place outside the cache raises, and nothing is written; CUDA does not wait to look, and leaves such
    keys out. No place may be given twice.

    Raises:
        ValueError: an argument has an unusable value, dtype, shape, stride or device; the message names it.
        TypeError: an argument is of the wrong Python type.
        RuntimeError: a tensor requires a gradient, or carries a forward derivative; vmap.
    """
    if not isinstance(proposal, ProposalKeys):
        raise TypeError(f"santa: proposal is a {type(proposal).__name__}; it needs to be a santa.ProposalKeys")
    check_tensor("k_new", k_new)
    check_tensor("positions", positions, optional=True)
    check_tensor("slots", slots, optional=True)
    if (positions is None) == (slots is None):
        both = "are both None" if positions is None else "are both given"
        raise ValueError(f"santa: positions and slots {both}; one of them is needed")
    call(
        torch.ops.santa.append_proposal_keys,
        *proposal.tensors().values(),
        k_new,
        positions if slots is None else slots,
        by_slot=slots is not None,
        kv_layout=proposal.layout(),
    )


def _valid_keys(nhd: Tensor, kv_lens: Tensor | None, kv_starts: Tensor | None, page_table: Tensor | None) -> Tensor:
    """Which keys there are: bool, the first two dimensions of k."""
    batch = nhd.shape[0] if page_table is None else page_table.shape[0]
    for name, tensor in (("kv_lens", kv_lens), ("kv_starts", kv_starts)):
        if tensor is not None and tensor.shape != (batch,):
            raise ValueError(
                f"santa: {name} has shape {list(tensor.shape)}; it needs to be [{batch}], one for each row"
            )
    if page_table is not None and page_table.dim() != 2:
        raise ValueError(f"santa: page_table has shape {list(page_table.shape)}; it needs to be [batch, max_pages]")
    page_size = nhd.shape[1]
    width = page_size if page_table is None else page_table.shape[1] * page_size
    positions = torch.arange(width, device=nhd.device)
    starts = 0 if kv_starts is None else kv_starts[:, None]
    valid = (positions >= starts).expand(batch, width)
    if kv_lens is not None:
        valid = valid & (positions < starts + kv_lens[:, None])
    if page_table is None:
        return valid
    # Entries that no key needs can be anything: they go to a slot behind the last.
    slots = page_table.long().repeat_interleave(page_size, dim=1) * page_size + positions % page_size
    last = nhd.shape[0] * page_size
    marked = torch.zeros(last + 1, dtype=torch.bool, device=nhd.device)
    marked[torch.where(valid, slots, last).flatten()] = True
    return marked[:last].view(nhd.shape[0], page_size)


def key_statistics(nhd: Tensor, valid: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """center and channel_scale: [batch or 1, num_kv_heads, head_dim]. A head at a time, in float32.

    nhd: keys, [batch, n, num_kv_heads, head_dim]; valid: bool [batch, n].
    """
    axes = (0, 1) if shared else (1,)
    valid = valid[:, :, None]
    count = valid.sum(axes, keepdim=True).clamp(min=1)
    centers, deviations = [], []
    for head in range(nhd.shape[2]):
        keys = torch.where(valid, nhd[:, :, head].float(), 0.0)
        mean = keys.sum(axes, keepdim=True) / count
        variance = torch.where(valid, keys - mean, 0.0).square().sum(axes, keepdim=True) / count
        centers.append(mean.flatten(0, 1))
        deviations.append(variance.sqrt().flatten(0, 1))
    std = torch.stack(deviations, dim=1) if deviations else nhd.new_zeros((1, 0, nhd.shape[3]), dtype=torch.float32)
    center = torch.stack(centers, dim=1) if centers else std
    scale = torch.maximum(std, std.amax(dim=-1, keepdim=True) * LEAST_STD).sqrt()
    return center, torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


@torch.library.register_fake("santa::append_proposal_keys")
def _append_proposal_keys_fake(
    codes: Tensor,
    scales: Tensor,
    center: Tensor,
    channel_scale: Tensor,
    k_new: Tensor,
    positions: Tensor,
    **options: Any,
) -> None:
    check_same_device(
        k_new,
        "k_new",
        codes=codes,
        scales=scales,
        center=center,
        channel_scale=channel_scale,
        positions=positions,
    )


register("append_proposal_keys", written=2)
