"""NaN and infinity around and in a float8 cache: in q, in the cache and in its scales."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.float8 import FLOAT8, quantised
from helpers.inputs import dtypes_of, make_qkv, working_dtype

import santa

pytestmark = pytest.mark.emulate


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("num_samples", [0, 32])
def test_what_is_not_finite_in_q_shows_in_its_head(device, num_samples, number):
    for dtype in dtypes_of(device):
        q, k, v = make_qkv(2, 8, 2, 500, 64, dtype=dtype, device=device)
        k, v, scales = quantised("fp8", k, v)
        options = {"num_samples": num_samples, "min_sampled_len": 0, "sampler": "systematic", **scales}
        expected = santa.decode(q, k, v, **options)
        q[1, 5, 40] = number
        out, lse = santa.decode(q, k, v, **options)
        assert out[1, 5].isnan().all() and not lse[1, 5].isfinite()
        out[1, 5], lse[1, 5] = expected[0][1, 5], expected[1][1, 5]
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("num_samples", [0, 32])
def test_nan_past_the_end_is_never_read(device, kind, num_samples):
    q, k, v = make_qkv(2, 4, 2, 900, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v)
    options = {
        "kv_lens": torch.tensor([300, 129], dtype=torch.int32, device=device),
        "num_samples": num_samples,
        "min_sampled_len": 0,
        **scales,
    }
    expected = santa.decode(q, k, v, **options)
    for x in (k, v):
        for b, length in enumerate([300, 129]):
            if x.dtype == FLOAT8:
                x.view(torch.uint8)[b, length:] = 0x7F
            else:
                x[b, length:] = float("nan")
    assert k[0, 300:].float().isnan().all()
    assert all(map(torch.equal, santa.decode(q, k, v, **options), expected))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("num_samples", [0, 32])
def test_nan_inside_shows(device, kind, num_samples, code):
    """A NaN key makes its KV head NaN and no other; so does, on the exact path, a NaN value its column."""
    q, k, v = make_qkv(1, 8, 2, 500, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v)
    options = {"num_samples": num_samples, "min_sampled_len": 0, **scales}
    expected = santa.decode(q, k, v, **options)
    if kind == "fp8" and num_samples == 0:
        poisoned = v.clone()
        poisoned.view(torch.uint8)[0, 400, 1, 5] = code
        out, lse = santa.decode(q, k, poisoned, **options)
        assert out[0, 4:, 5].isnan().all() and out.isnan().sum() == 4 and torch.equal(lse, expected[1])
    for position, feature in ((400, 63), (0, 0), (499, 21), (77, 34)):
        poisoned = k.clone()
        poisoned.view(torch.uint8)[0, position, 1, feature] = code
        out, lse = santa.decode(q, poisoned, v, **options)
        assert out[0, 4:].isnan().all() and lse[0, 4:].isnan().all()
        assert torch.equal(out[0, :4], expected[0][0, :4]) and torch.equal(lse[0, :4], expected[1][0, :4])


@pytest.mark.parametrize("num_samples", [0, 32])
def test_nan_scale_shows(device, kind, num_samples):
    """In its KV head alone: k_scale in out and lse, v_scale in out. A row without keys is zero all the same."""
    q, k, v = make_qkv(2, 8, 2, 500, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v)
    kv_lens = torch.tensor([500, 0], dtype=torch.int32, device=device)
    options = {"kv_lens": kv_lens, "num_samples": num_samples, "min_sampled_len": 0}
    expected = santa.decode(q, k, v, **scales, **options)
    for name, scale in scales.items():
        bad = scale.clone()
        bad[1] = float("nan")
        out, lse = santa.decode(q, k, v, **{**scales, name: bad}, **options)
        assert out[0, 4:].isnan().all() and lse[0, 4:].isnan().all() == (name == "k_scale")
        assert torch.equal(out[0, :4], expected[0][0, :4]) and torch.equal(lse[0, :4], expected[1][0, :4])
        assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
