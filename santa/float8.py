"""Quantising KV caches to float8 for `santa.decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from santa.arguments import KvLayout, check_tensor, value_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_kv(
    x: Tensor, *, per_head: bool = True, kv_layout: KvLayout | int | str = KvLayout.NHD
) -> tuple[Tensor, Tensor]:
    """Round keys or values to float8_e4m3fn, symmetrically: x is about ``x_fp8.float() * scale``.

    The scale maps the largest magnitude to 448, the largest number of the format; it is 1 where all of x is zero. The
    error of an element is at most the larger of 2^-4 of itself and 2^-10 scale. All of x counts for the scale, so pass
    the valid part of a longer buffer alone. Rows that come later take the scale there is:
    ``(rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn)``, with a scale per head in the shape of ``rows``.

    Args:
        x: [batch, kv_len, num_kv_heads, head_dim] for NHD, [batch, num_kv_heads, kv_len, head_dim] for HND; bfloat16,
            float16 or float32, any strides. It needs to be finite: a NaN or an infinity leaves nothing of its head.
        per_head: a scale for each KV head, else one for the tensor.
        kv_layout: "NHD" or "HND" (or `KvLayout`).

    Returns:
        x_fp8: float8_e4m3fn, shape and device of x, for ``k`` or ``v`` of `santa.decode`.
        scale: float32 [num_kv_heads], or [] without per_head, for its ``k_scale`` or ``v_scale``.

    Raises:
        ValueError: x has another rank or dtype; an unknown kv_layout.
        TypeError: x is no tensor.
    """
    check_tensor("x", x)
    layout = value_of("kv_layout", kv_layout, KvLayout)
    if x.dim() != 4:
        raise ValueError(f"santa: x has shape {list(x.shape)}; it needs 4 dimensions, those of k and v in santa.decode")
    if x.dtype not in _DTYPES:
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"santa: x is {got}; it needs to be bfloat16, float16 or float32")
    limits = torch.finfo(torch.float8_e4m3fn), torch.finfo(torch.float32)
    head_axis = 1 if layout == KvLayout.HND else 2
    x = x.float()
    reduced = [axis for axis in range(4) if not per_head or axis != head_axis]
    # The maximum over nothing is an error in PyTorch; an empty cache has no use for its scale.
    amax = x.abs().amax(reduced, keepdim=True) if x.numel() else x.new_zeros(x.sum(reduced, keepdim=True).shape)
    # Where amax / 448 is no normal number of float32, the division below would lose it.
    scale = torch.where(amax == 0, 1.0, (amax / limits[0].max).clamp(min=limits[1].tiny))
    x_fp8 = (x / scale).to(torch.float8_e4m3fn)
    return x_fp8, scale.flatten() if per_head else scale.reshape(())
