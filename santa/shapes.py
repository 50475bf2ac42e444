"""Which head_dims there are kernels for, and how others are padded to one of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch.ops.santa.decode, decode_bernoulli and, for prefill, sample_select take.
DECODE_HEAD_DIMS = (64, 96, 128, 192, 256)
PREFILL_HEAD_DIMS = (64, 128)


class PaddingWarning(UserWarning):
    """A KV cache is copied in every call, to pad its head_dim."""


def padded_head_dim(head_dim: int, v_head_dim: int | None = None, *, prefill: bool = False) -> int:
    """The head_dim that attention is computed in, for keys (and queries) and values of these.

    Equal to both where there are kernels for them, ``DECODE_HEAD_DIMS`` or ``PREFILL_HEAD_DIMS``; nothing is copied
    then. Otherwise the narrowest of these that holds both: what is narrower is padded with zeros, which changes no
    score and no value, and the output is cut to v_head_dim again. The softmax scale stays that of head_dim.

    In `santa.prefill` padding costs little. In `santa.decode` padding k and v copies the whole cache, in every call,
    which costs more than attention to it: keep a cache of this width, with zeros behind head_dim, and only q is padded.

    Args:
        head_dim: of queries and keys.
        v_head_dim: of values; None: the same.
        prefill: of `santa.prefill` and `santa.sample_select`, else of `santa.decode`.

    Raises:
        ValueError: either is below 1, or wider than every kernel.
    """
    widths = PREFILL_HEAD_DIMS if prefill else DECODE_HEAD_DIMS
    for name, width in (("q", head_dim), ("v", head_dim if v_head_dim is None else v_head_dim)):
        if not 1 <= width <= widths[-1]:
            narrower = "" if width < 1 else ", and narrower ones are padded; use dense attention for this layer"
            raise ValueError(
                f"santa: {name} has head_dim {width}; it needs to be from 1 to {widths[-1]}: kernels keep a whole head "
                f"on the chip, so there are some for {', '.join(map(str, widths))} alone{narrower}"
            )
    widest = max(head_dim, v_head_dim or 0)
    return next(width for width in widths if width >= widest)


def pad(x: Tensor, width: int, axis: int = -1) -> Tensor:
    """x with zeros behind, to `width` along `axis`, counted from the end; x itself if it is that wide."""
    missing = width - x.shape[axis]
    if missing == 0:
        return x
    widths = (0, 0) * (-axis - 1) + (0, missing)
    if x.dtype == torch.float8_e4m3fn:  # torch pads no float8; a zero byte is its zero
        return F.pad(x.view(torch.uint8), widths).view(x.dtype)
    return F.pad(x, widths)
