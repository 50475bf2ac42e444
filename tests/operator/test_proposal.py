"""Decoding with proposal keys: the oracle's results given the same draws, exact ones where everything is drawn, and the
same bits from the same inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.float8 import on_cpu, quantised
from helpers.inputs import make_qkv, num_threads, working_dtype
from helpers.paged import FORMS, STORAGES, PagedCache, assert_same_bits
from helpers.proposal import all_rows, problem, rows_of, selected, spoiled
from helpers.statistics import relative_rms

import santa
from santa import reference
from santa import reference_proposal as oracle
from santa.integrations.vllm.cache import LayerCodes, bytes_of_codes, layer_cache

# Of a boundary between two keys, in draws: exponentials are off by 2^-22 of themselves, and a tile has tens of draws.
ROUNDING = 1e-5
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def batch_of(device, *, group=4, kv_len=1300, head_dim=64, dtype=None, layout="NHD", seed=0):
    """Three rows of two KV heads, and what says which of their keys there are."""
    dtype = working_dtype(device) if dtype is None else dtype
    q, k, v = make_qkv(
        3, 2 * group, 2, kv_len, head_dim, dtype=dtype, device=device, layout=layout, logit_std=1.5, seed=seed
    )
    spans = {
        "kv_lens": torch.tensor([kv_len, 700, 129], dtype=torch.int32, device=device),
        "row_seeds": torch.tensor([5, -6, 7], device=device),
    }
    return q, k, v, spans


def closest_threshold(of_row, num_samples, **stream):
    """Of all KV heads of a row: see oracle.Row."""
    return min(row.closest_threshold(num_samples, kv_head=i, **stream) for i, row in enumerate(of_row))


def decode(q, k, v, proposal, **options):
    options = {"num_samples": 64, "min_sampled_len": 0, "return_rows_read": True} | options
    return santa.decode(q, k, v, proposal=proposal, **options)


# The operator against the oracle ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "group, head_dim", [(1, 64), (2, 96), (3, 128), (4, 128), (5, 192), (8, 256), (12, 64), (16, 64)]
)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_given_the_draws(device, group, head_dim, layout):
    """out, lse and rows_read are those of the oracle, which makes the same draws; rows of a start of their own. But for
    rows with a threshold within rounding of a boundary between two keys: they are few."""
    compared = 0
    for dtype in [torch.float16, torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]:
        q, k, v, spans = batch_of(device, group=group, head_dim=head_dim, dtype=dtype, layout=layout, seed=group)
        spans["kv_lens"][0] -= 17
        spans["kv_starts"] = torch.tensor([17, 5, 0], dtype=torch.int32, device=device)
        proposal = santa.make_proposal_keys(
            k, spans["kv_lens"], kv_starts=spans["kv_starts"], kv_layout=layout, shared=group % 2 == 0
        )
        out, lse, rows = decode(q, k, v, proposal, **spans, seed=9, kv_layout=layout)
        if layout == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            codes, scales = proposal.codes.transpose(1, 2), proposal.scales.transpose(1, 2)
            proposal = replace(proposal, codes=codes, scales=scales)
        for b in range(3):
            span = {"kv_start": int(spans["kv_starts"][b]), "kv_len": int(spans["kv_lens"][b])}
            of_row, stream = rows_of(q, k, v, proposal, b, **span), {"seed": 9, "row_seed": int(spans["row_seeds"][b])}
            expected, expected_lse, expected_rows = oracle.decode(of_row, 64, **stream)
            if closest_threshold(of_row, 64, position=span["kv_len"], **stream) < ROUNDING:
                continue
            compared += 1
            assert torch.equal(rows[b].cpu(), expected_rows)
            assert relative_rms(out[b], expected) < TOLERANCE[dtype]
            assert (lse[b].double().cpu() - expected_lse).abs().max() < 2e-5
    assert compared >= 4


@pytest.mark.parametrize("codes", ["random", "constant", "scale 0"])
def test_given_the_draws_of_bad_codes(device, codes):
    """Where the guard acts as well."""
    given = problem(device, codes, logit_std=2.0)
    guarded = compared = 0
    out, lse, rows = given.draws(40, num_samples=32, return_rows_read=True)
    for b in range(40):
        drawn = given.row.draw(32, seed=0, row_seed=b, position=given.k.shape[1], kv_head=0)
        _, z, plain = given.row.estimate(drawn, 32)
        guarded += int((z < plain / 2).sum())
        expected, expected_lse, expected_rows = oracle.decode([given.row], 32, row_seed=b)
        if closest_threshold([given.row], 32, seed=0, row_seed=b, position=given.k.shape[1]) < ROUNDING:
            continue
        compared += 1
        assert rows[b].item() == expected_rows.item()
        assert relative_rms(out[b], expected) < (1e-4 if device == "cpu" else 2e-3)
        assert (lse[b].double().cpu() - expected_lse).abs().max() < 1e-4
    assert guarded > 0 or codes != "random"
    assert compared >= 20


# Everything drawn: exact, whatever the codes ---------------------------------------------------------------


def quiet(proposal):
    """Its logits no larger than those of the keys: float32 sums lose what is below their largest terms."""
    return replace(proposal, scales=proposal.scales / 3)


def assert_exact_if_all_is_drawn(q, k, v, proposal, **options):
    reading = {name: x for name, x in options.items() if name not in ("seed", "row_seeds", "positions")}
    named = {name: x for name, x in reading.items() if isinstance(x, torch.Tensor)}
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu(), **reading | on_cpu(**named))
    out, lse, rows = decode(q, k, v, proposal, num_samples=all_rows(1300), **options)
    assert relative_rms(out, expected) < TOLERANCE[q.dtype]
    finite = torch.isfinite(expected_lse)
    assert (lse.double().cpu() - expected_lse)[finite].abs().max() < 2e-5
    assert torch.equal(lse.cpu()[~finite].double(), expected_lse[~finite])
    return rows


FEATURES = {
    "plain": {},
    "soft cap": {"logits_soft_cap": 2.0},
    "window": {"window_left": 300},
    "sinks": {"sinks": True},
    "scale": {"sm_scale": 0.3},
    "all of them": {"logits_soft_cap": 3.0, "window_left": 400, "sinks": True, "sm_scale": 0.2},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_everything_drawn_is_exact(device, name, q_len):
    """With so many samples that the floor draws every key, the sums are those of exact attention, of random codes too:
    soft cap, window, sinks, scale and several new tokens."""
    q, k, v, spans = batch_of(device)
    proposal = quiet(spoiled(santa.make_proposal_keys(k), "random"))
    options = dict(FEATURES[name]) | {"kv_lens": spans["kv_lens"]}
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2, 8, q.shape[1], device=device)
    if q_len > 1:
        q = torch.stack([q, q.flip(1), -q], dim=1)
    rows = assert_exact_if_all_is_drawn(q, k, v, proposal, **options)
    window = options.get("window_left", 1300) + q_len
    blocks = len(reference.head_blocks(4 * q_len))
    assert torch.equal(rows.cpu(), blocks * options["kv_lens"].cpu().clamp(max=window)[:, None].expand(3, 2))


@pytest.mark.sanitize
def test_features_when_sampled(device):
    """Window, soft cap, sinks and several tokens on few draws: near the exact result."""
    q, k, v, spans = batch_of(device)
    q = torch.stack([q, q.flip(1)], dim=1)
    options = {"kv_lens": spans["kv_lens"], "logits_soft_cap": 5.0, "window_left": 900}
    options["sinks"] = torch.zeros(8, device=device)
    proposal = santa.make_proposal_keys(k)
    expected, expected_lse = santa.decode(q, k, v, num_samples=0, **options)
    out, lse, rows = decode(q, k, v, proposal, num_samples=64, **options)
    assert relative_rms(out, expected) < 0.2 and (lse - expected_lse).abs().max() < 0.15
    assert (rows[0] < 900).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_float8(device, kind, layout):
    """K, or K and V, in float8: codes are of k as it is stored, and its scale multiplies all logits."""
    q, k, v, spans = batch_of(device, layout=layout)
    k, v, scales = quantised(kind, k, v, layout=layout)
    proposal = santa.make_proposal_keys(k, kv_layout=layout)
    options = {"kv_lens": spans["kv_lens"], "kv_layout": layout, **scales}
    assert_exact_if_all_is_drawn(q, k, v, quiet(spoiled(proposal, "random")), **options)
    _, exact_lse = santa.decode(q, k, v, num_samples=0, **options)
    _, lse, _ = decode(q, k, v, proposal, **options)
    assert (lse - exact_lse).abs().max() < 0.15


# Rows that are not sampled ---------------------------------------------------------------------------------


@pytest.mark.sanitize
def test_short_rows_are_exact(device):
    """Below min_sampled_len, and with num_samples = 0, the bits of decode without proposal keys; these are not read."""
    q, k, v, spans = batch_of(device)
    proposal = santa.make_proposal_keys(k)
    options = {"min_sampled_len": 701, **spans}
    out, lse, rows = decode(q, k, v, proposal, **options)
    nothing = replace(proposal, scales=torch.full_like(proposal.scales, float("nan")))
    exact = santa.decode(q, k, v, num_samples=0, kv_lens=spans["kv_lens"], return_rows_read=True)
    assert_same_bits([out[1:], lse[1:], rows[1:]], [x[1:] for x in exact])
    assert not torch.equal(out[0], exact[0][0]) and (rows[0] < 1300).all()
    assert_same_bits(decode(q, k, v, nothing, num_samples=0, **spans), exact)
    assert_same_bits(decode(q, k, v, nothing, min_sampled_len=None, **spans), exact)  # the default is 8,192 keys


# Same bits -------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
def test_repeated_alone_or_in_a_batch(device):
    q, k, v, spans = batch_of(device)
    proposal = santa.make_proposal_keys(k)
    together = decode(q, k, v, proposal, **spans)
    assert_same_bits(decode(q, k, v, proposal, **spans), together)
    order = [2, 0, 1]
    moved = {name: x[order] for name, x in spans.items()}
    permuted = decode(q[order], k[order], v[order], selected(proposal, order), **moved)
    assert_same_bits(permuted, [x[order] for x in together])
    for b in range(3):
        one = slice(b, b + 1)
        own = {name: x[one] for name, x in spans.items()}
        assert_same_bits(decode(q[one], k[one], v[one], selected(proposal, one), **own), [x[one] for x in together])


def test_layouts_padding_and_threads(device):
    q, k, v, spans = batch_of(device)
    proposal = santa.make_proposal_keys(k)
    expected = decode(q, k, v, proposal, **spans)
    hnd = replace(
        proposal, codes=proposal.codes.transpose(1, 2), scales=proposal.scales.transpose(1, 2), kv_layout="HND"
    )
    turned = [x.transpose(1, 2) for x in (k, v)]
    assert_same_bits(decode(q, *turned, hnd, kv_layout="HND", **spans), expected)
    wide = [torch.cat([x[:, :1].expand(-1, 33, *x.shape[2:]), x, x], dim=1) for x in (k, v)]
    codes = [torch.cat([x[:, :33], x, x], dim=1) for x in (proposal.codes, proposal.scales)]
    starts = torch.full((3,), 33, dtype=torch.int32, device=device)
    padded = replace(proposal, codes=codes[0], scales=codes[1])
    assert_same_bits(decode(q, *wide, padded, kv_starts=starts, **spans), expected)
    for count in (1, 3):
        with num_threads(count):
            assert_same_bits(decode(q, k, v, proposal, **spans), expected)


def test_heads_spread_over_devices(device):
    """first_kv_head: the second half of the heads by themselves."""
    q, k, v, spans = batch_of(device)
    proposal = santa.make_proposal_keys(k)
    expected = decode(q, k, v, proposal, **spans)
    second = slice(1, 2)
    half = replace(
        proposal,
        codes=proposal.codes[:, :, second],
        scales=proposal.scales[:, :, second],
        center=proposal.center[:, second].contiguous(),
        channel_scale=proposal.channel_scale[:, second].contiguous(),
    )
    out, lse, rows = decode(q[:, 4:], k[:, :, 1:], v[:, :, 1:], half, first_kv_head=1, **spans)
    assert_same_bits([out, lse, rows], [expected[0][:, 4:], expected[1][:, 4:], expected[2][:, 1:]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_pages(device, form, layout, page_size):
    """From pages the bits of a contiguous cache, by table and by lists; codes are laid out as the pages of k."""
    q, k, v, spans = batch_of(device)
    lens = spans["kv_lens"].tolist()
    cache = PagedCache(k, v, page_size, lens=lens, layout=layout, storage=STORAGES[1 if page_size == 16 else 0])
    pages = santa.make_proposal_keys(cache.k_cache, spans["kv_lens"], page_table=cache.table, kv_layout=layout)
    rows = santa.make_proposal_keys(k, spans["kv_lens"], center=pages.center, channel_scale=pages.channel_scale)
    expected = decode(q, k, v, rows, **spans)
    options = {"num_samples": 64, "min_sampled_len": 0, "row_seeds": spans["row_seeds"], "return_rows_read": True}
    if form == "csr":
        options["max_kv_len"] = 1300
    assert_same_bits(cache.decode(q, form=form, proposal=pages, **options), expected)
    out, lse = torch.full_like(expected[0], 7), torch.full_like(expected[1], 7)
    given = cache.decode(q, form=form, proposal=pages, out=out, lse=lse, **options)
    assert given[0] is out and given[1] is lse
    assert_same_bits((out, lse), expected[:2])


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_that_hold_their_codes(device, page_size, head_dim):
    """As in vLLM's cache: K, V, codes and scales of a page one after the other, the codes of a head side by side."""
    q, k, v, spans = batch_of(device, head_dim=head_dim)
    cache = PagedCache(k, v, page_size, lens=spans["kv_lens"].tolist(), storage=STORAGES[0])
    options = {"num_samples": 64, "min_sampled_len": 0, "row_seeds": spans["row_seeds"], "return_rows_read": True}
    pages, size = cache.k_cache.shape[0], k.element_size()
    values = page_size * 2 * head_dim
    page = 2 * values + bytes_of_codes(page_size, 2, head_dim) // size
    shape, strides = (pages, 2, page_size, 2, head_dim), (page, values, 2 * head_dim, head_dim, 1)
    vllm = torch.zeros(pages * page, dtype=k.dtype, device=device).as_strided(shape, strides)
    vllm[:, 0], vllm[:, 1] = cache.k_cache, cache.v_cache
    codes = LayerCodes(2, head_dim, k.device)
    codes.freeze(vllm, layer_cache(vllm, head_dim, k.dtype), k[0])
    held = codes.proposal(vllm)
    made = santa.make_proposal_keys(cache.k_cache, center=held.center, channel_scale=held.channel_scale)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}  # behind rows there is NaN
    torch.testing.assert_close((held.codes, held.scales), (made.codes, made.scales), **exact)
    expected = cache.decode(q, form="table", proposal=made, **options)
    got = santa.decode_paged(
        q, vllm[:, 0], vllm[:, 1], page_table=cache.table, kv_lens=spans["kv_lens"], proposal=held, **options
    )
    assert_same_bits(got, expected)
    # New keys, of which some go nowhere.
    new = torch.randn(1, 5, 2, head_dim, device=device).to(k)
    slots = torch.tensor([3, -1, page_size + 2, -1, 7], device=device)
    codes.write(vllm, new[0], slots)
    santa.append_proposal_keys(made, new, slots=slots[None])
    torch.testing.assert_close((held.codes, held.scales), (made.codes, made.scales), **exact)
    torch.testing.assert_close((vllm[:, 0], vllm[:, 1]), (cache.k_cache, cache.v_cache), **exact)


def test_given_outputs(device):
    q, k, v, spans = batch_of(device)
    proposal = santa.make_proposal_keys(k)
    expected = decode(q, k, v, proposal, **spans)
    out, lse = torch.full_like(expected[0], 7), torch.full_like(expected[1], 7)
    given = decode(q, k, v, proposal, out=out, lse=lse, **spans)
    assert given[0] is out and given[1] is lse
    assert_same_bits(given, expected)


def test_v_of_another_head_dim(device):
    """v is padded as without proposal keys; a q that is narrower than a padded cache as well."""
    q, k, v, spans = batch_of(device)
    proposal = santa.make_proposal_keys(k)
    expected = decode(q, k, v, proposal, **spans)
    with pytest.warns(santa.PaddingWarning):
        out, lse, rows = decode(q, k, v[..., :40], proposal, **spans)
    assert_same_bits([out, lse, rows], [expected[0][..., :40], *expected[1:]])
    q, k = q.clone(), k.clone()
    q[..., 50:], k[..., 50:] = 0.0, 0.0
    proposal = santa.make_proposal_keys(k)
    expected = decode(q, k, v, proposal, sm_scale=0.1, **spans)
    assert_same_bits(decode(q[..., :50], k, v, proposal, sm_scale=0.1, **spans), expected)
