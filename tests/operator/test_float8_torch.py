"""A float8 cache inside PyTorch, and bad input of it."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.float8 import FLOAT8, quantised
from helpers.inputs import make_qkv, working_dtype

import santa

# PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, 32])
def test_opcheck(device, kind, num_samples):
    """All but test_schema, which multiplies its inputs by a number: torch has no such kernel for float8. The schema is
    the one that tests/operator/test_torch.py checks."""
    q, k, v = make_qkv(2, 8, 2, 700, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v)
    options = {"num_samples": num_samples, "min_sampled_len": 0, "seed": 3, **scales}
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.santa.decode.default, (q, k, v), options, test_utils=checks)


def test_compile_fullgraph(device, kind):
    """Quantising and decoding in one graph."""
    q, k, v = make_qkv(2, 8, 2, 700, 64, dtype=working_dtype(device), device=device)

    def step(q, k, v):
        k, v, scales = quantised(kind, k, v)
        out, lse, rows = santa.decode(q * 2, k, v, num_samples=32, min_sampled_len=0, return_rows_read=True, **scales)
        return out + 1, lse, rows

    eager = step(q, k, v)
    # Not inductor: it may fuse the divisions of quantize_kv, and a last bit there is another code.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(map(torch.equal, compiled, eager))


def test_backward_through_a_scale_is_refused(device):
    q, k, v = make_qkv(1, 4, 2, 300, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised("fp8", k, v)
    expected = santa.decode(q, k, v, **scales)
    for name in scales:
        asked = {**scales, name: scales[name].clone().requires_grad_()}
        out, lse = santa.decode(q, k, v, **asked)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
        with pytest.raises(RuntimeError, match="santa: decode has no backward pass"):
            out.sum().backward()


# Errors -------------------------------------------------------------------------------------------------


def bad_arguments(device):
    """name -> (what is changed of a call with a float8 cache of both kinds, the message)."""

    def scale(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=device)

    def cache(dtype):
        return torch.zeros(2, 300, 2, 64, dtype=torch.float16, device=device).to(dtype)

    half = cache(torch.float16)
    cases = {
        "v float8 alone": (
            {"k": half, "k_scale": None},
            r"santa: v is float8_e4m3fn while k is float16; it needs to be float16 too, or k to be float8_e4m3fn",
        ),
        "k float8_e5m2": (
            {"k": cache(torch.float8_e5m2)},
            r"santa: k is float8_e5m2; it needs to be float16, q's dtype, or float8_e4m3fn",
        ),
        "v float8_e5m2": (
            {"v": cache(torch.float8_e5m2)},
            r"santa: v is float8_e5m2; it needs to be float16, q's dtype, or float8_e4m3fn",
        ),
        "v bfloat16": (
            {"v": cache(torch.bfloat16)},
            r"santa: v is bfloat16; it needs to be float16, q's dtype, or float8_e4m3fn",
        ),
        "k_scale for a 16-bit k": (
            {"k": half, "v": half, "v_scale": None},
            r"santa: k_scale is given while k is float16; it needs k to be float8_e4m3fn, or to be None",
        ),
        "v_scale for a 16-bit v": (
            {"v": half},
            r"santa: v_scale is given while v is float16; it needs v to be float8_e4m3fn, or to be None",
        ),
    }
    for name in ("k_scale", "v_scale"):
        needs = r"it needs to be \[\] or \[1\] \(one for the tensor\) or \[2\] \(one per KV head\)"
        cases |= {
            f"{name} float16": (
                {name: scale(2, dtype=torch.float16)},
                rf"santa: {name} is float16; it needs to be float32",
            ),
            f"{name} float64": (
                {name: scale(dtype=torch.float64)},
                rf"santa: {name} is float64; it needs to be float32",
            ),
            f"{name} of q's heads": ({name: scale(4)}, rf"santa: {name} has shape \[4\]; {needs}"),
            f"{name} empty": ({name: scale(0)}, rf"santa: {name} has shape \[0\]; {needs}"),
            f"{name} rank 2": ({name: scale(1, 2)}, rf"santa: {name} has shape \[1, 2\]; {needs}"),
            f"{name} stride": (
                {name: scale(4)[::2]},
                rf"santa: {name} has stride 2; it needs to be contiguous",
            ),
            f"{name} expanded": (
                {name: scale().expand(2)},
                rf"santa: {name} has stride 0; it needs to be contiguous",
            ),
            f"{name} on meta": (
                {name: torch.ones(2, device="meta")},
                rf"santa: {name} is on meta; it needs to be on q's device, {device}(:0)?",
            ),
        }
    return cases


@pytest.mark.parametrize("operator", [santa.decode, torch.ops.santa.decode], ids=["santa", "ops"])
@pytest.mark.parametrize("case", bad_arguments("cpu"))
def test_bad_argument(operator, device, case):
    changes, match = bad_arguments(device)[case]
    q = torch.zeros(2, 4, 64, dtype=torch.float16, device=device)
    cache = torch.zeros(2, 300, 2, 64, device=device).to(FLOAT8)
    scale = torch.ones(2, device=device)
    arguments = {"k": cache, "v": cache, "k_scale": scale, "v_scale": scale}
    operator(q, **arguments)
    with pytest.raises(ValueError) as caught:
        operator(q, **arguments | changes)
    assert re.fullmatch(match, str(caught.value)), caught.value


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scale_on_another_device(name):
    q = torch.zeros(2, 4, 64, dtype=torch.float16)
    cache = torch.zeros(2, 300, 2, 64).to(FLOAT8)
    with pytest.raises(ValueError, match=rf"santa: {name} is on cuda:0; it needs to be on q's device, cpu"):
        santa.decode(q, cache, cache, **{name: torch.ones(2, device="cuda")})
