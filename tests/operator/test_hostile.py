"""Inputs that break careless kernels."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import BUDGETS, SAMPLED, make_qkv, working_dtype
from helpers.statistics import relative_rms

import santa
from santa import reference

ALL = [(*combination, 32) for combination in SAMPLED] + [("grouped", "proportional", 0)]


@pytest.fixture(params=ALL, ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}")
def options(request):
    sampler, budget, num_samples = request.param
    return {"sampler": sampler, "budget": budget, "num_samples": num_samples, "min_sampled_len": 0}


@pytest.mark.sanitize
@pytest.mark.parametrize("kv_len", [1, 2, 64, 65, 127, 128, 129, 255, 256, 257, 4097])
def test_short_and_odd_lengths(device, options, kv_len):
    """Finite, and exact where one key holds everything."""
    q, k, v = make_qkv(1, 4, 2, kv_len, 64, dtype=working_dtype(device), device=device)
    out, lse = santa.decode(q, k, v, **options)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    assert torch.isfinite(out).all()
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-4)
    if kv_len == 1:
        torch.testing.assert_close(out.double().cpu(), expected, rtol=2e-3, atol=0)


@pytest.mark.sanitize
def test_empty_rows_and_batches(device, options):
    q, k, v = make_qkv(3, 4, 2, 300, 64, dtype=working_dtype(device), device=device)
    kv_lens = torch.tensor([0, 300, 0], dtype=torch.int32, device=device)
    out, lse, rows = santa.decode(q, k, v, kv_lens=kv_lens, return_rows_read=True, **options)
    assert (out[[0, 2]] == 0).all() and (lse[[0, 2]] == -math.inf).all() and (rows[[0, 2]] == 0).all()
    assert torch.isfinite(out[1]).all() and torch.isfinite(lse[1]).all()
    out, lse, rows = santa.decode(q[:0], k[:0], v[:0], return_rows_read=True, **options)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4) and rows.shape == (0, 2)
    out, lse = santa.decode(q, k[:, :0], v[:, :0], **options)
    assert (out == 0).all() and (lse == -math.inf).all()


def assert_reads_one_row(out, value, kv_len, options):
    """All heads return the one value row with all of the mass: exactly, but systematic draws of a tile that expects x
    of them are x rounded up or down. Under the uniform budget x is S times the tile's part of the keys, no whole
    number; else it is S."""
    factors = [1.0]
    if (options["sampler"], options["budget"]) == ("systematic", "uniform"):
        x = options["num_samples"] * reference.tile_kv(kv_len) / kv_len
        factors = [math.floor(x) / x, math.ceil(x) / x]
    for head in out:
        torch.testing.assert_close(head, min((value * f for f in factors), key=head.dist), rtol=1e-3, atol=1e-5)


def test_all_mass_on_one_key(device, options):
    """One key holds all probability: every estimator returns its value row, but for rounding."""
    q, k, v = make_qkv(1, 4, 1, 2000, 64, dtype=working_dtype(device), device=device)
    k = k * 0.01
    k[0, 1234, 0] = q[0].mean(dim=0) * 200
    q[:] = q[0].mean(dim=0)
    q *= 20
    out, _, rows = santa.decode(q, k, v, return_rows_read=True, **options)
    p, _, _ = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu())
    assert p[0, 0, 1234] > 1 - 1e-12
    assert_reads_one_row(out[0], v[0, 1234, 0], 2000, options)
    if options["num_samples"] and options["budget"] == "proportional":
        assert rows.item() == 1


def test_uniform_mass(device, options):
    """Equal keys: all rows weigh the same and none is preferred."""
    q, k, v = make_qkv(1, 4, 1, 1024, 64, dtype=working_dtype(device), device=device)
    k[:] = k[:, :1]
    out, lse, rows = santa.decode(q, k, v, return_rows_read=True, **options)
    scores = (q[0].double() @ k[0, 0, 0].double()) / 8
    torch.testing.assert_close(lse[0].double(), scores + math.log(1024), rtol=1e-5, atol=1e-4)
    if options["num_samples"] and options["sampler"] in ("systematic", "stratified"):
        # A head draws one row of each 32 keys, wherever the others draw theirs: nearly four distinct ones of each 32.
        assert 96 <= rows.item() <= 128
        assert (out[0, 0] - out[0, 1]).abs().max() > 0
    if options["num_samples"] and options["sampler"] == "grouped":
        assert rows.item() == 128  # R = S * group equal strata, one row each


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_extreme_logits(device, options, magnitude):
    """Logits of +-1e4 neither overflow nor lose the maximum."""
    q, k, v = make_qkv(1, 4, 1, 600, 64, dtype=working_dtype(device), device=device)
    q[:] = 1.0
    k[:] = 0.0
    k[0, :, 0, 0] = 1.0
    k[0, ::2, 0, 0] = -1.0
    k[0, 77, 0, 0] = 2.0
    out, lse = santa.decode(q, k, v, sm_scale=magnitude, **options)
    assert_reads_one_row(out[0], v[0, 77, 0], 600, options)
    torch.testing.assert_close(lse, torch.full_like(lse, 2 * magnitude), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_past_the_end_are_never_read(device, options, bad):
    q, k, v = make_qkv(2, 4, 2, 900, 64, dtype=working_dtype(device), device=device)
    kv_lens = torch.tensor([300, 129], dtype=torch.int32, device=device)
    expected = santa.decode(q, k, v, kv_lens=kv_lens, **options)
    for b in range(2):
        k[b, kv_lens[b] :] = bad
        v[b, kv_lens[b] :] = bad
    for actual, clean in zip(santa.decode(q, k, v, kv_lens=kv_lens, **options), expected, strict=True):
        assert torch.equal(actual, clean)


def test_nan_inside_stays_in_its_heads(device, options):
    """A NaN query head gives NaN for that head alone; the other heads of its group are as they would be."""
    q, k, v = make_qkv(1, 8, 2, 500, 64, dtype=working_dtype(device), device=device)
    q[0, 2] = float("nan")
    out, lse = santa.decode(q, k, v, **options)
    others = [h for h in range(8) if h != 2]
    assert out[0, 2].isnan().all() and lse[0, 2].isnan()
    assert torch.isfinite(out[0, others]).all() and torch.isfinite(lse[0, others]).all()
    kv = [x.cpu()[:, :, :1] for x in (k, v)]
    expected, _ = reference.exact(q[:, [0, 1, 3]].cpu(), *kv)
    assert relative_rms(out[0, [0, 1, 3]], expected[0]) < 1.0


def test_nan_key_shows(device, options):
    """A NaN among the valid keys makes the output NaN, as it does in dense attention: nothing hides it."""
    q, k, v = make_qkv(1, 4, 1, 500, 64, dtype=working_dtype(device), device=device)
    k[0, 400] = float("nan")
    out, lse = santa.decode(q, k, v, **options)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.gpu
def test_more_than_2_to_31_elements():
    """Offsets are 64-bit: the last rows of a cache of 2^31 + elements."""
    batch, kv_len, heads, head_dim = 3, 1 << 20, 8, 128
    k = torch.zeros(batch, kv_len, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    assert k.numel() > 2**31
    v = torch.zeros_like(k)
    q = torch.randn(batch, heads * 4, head_dim, dtype=torch.bfloat16, device="cuda")
    k[:, -1] = q.unflatten(1, (heads, 4)).mean(dim=2) * 40
    v[:, -1] = torch.randn(batch, heads, head_dim, device="cuda").bfloat16()
    v[:, -2] = float("nan")
    kv_lens = torch.full((batch,), kv_len, dtype=torch.int32, device="cuda")
    q = q.unflatten(1, (heads, 4)).mean(dim=2, keepdim=True).expand(-1, -1, 4, -1).flatten(1, 2).contiguous()
    for budget in BUDGETS:
        out, _, rows = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=64, budget=budget, return_rows_read=True)
        expected = v[:, -1].repeat_interleave(4, dim=1)
        if budget == "uniform":  # the last tile expects 64 * 4 * 128 / 2^20 = 1/32 of a draw
            enters = out.norm(dim=-1, keepdim=True) > 0
            assert torch.equal(out, torch.where(enters, 32 * expected, 0.0))
        else:
            assert torch.equal(out, expected)
        # Tiles without mass have their part of the draws in one pass: uniform all of it, streaming a quarter.
        assert (rows == 1).all() if budget == "proportional" else ((rows >= 1) & (rows <= 64 * 4 + 1)).all()


@pytest.mark.gpu
def test_long_rows():
    """4,194,304 keys in one row: thousands of tiles, uniform mass, exact log-sum-exp."""
    kv_len = 1 << 22
    q = torch.ones(1, 4, 64, dtype=torch.bfloat16, device="cuda")
    k = torch.zeros(1, kv_len, 1, 64, dtype=torch.bfloat16, device="cuda")
    v = torch.ones(1, kv_len, 1, 64, dtype=torch.bfloat16, device="cuda")
    for budget in BUDGETS:
        out, lse, rows = santa.decode(q, k, v, num_samples=512, budget=budget, return_rows_read=True)
        # Each streaming tile draws by itself, one row in sixteen tiles here: 2,048 rows are 45 more or less.
        slack = 0.15 if budget == "streaming" else 1e-2
        torch.testing.assert_close(out, torch.ones_like(out), rtol=slack, atol=0)
        assert abs(rows.item() - 2048) <= (0.15 * 2048 if budget == "streaming" else 1)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(kv_len)), rtol=1e-6, atol=0)
