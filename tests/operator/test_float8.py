"""Float8 KV caches: K in float8_e4m3fn with V in q's dtype, and both in float8_e4m3fn.

What a scale or a conversion gets wrong is wrong by a factor, so most tests compare with the float64 oracle on the
dequantised values: rounding to float8 is not part of the error that they allow.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import BUDGETS, HEAD_DIMS, SAMPLERS, dtypes_of, make_qkv, mean_z, relative_rms, repeat_rows, working_dtype

import santa
from santa import reference

FLOAT8 = torch.float8_e4m3fn
KINDS = ["fp8-k", "fp8"]  # K alone, or K and V
LAYOUTS = ["NHD", "HND"]
Z_PROJECTED = 4.9  # two-sided false-alarm rate 1e-6
Z_LARGEST = 6.0  # 256 elements: 256 * 2e-9 = 5e-7


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


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


# Exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_exact_is_attention_of_the_dequantised_cache(device, kind, head_dim, layout, per_head):
    """Error against float64 on the dequantised values at most twice that of same-dtype PyTorch on the same values."""
    for dtype in dtypes_of(device):
        q, k, v = make_qkv(2, 8, 2, 700, head_dim, dtype=dtype, device=device, layout=layout)
        k, v, scales = quantised(
            kind, heads_apart(k, layout) / 2, heads_apart(v, layout), layout=layout, per_head=per_head
        )
        assert k.dtype == FLOAT8 and v.dtype == (FLOAT8 if kind == "fp8" else dtype)
        assert all(x.shape == ((2,) if per_head else ()) for x in scales.values())
        out, lse = santa.decode(q, k, v, num_samples=0, kv_layout=layout, **scales)
        assert out.dtype == dtype and lse.dtype == torch.float32
        expected, expected_lse = oracle(q, k, v, scales, kv_layout=layout)
        ours, theirs = relative_rms(out, expected), torch_error(q, k, v, scales, layout, expected)
        assert ours <= 2 * theirs + 1e-7, f"{dtype}: santa {ours:.2e}, torch {theirs:.2e}"
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("group_size", [1, 3, 5, 7, 8, 12])
@pytest.mark.parametrize("kv_len", [1, 127, 129, 4097])
def test_group_sizes_and_lengths(device, kind, group_size, kv_len):
    q, k, v = make_qkv(1, 2 * group_size, 2, kv_len, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v)
    out, lse = santa.decode(q, k, v, num_samples=0, **scales)
    expected, expected_lse = oracle(q, k, v, scales)
    assert relative_rms(out, expected) <= 2 * torch_error(q, k, v, scales, "NHD", expected) + 1e-7
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("num_samples", [0, 4])
@pytest.mark.parametrize("group_size", [1, 9])
def test_every_code_is_read_right(device, group_size, num_samples):
    """All 254 numbers of the format, subnormals and both zeros included, as keys and as values. Each key stands in one
    row, multiplied with a one of q, so the scores are the numbers; each value is the only one of its row, and drawn."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8, device=device)
    numbers = codes.view(FLOAT8)
    for dtype in dtypes_of(device):
        for feature in (3, 60):
            q = torch.zeros(len(codes), group_size, 64, dtype=dtype, device=device)
            q[..., feature] = 1.0
            cache = torch.zeros(len(codes), 1, 1, 64, dtype=FLOAT8, device=device)
            cache.view(torch.uint8)[..., feature] = codes.view(-1, 1, 1)
            out, lse = santa.decode(q, cache, cache, num_samples=num_samples, min_sampled_len=0, sm_scale=1.0)
            expected = torch.zeros_like(out)
            expected[..., feature] = numbers.to(dtype).unsqueeze(1)
            assert torch.equal(out, expected)
            torch.testing.assert_close(lse, numbers.float().unsqueeze(1).expand_as(lse), rtol=1e-6, atol=1e-9)


def test_scales(device, kind):
    """[], [1] and [num_kv_heads] of one number are one number, None is 1; keys take k_scale, outputs v_scale."""
    q, k, v = make_qkv(2, 8, 2, 300, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v, per_head=False)
    options = {"num_samples": 16, "min_sampled_len": 0}
    expected = santa.decode(q, k, v, **scales, **options)
    for shape in ([1], [2]):
        same = santa.decode(q, k, v, **{name: x.expand(shape).contiguous() for name, x in scales.items()}, **options)
        assert all(map(torch.equal, same, expected))
    ones = {name: torch.ones_like(x) for name, x in scales.items()}
    assert all(map(torch.equal, santa.decode(q, k, v, **ones, **options), santa.decode(q, k, v, **options)))
    double = {**scales, "k_scale": 2 * scales["k_scale"]}
    folded = santa.decode(q, k, v, **scales, sm_scale=0.25, **options)
    assert all(map(torch.equal, santa.decode(q, k, v, **double, sm_scale=0.125, **options), folded))
    if kind == "fp8":
        out, lse = santa.decode(q, k, v, **{**scales, "v_scale": 2 * scales["v_scale"]}, **options)
        assert torch.equal(out, 2 * expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("sampler", ["exact", *SAMPLERS])
def test_a_cache_without_rounding_gives_the_same_bits(device, kind, sampler):
    """K and V of numbers that float8 has: the scores, so the draws, and the estimates are those of the 16-bit cache. On
    CUDA not in persistent rows, which are summed in larger steps: so 9 query heads per KV head, too many for those."""
    options = {"min_sampled_len": 0, "return_rows_read": True}
    options |= {"num_samples": 0} if sampler == "exact" else {"num_samples": 32, "sampler": sampler}
    for dtype in dtypes_of(device):
        for head_dim in HEAD_DIMS if device == "cuda" else [64]:
            q, k, v = make_qkv(2, 18, 2, 900, head_dim, dtype=dtype, device=device)
            k, v = k.to(FLOAT8), v.to(FLOAT8)
            expected = santa.decode(q, k.to(dtype), v.to(dtype), **options)
            actual = santa.decode(q, k, v if kind == "fp8" else v.to(dtype), **options)
            assert all(map(torch.equal, actual, expected))


# Sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_that_are_all_drawn_give_exact_attention(device, kind, head_dim, group_size):
    """So many draws that each row has more than one on average: `grouped` weighs every row with its probability, and
    the estimate has the error of exact attention. `systematic` counts are off by one draw at most: the errors of 1,100
    rows of V, whose mean is 1, add up to less than sqrt(1100) / S = 1e-3."""
    num_samples = 2**15
    for dtype in dtypes_of(device) if device == "cuda" else [torch.float32]:
        q, k, v = make_qkv(2, 2 * group_size, 2, 1100, head_dim, dtype=dtype, device=device, logit_std=0.5)
        k, v, scales = quantised(kind, heads_apart(k, "NHD") / 2, heads_apart(v, "NHD"))
        expected, expected_lse = oracle(q, k, v, scales)
        theirs = torch_error(q, k, v, scales, "NHD", expected)
        for sampler, noise in (("grouped", 1e-6), ("systematic", 2e-3)):
            options = {"num_samples": num_samples, "sampler": sampler, "min_sampled_len": 0, "return_rows_read": True}
            out, lse, rows = santa.decode(q, k, v, **options, **scales)
            assert (rows == 1100).all()
            ours = relative_rms(out, expected)
            assert ours <= 2 * theirs + noise, f"{sampler}, {dtype}: santa {ours:.2e}, torch {theirs:.2e}"
            torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("num_samples", [0, 32])
def test_magnitudes_of_q(device, num_samples):
    """A power of two moves from sm_scale to q without a trace; each head has a magnitude of its own; a large element
    does not take the bits of small ones, 2^28 below it. lse shows the scores."""
    for dtype in dtypes_of(device):
        q, k, v = make_qkv(2, 8, 2, 900, 64, dtype=dtype, device=device)
        k, v, scales = quantised("fp8", k, v)
        options = {"num_samples": num_samples, "min_sampled_len": 0, **scales}
        expected = santa.decode(q, k, v, sm_scale=0.125, **options)
        for exponent in (3, 10) if dtype == torch.float16 else (-90, 100):
            moved = q * 2.0**exponent
            assert torch.equal(moved.double(), q.double() * 2.0**exponent)
            actual = santa.decode(moved, k, v, sm_scale=0.125 * 2.0**-exponent, **options)
            assert all(map(torch.equal, actual, expected)), (dtype, exponent)

        spread = q * 2.0 ** torch.arange(-10, 6, 2, device=device).view(1, 8, 1).to(dtype)
        _, lse = santa.decode(spread, k, v, sm_scale=0.125, **options)
        _, expected_lse = oracle(spread, k, v, scales, sm_scale=0.125)
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=2e-5)

        small = q * 2.0**-14
        small[..., 7] = 2.0**14
        k.view(torch.uint8)[..., 7] = 0
        _, lse = santa.decode(small, k, v, sm_scale=2.0**11, **options)
        _, expected_lse = oracle(small, k, v, scales, sm_scale=2.0**11)
        assert expected_lse.std() > 1e-3
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-6, atol=2e-5)


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


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_rows_as_on_the_cpu_and_from_a_16_bit_cache(kind, sampler):
    """At least 999 of 1,000 drawn rows agree: scores and their sums differ in the last bits, so a row may differ where
    a threshold falls within rounding of a boundary. V is the identity, so the output shows the rows."""
    count, head_dim = 256, 256
    for dtype in (torch.bfloat16, torch.float16):
        q, k, _ = make_qkv(count, 8, 2, head_dim, head_dim, dtype=dtype, logit_std=2.0)
        v = torch.eye(head_dim, dtype=dtype).reshape(1, head_dim, 1, head_dim).expand(count, -1, 2, -1)
        k8, v8 = k.to(FLOAT8), v.to(FLOAT8) if kind == "fp8" else v
        drawn = [
            santa.decode(
                *(x.to(device) for x in cache),
                num_samples=16,
                sampler=sampler,
                row_seeds=torch.arange(count, device=device),
                min_sampled_len=0,
            )[0].cpu()
            != 0
            for device, cache in (("cuda", (q, k8, v8)), ("cuda", (q, k8.to(dtype), v)), ("cpu", (q, k8, v8)))
        ]
        for other in drawn[1:]:
            assert (drawn[0] != other).sum() <= 1e-3 * drawn[0].sum()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unbiased(device, kind, sampler, budget):
    """The mean of N draws is exact attention over the dequantised cache (z-test, false-alarm rate 2e-6 a case), and the
    same test sees a bias of 1%. Rounding to float8 is not random, so it is no part of this."""
    count = 8192
    q, k, v = make_qkv(1, 4, 1, 300, 64, dtype=working_dtype(device), device=device, logit_std=1.5, seed=1)
    k, v, scales = quantised(kind, k, v)
    out, lse = santa.decode(
        *(repeat_rows(x, count) for x in (q, k, v)),
        num_samples=32,
        sampler=sampler,
        budget=budget,
        row_seeds=torch.arange(count, device=device),
        min_sampled_len=0,
        **scales,
    )
    expected, expected_lse = oracle(q, k, v, scales)
    projected, largest = mean_z(out, expected[0])
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST
    assert abs(mean_z(out * 1.01, expected[0])[0]) > Z_PROJECTED, "the test could not see a bias of 1%"
    assert (lse.cpu() - expected_lse).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_repeated_and_alone_and_in_any_layout(device, kind, sampler):
    """Same inputs and seed, same bits: again, alone, permuted, HND, padded on either side, at odd strides."""
    q, k, v = make_qkv(3, 8, 2, 1300, 64, dtype=working_dtype(device), device=device, logit_std=2.0)
    k, v, scales = quantised(kind, k, v)
    kv_lens = torch.tensor([1300, 700, 129], dtype=torch.int32, device=device)
    row_seeds = torch.tensor([5, -6, 7], device=device)

    def select(x, rows):  # as bytes: indexing by a list is not there for float8 in every torch
        return x.view(torch.uint8)[rows].view(FLOAT8) if x.dtype == FLOAT8 else x[rows]

    def run(q, k, v, rows=slice(None), **options):
        return santa.decode(
            *(select(x, rows) for x in (q, k, v)),
            kv_lens=kv_lens[rows],
            row_seeds=row_seeds[rows],
            num_samples=64,
            sampler=sampler,
            min_sampled_len=0,
            return_rows_read=True,
            **scales,
            **options,
        )

    expected = run(q, k, v)
    for _ in range(3):
        assert all(map(torch.equal, run(q, k, v), expected))
    order = [2, 0, 1]
    assert all(map(torch.equal, run(q, k, v, order), [x[order] for x in expected]))
    for b in range(3):
        one = slice(b, b + 1)
        assert all(map(torch.equal, run(q, k, v, one), [x[one] for x in expected]))
    hnd = [x.transpose(1, 2) for x in (k, v)]
    assert all(map(torch.equal, run(q, *hnd, kv_layout="HND"), expected))
    assert all(map(torch.equal, run(q, *(x.contiguous() for x in hnd), kv_layout="HND"), expected))

    def surrounded(x, tokens, gap):
        """x inside a buffer of NaN: `tokens` more of them on either side, rows `gap` elements further apart."""
        shape = (x.shape[0], x.shape[1] + 2 * tokens, x.shape[2], x.shape[3] + gap)
        buffer = torch.full(shape, float("nan"), device=device).to(x.dtype)
        assert buffer.float().isnan().all()
        buffer[:, tokens : tokens + x.shape[1], :, gap:] = x
        return buffer[..., gap:]

    for tokens, gap in ((0, 16), (0, 1), (333, 0), (5, 3)):
        starts = torch.full((3,), tokens, dtype=torch.int32, device=device)
        moved = run(q, surrounded(k, tokens, gap), surrounded(v, tokens, gap), kv_starts=starts)
        assert all(map(torch.equal, moved, expected))


# NaN ----------------------------------------------------------------------------------------------------


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


# PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode", "decode_rows_read"])
@pytest.mark.parametrize("num_samples", [0, 32])
def test_opcheck(device, kind, op, num_samples):
    """All but test_schema, which multiplies its inputs by a number: torch has no such kernel for float8. The schema is
    the one that tests/operator/test_torch.py checks."""
    q, k, v = make_qkv(2, 8, 2, 700, 64, dtype=working_dtype(device), device=device)
    k, v, scales = quantised(kind, k, v)
    options = {"num_samples": num_samples, "min_sampled_len": 0, "seed": 3, **scales}
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(torch.ops.santa, op).default, (q, k, v), options, test_utils=checks)


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


@pytest.mark.parametrize("operator", [santa.decode, torch.ops.santa.decode_rows_read], ids=["santa", "ops"])
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


# quantize_kv --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_kv(device, layout, per_head):
    """The largest magnitude becomes 448; no element is further off than half a unit of float8."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _, k, _ = make_qkv(2, 6, 3, 200, 64, dtype=dtype, device=device, layout=layout)
        k = heads_apart(k, layout)
        heads = k.transpose(1, 2) if layout == "NHD" else k
        x, scale = santa.quantize_kv(k, per_head=per_head, kv_layout=layout)
        assert x.dtype == FLOAT8 and x.shape == k.shape and x.device == k.device
        assert scale.dtype == torch.float32 and scale.shape == ((3,) if per_head else ())
        amax = heads.abs().amax((0, 2, 3)) if per_head else heads.abs().max()
        torch.testing.assert_close(scale, amax.float() / 448, rtol=1e-6, atol=0)
        x = x.transpose(1, 2) if layout == "NHD" else x
        assert (x.float().abs().amax((0, 2, 3) if per_head else None) == 448).all()
        steps = scale.double().view(-1, 1, 1)
        error = (x.double() * steps - heads.double()).abs()
        assert (error <= torch.maximum(heads.double().abs() / 16, steps / 1024) * (1 + 1e-6)).all()


def test_quantize_kv_of_what_has_no_scale(device):
    """Zeros have the scale 1, and one zero head does not touch the others; tiny and huge numbers stay finite."""
    x = torch.randn(1, 5, 3, 64, device=device)
    x[:, :, 1] = 0.0
    x_fp8, scale = santa.quantize_kv(x)
    assert scale[1] == 1 and (x_fp8[:, :, 1].float() == 0).all()
    assert torch.equal(x_fp8[:, :, 2:].float(), santa.quantize_kv(x[:, :, 2:])[0].float())
    for magnitude in (1e-45, 1e-40, 1e-37, 3e38):
        x_fp8, scale = santa.quantize_kv(torch.full((1, 5, 1, 64), magnitude, device=device))
        back = x_fp8.double() * scale.double()
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert (back - magnitude).abs().max() <= max(magnitude / 16, scale.item() / 1024)
    for shape in ((2, 0, 3, 64), (0, 5, 3, 64)):
        x_fp8, scale = santa.quantize_kv(torch.zeros(shape, device=device))
        assert x_fp8.shape == shape and scale.tolist() == [1, 1, 1]
    x[0, 0, 0, 0] = float("nan")
    x_fp8, scale = santa.quantize_kv(x)
    assert scale.isnan().tolist() == [True, False, False] and x_fp8[:, :, 0].isnan().all()


def test_quantize_kv_errors():
    x = torch.zeros(1, 5, 2, 64)
    for argument, error, match in [
        ([1.0], TypeError, r"santa: x is a list; it needs to be a torch\.Tensor"),
        (x[0], ValueError, r"santa: x has shape \[5, 2, 64\]; it needs 4 dimensions, .*"),
        (x.double(), ValueError, r"santa: x is float64; it needs to be bfloat16, float16 or float32"),
        (x.to(FLOAT8), ValueError, r"santa: x is float8_e4m3fn; it needs to be bfloat16, float16 or float32"),
    ]:
        with pytest.raises(error, match=match):
            santa.quantize_kv(argument)
    with pytest.raises(ValueError, match=r"santa: kv_layout is 'HDN'; it needs to be one of 'NHD', 'HND' .*"):
        santa.quantize_kv(x, kv_layout="HDN")


def test_error_of_the_rounding():
    """A rounded number is off by about 2.6% (rms), so each logit of standard deviation 1 by 0.026, and the sums over
    keys and over values by as much. Errors add up in squares: 3.7% with both."""
    q, k, v = make_qkv(4, 8, 2, 4096, 128)
    v = v - 1.0
    exact, exact_lse = santa.decode(q, k, v, num_samples=0)
    for kind, expected in (("fp8-k", 0.026), ("fp8", 0.037)):
        k8, v8, scales = quantised(kind, k, v)
        out, lse = santa.decode(q, k8, v8, num_samples=0, **scales)
        assert expected / 1.2 < relative_rms(out, exact) < expected * 1.2
        assert (lse - exact_lse).abs().max() < 0.005
