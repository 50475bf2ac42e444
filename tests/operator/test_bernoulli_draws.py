"""Bernoulli scores: the laws of the draws. Seeds are fixed, so a test that passes keeps passing."""

from __future__ import annotations

import pytest
import torch
from helpers.bernoulli import SCORE_SAMPLERS, bernoulli, draw, feature_major
from helpers.inputs import HEAD_DIMS, dtypes_of, make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z

from santa import reference_bernoulli as oracle

N = 16384


@pytest.mark.emulate
@pytest.mark.parametrize("score_sampler", SCORE_SAMPLERS)
@pytest.mark.parametrize("num_draws", [1, 3, 16, 4096])
def test_counts_are_the_oracles(device, score_sampler, num_draws):
    """Bit for bit, in every dtype, head_dim and group size; both backends are compared with the same oracle."""
    generator = torch.Generator().manual_seed(num_draws)
    shapes = list(zip(HEAD_DIMS, (1, 3, 4, 8, 12), strict=True))
    for dtype in dtypes_of(device):
        for head_dim, group in shapes if num_draws < 4096 else shapes[:1]:
            q = torch.randn(2, 2 * group, head_dim, generator=generator).to(dtype)
            options = {
                "seed": -(2**63) + 5,
                "row_seeds": torch.tensor([3, -(2**62)]),
                "kv_lens": torch.tensor([7, 2**31 - 1]),
            }
            expected = oracle.ternary_counts(
                q, num_kv_heads=2, num_draws=num_draws, score_sampler=score_sampler, **options
            )
            assert torch.equal(draw(q.to(device), 2, num_draws, score_sampler, **options), expected)


@pytest.mark.parametrize("score_sampler", SCORE_SAMPLERS)
@pytest.mark.parametrize("num_draws", [1, 5])
def test_marginal_means(device, score_sampler, num_draws):
    """The mean of every count is B q_i / max|q|; the variance, with which z is formed, that of its law."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 4, 64, generator=generator).to(device, working_dtype(device))
    counts = draw(repeat_rows(q, N), 1, num_draws, score_sampler, row_seeds=torch.arange(N)).double()
    p = (q[0].double() / q[0].double().abs().amax(dim=-1, keepdim=True)).cpu()
    share = num_draws * p.abs()
    variance = share.frac() * (1 - share.frac()) if score_sampler == "systematic" else share * (1 - p.abs())
    certain = variance < 1e-9
    mean = counts.mean(dim=0)
    assert certain.any() and torch.equal(mean[certain], (num_draws * p)[certain])  # p = 1 is always drawn
    assert ((mean - num_draws * p) / (variance / N).sqrt())[~certain].abs().max() < Z_LARGEST
    assert (counts * p.sign() >= 0).all() and (counts.abs() <= num_draws).all()
    # The spread of counts is that of the law: the mean over elements of squared deviations, to 6 standard errors.
    squared = (counts - num_draws * p).pow(2).flatten(1).sum(dim=1)
    assert abs(squared.mean() - variance.sum()) < 6 * squared.std() / N**0.5


def test_systematic_fixes_the_number_of_draws(device):
    """Counts are B p_i rounded up or down, and those of a head sum to their mean rounded up or down."""
    q = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(2)).to(device, working_dtype(device))
    counts = draw(repeat_rows(q, 512), 1, 3, "systematic", row_seeds=torch.arange(512)).abs().double()
    share = 3 * (q[0].double().abs() / q[0].double().abs().amax(dim=-1, keepdim=True)).cpu()
    assert ((counts >= (share - 1e-6).floor()) & (counts <= (share + 1e-6).ceil())).all()
    totals, expected = counts.sum(dim=-1), share.sum(dim=-1)
    assert ((totals >= (expected - 1e-6).floor()) & (totals <= (expected + 1e-6).ceil())).all()


@pytest.mark.parametrize("score_sampler", SCORE_SAMPLERS)
def test_logits_are_unbiased(device, score_sampler):
    """A row of one key has its logit for an lse: the mean of N of them is the exact logit (z-test per head), and the
    same test sees a planted bias of 10%."""
    q, k, v = make_qkv(1, 4, 1, 1, 64, dtype=working_dtype(device), device=device, seed=4)
    rows = [repeat_rows(x, N) for x in (q, feature_major(k), v)]
    _, lse = bernoulli(*rows, row_seeds=torch.arange(N, device=device), score_sampler=score_sampler)
    expected = torch.einsum("hd,d->h", q[0].double().cpu(), k[0, 0, 0].double().cpu()) / 8
    projected, largest = mean_z(lse, expected)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST
    assert abs(mean_z(lse * 1.1, expected)[0]) > Z_PROJECTED, "the test could not see a bias of 10%"


def test_systematic_has_the_least_variance(device):
    """Mean squared error of logits: systematic below independent by over a tenth; shared as independent (the marginals
    are the same), to 6 standard errors."""
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(1, 4, 128, generator=generator).to(device, working_dtype(device))
    keys = torch.randn(128, 256, generator=generator).double()
    exact = q[0].double().cpu() @ keys
    count = 2048
    errors = {}
    for score_sampler in SCORE_SAMPLERS:
        counts = draw(repeat_rows(q, count), 1, 2, score_sampler, row_seeds=torch.arange(count)).double()
        estimates = counts @ keys * oracle.score_scale(q[0].cpu(), 2)[:, None]
        errors[score_sampler] = (estimates - exact).pow(2).mean(dim=(1, 2))
    independent, systematic, shared = (errors[s] for s in ("independent", "systematic", "shared"))
    assert systematic.mean() < 0.9 * independent.mean()
    assert abs(independent.mean() - shared.mean()) < 6 * ((independent.var() + shared.var()) / count) ** 0.5


def test_union_of_features(device):
    """features_read is the union over the group, of the size that each law expects (6 standard errors); sharing the
    random numbers makes it smaller."""
    q, k, v = make_qkv(1, 8, 2, 4, 128, dtype=working_dtype(device), device=device, seed=7)
    count = 2048
    rows = [repeat_rows(x, count) for x in (q, feature_major(k), v)]
    p = (q[0].double().abs() / q[0].double().abs().amax(dim=-1, keepdim=True)).cpu().unflatten(0, (2, 4))
    read = {}
    for score_sampler in SCORE_SAMPLERS:
        row_seeds = torch.arange(count, device=device)
        *_, features = bernoulli(*rows, row_seeds=row_seeds, score_sampler=score_sampler, return_features_read=True)
        counts = draw(rows[0], 2, 2, score_sampler, row_seeds=row_seeds, kv_lens=torch.full((count,), 4))
        assert torch.equal(features.cpu(), oracle.features_read(counts, 2))
        read[score_sampler] = features.double().cpu()
    for score_sampler, missed in (("independent", (1 - p).prod(dim=1) ** 2), ("shared", (1 - p.amax(dim=1)) ** 2)):
        features = read[score_sampler]
        error = features.std(dim=0) / count**0.5
        assert ((features.mean(dim=0) - (1 - missed).sum(dim=-1)).abs() < 6 * error).all()
    assert (read["shared"].mean(dim=0) < 0.9 * read["independent"].mean(dim=0)).all()


def test_draws_are_not_those_of_the_values():
    """The head word of a score stream has its top bit set; with it cleared the oracle gives other counts."""
    q = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(8))
    keys = [
        oracle.philox([0, 0, 100, head], (0, 0))[:2]  # seed 0, row seed 0, kv_len 100
        for head in (0, 1 << 31)
    ]
    assert keys[0] != keys[1]
    score_key = oracle._stream(0, 0, 100, 0)
    assert (score_key[0], score_key[1]) == tuple(keys[1])
    assert torch.equal(
        draw(q, 1, 8, "independent"),
        oracle.ternary_counts(q, num_kv_heads=1, num_draws=8, kv_lens=torch.tensor([100])),
    )


def test_streams(device):
    """Seed, row seed and length each change the draws."""
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(14)).to(device, working_dtype(device))
    base = draw(q, 1, 4, "independent")
    for options in ({"seed": 1}, {"row_seeds": torch.tensor([1])}, {"kv_lens": torch.tensor([101])}):
        assert not torch.equal(draw(q, 1, 4, "independent", **options), base)
