"""Rows of many tiles and parts and batches of many rows on CUDA, rows of every kind."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import SAMPLED, make_qkv, repeat_rows
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z

import santa
from santa import reference

pytestmark = pytest.mark.gpu

DRAWS = 512  # of up to 1,800 elements: the largest raises about 1e-5 false alarms a case


@pytest.mark.parametrize("sampler, budget", SAMPLED)
@pytest.mark.parametrize(("group_size", "kv_len"), [(1, 131_072), (4, 40_000), (7, 20_001)])
def test_unbiased_over_many_tiles(sampler, budget, group_size, kv_len):
    q, k, v = make_qkv(1, 2 * group_size, 2, kv_len, 128, dtype=torch.float16, device="cuda", logit_std=1.5)
    out, lse = santa.decode(
        *(repeat_rows(x, DRAWS) for x in (q, k, v)),
        row_seeds=torch.arange(DRAWS, device="cuda"),
        num_samples=64,
        sampler=sampler,
        budget=budget,
        min_sampled_len=0,
    )
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    projected, largest = mean_z(out, expected[0])
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST
    assert (lse.double().cpu() - expected_lse).abs().max() < 1e-4
    assert torch.equal(lse, lse[:1].expand_as(lse))


def mixed_problem(layout):
    lengths = [0, 1, 511, 8_191, 8_192, 8_193, 9_000, 16_384, 16_385, 24_577, 32_768, 40_000]
    lengths = (lengths * 4)[:45]
    q = make_qkv(len(lengths), 8, 2, 1, 128, dtype=torch.bfloat16, device="cuda", logit_std=2.0)[0]
    _, k, v = make_qkv(1, 8, 2, max(lengths), 128, dtype=torch.bfloat16, device="cuda", layout=layout)
    k, v = (repeat_rows(x, len(lengths)) for x in (k, v))
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sampler, budget", SAMPLED)
def test_mixed_batch(sampler, budget, layout):
    """Exact, sampled and empty rows in one batch of more than 32: each has the bits that it has alone, with its length
    given or its cache cut to it."""
    q, k, v, kv_lens = mixed_problem(layout)
    row_seeds = torch.arange(len(q), device="cuda")
    options = {"num_samples": 64, "sampler": sampler, "budget": budget, "kv_layout": layout, "return_rows_read": True}
    together = santa.decode(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    assert torch.isfinite(together[0]).all()

    exact = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=0, kv_layout=layout)
    torch.testing.assert_close(together[1], exact[1], rtol=0, atol=1e-3)
    short = kv_lens < 8_192
    assert torch.equal(together[0][short], exact[0][short])
    assert (together[2][short] == kv_lens[short, None]).all()
    assert (together[2][~short] > 0).all() and (together[2][~short] <= 2 * 64 * 4).all()

    for b in (1, 4, 6, 11, 33, 44):
        one, length = slice(b, b + 1), int(kv_lens[b])
        cut = [x[one, :length] if layout == "NHD" else x[one, :, :length] for x in (k, v)]
        for alone in (
            santa.decode(q[one], k[one], v[one], kv_lens=kv_lens[one], row_seeds=row_seeds[one], **options),
            santa.decode(q[one], *cut, row_seeds=row_seeds[one], **options),
        ):
            for ours, theirs in zip(alone, together, strict=True):
                assert torch.equal(ours, theirs[one]), (b, length)
