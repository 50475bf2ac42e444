"""`santa.sample_select` of hostile input: views, ties, huge logits, NaN, infinity, nothing."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.selection import COLUMNS, DENSITY, MEAN, PERCENTILE, SLASHES, check_laws, make_qk, same
from torch import Tensor

import santa
from santa import reference_prefill as reference
from santa.reference_prefill import BLOCK

pytestmark = pytest.mark.emulate


def padded(x: Tensor, *, rows: int, columns: int) -> Tensor:
    """x as a view into a larger buffer of NaN."""
    buffer = x.new_full((*x.shape[:2], x.shape[2] + rows, x.shape[3] + columns), torch.nan)
    view = buffer[:, :, : x.shape[2], columns:]
    return view.copy_(x)


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [0, 1, 8])
@pytest.mark.parametrize(("q_len", "past_blocks"), [(1, 0), (100, 1), (700, 2)])
def test_views_and_what_lies_around_them(device, columns, q_len, past_blocks):
    """Strides, rows that are not aligned, heads inside tokens: the same bits; NaN around them is not read."""
    q, k = make_qk(q_len, past_blocks, batch=2, num_qo_heads=4, num_kv_heads=2, dtype=torch.float16, device=device)
    expected = santa.sample_select(q, k, alpha_c=0.8, alpha_s=0.8)
    views = (padded(x, rows=200, columns=columns) for x in (q, k))
    assert same(santa.sample_select(*views, alpha_c=0.8, alpha_s=0.8), expected)
    tokens_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    assert same(santa.sample_select(*tokens_first, alpha_c=0.8, alpha_s=0.8), expected)


def test_equal_keys(device):
    """Every score is the same: the mass of a block is its number of visible keys, and ties go to the lower index."""
    q = torch.ones(1, 1, 4 * BLOCK, 64, dtype=torch.float16, device=device)
    check_laws(q, q, alpha_c=0.5, alpha_s=0.5, num_chunks=1)
    kv_cnt, kv_idx, stats = santa.sample_select(q, q, alpha_c=0.4, alpha_s=0.0, num_chunks=1, window_blocks=1)
    assert kv_cnt[0, 0].tolist() == [1, 2, 3, 3]
    assert kv_idx[0, 0, 3].tolist() == [0, 1, 3, 0]
    assert stats[0, 0, COLUMNS] == 2 and stats[0, 0, SLASHES] == 1


def test_one_huge_logit(device):
    q, k = make_qk(1000, 1, num_qo_heads=1, dtype=torch.float16, device=device)
    q[..., 1], k[..., 1] = 200.0, 0.0
    k[0, 0, 300, 1] = 400.0  # a logit of 10,000 in block 2
    keep = check_laws(q, k, alpha_c=0.9, alpha_s=0.0, sink_blocks=0, window_blocks=1)
    assert keep[0, 0, 4].nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gqa", ["per_head", "union"])
def test_heads_without_a_softmax_keep_everything(device, value, gqa):
    q, k = make_qk(600, 1, num_qo_heads=4, num_kv_heads=2, dtype=torch.float16, device=device)
    options = {"alpha_c": 0.5, "alpha_s": 0.5, "gqa": gqa}
    expected = santa.sample_select(q, k, **options)
    k[0, 1, 200, 3], q[..., 3] = value, 1.0  # one key of the second KV head
    before = santa.sample_select(q[:, :2], k[:, :1], **options)
    for extra in ({}, {"selection": "joint"}, {"min_mass": 0.9}):
        kv_cnt, _, stats = santa.sample_select(q, k, **options, **extra)
        assert (kv_cnt[:, 2:] == torch.arange(2, 7, device=device)).all()
        assert (stats[:, 2:, DENSITY] == 1).all() and stats[:, 2:, MEAN : PERCENTILE + 1].isnan().all()
        assert (stats[:, 2:, COLUMNS:] == 6).all()
        assert not stats[:, :2].isnan().any()
    ours = santa.sample_select(q, k, **options)
    assert same([x[:, :2] for x in ours], before)
    oracle = reference.sample_select(q, k, alpha_c=0.5, alpha_s=0.5, gqa=int(gqa == "union"))
    assert torch.equal(ours[0].cpu(), oracle[0])
    torch.testing.assert_close(ours[2].cpu(), oracle[2], equal_nan=True, rtol=0, atol=1e-4)
    assert not expected[2].isnan().any()


def test_rows_of_minus_infinity(device):
    """-inf weighs nothing; a row with nothing else has no softmax."""
    q, k = make_qk(500, num_qo_heads=1, dtype=torch.float16, device=device)
    q[..., 3] = 1.0
    k[0, 0, 130:256, 3] = -math.inf
    keep = check_laws(q, k, alpha_c=0.9, alpha_s=0.9)
    assert keep.shape[-1] == 4
    k[..., 3] = -math.inf
    kv_cnt, _, stats = santa.sample_select(q, k, alpha_c=0.1, alpha_s=0.1)
    assert kv_cnt[0, 0].tolist() == [1, 2, 3, 4] and stats[0, 0, MEAN : PERCENTILE + 1].isnan().all()


def test_queries_that_are_not_sampled_do_not_matter(device):
    q, k = make_qk(1000, dtype=torch.float16, device=device)
    expected = santa.sample_select(q, k, num_chunks=2)
    blocks = torch.arange(1000) // BLOCK
    q[:, :, ~torch.isin(blocks, torch.tensor(reference.sampled_blocks(8, 2)))] = math.nan
    assert same(santa.sample_select(q, k, num_chunks=2), expected)


def test_empty_batch(device):
    q, k = make_qk(300, 1, dtype=torch.float16, device=device)
    outputs = santa.sample_select(q[:0], k[:0])
    assert [list(x.shape) for x in outputs] == [[0, 2, 3], [0, 2, 3, 4], [0, 2, 6]]
