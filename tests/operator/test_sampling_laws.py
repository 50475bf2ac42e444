"""The laws of the proportional budget, end to end through the operator, against the float64 oracle. Those of the other
budgets are in test_one_pass.py.

One call makes N independent draws: the same row N times with different row seeds. Seeds are fixed, so a test that
passes keeps passing; the false-alarm rates are what a change of seed would risk.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.inputs import SAMPLERS, make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z, relative_rms

import santa
from santa import reference

N = 16384
GROUP = 4


def draws_of(q, k, v, *, count=N, seed=0, **options):
    """`count` independent estimates of one row: [count, num_qo_heads, head_dim]."""
    row_seeds = torch.arange(count, dtype=torch.int64, device=q.device)
    options = {"budget": "proportional", **options}
    return santa.decode(
        *(repeat_rows(x, count) for x in (q, k, v)), row_seeds=row_seeds, seed=seed, min_sampled_len=0, **options
    )


def problem(device, kv_len=300, logit_std=1.5, seed=1, head_dim=64):
    q, k, v = make_qkv(
        1, GROUP, 1, kv_len, head_dim, dtype=working_dtype(device), device=device, logit_std=logit_std, seed=seed
    )
    p, values, lse = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu())
    return (q, k, v), p[0], values[0], lse[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unbiased(device, sampler):
    """The mean of N draws is exact attention (z-test), and the same test sees a planted bias of 1%."""
    qkv, p, values, lse = problem(device)
    out, out_lse = draws_of(*qkv, num_samples=32, sampler=sampler)
    expected = p @ values
    projected, largest = mean_z(out, expected)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST
    assert abs(mean_z(out * 1.01, expected)[0]) > Z_PROJECTED, "the test could not see a bias of 1%"
    # The log-sum-exp is exact in every draw.
    assert (out_lse.cpu() - lse).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variance(device, sampler):
    """The total variance is what the oracle computes: in closed form or by enumeration (6 standard errors: 2e-9)."""
    qkv, p, values, _ = problem(device)
    out, _ = draws_of(*qkv, num_samples=32, sampler=sampler)
    mean, variance = reference.moments(p, values, 32, sampler)
    squared = (out.double().cpu() - mean).pow(2).flatten(1).sum(dim=1)
    error = squared.std() / N**0.5
    assert abs(squared.mean() - variance.sum()) < 6 * error + 1e-3 * variance.sum()


def test_stratification_orders_the_variances(device):
    """multinomial > stratified >= systematic is what the samplers are for; grouped is the lowest per row read."""
    qkv, p, values, _ = problem(device)
    variance = {s: reference.moments(p, values, 32, s)[1].sum().item() for s in SAMPLERS}
    assert variance["multinomial"] > variance["stratified"] > variance["grouped"]
    measured = {}
    for sampler in SAMPLERS:
        out, _ = draws_of(*qkv, num_samples=32, sampler=sampler, count=2048)
        measured[sampler] = (out.double().cpu() - p @ values).pow(2).mean().item()
    assert measured["multinomial"] > measured["stratified"] > measured["grouped"]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("logit_std", [1.0, 2.0, 4.0])
def test_grouped_beats_systematic_at_equal_rows(device, logit_std, correlation):
    """RMSE of grouped < RMSE of systematic at the same number of distinct V rows (log-log interpolation), for query
    heads of a group with any correlation. V has mean 0: a Horvitz-Thompson estimate pays for the mean of V, because its
    weights add up to 1 on average only (docs/estimators.md)."""
    kv_len, num_draws = 2048, 128
    dtype = working_dtype(device)
    generator = torch.Generator().manual_seed(3)
    common, own = torch.randn(1, 1, 64, generator=generator), torch.randn(1, GROUP, 64, generator=generator)
    q = ((correlation**0.5 * common + (1 - correlation) ** 0.5 * own) * logit_std).to(device, dtype)
    k = torch.randn(1, kv_len, 1, 64, generator=generator).to(device, dtype)
    v = torch.randn(1, kv_len, 1, 64, generator=generator).to(device, dtype)
    p, values, _ = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu())
    expected = p[0] @ values[0]
    points = {}
    for sampler in ("systematic", "grouped"):
        points[sampler] = []
        for num_samples in (8, 16, 32, 64, 128):
            out, _, rows = draws_of(
                q, k, v, num_samples=num_samples, sampler=sampler, count=num_draws, return_rows_read=True
            )
            rmse = (out.double().cpu() - expected).pow(2).mean().sqrt()
            points[sampler].append((rows.double().mean().log().item(), rmse.log().item()))
    grouped_rows, grouped_rmse = zip(*points["grouped"], strict=True)
    compared = 0
    for rows, rmse in points["systematic"]:
        if grouped_rows[0] <= rows <= grouped_rows[-1]:
            assert np.interp(rows, grouped_rows, grouped_rmse) < rmse
            compared += 1
    assert compared >= 3


def identity_problem(device, head_dim=256, logit_std=1.5):
    """V is the identity, so the output shows the weight that every row got."""
    q, k, _ = make_qkv(
        1, GROUP, 1, head_dim, head_dim, dtype=working_dtype(device), device=device, logit_std=logit_std, seed=5
    )
    v = torch.eye(head_dim, dtype=q.dtype, device=device).reshape(1, head_dim, 1, head_dim)
    p, _, _ = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu())
    return (q, k, v), p[0]


@pytest.mark.parametrize("sampler", ["multinomial", "stratified", "systematic"])
def test_counts_are_integers_that_sum_to_the_budget(device, sampler):
    """out * S are counts: each is an integer and they sum to S exactly."""
    qkv, _ = identity_problem(device)
    num_samples = 64  # a power of two: counts / S are exact in every dtype
    out, _ = draws_of(*qkv, num_samples=num_samples, sampler=sampler, count=64)
    weights = out.double().cpu() * num_samples
    assert torch.equal(weights, weights.round())
    assert (weights.sum(dim=-1) == num_samples).all()


def test_systematic_counts_are_floor_or_ceil(device):
    """Systematic sampling draws row n either floor(S p_n) or ceil(S p_n) times, never anything else."""
    qkv, p = identity_problem(device)
    out, _ = draws_of(*qkv, num_samples=64, sampler="systematic", count=512)
    counts, expected = out.double().cpu() * 64, p * 64
    slack = 1e-4  # float32 scores
    assert ((counts >= (expected - slack).floor()) & (counts <= (expected + slack).ceil())).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inclusion_frequencies(device, sampler):
    """Every row is drawn as often as its probability says (chi-square over rows; false-alarm rate below 1e-6)."""
    qkv, p = identity_problem(device)
    count = 4096
    out, _ = draws_of(*qkv, num_samples=16, sampler=sampler, count=count)
    weights = out.double().cpu()
    if sampler == "grouped":
        inclusion = (16 * GROUP * p.mean(dim=0)).clamp(max=1.0)
        hits = (weights.sum(dim=1) > 0).double().sum(dim=0)
        always = inclusion > 1 - 1e-6
        assert (hits[always] == count).all()
        inclusion, hits = inclusion[~always], hits[~always]
    else:
        inclusion = 1 - (1 - p[0]) ** 16 if sampler == "multinomial" else None
        if inclusion is None:  # expected number of draws, for counts of 0 and 1 alone a probability
            expected_draws = 16 * p[0]
            single = expected_draws < 1
            hits = (weights[:, 0] * 16).sum(dim=0)[single]
            inclusion = expected_draws[single]
        else:
            hits = (weights[:, 0] > 0).double().sum(dim=0)
    variance = count * inclusion * (1 - inclusion)
    keep = variance > 5
    chi_square = ((hits - count * inclusion)[keep] ** 2 / variance[keep]).sum()
    degrees = int(keep.sum())
    # A chi-square of that many degrees: mean d, variance 2 d; draws of neighbouring rows are negatively correlated,
    # which only lowers the spread. 6 sigma of the normal approximation plus its skew.
    assert chi_square < degrees + 6 * (2 * degrees) ** 0.5 + 30
    assert degrees > 50


def test_horvitz_thompson_weights(device):
    """A selected row enters head h with p_{h,n} / min(1, R mean_n), and a row with R mean_n >= 1 with p_{h,n}."""
    qkv, p = identity_problem(device, logit_std=3.0)
    out, _ = draws_of(*qkv, num_samples=16, sampler="grouped", count=256)
    weights = out.double().cpu()
    expected = p / (16 * GROUP * p.mean(dim=0)).clamp(max=1.0)
    selected = weights.sum(dim=1, keepdim=True) > 0
    torch.testing.assert_close(
        weights, torch.where(selected, expected, 0.0), rtol=2e-3 if device == "cuda" else 1e-4, atol=1e-6
    )


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 7, 100, 1000])
@pytest.mark.parametrize("sampler", ["multinomial", "stratified", "systematic"])
def test_any_budget_sums_to_one(device, sampler, num_samples):
    """With V = 1 the counts of any S add up to an output of 1."""
    q, k, v = make_qkv(1, 4, 2, 777, 64, dtype=working_dtype(device), device=device)
    out, _ = santa.decode(
        q,
        k,
        torch.ones_like(v),
        num_samples=num_samples,
        sampler=sampler,
        budget="proportional",
        min_sampled_len=0,
    )
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-6 if device == "cpu" else 1e-3, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_error_falls_with_num_samples(device, sampler):
    """RMSE at 4 S is at most 0.6 times RMSE at S (the i.i.d. rate is 0.5)."""
    qkv, p, values, _ = problem(device, kv_len=2000, logit_std=2.0)
    errors = []
    for num_samples in (16, 64, 256):
        out, _ = draws_of(*qkv, num_samples=num_samples, sampler=sampler, count=256)
        errors.append(relative_rms(out, (p @ values).expand(256, GROUP, 64)))
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_streams_are_independent(device):
    """Different seeds, row seeds and lengths give different draws; the same ones the same draws."""
    q, k, v = make_qkv(1, 4, 1, 500, 64, dtype=working_dtype(device), device=device)

    def run(seed=0, row_seed=0, kv_len=500):
        return santa.decode(
            q,
            k,
            v,
            num_samples=16,
            seed=seed,
            row_seeds=torch.tensor([row_seed], device=device),
            kv_lens=torch.tensor([kv_len], dtype=torch.int32, device=device),
            min_sampled_len=0,
        )[0]

    base = run()
    assert torch.equal(base, run())
    for other in (run(seed=1), run(row_seed=1), run(seed=2**63 - 1), run(row_seed=-(2**63)), run(kv_len=499)):
        assert not torch.equal(base, other)
