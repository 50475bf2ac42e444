"""Bernoulli scores: the laws of the draws, bits that agree with the oracle's, and the operator around them.

Seeds are fixed, so a test that passes keeps passing; the false-alarm rates are what a change of seed would risk.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BUDGETS, HEAD_DIMS, SAMPLERS, make_qkv, mean_z, relative_rms, repeat_rows, working_dtype

import santa
from santa import reference
from santa import reference_bernoulli as oracle

SCORE_SAMPLERS = list(oracle.SCORE_SAMPLERS)
N = 16384
Z_PROJECTED = 4.9  # two-sided false-alarm rate 1e-6
Z_LARGEST = 6.0  # 256 elements: 256 * 2e-9 = 5e-7
NAN = float("nan")


def feature_major(k):
    """[batch, kv_len, heads, head_dim] to [batch, heads, head_dim, kv_len]."""
    return k.permute(0, 2, 3, 1).contiguous()


def draw(q, num_kv_heads, num_draws, score_sampler, *, seed=0, row_seeds=None, kv_lens=None):
    """The operator's counts [batch, num_qo_heads, head_dim], on the CPU."""
    batch = q.shape[0]
    row_seeds = torch.zeros(batch, dtype=torch.int64) if row_seeds is None else row_seeds
    kv_lens = torch.full((batch,), 100, dtype=torch.int32) if kv_lens is None else kv_lens
    return torch.ops.santa._ternary_counts(
        q,
        kv_lens.to(q.device, torch.int32),
        row_seeds.to(q.device),
        num_kv_heads,
        num_draws,
        SCORE_SAMPLERS.index(score_sampler),
        seed,
    ).cpu()


def oracle_of(q, k, v, num_draws, score_sampler, *, seed=0, row_seeds=None, kv_lens=None, **options):
    """(out, lse, counts) of the oracle, with exact values; k is feature-major."""
    starts = options.get("kv_starts")
    lens = kv_lens
    if lens is None:
        lens = torch.full((q.shape[0],), k.shape[3]) - (0 if starts is None else starts.cpu())
    counts = oracle.ternary_counts(
        q,
        num_kv_heads=k.shape[1],
        num_draws=num_draws,
        score_sampler=score_sampler,
        seed=seed,
        row_seeds=row_seeds,
        kv_lens=lens,
    )
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = oracle.decode(q.cpu(), k.cpu(), v.cpu(), counts, num_draws, kv_lens=lens.cpu(), **on_cpu)
    return out, lse, counts


def bernoulli(q, k, v, **options):
    options = {"num_draws": 2, "num_samples": 0, "min_sampled_len": 0} | options
    return santa.decode(q, k, v, score="bernoulli", **options)


def tolerance(dtype):
    """Relative error of an exact value stage: rounding of the output, and of its weights where V is 16 bits."""
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]


# The draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_sampler", SCORE_SAMPLERS)
@pytest.mark.parametrize("num_draws", [1, 3, 16, 4096])
def test_counts_are_the_oracles(device, score_sampler, num_draws):
    """Bit for bit, in every dtype, head_dim and group size; both backends are compared with the same oracle."""
    generator = torch.Generator().manual_seed(num_draws)
    dtypes = [torch.bfloat16, torch.float16] + ([torch.float32] if device == "cpu" else [])
    shapes = list(zip(HEAD_DIMS, (1, 3, 4, 8, 12), strict=True))
    for dtype in dtypes:
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


# The operator against the oracle ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "group, head_dim", [(1, 64), (2, 96), (3, 128), (4, 128), (5, 192), (7, 64), (8, 256), (12, 64)]
)
def test_exact_values_of_noisy_scores(device, group, head_dim):
    """num_samples = 0 is softmax attention of the noisy logits: one tile, several, odd lengths, starts that are not
    aligned, either layout of V."""
    score_sampler = SCORE_SAMPLERS[group % 3]
    generator = torch.Generator().manual_seed(group)
    for dtype in [torch.bfloat16, torch.float16] if device == "cuda" else [torch.float32, torch.bfloat16]:
        for layout, max_kv_len in (("NHD", 1101), ("HND", 1104)):
            q, k, v = make_qkv(3, 2 * group, 2, max_kv_len, head_dim, dtype=dtype, device=device, seed=group)
            k, v = feature_major(k), v if layout == "NHD" else v.transpose(1, 2).contiguous()
            options = {
                "kv_lens": torch.tensor([1100, 513, 1], dtype=torch.int32, device=device),
                "kv_starts": torch.tensor(
                    [0, int(torch.randint(1, 8, (), generator=generator)), 700], device=device
                ).int(),
                "row_seeds": torch.tensor([1, 2, 3], device=device),
                "kv_layout": layout,
            }
            out, lse, rows, features = bernoulli(
                q,
                k,
                v,
                score_sampler=score_sampler,
                seed=9,
                return_rows_read=True,
                return_features_read=True,
                **options,
            )
            expected, expected_lse, counts = oracle_of(q, k, v, 2, score_sampler, seed=9, **options)
            assert relative_rms(out, expected) < tolerance(dtype)
            assert (lse.double().cpu() - expected_lse).abs().max() < 2e-5
            assert torch.equal(rows.cpu(), options["kv_lens"].cpu()[:, None].expand(3, 2))
            assert torch.equal(features.cpu(), oracle.features_read(counts, 2))


@pytest.mark.parametrize("group", [1, 2, 4, 6, 8, 16])
def test_scores_of_sampled_rows(device, group):
    """The lse of sampled rows, which is made of the tiles' softmax states, for all tile sizes."""
    dtype = working_dtype(device)
    lens = [130, 4000, 9000, 17000] if device == "cuda" else [130, 4000, 4500]
    q, k, v = make_qkv(len(lens), group, 1, max(lens) + 8, 64, dtype=dtype, device=device, seed=group)
    k = feature_major(k)
    options = {
        "kv_lens": torch.tensor(lens, dtype=torch.int32, device=device),
        "kv_starts": torch.tensor([8, 3, 0, 1][: len(lens)], dtype=torch.int32, device=device),
    }
    out, lse, rows = bernoulli(q, k, v, num_samples=4096, return_rows_read=True, **options)
    expected, expected_lse, _ = oracle_of(q, k, v, 2, "independent", **options)
    assert (lse.double().cpu() - expected_lse).abs().max() < 2e-5
    assert relative_rms(out, expected) < 0.1
    assert (rows.cpu().flatten() <= torch.tensor(lens)).all() and (rows > 0).all()


@pytest.mark.parametrize("group, head_dim", [(1, 64), (3, 96), (4, 128), (8, 192), (2, 256)])
@pytest.mark.parametrize("aligned", [True, False])
def test_rows_of_any_share(device, group, head_dim, aligned):
    """Elements of q of one magnitude are drawn for certain, so that scores are exact: the lse of rows that read from no
    feature to all of them, of all lengths, in one call. A GPU copies features ahead of what it adds, from block to
    block and row to row; here their lists end anywhere."""
    generator = torch.Generator().manual_seed(group)
    batch, max_kv_len = (48, 6000) if device == "cuda" else (12, 1500)
    q, k, v = make_qkv(batch, 2 * group, 2, max_kv_len + 8, head_dim, dtype=working_dtype(device), seed=group)
    shares = torch.rand(batch, generator=generator)
    shares[torch.arange(batch) % 4 == 1] = 0.0
    shares[torch.arange(batch) % 4 == 2] = 1.5 / head_dim
    kept = torch.rand(batch, 1, head_dim, generator=generator) < shares[:, None, None]
    q = torch.where(kept, q.sign(), 0.0).to(q.dtype)  # one set of features per row, of either sign
    lens = torch.randint(1, max_kv_len, (batch,), generator=generator).int()
    lens[::5] = torch.randint(1, 300, (len(lens[::5]),), generator=generator).int()
    lens[7], lens[8] = 0, max_kv_len
    starts = torch.full((batch,), 8 if aligned else 5, dtype=torch.int32)
    inputs = [x.to(device) for x in (q, feature_major(k), v)]
    options = {"kv_lens": lens.to(device), "kv_starts": starts.to(device)}
    out, lse, features = bernoulli(*inputs, num_draws=1, num_samples=64, return_features_read=True, **options)
    for b in range(batch):
        keys = k[b, starts[b] : starts[b] + lens[b]].double().repeat_interleave(group, dim=1)
        expected = torch.einsum("hd,nhd->hn", q[b].double(), keys).mul(head_dim**-0.5).logsumexp(dim=-1)
        assert torch.allclose(lse[b].double().cpu(), expected, rtol=0, atol=2e-5), b
        assert (features[b].cpu() == (kept[b].sum() if lens[b] > 0 else 0)).all()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_values_are_unbiased_given_the_scores(device, sampler, budget):
    """Sampled minus exact values over the same scores has mean 0 (z-test over pairs), and the same test sees a planted
    bias of 3%."""
    count = 4096
    q, k, v = make_qkv(1, 4, 1, 200, 64, dtype=working_dtype(device), device=device, seed=10)
    rows = [repeat_rows(x, count) for x in (q, feature_major(k), v)]
    options = {"row_seeds": torch.arange(count, device=device), "score_sampler": "shared"}
    exact, lse = bernoulli(*rows, **options)
    sampled, sampled_lse = bernoulli(*rows, num_samples=32, sampler=sampler, budget=budget, **options)
    assert (lse - sampled_lse).abs().max() < 1e-4
    expected = exact.double().cpu().mean(dim=0)
    projected, largest = mean_z(sampled.double().cpu() - exact.double().cpu() + expected, expected)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST
    biased = sampled.double().cpu() * 1.03 - exact.double().cpu() + expected
    assert abs(mean_z(biased, expected)[0]) > Z_PROJECTED, "the test could not see a bias of 3%"


@pytest.mark.parametrize("num_samples", [0, 2048])
def test_many_draws_come_close_to_exact_scores(device, num_samples):
    q, k, v = make_qkv(2, 8, 2, 1000, 64, dtype=working_dtype(device), device=device, seed=11)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    out, lse = bernoulli(
        q,
        feature_major(k),
        v,
        num_draws=4096,
        score_sampler="systematic",
        num_samples=num_samples,
        sampler="systematic",
    )
    assert (lse.double().cpu() - expected_lse).abs().max() < 1e-2
    assert relative_rms(out, expected) < (5e-3 if num_samples == 0 else 0.1)


def test_short_rows_have_exact_values(device):
    """min_sampled_len speaks of values: a shorter row has noisy scores and all of its values."""
    q, k, v = make_qkv(2, 8, 2, 900, 64, dtype=working_dtype(device), device=device, seed=12)
    k = feature_major(k)
    options = {"kv_lens": torch.tensor([900, 300], dtype=torch.int32, device=device), "seed": 1}
    out, _, rows = bernoulli(q, k, v, num_samples=16, min_sampled_len=500, return_rows_read=True, **options)
    exact = bernoulli(q, k, v, **options)[0]
    assert torch.equal(out[1], exact[1]) and not torch.equal(out[0], exact[0])
    assert (rows[1] == 300).all() and (rows[0] < 300).all()


@pytest.mark.gpu
def test_backends_agree():
    """The same features, and scores that differ by rounding alone: sums of keys times integers are exact to the last
    addition, so the lse agrees closely."""
    lens = torch.tensor([1000, 333, 20000], dtype=torch.int32)
    q, k, v = make_qkv(3, 8, 2, 20000, 128, dtype=torch.bfloat16, seed=13)
    k = feature_major(k)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device) for x in (q, k, v)]
        results.append(
            bernoulli(
                *inputs, kv_lens=lens.to(device), num_samples=64, score_sampler="shared", return_features_read=True
            )
        )
    (_, lse, features), (_, cuda_lse, cuda_features) = results
    assert torch.equal(features, cuda_features.cpu())
    assert (lse - cuda_lse.cpu()).abs().max() < 1e-5


# Same bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, 32])
@pytest.mark.parametrize("score_sampler", SCORE_SAMPLERS)
def test_same_bits(device, num_samples, score_sampler):
    """Repeated, alone or in a batch, from a larger cache and from another start: the same bits."""
    q, k, v = make_qkv(3, 8, 2, 1304, 64, dtype=working_dtype(device), device=device, logit_std=2.0)
    k = feature_major(k)
    lens = torch.tensor([1300, 700, 129], dtype=torch.int32, device=device)
    seeds = torch.tensor([5, -6, 7], device=device)
    options = {"num_samples": num_samples, "score_sampler": score_sampler, "return_features_read": True}
    first = bernoulli(q, k, v, kv_lens=lens, row_seeds=seeds, **options)
    for a, b in zip(bernoulli(q, k, v, kv_lens=lens, row_seeds=seeds, **options), first, strict=True):
        assert torch.equal(a, b)
    for b in range(3):
        one = slice(b, b + 1)
        alone = bernoulli(q[one], k[one], v[one], kv_lens=lens[one], row_seeds=seeds[one], **options)
        for x, y in zip(alone, first, strict=True):
            assert torch.equal(x, y[one])
    # In a larger cache, from an odd start on; on CUDA that takes the path of rows that are not aligned.
    padded_k = torch.full((3, 2, 64, 1312), NAN, dtype=k.dtype, device=device)
    padded_v = torch.full((3, 1312, 2, 64), NAN, dtype=v.dtype, device=device)
    for start in (8, 3):
        padded_k.fill_(NAN), padded_v.fill_(NAN)
        padded_k[..., start : start + 1304], padded_v[:, start : start + 1304] = k, v
        for b, length in enumerate(lens.tolist()):
            padded_k[b, ..., start + length :] = NAN
            padded_v[b, start + length :] = NAN
        starts = torch.full((3,), start, dtype=torch.int32, device=device)
        moved = bernoulli(q, padded_k, padded_v, kv_lens=lens, kv_starts=starts, row_seeds=seeds, **options)
        for x, y in zip(moved, first, strict=True):
            assert torch.equal(x, y)


def test_streams(device):
    """Seed, row seed and length each change the draws."""
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(14)).to(device, working_dtype(device))
    base = draw(q, 1, 4, "independent")
    for options in ({"seed": 1}, {"row_seeds": torch.tensor([1])}, {"kv_lens": torch.tensor([101])}):
        assert not torch.equal(draw(q, 1, 4, "independent", **options), base)


# Hostile input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, 16])
def test_zero_query_has_equal_logits(device, num_samples):
    """No feature is read, so not even NaN keys matter; the logits are 0."""
    q, k, v = make_qkv(1, 2, 1, 200, 64, dtype=working_dtype(device), device=device)
    out, lse, features = bernoulli(
        torch.zeros_like(q),
        torch.full_like(feature_major(k), NAN),
        v,
        num_samples=num_samples,
        return_features_read=True,
    )
    assert (lse - math.log(200)).abs().max() < 1e-5 and (features == 0).all() and torch.isfinite(out).all()
    if num_samples == 0:
        assert relative_rms(out, v.double().mean(dim=1).expand(1, 2, 64)) < tolerance(q.dtype)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("num_samples", [0, 16])
def test_query_that_is_not_finite(device, value, num_samples):
    """That head is NaN; the others of its group are what they are without it."""
    q, k, v = make_qkv(1, 4, 1, 300, 64, dtype=working_dtype(device), device=device)
    k = feature_major(k)
    hostile = q.clone()
    hostile[0, 1, 5] = value
    options = {"num_samples": num_samples, "sampler": "systematic"}
    out, lse = bernoulli(hostile, k, v, **options)
    expected, expected_lse = bernoulli(q, k, v, **options)
    assert torch.isnan(out[0, 1]).all() and torch.isnan(lse[0, 1])
    others = [0, 2, 3]
    assert torch.equal(out[0, others], expected[0, others]) and torch.equal(lse[0, others], expected_lse[0, others])
    assert (draw(hostile, 1, 4, "independent")[0, 1] == 0).all()


@pytest.mark.parametrize("num_samples", [0, 16])
@pytest.mark.parametrize("group, head_dim, kv_len", [(4, 64, 700), (7, 128, 3000)])
def test_features_that_a_head_did_not_draw_do_not_reach_it(device, num_samples, group, head_dim, kv_len):
    """NaN in every feature of a key that no head drew changes nothing; in one that some heads drew, those alone."""
    q, k, v = make_qkv(1, group, 1, kv_len, head_dim, dtype=working_dtype(device), device=device)
    q = q.sign() * q.abs().pow(3)  # few large elements, so that some features are drawn by no head
    k = feature_major(k)
    options = {"num_samples": num_samples, "num_draws": 1, "sampler": "systematic"}
    expected, expected_lse = bernoulli(q, k, v, **options)
    counts = draw(q, 1, 1, "independent", kv_lens=torch.tensor([kv_len]))[0]
    unread = (counts == 0).all(dim=0)
    assert 0 < unread.sum() < head_dim
    hostile = k.clone()
    hostile[0, 0, unread.to(device)] = NAN
    for a, b in zip(bernoulli(q, hostile, v, **options), (expected, expected_lse), strict=True):
        assert torch.equal(a, b)

    by_some = int((((counts != 0).sum(dim=0) > 0) & ((counts != 0).sum(dim=0) < group)).nonzero()[0])
    hostile[0, 0, by_some, 123] = NAN
    out, lse = bernoulli(q, hostile, v, **options)
    drew = (counts[:, by_some] != 0).to(device)
    assert torch.isnan(out[0, drew]).all() and torch.isnan(lse[0, drew]).all()
    assert torch.equal(out[0, ~drew], expected[0, ~drew]) and torch.equal(lse[0, ~drew], expected_lse[0, ~drew])


@pytest.mark.parametrize("num_samples", [0, 64])
@pytest.mark.parametrize("group", [4, 8])
def test_infinite_keys(device, num_samples, group):
    """A logit of -inf is a key that weighs nothing; one of +inf leaves the head undefined; a head that did not draw the
    feature does not see it."""
    q, k, v = make_qkv(1, group, 1, 1500, 64, dtype=working_dtype(device), device=device)
    q = q.sign()  # drawn for certain: logits are exact
    q[0, 0, 7] = 0.0
    k = feature_major(k)
    options = {"num_samples": num_samples, "num_draws": 1, "sampler": "systematic"}
    expected = bernoulli(q, k, v, **options)
    k[0, 0, 7, 1234] = -math.inf
    out, lse = bernoulli(q, k, v, **options)
    assert torch.equal(out[0, 0], expected[0][0, 0]) and torch.equal(lse[0, 0], expected[1][0, 0])
    scores = torch.einsum("hd,dn->hn", q[0].double().cpu(), k[0, 0].double().cpu().nan_to_num(neginf=0.0)) / 8
    scores[:, 1234] = -math.inf
    without = q[0, :, 7] > 0
    assert 0 < without.sum() < group - 1
    assert (lse[0].double().cpu() - scores.logsumexp(dim=-1))[without.cpu()].abs().max() < 2e-5
    assert torch.isfinite(out[0, without]).all() and torch.isnan(out[0, q[0, :, 7] < 0]).all()


@pytest.mark.parametrize("num_samples", [0, 16])
def test_no_key_and_one_key(device, num_samples):
    q, k, v = make_qkv(3, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    k = feature_major(k)
    k[0], v[0] = NAN, NAN
    lens = torch.tensor([0, 1, 50], dtype=torch.int32, device=device)
    out, lse, rows, features = bernoulli(
        q, k, v, kv_lens=lens, num_samples=num_samples, return_rows_read=True, return_features_read=True
    )
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and (rows[0] == 0).all() and (features[0] == 0).all()
    assert relative_rms(out[1].unflatten(0, (2, 2)), v[1, 0, :, None].expand(2, 2, 64)) < 1e-6
    assert (rows[1] == 1).all() and torch.isfinite(out).all()


def test_empty_cache_and_empty_batch(device):
    q, k, v = make_qkv(2, 4, 2, 0, 64, dtype=working_dtype(device), device=device)
    for num_samples in (0, 16):
        out, lse, features = bernoulli(q, k.reshape(2, 2, 64, 0), v, num_samples=num_samples, return_features_read=True)
        assert (out == 0).all() and (lse == -math.inf).all() and (features == 0).all()
    out, _ = bernoulli(q[:0], k.reshape(2, 2, 64, 0)[:0], v[:0])
    assert out.shape == (0, 4, 64)


def test_rows_outside_the_cache(device):
    q, k, v = make_qkv(2, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    lens = torch.tensor([51, 50], dtype=torch.int32, device=device)
    for num_samples in (0, 16):
        if device == "cpu":
            with pytest.raises(ValueError, match="row 0 has kv_lens 51"):
                bernoulli(q, feature_major(k), v, kv_lens=lens, num_samples=num_samples)
            continue
        out, lse, features = bernoulli(
            q, feature_major(k), v, kv_lens=lens, num_samples=num_samples, return_features_read=True
        )
        assert torch.isnan(out[0]).all() and torch.isnan(lse[0]).all() and (features[0] == -1).all()
        assert torch.isfinite(out[1]).all()


def test_strided_inputs(device):
    """Strides of the cache, and a q whose heads are apart."""
    q, k, v = make_qkv(2, 4, 2, 333, 64, dtype=working_dtype(device), device=device)
    k = feature_major(k)
    expected = bernoulli(q, k, v)[0]
    wide = torch.full((2, 3, 70, 341), NAN, dtype=k.dtype, device=device)
    wide[:, :2, :64, 5:338] = k
    apart = torch.full((2, 4, 67), NAN, dtype=q.dtype, device=device)
    apart[..., :64] = q
    assert torch.equal(bernoulli(apart[..., :64], wide[:, :2, :64, 5:338], v)[0], expected)


# Errors ------------------------------------------------------------------------------------------------


def test_errors(device):
    q, k, v = make_qkv(2, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    rows, k = k, feature_major(k)
    other = torch.float16 if q.dtype != torch.float16 else torch.bfloat16
    scale = torch.ones((), device=device)
    for message, inputs, options in (
        (r"k_features has shape \[2, 50, 2, 64\]; dimension 2 \(head_dim\)", (q, rows, v), {}),
        ("k_features is .*; it needs to be .*, q's dtype", (q, k.to(other), v), {}),
        ("v has shape .* needs to be 50", (q, k, v[:, :49]), {}),
        ("k_features has stride 64 in its last dimension", (q, rows.permute(0, 2, 3, 1).mT.contiguous().mT, v), {}),
        (r"num_draws is 0; it needs to be in \[1, 4096\]", (q, k, v), {"num_draws": 0}),
        (r"num_draws is 4097; it needs to be in \[1, 4096\]", (q, k, v), {"num_draws": 4097}),
        ("score_sampler is 3; it needs to be one of 'independent'", (q, k, v), {"score_sampler": 3}),
        ("score_sampler is 'twice'", (q, k, v), {"score_sampler": "twice"}),
        ("k_scale is given with score='bernoulli'", (q, k, v), {"k_scale": scale}),
        ("k_features has 2 KV heads", (q[:, :3], k, v), {}),
        ("kv_lens is int64", (q, k, v), {"kv_lens": torch.tensor([1, 2], device=device)}),
        ("num_samples is -1", (q, k, v), {"num_samples": -1}),
    ):
        if "stride" in message:
            inputs = (q, k.mT.contiguous().mT, v)
            message = "k_features has stride .* in its last dimension"
        with pytest.raises(ValueError, match=message):
            bernoulli(*inputs, **options)
    for name, value in (("num_draws", 4), ("score_sampler", "shared"), ("return_features_read", True)):
        with pytest.raises(ValueError, match=f"{name} is given with score='exact'"):
            santa.decode(q, rows, v, **{name: value})
    with pytest.raises(ValueError, match="score is 'noisy'; it needs to be 'exact' or 'bernoulli'"):
        santa.decode(q, rows, v, score="noisy")
    with pytest.raises(TypeError, match="num_draws is a float"):
        bernoulli(q, k, v, num_draws=2.0)


def test_no_backward(device):
    q, k, v = make_qkv(1, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    q.requires_grad_()
    out, _ = bernoulli(q, feature_major(k), v)
    with pytest.raises(RuntimeError, match="no backward pass"):
        out.sum().backward()


# Inside PyTorch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode_bernoulli", "decode_bernoulli_rows_read"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, op, requires_grad):
    q, k, v = make_qkv(2, 8, 2, 300, 64, dtype=working_dtype(device), device=device)
    options = {"kv_lens": torch.tensor([300, 20], dtype=torch.int32, device=device), "min_sampled_len": 0, "seed": 3}
    if requires_grad:
        q.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # that check runs a backward pass where a gradient is required
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        getattr(torch.ops.santa, op).default, (q, feature_major(k), v), options | {"num_samples": 16}, test_utils=checks
    )


def test_opcheck_append(device):
    k = torch.zeros(2, 2, 64, 50, dtype=working_dtype(device), device=device)
    new = torch.randn(2, 3, 2, 64, device=device).to(k.dtype)
    positions = torch.tensor([0, 47], device=device)
    torch.library.opcheck(torch.ops.santa.append_k_features.default, (k, new, positions))
    pages = torch.zeros(5, 2, 64, 16, dtype=k.dtype, device=device)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.santa.append_k_features_paged.default, (pages, new, positions // 2, table))


def test_compile_fullgraph(device):
    """A decode step: append the new key, then attend; the cache is written in place."""
    q, k, v = make_qkv(2, 8, 2, 64, 64, dtype=working_dtype(device), device=device)
    new = torch.randn(2, 1, 2, 64, device=device).to(k.dtype)
    positions = torch.tensor([10, 63], device=device)

    def step(q, k, v, new, positions):
        santa.append_k_features(k, new * 2, positions)
        lens = (positions + 1).int()
        return santa.decode(
            q, k, v, kv_lens=lens, score="bernoulli", num_draws=2, num_samples=8, min_sampled_len=0,
            return_features_read=True,
        )  # fmt: skip

    caches = [feature_major(k), feature_major(k)]
    eager = step(q, caches[0], v, new, positions)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)(q, caches[1], v, new, positions)
    assert torch.equal(*caches) and not torch.equal(caches[0], feature_major(k))
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_draws_fresh_features():
    """A replayed graph follows kv_lens: other features for a longer row, the same bits for the same."""
    q, k, v = make_qkv(2, 8, 2, 700, 64, dtype=torch.float16, device="cuda")
    k = feature_major(k)
    lens = torch.tensor([600, 300], dtype=torch.int32, device="cuda")

    def step():
        return bernoulli(q, k, v, kv_lens=lens, num_samples=32)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    results = []
    for lengths in ([600, 300], [601, 301], [600, 300], [0, 700]):
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        results.append(out.clone())
        assert torch.equal(out, step())
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    assert (results[3][0] == 0).all()


# Filling the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 7, 100])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_append(device, num_rows, index_dtype):
    """A transposition, at each row's own position, that touches nothing else; of k_new with any strides."""
    generator = torch.Generator().manual_seed(num_rows)
    for head_dim, dtype in ((64, torch.float16), (96, torch.bfloat16), (40, working_dtype(device))):
        new = torch.randn(3, 2, num_rows, head_dim + 3, generator=generator).to(device, dtype)
        new = new.transpose(1, 2)[..., 1 : head_dim + 1]
        storage = torch.randn(3, 4, head_dim, 137, generator=generator).to(device, dtype)
        k = storage[:, 1:3, :, 2:133]
        expected = storage.clone()
        positions = torch.tensor([0, 13, 131 - num_rows], dtype=index_dtype, device=device)
        for b, position in enumerate(positions.tolist()):
            expected[b, 1:3, :, 2 + position : 2 + position + num_rows] = new[b].permute(1, 2, 0)
        santa.append_k_features(k, new, positions)
        assert torch.equal(storage, expected)


@pytest.mark.parametrize("num_rows", [1, 50])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_append_paged(device, num_rows, page_size):
    """Positions go through the block table, whose entries are in no order."""
    generator = torch.Generator().manual_seed(page_size)
    dtype = working_dtype(device)
    max_pages = -(-130 // page_size)
    table = torch.randperm(2 * max_pages + 5, generator=generator)[: 2 * max_pages].reshape(2, max_pages).int()
    pages = torch.randn(2 * max_pages + 5, 2, 64, page_size, generator=generator).to(device, dtype)
    new = torch.randn(2, num_rows, 2, 64, generator=generator).to(device, dtype)
    positions = torch.tensor([3, 77], device=device)
    expected = pages.clone()
    for b, first in enumerate(positions.tolist()):
        for n in range(num_rows):
            page, offset = divmod(first + n, page_size)
            expected[table[b, page], :, :, offset] = new[b, n]
    table[0, -1] = 10**6  # not needed, not looked at
    santa.append_k_features_paged(pages, new, positions, table.to(device))
    assert torch.equal(pages, expected)


def test_append_without_room(device):
    """On the CPU an error, before anything is written; on CUDA such a row stays as it is."""
    k = torch.zeros(2, 2, 64, 50, dtype=working_dtype(device), device=device)
    new = torch.ones(2, 4, 2, 64, dtype=k.dtype, device=device)
    table = torch.tensor([[0, 9], [1, 0]], dtype=torch.int32, device=device)
    for positions in ([0, 47], [0, -1], [0, 2**40]):
        positions = torch.tensor(positions, device=device)
        if device == "cpu":
            with pytest.raises(ValueError, match="positions of row 1 is"):
                santa.append_k_features(k, new, positions)
            assert (k == 0).all()
        else:
            santa.append_k_features(k, new, positions)
            assert (k[1] == 0).all() and (k[0, ..., :4] == 1).all()
    pages = torch.zeros(2, 2, 64, 16, dtype=k.dtype, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="block_table of row 0 has a page outside"):
            santa.append_k_features_paged(pages, new, torch.tensor([14, 0]), table)
        assert (pages == 0).all()
    else:
        santa.append_k_features_paged(pages, new, torch.tensor([14, 0], device=device), table)
        assert (pages[0, ..., 14:] == 1).all() and (pages[0, ..., :14] == 0).all() and (pages[1, ..., :4] == 1).all()


def test_append_errors(device):
    k = torch.zeros(2, 2, 64, 50, dtype=working_dtype(device), device=device)
    new, positions = torch.ones(2, 4, 2, 64, dtype=k.dtype, device=device), torch.tensor([0, 1], device=device)
    other = torch.float16 if k.dtype != torch.float16 else torch.bfloat16
    for message, inputs in (
        ("k_new is .*; it needs to be .*, the dtype of k_features", (k, new.to(other), positions)),
        (r"k_new has shape \[2, 4, 1, 64\]; dimension 2 \(num_kv_heads\)", (k, new[:, :, :1], positions)),
        (r"positions has shape \[1\]", (k, new, positions[:1])),
        ("positions is float32", (k, new, positions.float())),
        ("k_new has 51 rows; k_features has room for 50", (k, new[:, :1].expand(2, 51, 2, 64), positions)),
        (
            "k_features has stride 64 in its last dimension",
            (k.transpose(2, 3).contiguous().transpose(2, 3), new, positions),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            santa.append_k_features(*inputs)
    with pytest.raises(RuntimeError, match="no backward pass"):
        santa.append_k_features(k, new.requires_grad_(), positions)
