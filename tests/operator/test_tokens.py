"""Several new tokens of a row in one call: q [batch, q_len, num_qo_heads, head_dim]."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.inputs import HEAD_DIMS, SAMPLED, dtypes_of, make_qkv, repeat_rows, working_dtype
from helpers.paged import PagedCache, assert_same_bits
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z, relative_rms

import santa
from santa import reference

OPTIONS = [("grouped", "streaming", 0)] + [(*combination, 32) for combination in SAMPLED]


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}")
def options(request):
    sampler, budget, num_samples = request.param
    return {"sampler": sampler, "budget": budget, "num_samples": num_samples, "min_sampled_len": 0}


def make_tokens(batch, q_len, num_qo_heads, num_kv_heads, kv_len, head_dim=64, *, device, dtype=None, logit_std=1.0):
    """q [batch, q_len, num_qo_heads, head_dim], k and v NHD."""
    dtype = working_dtype(device) if dtype is None else dtype
    q, k, v = make_qkv(
        batch, q_len * num_qo_heads, num_kv_heads, kv_len, head_dim, dtype=dtype, device=device, logit_std=logit_std
    )
    return q.unflatten(1, (q_len, num_qo_heads)), k, v


def sdpa(q, k, v):
    """PyTorch's attention with a causal mask among the new tokens, the last of the keys; k and v NHD."""
    q_len, kv_len = q.shape[1], k.shape[1]
    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)


# Exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len", range(1, 9))
@pytest.mark.parametrize("group_size", [1, 4, 7])
def test_exact_is_attention_with_a_causal_mask(device, q_len, group_size):
    """Error against float64 at most twice that of same-dtype PyTorch (which adds float32 up in smaller pieces where
    there are several tokens: 2e-7 better); the log-sum-exp is that of the keys seen."""
    for dtype, kv_len in itertools.product(dtypes_of(device), (q_len, 129, 700)):
        q, k, v = make_tokens(2, q_len, 2 * group_size, 2, kv_len, device=device, dtype=dtype)
        out, lse = santa.decode(q, k, v, num_samples=0)
        assert out.shape == q.shape and out.dtype == dtype and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        expected, theirs = sdpa(*(x.double().cpu() for x in (q, k, v))), sdpa(q, k, v)
        assert relative_rms(out, expected) <= 2 * relative_rms(theirs, expected) + 3e-7
        oracle, oracle_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
        torch.testing.assert_close(oracle, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse.double().cpu(), oracle_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_layout(device, head_dim, options):
    """The same bits from every layout: strided, paged, alone; in float64's neighbourhood where nothing is drawn."""
    lens = [700, 130]
    q, k, v = make_tokens(2, 4, 6, 2, 700, head_dim, device=device, logit_std=2.0)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    expected = santa.decode(q, k, v, kv_lens=kv_lens, **options)
    hnd = [x.transpose(1, 2) for x in (k, v)]
    assert_same_bits(santa.decode(q, *hnd, kv_lens=kv_lens, kv_layout="HND", **options), expected)
    hnd = [x.contiguous() for x in hnd]
    assert_same_bits(santa.decode(q, *hnd, kv_lens=kv_lens, kv_layout="HND", **options), expected)
    assert_same_bits(PagedCache(k, v, 16, lens=lens).decode(q, **options), expected)
    by_heads = q.transpose(1, 2).contiguous().transpose(1, 2)  # as Transformers has it
    assert_same_bits(santa.decode(by_heads, k, v, kv_lens=kv_lens, **options), expected)
    if options["num_samples"] == 0:
        oracle, _ = reference.exact(q.cpu(), k.cpu(), v.cpu(), kv_lens=kv_lens.cpu())
        assert relative_rms(expected[0], oracle) < 4 * torch.finfo(q.dtype).eps


@pytest.mark.parametrize(("q_len", "group_size"), [(8, 128), (3, 341), (7, 73), (1, 1024)])
def test_up_to_1024_query_vectors(device, options, q_len, group_size):
    """Whose token and head each is shows in the log-sum-exp, and in outputs where nothing is left to chance."""
    q, k, v = make_tokens(1, q_len, group_size, 1, 70, device=device)
    out, lse = santa.decode(q, k, v, **options)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-4)
    if options["num_samples"] == 0:
        assert relative_rms(out, expected) < 4 * torch.finfo(q.dtype).eps
    if options["sampler"] == "grouped" and options["num_samples"] > 0:
        every, _ = santa.decode(q, k, v, **options | {"num_samples": 2**13})
        assert relative_rms(every, expected) < 4e-6 + 4 * torch.finfo(q.dtype).eps


@pytest.mark.parametrize("q_len", [2, 8])
def test_a_token_sees_nothing_behind_itself(device, q_len):
    """Other keys and values of later tokens change no bit of an earlier one, and do change the later ones."""
    q, k, v = make_tokens(1, q_len, 4, 2, 300, device=device)
    out, lse = santa.decode(q, k, v, num_samples=0)
    for token in range(q_len - 1):
        others = [
            torch.cat([x[:, : 300 - q_len + 1 + token], 3 - x[:, 300 - q_len + 1 + token :]], dim=1) for x in (k, v)
        ]
        changed, changed_lse = santa.decode(q, *others, num_samples=0)
        seen = token + 1
        assert torch.equal(changed[:, :seen], out[:, :seen]) and torch.equal(changed_lse[:, :seen], lse[:, :seen])
        assert (changed[:, seen:] != out[:, seen:]).any(dim=-1).all() and (changed_lse[:, seen:] != lse[:, seen:]).all()


@pytest.mark.emulate
@pytest.mark.sanitize
@pytest.mark.parametrize("q_len", [2, 5, 8])
def test_rows_shorter_than_q_len(device, options, q_len):
    """The first tokens have no key of their own and see none: zeros and -inf. One with one key returns its value."""
    for kv_len in range(q_len + 1):
        q, k, v = make_tokens(1, q_len, 4, 2, 8, device=device)
        kv_lens = torch.tensor([kv_len], dtype=torch.int32, device=device)
        k[:, kv_len:], v[:, kv_len:] = math.nan, math.nan
        out, lse = santa.decode(q, k, v, kv_lens=kv_lens, **options)
        blind = q_len - kv_len
        assert (out[:, :blind] == 0).all() and (lse[:, :blind] == -math.inf).all()
        assert out.isfinite().all() and lse[:, blind:].isfinite().all()
        if kv_len > 0 and options["num_samples"] == 0:
            alone = v[:, 0].repeat_interleave(2, dim=1)
            torch.testing.assert_close(out[:, blind], alone, rtol=1e-3, atol=1e-5)
        _, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu(), kv_lens=kv_lens.cpu())
        torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.emulate
@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_one_token_is_one_token(device, options, group_size):
    """[batch, 1, heads, head_dim] gives the bits of [batch, heads, head_dim]."""
    for dtype in dtypes_of(device):
        q, k, v = make_qkv(2, 2 * group_size, 2, 900, 64, dtype=dtype, device=device, logit_std=2.0)
        expected = santa.decode(q, k, v, return_rows_read=True, **options)
        out, lse, rows = santa.decode(q.unsqueeze(1), k, v, return_rows_read=True, **options)
        assert out.shape == (2, 1, 2 * group_size, 64) and lse.shape == (2, 1, 2 * group_size)
        assert_same_bits((out.squeeze(1), lse.squeeze(1), rows), expected)


# Sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "budget"), SAMPLED)
@pytest.mark.parametrize(("q_len", "group_size"), [(2, 2), (5, 3)])
def test_unbiased(device, sampler, budget, q_len, group_size):
    """The mean of N draws is exact attention for every token (z-tests, false-alarm rate 2e-6 a token), and the same
    tests see a bias of 1%. 300 keys, of which the last tokens' are large: who sees them or does not shows."""
    count = 2048
    q, k, v = make_tokens(1, q_len, group_size, 1, 300, device=device, logit_std=1.5)
    v[:, -q_len:] += 8.0
    k[:, -q_len:] += 0.3 * q.mean(dim=(1, 2))
    out, lse = santa.decode(
        *(repeat_rows(x, count) for x in (q, k, v)),
        row_seeds=torch.arange(count, device=device),
        num_samples=16,
        sampler=sampler,
        budget=budget,
        min_sampled_len=0,
    )
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    seen = 0
    for token in range(q_len):
        rounding = torch.finfo(out.dtype).eps / 2
        projected, largest = mean_z(out[:, token], expected[0, token], rounding=rounding)
        assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST, (token, projected, largest)
        seen += abs(mean_z(out[:, token] * 1.03, expected[0, token])[0]) > Z_PROJECTED
    assert seen == q_len, "the test could not see a bias of 3%"
    assert (lse.cpu() - expected_lse).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["multinomial", "stratified", "systematic"])
def test_tokens_draw_independently(device, sampler):
    """The same query as every token, in rows that are long beside their number: different draws."""
    q, k, v = make_tokens(1, 4, 2, 1, 2000, device=device)
    q[:] = q[:, :1, :1]
    out, _ = santa.decode(q, k, v, num_samples=16, sampler=sampler, min_sampled_len=0)
    assert len({tuple(x) for x in out.flatten(0, 2).tolist()}) == 8


@pytest.mark.parametrize("budget", ["streaming", "uniform", "proportional"])
def test_tokens_share_their_samples(device, budget):
    """grouped: rows are read once for all tokens, and that is fewer than they would read one by one; every token enters
    with all of them. So do tokens of a group that is cut into blocks, each block once."""
    q, k, v = make_tokens(1, 4, 2, 1, 3000, device=device, logit_std=3.0)
    q = q[:, :1] + 0.3 * q  # tokens attend to similar keys
    options = {"num_samples": 32, "sampler": "grouped", "budget": budget, "min_sampled_len": 0, "seed": 5}
    count = 16
    seeds = torch.arange(count, device=device)
    many = [repeat_rows(x, count) for x in (q, k, v)]
    rows = santa.decode(*many, row_seeds=seeds, return_rows_read=True, **options)[2]
    alone = [
        santa.decode(
            many[0][:, t], *(x[:, : 3000 - 3 + t] for x in many[1:]), row_seeds=seeds, return_rows_read=True, **options
        )[2]
        for t in range(4)
    ]
    assert (rows < sum(alone)).all()
    exact = santa.decode(q, k, v, num_samples=0, return_rows_read=True)[2]
    assert (exact == 3000).all()


def test_alone_or_in_a_batch(device, options):
    lens = [1300, 3, 700]
    q, k, v = make_tokens(3, 4, 4, 2, 1300, device=device, logit_std=2.0)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    row_seeds = torch.tensor([5, -6, 7], device=device)
    together = santa.decode(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, return_rows_read=True, **options)
    for rows in ([2, 0, 1], [0], [1], [2]):
        actual = santa.decode(
            *(x[rows] for x in (q, k, v)),
            kv_lens=kv_lens[rows],
            row_seeds=row_seeds[rows],
            return_rows_read=True,
            **options,
        )
        assert_same_bits(actual, [x[rows] for x in together])


def test_more_keys_than_a_row_has(device, options):
    """Padding around rows, on either side, and gaps between query vectors change nothing."""
    q, k, v = make_tokens(2, 3, 4, 2, 600, device=device, logit_std=2.0)
    kv_lens = torch.tensor([600, 130], dtype=torch.int32, device=device)
    expected = santa.decode(q, k, v, kv_lens=kv_lens, **options)
    starts = torch.tensor([5, 70], dtype=torch.int32, device=device)
    moved = [torch.full((2, 700, 2, 64), math.nan, dtype=k.dtype, device=device) for _ in "kv"]
    for x, target in zip((k, v), moved, strict=True):
        for b, (start, length) in enumerate(zip(starts.tolist(), kv_lens.tolist(), strict=True)):
            target[b, start : start + length] = x[b, :length]
    spread = torch.full((2, 5, 4, 72), math.nan, dtype=q.dtype, device=device)
    spread[:, 1:4, :, :64] = q
    actual = santa.decode(spread[:, 1:4, :, :64], *moved, kv_lens=kv_lens, kv_starts=starts, **options)
    assert_same_bits(actual, expected)


def test_min_sampled_len_is_of_the_row(device):
    """All tokens of a row are sampled or none is; the default counts their query vectors as those of one group."""
    q, k, v = make_tokens(2, 3, 4, 2, 600, device=device, logit_std=2.0)
    kv_lens = torch.tensor([599, 600], dtype=torch.int32, device=device)
    exact, _ = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=0)
    options = {"kv_lens": kv_lens, "num_samples": 16, "return_rows_read": True}
    out, _, rows = santa.decode(q, k, v, min_sampled_len=600, **options)
    assert torch.equal(out[0], exact[0]) and (rows[0] == 599).all()
    assert (out[1] != exact[1]).any(dim=-1).all() and (rows[1] < 300).all()
    bound = santa.default_min_sampled_len(1024, 3 * 2)
    assert bound == 24576
    lengths = torch.tensor([bound - 1, bound], dtype=torch.int32, device=device)
    long = [repeat_rows(x[:1], bound // 600 + 1).reshape(1, -1, 2, 64)[:, :bound].expand(2, -1, -1, -1) for x in (k, v)]
    _, _, rows = santa.decode(q, *long, kv_lens=lengths, num_samples=1024, return_rows_read=True)
    assert (rows[0] == bound - 1).all() and (rows[1] <= 7000).all()
