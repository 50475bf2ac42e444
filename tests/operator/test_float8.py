"""Float8 KV caches: K in float8_e4m3fn with V in q's dtype, and both in float8_e4m3fn.

What a scale or a conversion gets wrong is wrong by a factor, so most tests compare with the float64 oracle on the
dequantised values: rounding to float8 is not part of the error that they allow.
"""

from __future__ import annotations

import pytest
import torch
from helpers.float8 import FLOAT8, LAYOUTS, heads_apart, oracle, quantised, torch_error
from helpers.inputs import HEAD_DIMS, SAMPLED, SAMPLERS, dtypes_of, make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z, relative_rms

import santa
from santa import reference

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
def test_a_cache_without_rounding_gives_the_same_bits(kind, sampler):
    """K and V of numbers that float8 has: the scores, so the draws, and the estimates are those of the 16-bit cache. On
    the CPU; on CUDA a score is summed in another order: see below."""
    options = {"min_sampled_len": 0, "return_rows_read": True}
    options |= {"num_samples": 0} if sampler == "exact" else {"num_samples": 32, "sampler": sampler}
    for dtype in dtypes_of("cpu"):
        q, k, v = make_qkv(2, 18, 2, 900, 64, dtype=dtype)
        k, v = k.to(FLOAT8), v.to(FLOAT8)
        expected = santa.decode(q, k.to(dtype), v.to(dtype), **options)
        actual = santa.decode(q, k, v if kind == "fp8" else v.to(dtype), **options)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 0},
        *({"sampler": s, "budget": b} for b in ("streaming", "uniform") for s in ("grouped", "systematic")),
        *({"sampler": s, "budget": "proportional"} for s in SAMPLERS),
    ],
    ids=lambda options: "-".join(str(x) for x in options.values()),
)
def test_a_cache_without_rounding(kind, options):
    """The same up to rounding. Sampled rows: but for those where a threshold lies within rounding of a boundary, in few
    heads."""
    options = {"min_sampled_len": 0, "num_samples": 32} | options
    for head_dim in HEAD_DIMS:
        q, k, v = make_qkv(2, 18, 2, 900, head_dim, dtype=torch.float16, device="cuda")
        k, v = k.to(FLOAT8), v.to(FLOAT8)
        expected, lse = santa.decode(q, k.half(), v.half(), **options)
        actual, own_lse = santa.decode(q, k, v if kind == "fp8" else v.half(), **options)
        torch.testing.assert_close(own_lse, lse, rtol=1e-5, atol=1e-5)
        same = torch.isclose(actual, expected, rtol=5e-3, atol=5e-3).all(dim=-1)
        assert same.float().mean() >= (1.0 if options["num_samples"] == 0 else 0.9)


# Sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 3, *(pytest.param(g, marks=pytest.mark.sanitize) for g in (4, 7)), 8, 12])
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
            assert (rows == 1100 * len(reference.head_blocks(group_size))).all()
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


@pytest.mark.parametrize("sampler, budget", SAMPLED)
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
