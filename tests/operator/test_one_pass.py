"""The laws of the streaming and the uniform budget, end to end through the operator, against the float64 oracle.

Rows have 66 tiles of 64 keys in 17 parts, long ones 130 tiles of 128 keys in 65 parts. One call makes N independent
draws: the same row N times with different row seeds. Seeds are fixed, so a test that passes keeps passing; the
false-alarm rates are what a change of seed would risk.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.inputs import working_dtype
from helpers.one_pass import (
    BUDGETS,
    KV_LEN,
    LONG_KV_LEN,
    SAMPLERS,
    Problem,
    assert_mean,
    assert_unbiased,
    draws_of,
    gaussian,
    with_peak,
)
from helpers.statistics import Z_PROJECTED, mean_z

import santa
from santa import reference

N = 4096
GROUP = 4
PILOT = set(reference.pilot(KV_LEN)[0].tolist())
MISSED = next(n for n in range(2000, KV_LEN) if n not in PILOT)
SPACED = next(n for n in range(2000, KV_LEN) if n in PILOT)

PROBLEMS = {
    "gaussian": gaussian,
    "std 3": lambda device: gaussian(device, logit_std=3.0),
    "a peak that the pilot misses": lambda device: with_peak(device, MISSED),
    "a peak that the pilot takes for 21": lambda device: with_peak(device, SPACED),
}


@pytest.fixture(params=BUDGETS)
def budget(request) -> str:
    return request.param


@pytest.fixture(params=SAMPLERS)
def sampler(request) -> str:
    return request.param


@pytest.mark.parametrize("name", PROBLEMS)
def test_mean_variance_and_rows(device, name, sampler, budget):
    """The mean of N draws is exact attention (z-test); the total variance and the rows read are what the oracle says (6
    standard errors: 2e-9); the log-sum-exp is exact in every draw."""
    assert_laws(PROBLEMS[name](device), sampler, budget)


def test_nearly_all_mass_on_a_key_that_the_pilot_misses(device, sampler):
    """The same where the level is a hundredth of the mass. Not for the uniform budget: on such rows its errors are few
    and huge, and z-tests need more of them."""
    assert_laws(with_peak(device, MISSED, share=0.99), sampler, "streaming")


def test_rows_of_larger_tiles(device, sampler, budget):
    """The same for rows above 16,384 keys."""
    assert_laws(gaussian(device, kv_len=LONG_KV_LEN), sampler, budget, count=1024, num_samples=128)


def assert_laws(problem: Problem, sampler: str, budget: str, *, count: int = N, num_samples: int = 64) -> None:
    out, lse, rows = draws_of(
        *problem.qkv, count=count, num_samples=num_samples, sampler=sampler, budget=budget, return_rows_read=True
    )
    assert_unbiased(out, problem.expected)
    assert (lse.cpu() - problem.lse).abs().max() < 1e-4
    assert (lse == lse[:1]).all()

    mean, variance = reference.moments(problem.p, problem.values, num_samples, sampler, budget)
    torch.testing.assert_close(mean, problem.expected, rtol=1e-9, atol=1e-9)
    squared = (out.double().cpu() - mean).pow(2).flatten(1).sum(dim=1)
    assert_mean(squared, float(variance.sum()), slack=2e-3 * float(variance.sum()))
    expected_rows = reference.one_pass_rows(problem.p, num_samples, sampler, budget)
    assert_mean(rows[:, 0], expected_rows, slack=1e-3 * expected_rows)


def test_the_test_sees_a_bias_of_one_percent(device):
    problem = gaussian(device)
    out, _ = draws_of(*problem.qkv, count=N, num_samples=64)
    assert abs(mean_z(out * 1.01, problem.expected)[0]) > Z_PROJECTED


def test_uniform_budget_is_spent_to_the_last_draw(device, sampler):
    """One line of thresholds serves the row: S draws per head, and up to the rounding of its end S * group rows."""
    problem = gaussian(device, logit_std=0.5)  # no key expects a whole draw
    num_samples = 64
    *_, rows = draws_of(
        *problem.qkv, count=256, num_samples=num_samples, sampler=sampler, budget="uniform", return_rows_read=True
    )
    if sampler == "grouped":
        assert (rows - num_samples * GROUP).abs().max() <= 1
    else:  # a row that two heads draw counts once
        assert (rows <= num_samples * GROUP + GROUP).all()


SHOWN = 4096.0  # so that small weights are not among float16's subnormal numbers


def windows_of(problem: Problem, first: int, count: int = 64) -> Problem:
    """The same row with values that show the weights of keys [first, first + count)."""
    q, k, v = problem.qkv
    shown = torch.zeros_like(v)
    shown[0, first : first + count, 0] = SHOWN * torch.eye(count, dtype=v.dtype, device=v.device)
    return Problem(q, k, shown)


WINDOWS = [0, 480, 2048 + 32, KV_LEN - 64]  # on both sides of a part's end, of a tile's; the ragged end
LONG_WINDOWS = [480, 16384 - 128 - 32, LONG_KV_LEN - 64]


@pytest.mark.parametrize("first", WINDOWS)
def test_weights_and_inclusion_frequencies(device, sampler, budget, first):
    """Every key is drawn floor(m) or ceil(m) times, as often as m says for every head, and enters with count p / m
    (chi-square over the keys of a window for each head: false-alarm rate below 1e-6)."""
    problem = windows_of(gaussian(device, logit_std=2.0), first)
    assert_inclusion(device, problem, sampler, budget, first, num_samples=64, count=8192)


@pytest.mark.parametrize("first", LONG_WINDOWS)
def test_weights_and_inclusion_frequencies_of_larger_tiles(device, sampler, budget, first):
    """The same for rows above 16,384 keys."""
    problem = windows_of(gaussian(device, kv_len=LONG_KV_LEN, logit_std=1.0), first)
    assert_inclusion(device, problem, sampler, budget, first, num_samples=256, count=2048)


def assert_inclusion(
    device: str, problem: Problem, sampler: str, budget: str, first: int, *, num_samples: int, count: int
) -> None:
    out, _ = draws_of(*problem.qkv, count=count, num_samples=num_samples, sampler=sampler, budget=budget)
    keys = slice(first, first + 64)
    m = reference.one_pass_draws(problem.p, num_samples, sampler, budget)[:, keys]
    counts = out.double().cpu() / SHOWN * m / problem.p[:, keys]
    whole = counts.round()
    torch.testing.assert_close(counts, whole, rtol=5e-3 if device == "cuda" else 1e-3, atol=1e-3)
    assert ((whole >= (m - 1e-4).floor()) & (whole <= (m + 1e-4).ceil())).all()
    if sampler == "grouped":  # one set of rows for all heads
        assert (whole == whole[:, :1]).all()

    fraction = m - m.floor()
    hits = (whole - m.floor()).sum(dim=0)
    variance = count * fraction * (1 - fraction)
    keep = variance > 5
    z_squared = torch.where(keep, (hits - count * fraction) ** 2 / variance, 0.0)
    degrees = keep.sum(dim=1)
    assert degrees.min() > 20
    # Mean d and variance 2 d; draws of neighbouring keys are negatively correlated, which only lowers the spread. 6
    # sigma of the normal approximation plus its skew.
    assert (z_squared.sum(dim=1) < degrees + 6 * (2 * degrees) ** 0.5 + 30).all()


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("logit_std", [1.0, 2.0, 3.0])
def test_grouped_beats_systematic_at_equal_rows(device, budget, logit_std, correlation):
    """RMSE of grouped < RMSE of systematic at the same number of V rows (log-log interpolation), for query heads of a
    group with any correlation. V has mean 0: see the same test of the proportional budget."""
    dtype = working_dtype(device)
    generator = torch.Generator().manual_seed(3)
    common, own = torch.randn(1, 1, 64, generator=generator), torch.randn(1, GROUP, 64, generator=generator)
    q = ((correlation**0.5 * common + (1 - correlation) ** 0.5 * own) * logit_std).to(device, dtype)
    k = torch.randn(1, KV_LEN, 1, 64, generator=generator).to(device, dtype)
    v = torch.randn(1, KV_LEN, 1, 64, generator=generator).to(device, dtype)
    problem = Problem(q, k, v)
    points = {}
    for sampler in SAMPLERS:
        points[sampler] = []
        for num_samples in (8, 16, 32, 64, 128):
            out, _, rows = draws_of(
                q, k, v, count=128, num_samples=num_samples, sampler=sampler, budget=budget, return_rows_read=True
            )
            rmse = (out.double().cpu() - problem.expected).pow(2).mean().sqrt()
            points[sampler].append((rows.double().mean().log().item(), rmse.log().item()))
    grouped_rows, grouped_rmse = zip(*points["grouped"], strict=True)
    compared = 0
    for rows, rmse in points["systematic"]:
        if grouped_rows[0] <= rows <= grouped_rows[-1]:
            assert np.interp(rows, grouped_rows, grouped_rmse) < rmse
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("logit_std", [1.0, 2.0])
def test_streaming_is_as_good_as_proportional_per_row(device, logit_std):
    """On Gaussian logits the error at equal rows read is at most 5% above that of the proportional budget; rows are set
    equal by error ~ rows^-1/2, which favours neither side by more than the rows differ."""
    problem = gaussian(device, logit_std=logit_std, seed=7)
    error = {}
    for budget in ("streaming", "proportional"):
        out, _, rows = draws_of(*problem.qkv, count=1024, num_samples=64, budget=budget, return_rows_read=True)
        rmse = (out.double().cpu() - problem.expected).pow(2).mean().sqrt()
        error[budget] = float(rmse * rows.double().mean().sqrt())
    assert error["streaming"] < 1.05 * error["proportional"]


def test_defaults(device):
    """No budget is streaming for the samplers that can draw tile by tile and proportional for the others."""
    q, k, v = gaussian(device, kv_len=700).qkv
    for sampler in ("multinomial", "stratified", "systematic", "grouped"):
        default = "streaming" if sampler in SAMPLERS else "proportional"
        options = {"num_samples": 32, "sampler": sampler, "min_sampled_len": 0}
        assert torch.equal(santa.decode(q, k, v, **options)[0], santa.decode(q, k, v, budget=default, **options)[0])
    for budget in BUDGETS:
        for sampler in ("multinomial", "stratified"):
            with pytest.raises(ValueError, match=f"santa: budget is '{budget}' .*'{sampler}'.*budget='proportional'"):
                santa.decode(q, k, v, sampler=sampler, budget=budget)
