"""Proposal keys with inputs that break careless kernels, and inside PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.inputs import make_qkv, working_dtype
from helpers.paged import PagedCache, assert_same_bits
from helpers.statistics import relative_rms

import santa
from santa import reference

NAN = float("nan")


def inputs(device, batch=2, kv_len=900, group=2):
    q, k, v = make_qkv(batch, 2 * group, 2, kv_len, 64, dtype=working_dtype(device), device=device)
    return q, k, v, santa.make_proposal_keys(k)


def decode(q, k, v, proposal, **options):
    options = {"num_samples": 32, "min_sampled_len": 0} | options
    return santa.decode(q, k, v, proposal=proposal, **options)


@pytest.mark.parametrize("kv_len", [1, 2, 64, 65, 127, 128, 129, 255, 256, 257, 4097])
def test_short_and_odd_lengths(device, kv_len):
    """Near exact attention, and equal to it for one key, of which the codes say nothing: center is the key."""
    q, k, v, proposal = inputs(device, batch=1, kv_len=kv_len)
    out, lse = decode(q, k, v, proposal, num_samples=128)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    assert torch.isfinite(out).all()
    assert (lse.double().cpu() - expected_lse).abs().max() < (1e-4 if kv_len <= 2 else 0.1)
    assert relative_rms(out, expected) < (2e-3 if kv_len <= 2 else 0.3)


def test_empty_rows_and_batches(device):
    q, k, v, proposal = inputs(device)
    kv_lens = torch.tensor([0, 300], dtype=torch.int32, device=device)
    out, lse, rows = decode(q, k, v, proposal, kv_lens=kv_lens, return_rows_read=True)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and (rows[0] == 0).all()
    assert torch.isfinite(out[1]).all() and torch.isfinite(lse[1]).all()
    out, lse = decode(q[:0], k[:0], v[:0], santa.make_proposal_keys(k[:0]))
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
    out, lse = decode(q, k[:, :0], v[:, :0], santa.make_proposal_keys(k[:, :0]))
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_nothing_past_the_end_is_read(device, bad):
    """Not of k or v, and not of codes or scales."""
    q, k, v, proposal = inputs(device)
    lens = torch.tensor([300, 129], dtype=torch.int32, device=device)
    starts = torch.tensor([7, 0], dtype=torch.int32, device=device)
    spans = {"kv_lens": lens, "kv_starts": starts}
    expected = decode(q, k, v, proposal, **spans)
    scales = proposal.scales.clone()
    for b in range(2):
        for outside in (slice(0, int(starts[b])), slice(int(starts[b] + lens[b]), None)):
            k[b, outside], v[b, outside], scales[b, outside] = bad, bad, bad
    assert_same_bits(decode(q, k, v, replace(proposal, scales=scales), **spans), expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_nothing_beside_a_rows_pages_is_read(device, layout):
    """Scales of other pages, and of the rest of the last one, are NaN; other entries of the table are no pages."""
    q, k, v, _ = inputs(device)
    lens = [300, 129]
    cache = PagedCache(k, v, 16, lens=lens, layout=layout)
    pages = santa.make_proposal_keys(cache.k_cache, cache.int32(lens), page_table=cache.table, kv_layout=layout)
    options = {"num_samples": 32, "min_sampled_len": 0}
    expected = cache.decode(q, proposal=pages, **options)
    scales = pages.scales if layout == "NHD" else pages.scales.transpose(1, 2)
    kept = torch.zeros(scales.shape[:2], dtype=torch.bool, device=device)
    for b in range(2):
        n = torch.arange(lens[b], device=device)
        kept[cache.table[b].long()[n // 16], n % 16] = True
    scales[~kept] = NAN
    assert_same_bits(cache.decode(q, proposal=pages, **options), expected)
    assert torch.isfinite(expected[0]).all()


def test_nan_query_stays_in_its_head(device):
    q, k, v, proposal = inputs(device)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    q[0, 1] = NAN
    out, lse = decode(q, k, v, proposal)
    others = [0, 2, 3]
    assert out[0, 1].isnan().all() and lse[0, 1].isnan()
    assert torch.isfinite(out[0, others]).all() and torch.isfinite(out[1]).all()
    assert (lse[0, others].double().cpu() - expected_lse[0, others]).abs().max() < 0.3
    assert relative_rms(out[0, others], expected[0, others]) < 0.5


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_key_that_is_not_finite_shows(device, bad):
    """In its codes, whether it is drawn or not; and if it came there after them, where it is drawn, as it does in exact
    attention."""
    q, k, v, clean = inputs(device)
    k[0, 400, 0, 3] = bad
    statistics = {"center": clean.center, "channel_scale": clean.channel_scale}
    out, lse = decode(q, k, v, santa.make_proposal_keys(k, **statistics))
    assert out[0, :2].isnan().all() and lse[0, :2].isnan().all()
    assert torch.isfinite(out[0, 2:]).all() and torch.isfinite(out[1]).all()
    out, lse = decode(q, k, v, clean, num_samples=16 * 900)
    expected, expected_lse = santa.decode(q, k, v, num_samples=0)
    assert torch.equal(torch.isfinite(out), torch.isfinite(expected)) and not torch.isfinite(expected[0, :2]).all()
    assert torch.equal(torch.isfinite(lse), torch.isfinite(expected_lse))


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_extreme_logits(device, magnitude):
    """Logits of +-1e4 neither overflow nor lose the maximum, which has all of the mass."""
    q, k, v, _ = inputs(device, batch=1, kv_len=600)
    q[:], k[:] = 1.0, 0.0
    k[0, :, :, 0] = 1.0
    k[0, ::2, :, 0] = -1.0
    k[0, 77, :, 0] = 2.0
    out, lse = decode(q, k, v, santa.make_proposal_keys(k), sm_scale=magnitude)
    torch.testing.assert_close(out[0].unflatten(0, (2, 2)), v[0, 77, :, None].expand(2, 2, 64), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, 2 * magnitude), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_samples", [32, 16 * 600])
def test_exact_logits_far_above_those_of_the_codes(device, num_samples):
    """By thousands, of a key that the codes take for any other: sums are relative to what is drawn, too. Exact where
    the floor draws every key."""
    q, k, v, _ = inputs(device, batch=1, kv_len=600)
    q[:], k[:] = 1.0, 0.0
    proposal = santa.make_proposal_keys(k)
    k[0, 77, :, 0] = 2.0
    for seed in range(8):
        out, lse = decode(q, k, v, proposal, sm_scale=1e4, num_samples=num_samples, seed=seed)
        assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        if num_samples > 32:
            value = v[0, 77, :, None].expand(2, 2, 64)
            torch.testing.assert_close(out[0].unflatten(0, (2, 2)), value, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(lse, torch.full_like(lse, 2e4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [0.0, 6e-8, 1.0, 100.0, 65504.0])
def test_garbage_codes_give_finite_results(device, scale):
    """Whatever bytes are taken for codes, and scales up to the largest float16: finite, at most twice the largest
    value."""
    q, k, v, proposal = inputs(device, batch=1)
    noise = torch.randint(0, 256, proposal.codes.shape, generator=torch.Generator().manual_seed(0))
    garbage = replace(
        proposal, codes=noise.to(proposal.codes), scales=torch.full_like(proposal.scales, scale).contiguous()
    )
    for seed in range(8):
        out, lse = decode(q, k, v, garbage, seed=seed)
        assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        assert out.abs().max() <= 2 * v.abs().max()


# Inside PyTorch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    q, k, v, proposal = inputs(device)
    options = {"kv_lens": torch.tensor([900, 300], dtype=torch.int32, device=device), "num_samples": 32, "seed": 3}
    options |= proposal.tensors() | {"min_sampled_len": 0}
    if requires_grad:
        q.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # that check runs a backward pass where a gradient is required
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.santa.decode_proposal.default, (q, k, v), options, test_utils=checks)
    if not requires_grad:
        given = (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32))
        torch.library.opcheck(torch.ops.santa.decode_proposal_out.default, (*given, q, k, v), options)


def test_opcheck_paged(device):
    q, k, v, _ = inputs(device)
    cache = PagedCache(k.nan_to_num(), v, 16, lens=[300, 129])
    pages = santa.make_proposal_keys(cache.k_cache, cache.int32([300, 129]), page_table=cache.table)
    options = {"page_table": cache.table, "kv_lens": cache.int32([300, 129]), "min_sampled_len": 0}
    options |= pages.tensors()
    caches = cache.k_cache.nan_to_num(), cache.v_cache.nan_to_num()
    torch.library.opcheck(torch.ops.santa.decode_proposal_paged.default, (q, *caches), options)
    given = (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32))
    torch.library.opcheck(torch.ops.santa.decode_proposal_paged_out.default, (*given, q, *caches), options)


def test_opcheck_append(device):
    _, k, _, proposal = inputs(device)
    positions = torch.tensor([[0, 5], [-1, 899]], device=device)
    arguments = (*proposal.tensors().values(), k[:, :2].contiguous(), positions)
    torch.library.opcheck(torch.ops.santa.append_proposal_keys.default, arguments)


def test_compile_fullgraph(device):
    """A decode step: append the new key, then attend; codes and scales are written in place."""
    q, k, v, proposal = inputs(device, kv_len=300)
    new = torch.randn(2, 1, 2, 64, device=device).to(k.dtype)
    positions = torch.tensor([[10], [299]], device=device)

    def step(q, k, v, codes, scales, new, positions):
        own = santa.ProposalKeys(codes, scales, proposal.center, proposal.channel_scale)
        santa.append_proposal_keys(own, new * 2, positions)
        lens = (positions[:, 0] + 1).int()
        return decode(q, k, v, own, kv_lens=lens, return_rows_read=True)

    caches = [[proposal.codes.clone(), proposal.scales.clone()] for _ in range(2)]
    eager = step(q, k, v, *caches[0], new, positions)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, *caches[1], new, positions)
    assert_same_bits(caches[1], caches[0])
    assert not torch.equal(caches[0][0], proposal.codes)
    assert_same_bits(compiled, eager)


@pytest.mark.gpu
def test_cuda_graph_follows_its_inputs():
    """A captured step, replayed: the new key's place, the lengths, and with them the draws, are those of the replay."""
    q, k, v, proposal = inputs("cuda", kv_len=900)
    new = torch.randn(2, 1, 2, 64, device="cuda").to(k.dtype)
    positions = torch.tensor([[600], [700]], device="cuda")

    def step(own):
        santa.append_proposal_keys(own, new, positions)
        return decode(q, k, v, own, kv_lens=(positions[:, 0] + 1).int(), return_rows_read=True)

    own = replace(proposal, codes=proposal.codes.clone(), scales=proposal.scales.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(own)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(own)
    for places in ([[600], [700]], [[601], [899]], [[899], [300]]):
        positions.copy_(torch.tensor(places))
        own.codes.copy_(proposal.codes), own.scales.copy_(proposal.scales)
        graph.replay()
        found = [x.clone() for x in captured]
        codes, scales = own.codes.clone(), own.scales.clone()
        own.codes.copy_(proposal.codes), own.scales.copy_(proposal.scales)
        assert_same_bits(step(own), found)
        assert torch.equal(own.codes, codes) and torch.equal(own.scales, scales)


def test_autocast_leaves_the_proposal_alone(device):
    """q, k and v are cast; codes, scales and statistics are as they are."""
    q, k, v, proposal = inputs(device)
    expected = decode(*(x.to(torch.bfloat16) for x in (q, k, v)), proposal)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(decode(q, k, v, proposal), expected)
