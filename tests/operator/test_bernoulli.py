"""Bernoulli scores: the operator against its oracle, and the same bits from the same inputs."""

from __future__ import annotations

import pytest
import torch
from helpers.bernoulli import NAN, SCORE_SAMPLERS, bernoulli, feature_major, oracle_of, tolerance
from helpers.inputs import SAMPLED, make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z, relative_rms

from santa import reference
from santa import reference_bernoulli as oracle

# The operator against the oracle ----------------------------------------------------------------------


@pytest.mark.emulate
@pytest.mark.sanitize
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


@pytest.mark.emulate
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
    assert (rows.cpu().flatten() <= torch.tensor(lens) * len(reference.head_blocks(group))).all() and (rows > 0).all()


@pytest.mark.sanitize
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


@pytest.mark.parametrize("sampler, budget", SAMPLED)
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
        budget="proportional",
        num_samples=num_samples,
        sampler="systematic",
    )
    assert (lse.double().cpu() - expected_lse).abs().max() < 1e-2
    assert relative_rms(out, expected) < (5e-3 if num_samples == 0 else 0.1)


@pytest.mark.emulate
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


@pytest.mark.emulate
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
