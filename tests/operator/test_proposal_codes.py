"""Making and filling proposal keys: the oracle's codes to the bit, wherever keys lie and however they arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.inputs import HEAD_DIMS, dtypes_of, make_qkv
from helpers.paged import PagedCache, assert_same_bits

import santa
from santa import ProposalKeys
from santa import reference_proposal as oracle

pytestmark = pytest.mark.emulate

NAN = float("nan")
BATCH, HEADS = 2, 3


def keys_of(device, kv_len=70, head_dim=64, dtype=torch.float32, batch=BATCH):
    """Channels of different means and spreads."""
    _, k, _ = make_qkv(batch, HEADS, HEADS, kv_len, head_dim, seed=head_dim)
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(HEADS, head_dim, generator=generator) * 3 + 0.1
    mean = torch.randn(HEADS, head_dim, generator=generator) * 4
    return (k * spread + mean).to(device, dtype)


def assert_codes(proposal: ProposalKeys, k, where=...) -> None:
    """The codes of keys k, NHD, at `where` of their first two dimensions."""
    center, channel_scale = proposal.center[:, None].cpu(), proposal.channel_scale[:, None].cpu()
    codes, scales = oracle.quantise(k.cpu(), center, channel_scale)
    nhd = [x.transpose(1, 2) if proposal.kv_layout == "HND" else x for x in (proposal.codes, proposal.scales)]
    assert torch.equal(nhd[0].cpu()[where], oracle.pack(codes)[where])
    assert torch.equal(nhd[1].cpu()[where].view(torch.int16), scales[where].view(torch.int16))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_codes_to_the_bit(device, head_dim, layout):
    for dtype in [*dtypes_of(device), torch.float8_e4m3fn]:
        k = keys_of(device, head_dim=head_dim, dtype=dtype)
        given = k.transpose(1, 2).contiguous() if layout == "HND" else k
        proposal = santa.make_proposal_keys(given, kv_layout=layout)
        assert proposal.codes.shape == (*given.shape[:-1], head_dim // 2) and proposal.scales.shape == given.shape[:-1]
        assert proposal.center.shape == proposal.channel_scale.shape == (BATCH, HEADS, head_dim)
        assert_codes(proposal, k)


def test_keys_of_any_magnitude(device):
    """Scales that round to every kind of float16, subnormal numbers and ties among them; codes that are clamped, as a
    scale is rounded; a key that is its center."""
    magnitudes = 10.0 ** torch.linspace(-12, 7, 400)
    k = torch.randn(1, 400, 1, 64, generator=torch.Generator().manual_seed(2)) * magnitudes[None, :, None, None]
    k[0, 0] = 0.0
    k[0, 1] = 7 * (1 + 2.0**-11)  # a tie of float16
    k[0, 2] = 7 * 2.0**-25  # half the smallest one
    k[0, 3] = 7 * 3 * 2.0**-25
    k[0, 4] = 7 * 65519.0
    k[0, 5, 0, :] = torch.arange(64) % 8 - 3.5
    k[0, 5, 0, 0] = 7.0
    one = torch.ones(1, 1, 64)
    proposal = santa.make_proposal_keys(k.to(device), center=0 * one.to(device), channel_scale=one.to(device))
    assert_codes(proposal, k)
    codes = oracle.unpack(proposal.codes.cpu())
    assert codes.min() == -8 and codes.max() == 7
    assert proposal.scales[0, 0] == 0 and (codes[0, 0] == 0).all()
    assert proposal.scales.max() == 65504 and (proposal.scales[0, 1:].float() > 0).sum() > 200


def test_decoded_keys_are_near(device):
    """codes scale channel_scale + center is the key, to half a step."""
    k = keys_of(device).cpu()
    proposal = santa.make_proposal_keys(k.to(device))
    center, channel_scale = proposal.center[:, None].cpu(), proposal.channel_scale[:, None].cpu()
    step = proposal.scales.cpu().float()[..., None] * channel_scale
    decoded = oracle.unpack(proposal.codes.cpu()) * step + center
    assert ((decoded - k).abs() <= 0.505 * step + 1e-6).all()


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_key_that_is_not_finite(device, bad):
    """Its scale is NaN and its codes are 0; those of others are as they would be."""
    k = keys_of(device)
    clean = santa.make_proposal_keys(k)
    k[1, 7, 2, 63] = bad
    proposal = santa.make_proposal_keys(k, center=clean.center, channel_scale=clean.channel_scale)
    assert_codes(proposal, k)
    assert proposal.scales.isnan().sum() == 1 and proposal.scales[1, 7, 2].isnan()
    assert (proposal.codes[1, 7, 2] == 0x88).all()


def test_statistics(device):
    """Mean and square root of the standard deviation, of the valid keys alone, of each row or of all of them."""
    k = keys_of(device)
    lens, starts = torch.tensor([60, 33]), torch.tensor([5, 30])
    for b in range(BATCH):
        k[b, : starts[b]], k[b, starts[b] + lens[b] :] = NAN, float("inf")
    valid = [k[b, starts[b] : starts[b] + lens[b]].double().cpu() for b in range(BATCH)]
    spans = {"kv_lens": lens.int().to(device), "kv_starts": starts.int().to(device)}
    for shared in (False, True):
        proposal = santa.make_proposal_keys(k, **spans, shared=shared)
        samples = [torch.cat(valid)] if shared else valid
        for b, keys in enumerate(samples):
            torch.testing.assert_close(proposal.center[b].double().cpu(), keys.mean(dim=0), rtol=1e-5, atol=1e-5)
            scale = keys.std(dim=0, correction=0).sqrt()
            torch.testing.assert_close(proposal.channel_scale[b].double().cpu(), scale, rtol=1e-5, atol=1e-5)
        assert proposal.center.shape[0] == len(samples)
        for b in range(BATCH):
            span = (slice(b, b + 1), slice(int(starts[b]), int(starts[b] + lens[b])))
            own = slice(0, 1) if shared else slice(b, b + 1)
            one = replace(proposal, center=proposal.center[own], channel_scale=proposal.channel_scale[own])
            row = replace(one, codes=one.codes[b : b + 1], scales=one.scales[b : b + 1])
            assert_codes(row, k[b : b + 1], (slice(None), span[1]))
            outside = torch.ones(70, dtype=torch.bool)
            outside[span[1]] = False
            assert (row.codes[0, outside] == 0).all() and (row.scales[0, outside] == 0).all()


def test_channels_that_do_not_vary(device):
    """One key, none, or equal ones: channel_scale 1. One channel among others that vary: 1/64 of the largest."""
    k = keys_of(device)
    lens = torch.tensor([1, 0], dtype=torch.int32, device=device)
    proposal = santa.make_proposal_keys(k, lens)
    assert (proposal.channel_scale == 1).all()
    assert torch.equal(proposal.center[0], k[0, 0]) and (proposal.center[1] == 0).all()
    k[..., 5] = 3.0
    proposal = santa.make_proposal_keys(k)
    torch.testing.assert_close(
        proposal.channel_scale[..., 5], proposal.channel_scale.amax(dim=-1) / 64, rtol=1e-5, atol=0
    )
    assert torch.isfinite(proposal.scales).all()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_append_is_make(device, layout, integers):
    """A prefill and then key by key, in any order: the bits of making all at once with the same statistics."""
    k = keys_of(device)
    given = k.transpose(1, 2).contiguous() if layout == "HND" else k
    lens = torch.tensor([40, 20], dtype=torch.int32, device=device)
    proposal = santa.make_proposal_keys(given, lens, kv_layout=layout)
    statistics = {"center": proposal.center, "channel_scale": proposal.channel_scale}
    whole = santa.make_proposal_keys(given, kv_layout=layout, **statistics)
    assert not torch.equal(proposal.codes, whole.codes)
    before = [x.clone() for x in proposal.tensors().values()]
    nothing = torch.full((BATCH, 5), -1, dtype=integers, device=device)
    santa.append_proposal_keys(proposal, k[:, :5] * NAN, nothing)
    assert_same_bits(list(proposal.tensors().values()), before)
    for step in range(50):
        positions = (lens[:, None] + step).to(integers)
        new = torch.stack([k[b, min(int(positions[b, 0]), 69)] for b in range(BATCH)])[:, None]
        positions = torch.where(positions < 70, positions, -3)
        santa.append_proposal_keys(proposal, new, positions)
    assert_same_bits(list(proposal.tensors().values()), list(whole.tensors().values()))


def test_strides(device):
    """Keys and codes that are views."""
    k = keys_of(device)
    expected = santa.make_proposal_keys(k)
    holder = torch.zeros(BATCH, HEADS, 140, 2 * 64, dtype=k.dtype, device=device)
    view = holder[:, :, ::2, 64:].transpose(1, 2)
    view.copy_(k)
    assert_same_bits(list(santa.make_proposal_keys(view).tensors().values()), list(expected.tensors().values()))
    codes = torch.zeros(BATCH, HEADS, 140, 64, dtype=torch.uint8, device=device)[:, :, ::2, 32:].transpose(1, 2)
    scales = torch.zeros(HEADS, 70, BATCH, dtype=torch.float16, device=device).permute(2, 1, 0)
    proposal = replace(expected, codes=codes, scales=scales)
    positions = torch.arange(70, device=device).expand(BATCH, 70).contiguous()
    santa.append_proposal_keys(proposal, k, positions)
    assert torch.equal(codes, expected.codes) and torch.equal(scales, expected.scales)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_pages(device, layout, page_size):
    """Pages hold the codes that a contiguous cache with the same statistics has, also where rows share a page; what no
    row has is not read. Appending by slot fills them alike."""
    k = keys_of(device)
    lens, starts = [50, 33], [3, 16]
    cache = PagedCache(k, k, page_size, lens=lens, starts=starts, layout=layout)
    spans = {"kv_lens": cache.int32(lens), "kv_starts": cache.int32(starts)}
    pages = santa.make_proposal_keys(cache.k_cache, page_table=cache.table, kv_layout=layout, **spans)
    rows = santa.make_proposal_keys(k, **spans, shared=True)
    torch.testing.assert_close(pages.center, rows.center)
    torch.testing.assert_close(pages.channel_scale, rows.channel_scale)
    statistics = {"center": pages.center, "channel_scale": pages.channel_scale}
    rows = santa.make_proposal_keys(k, **spans, **statistics)
    by_slot = replace(
        pages, codes=torch.full_like(pages.codes, 7), scales=torch.full_like(pages.scales, NAN)
    )  # as an engine does: one list of tokens
    tokens, slots = [], []
    for b in range(BATCH):
        for n in range(starts[b], starts[b] + lens[b]):
            page, offset = int(cache.table[b, n // page_size]), n % page_size
            at = (page, offset) if layout == "NHD" else (page, slice(None), offset)
            assert torch.equal(pages.codes[at], rows.codes[b, n]) and torch.equal(pages.scales[at], rows.scales[b, n])
            tokens.append(k[b, n]), slots.append(page * page_size + offset)
    tokens, slots = torch.stack(tokens)[None], torch.tensor(slots, device=device)[None]
    santa.append_proposal_keys(by_slot, tokens, slots=slots)
    nhd = [(x.codes, x.scales) if layout == "NHD" else (x.codes.transpose(1, 2), x.scales.transpose(1, 2))
           for x in (by_slot, pages)]  # fmt: skip
    written = torch.zeros(nhd[0][1].shape[:2], dtype=torch.bool, device=device)
    written[slots[0] // page_size, slots[0] % page_size] = True
    for ours, theirs in zip(*nhd, strict=True):
        assert torch.equal(ours[written], theirs[written])
    assert (nhd[0][0][~written] == 7).all() and nhd[0][1][~written].isnan().all()
    assert (nhd[1][0][~written] == 0).all() and (nhd[1][1][~written] == 0).all()


def test_nothing_is_written_where_a_place_is_not_there(device):
    """The CPU says so; CUDA, which does not wait to look, leaves such keys out."""
    k = keys_of(device)
    proposal = santa.make_proposal_keys(k)
    before = [x.clone() for x in proposal.tensors().values()]
    positions = torch.tensor([[-1, -1], [-1, 70]], device=device)
    shared = santa.make_proposal_keys(k, shared=True)
    of_shared = [x.clone() for x in shared.tensors().values()]
    slots = torch.tensor([[-1, 140]], device=device)
    if device == "cpu":
        match = r"santa: positions of row 1 has 70; it needs to be below 70, or negative for a key that is left out"
        with pytest.raises(ValueError, match=match):
            santa.append_proposal_keys(proposal, k[:, :2] * 2, positions)
        with pytest.raises(ValueError, match=match):
            santa.append_proposal_keys(proposal, k[:, :2] * 2, torch.tensor([[3, 4], [5, 70]]))
        with pytest.raises(ValueError, match="santa: slots of row 0 has 140; it needs to be below 140"):
            santa.append_proposal_keys(shared, k[:1, :2], slots=slots)
    else:
        santa.append_proposal_keys(proposal, k[:, :2] * 2, positions)
        santa.append_proposal_keys(shared, k[:1, :2] * 2, slots=slots)
    assert_same_bits(list(proposal.tensors().values()), before)
    assert_same_bits(list(shared.tensors().values()), of_shared)


def test_empty(device):
    """No rows, no keys, no pages."""
    k = keys_of(device)
    assert santa.make_proposal_keys(k[:0]).codes.shape == (0, 70, HEADS, 32)
    proposal = santa.make_proposal_keys(k[:, :0])
    assert proposal.codes.shape == (BATCH, 0, HEADS, 32) and (proposal.channel_scale == 1).all()
    santa.append_proposal_keys(santa.make_proposal_keys(k), k[:, :0], torch.zeros(BATCH, 0, device=device).long())
