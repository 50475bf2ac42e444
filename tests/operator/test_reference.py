"""The oracle itself: santa/reference.py against PyTorch attention, brute force and the laws of the
estimators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.inputs import SAMPLERS, make_qkv
from helpers.properties import for_all
from hypothesis import strategies as st

from santa import reference


def distribution(*shape: int, logit_std: float = 1.5, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(logit_std * logits, dim=-1)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values with mean 1: an estimator whose weights do not sum to 1 on average shows."""
    return 1.0 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


weights = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.floats(1e-300, 1e-290)), min_size=1, max_size=40
).filter(any)
units = st.floats(0, 1, exclude_max=True)


def normalised(raw: list[float]) -> torch.Tensor:
    p = torch.tensor(raw, dtype=torch.float64)
    return p / p.sum()


# Exact attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("num_qo_heads", [2, 6])
@pytest.mark.parametrize("sm_scale", [None, 0.3, 0.0, -0.2])
def test_exact_is_sdpa(layout, num_qo_heads, sm_scale):
    """Outputs in float64, to 12 digits; the log-sum-exp is that of the scaled scores."""
    q, k, v = (x.double() for x in make_qkv(3, num_qo_heads, 2, 37, 64, layout=layout))
    out, lse = reference.exact(q, k, v, kv_layout=layout, sm_scale=sm_scale)
    keys, values = (k, v) if layout == "HND" else (k.transpose(1, 2), v.transpose(1, 2))
    expected = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, scale=sm_scale, enable_gqa=True)
    torch.testing.assert_close(out, expected.squeeze(2), rtol=1e-12, atol=1e-12)
    scale = 64**-0.5 if sm_scale is None else sm_scale
    scores = torch.einsum("bhd,bhnd->bhn", q, keys.repeat_interleave(num_qo_heads // 2, dim=1).double()) * scale
    torch.testing.assert_close(lse, torch.log(torch.exp(scores).sum(-1)), rtol=1e-12, atol=1e-12)
    assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_exact_touches_the_valid_range_alone(layout):
    """Rows of lengths 0, 1, 20 and full, from starts 5, 36, 3 and 0; everything else is NaN."""
    lens, starts = torch.tensor([0, 1, 20, 37]), torch.tensor([5, 36, 3, 0])
    q, k, v = make_qkv(4, 6, 2, 37, 64)
    expected_out, expected_lse = [], []
    for b, (start, length) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        if length == 0:
            expected_out.append(torch.zeros(6, 64, dtype=torch.float64))
            expected_lse.append(torch.full((6,), -math.inf, dtype=torch.float64))
        else:
            valid = slice(start, start + length)
            out, lse = reference.exact(q[b : b + 1], k[b : b + 1, valid], v[b : b + 1, valid])
            expected_out.append(out[0])
            expected_lse.append(lse[0])
        for x in (k, v):
            x[b, :start], x[b, start + length :] = math.nan, math.nan
    if layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    out, lse = reference.exact(q, k, v, kv_lens=lens, kv_starts=starts, kv_layout=layout)
    torch.testing.assert_close(out, torch.stack(expected_out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.stack(expected_lse), rtol=1e-12, atol=1e-12)


def test_probabilities_are_those_of_exact():
    q, k, v = make_qkv(1, 6, 2, 50, 64)
    p, values, lse = reference.probabilities(q[0], k[0], v[0], kv_start=7, kv_len=30)
    assert p.shape == (2, 3, 30) and values.shape == (2, 30, 64) and lse.shape == (2, 3)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=1e-12, atol=0)
    out, exact_lse = reference.exact(q, k, v, kv_lens=torch.tensor([30]), kv_starts=torch.tensor([7]), sm_scale=None)
    torch.testing.assert_close((p @ values).flatten(0, 1), out[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.flatten(), exact_lse[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("window_left", [-1, 0, 5, 100])
@pytest.mark.parametrize("logits_soft_cap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_exact_with_features_is_masked_attention(layout, window_left, logits_soft_cap, sinks):
    """Of several tokens, written out: a mask on all keys, tanh on logits, and a sink as one key more without a value;
    scales as factors of keys and values."""
    q_len, kv_len = 4, 30
    q, k, v = (x.double() for x in make_qkv(2, q_len * 6, 2, kv_len + 3, 64, layout="HND"))
    q = q.unflatten(1, (q_len, 6))
    k_scale, v_scale = torch.tensor([0.5, 1.5]), 2.0
    sink = torch.linspace(-1, 2, 6) if sinks else None
    out, lse = reference.exact(
        q,
        *(x if layout == "HND" else x.transpose(1, 2) for x in (k, v)),
        kv_lens=torch.tensor([kv_len, kv_len]),
        kv_starts=torch.tensor([2, 0]),
        kv_layout=layout,
        k_scale=k_scale,
        v_scale=v_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sinks=sink,
    )
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    for b, start in enumerate((2, 0)):
        keys, values = (x[b, :, start : start + kv_len].repeat_interleave(3, dim=0) for x in (k, v))
        logits = torch.einsum("thd,hnd->thn", q[b], keys * k_scale.repeat_interleave(3).view(-1, 1, 1).double()) / 8
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        behind = torch.arange(kv_len - q_len, kv_len).view(-1, 1) - torch.arange(kv_len)
        hidden = (behind < 0) | ((behind > window_left) if window_left >= 0 else False)
        logits = logits.masked_fill(hidden.unsqueeze(1), -math.inf)
        if sinks:
            logits = torch.cat([logits, sink.double().view(1, -1, 1).expand(q_len, -1, -1)], dim=-1)
        p = logits.softmax(-1)[..., :kv_len]
        torch.testing.assert_close(out[b], torch.einsum("thn,hnd->thd", p, 2 * values), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[b], logits.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_exact_of_tokens_without_keys():
    """A row shorter than q_len: zeros and -inf, or the sinks."""
    q, k, v = make_qkv(1, 3 * 4, 2, 9, 64)
    q = q.unflatten(1, (3, 4))
    out, lse = reference.exact(q, k, v, kv_lens=torch.tensor([2]))
    assert not out[:, 0].any() and (lse[:, 0] == -math.inf).all() and lse[:, 1:].isfinite().all()
    torch.testing.assert_close(out[:, 1], v[:, 0].double().repeat_interleave(2, dim=1), rtol=1e-12, atol=0)
    sinks = torch.arange(4.0)
    out, lse = reference.exact(q, k, v, kv_lens=torch.tensor([2]), sinks=sinks)
    assert not out[:, 0].any() and torch.equal(lse[0, 0], sinks.double())


# Counts -----------------------------------------------------------------------------------------------


@for_all(weights, st.integers(1, 300), units)
def test_systematic_counts_law(raw, num_samples, u):
    """They are the counts of the thresholds (m + u) / S, sum to S, and each is floor or ceil of S p_n (1e-9
    of rounding in the CDF allowed). Rows without probability are not hit."""
    p = normalised(raw)
    counts = reference.systematic_counts(p, num_samples, u)
    assert counts.sum() == num_samples
    assert (counts == counts.round()).all() and (counts >= 0).all()
    assert (counts >= torch.floor(num_samples * p - 1e-9)).all()
    assert (counts <= torch.ceil(num_samples * p + 1e-9)).all()
    assert (counts[p == 0] == 0).all()


@for_all(weights, st.integers(1, 300), st.integers(0, 2**31))
def test_drawn_counts_law(raw, num_samples, seed):
    """Stratified and multinomial counts sum to S; a stratified one is within the strata that the row touches,
    above S p_n - 1 - 1 and below S p_n + 1 + 1. Rows without probability are not hit."""
    p = normalised(raw)
    u = torch.rand(num_samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stratified = reference.stratified_counts(p, num_samples, u)
    assert (abs(stratified - num_samples * p) < 2 + 1e-9).all()
    for counts in (stratified, reference.multinomial_counts(p, num_samples, u)):
        assert counts.sum() == num_samples
        assert (counts[p == 0] == 0).all()


@for_all(weights, st.integers(1, 100), units)
def test_counts_of_equal_numbers_agree(raw, num_samples, u):
    """Stratified sampling with the same number in every stratum is systematic sampling, and its thresholds
    handed to multinomial sampling give the same counts: three ways to count, one answer. Where a threshold
    falls on a boundary to the last bits the ways may round apart, so those u are passed over."""
    p = normalised(raw)
    distance = torch.remainder(num_samples * torch.cumsum(p, 0) - u, 1.0)
    if torch.minimum(distance, 1 - distance)[:-1].lt(1e-9).any():
        return
    thresholds = (torch.arange(num_samples, dtype=torch.float64) + u) / num_samples
    brute = torch.zeros_like(p)
    for threshold in thresholds.tolist():
        brute[min(int((torch.cumsum(p, 0) <= threshold).sum()), len(p) - 1)] += 1
    for counts in (
        reference.systematic_counts(p, num_samples, u),
        reference.stratified_counts(p, num_samples, torch.full((num_samples,), u, dtype=torch.float64)),
        reference.multinomial_counts(p, num_samples, thresholds),
    ):
        assert torch.equal(counts, brute)


def test_counts_at_boundaries():
    """A threshold on a boundary belongs to the row that begins there; probabilities and thresholds are exact
    in binary. A row without probability is not hit, the first and the last included."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    expected = torch.tensor([0, 1, 0, 1, 2, 0], dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(reference.systematic_counts(p, 4, 0.0), expected)
    assert torch.equal(reference.stratified_counts(p, 4, zeros), expected)
    assert torch.equal(reference.multinomial_counts(p, 4, torch.arange(4).double() / 4), expected)
    weight = reference.grouped_weights(torch.stack([p, p]), 2, 0.0)
    assert torch.equal(weight, torch.stack([p, p])), "R p_n is 0, 1 or 2: all rows are certain"


# The grouped sampler ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "num_samples"), [(1, 8), (4, 2), (4, 16), (7, 5)])
def test_grouped_inclusion_frequencies(group, num_samples):
    """P(row n enters) = min(1, R mean_n), R = S * group, and it enters head h with p_hn / that. No chance:
    over a grid of N values of u, a row is selected on at most two intervals, so its frequency is off by at
    most 2 / N. Counts sum to R, hence the number of rows is at most R and the expected number sum_n min(1, R
    mean_n)."""
    p = distribution(group, 60, logit_std=2.5, seed=group)
    draws, mean, grid = num_samples * group, p.mean(0), 4000
    expected = (draws * mean).clamp(max=1.0)
    assert (expected < 1).any() and (expected == 1).any(), "the case needs both kinds of rows"
    selected = torch.zeros(60, dtype=torch.float64)
    for i in range(grid):
        weight = reference.grouped_weights(p, num_samples, (i + 0.5) / grid)
        hit = weight[0] > 0
        assert torch.equal(weight[:, hit], (p / expected)[:, hit]) and not weight[:, ~hit].any()
        assert hit.sum() <= draws
        selected += hit
    assert abs(selected / grid - expected).max() <= 2 / grid + 1e-12


def test_grouped_rows_that_are_certain_enter_exactly():
    """R mean_n >= 1 for every row: no randomness is left, and the estimate is exact."""
    p, values = distribution(4, 10, logit_std=0.1), normals(10, 3)
    for u in (0.0, 0.3, 0.999):
        torch.testing.assert_close(reference.grouped_weights(p, 20, u), p, rtol=0, atol=0)
    mean, variance = reference.moments(p, values, 20, "grouped")
    torch.testing.assert_close(mean, p @ values, rtol=1e-12, atol=0)
    assert variance.max() < 1e-24


# Moments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_samples", [1, 2, 7, 64])
@pytest.mark.parametrize("logit_std", [0.0, 1.0, 4.0])
def test_every_sampler_is_unbiased(sampler, num_samples, logit_std):
    """The mean over all random numbers is p @ v, to rounding. For systematic and grouped sampling `moments`
    adds up the outcomes, so an end of an interval on the wrong side would show."""
    for group, n in [(1, 1), (1, 33), (4, 50), (7, 50)]:
        p, values = distribution(group, n, logit_std=logit_std, seed=n), normals(n, 5, seed=group)
        mean, variance = reference.moments(p, values, num_samples, sampler)
        assert mean.shape == variance.shape == (group, 5)
        torch.testing.assert_close(mean, p @ values, rtol=1e-9, atol=1e-9)
        assert (variance >= -1e-12).all()


def estimates(sampler: str, p: torch.Tensor, values: torch.Tensor, num_samples: int, trials: int, seed: int):
    """[trials, group, head_dim]: the estimator, drawn."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(trials, p.shape[0], num_samples, generator=generator, dtype=torch.float64)
    draws = []
    for trial in u:
        if sampler == "grouped":
            draws.append(reference.grouped_weights(p, num_samples, float(trial[0, 0])) @ values)
            continue
        if sampler == "systematic":
            counts = [reference.systematic_counts(p[h], num_samples, float(trial[h, 0])) for h in range(len(p))]
        else:
            count = reference.stratified_counts if sampler == "stratified" else reference.multinomial_counts
            counts = [count(p[h], num_samples, trial[h]) for h in range(len(p))]
        draws.append(torch.stack(counts) @ values / num_samples)
    return torch.stack(draws)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_samples", [1, 6])
def test_moments_against_monte_carlo(sampler, num_samples):
    """3,000 estimates of 2 heads of 3 features from fixed seeds. Sample mean and sample variance are as good
    as normal, with deviations sqrt(var / N) and sqrt((m4 - m2^2) / N): 12 numbers a case, 96 in all, each
    beyond 5 sigma with probability 6e-7: false alarm 6e-5. A variance that is off by a factor of 1.25 fails.
    """
    trials = 3000
    p, values = distribution(2, 24, seed=1), normals(24, 3, seed=2)
    mean, variance = reference.moments(p, values, num_samples, sampler)
    drawn = estimates(sampler, p, values, num_samples, trials, seed=num_samples)
    deviation = drawn - mean
    z_mean = deviation.mean(0) / torch.sqrt(variance / trials)
    second, fourth = (deviation**2).mean(0), (deviation**4).mean(0)
    z_variance = (second - variance) / torch.sqrt((fourth - second**2) / trials)
    assert variance.min() > 1e-4, "the case needs to be random"
    assert abs(z_mean).max() < 5, z_mean
    assert abs(z_variance).max() < 5, z_variance


def test_variances_are_ordered():
    """Stratified sampling never has a larger variance than multinomial; with S = 1 the first three are one."""
    for seed in range(20):
        p, values = distribution(3, 30, seed=seed), normals(30, 4, seed=seed)
        for num_samples in (1, 5, 17):
            multinomial, stratified, systematic = (
                reference.moments(p, values, num_samples, sampler)[1]
                for sampler in ("multinomial", "stratified", "systematic")
            )
            assert (stratified <= multinomial * (1 + 1e-9)).all()
            if num_samples == 1:
                torch.testing.assert_close(stratified, multinomial, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(systematic, multinomial, rtol=1e-9, atol=1e-12)


def test_one_key_has_no_variance():
    """All mass on one key: every sampler returns its value."""
    p = torch.zeros(2, 9, dtype=torch.float64)
    p[:, 4] = 1.0
    values = normals(9, 3)
    for sampler in SAMPLERS:
        mean, variance = reference.moments(p, values, 5, sampler)
        torch.testing.assert_close(mean, values[4].expand(2, 3), rtol=1e-12, atol=0)
        assert abs(variance).max() < 1e-15


def test_unknown_sampler():
    with pytest.raises(ValueError, match="sampler is 'sorted'; it needs to be multinomial, stratified"):
        reference.moments(distribution(1, 3), normals(3, 1), 2, "sorted")
