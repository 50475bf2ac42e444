"""Float8 caches, the oracle of what they hold, and the error that same-dtype PyTorch makes on it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import santa
from helpers.statistics import relative_rms
from santa import reference

FLOAT8 = torch.float8_e4m3fn
KINDS = ["fp8-k", "fp8"]  # K alone, or K and V
LAYOUTS = ["NHD", "HND"]


def quantised(kind, k, v, *, layout="NHD", per_head=True):
    """(k, v, scales) of a cache of that kind."""
    k, k_scale = santa.quantize_kv(k, per_head=per_head, kv_layout=layout)
    if kind == "fp8-k":
        return k, v, {"k_scale": k_scale}
    v, v_scale = santa.quantize_kv(v, per_head=per_head, kv_layout=layout)
    return k, v, {"k_scale": k_scale, "v_scale": v_scale}


def heads_apart(x, layout):
    """Each KV head at another magnitude, so that a scale of the wrong head shows."""
    heads = x.shape[1 if layout == "HND" else 2]
    factors = 2.0 ** torch.arange(heads, dtype=x.dtype, device=x.device)
    return x * factors.view((1, -1, 1, 1) if layout == "HND" else (1, 1, -1, 1))


def on_cpu(**tensors):
    return {name: x.cpu() for name, x in tensors.items()}


def oracle(q, k, v, scales, **options):
    return reference.exact(q.cpu(), k.cpu(), v.cpu(), **on_cpu(**scales), **options)


def torch_error(q, k, v, scales, layout, expected) -> float:
    """The error of same-dtype PyTorch attention: head by head, so that scales enter as they do in the operator. Every
    float8 number is one of q's dtype too."""
    if layout == "NHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    heads, outs = k.shape[1], []
    for g, queries in enumerate(q.chunk(heads, dim=1)):
        k_scale, v_scale = (
            float(scales[name].expand(heads)[g]) if name in scales else 1.0 for name in ("k_scale", "v_scale")
        )
        keys, values = (x[:, g : g + 1].to(q.dtype) for x in (k, v))
        scale = k_scale / math.sqrt(q.shape[-1])
        out = F.scaled_dot_product_attention(queries.unsqueeze(2), keys, values, scale=scale, enable_gqa=True)
        outs.append((out.squeeze(2).double() * v_scale).to(q.dtype))  # rounded at the end, as ours are
    return relative_rms(torch.cat(outs, dim=1), expected)
