"""Rows that are sampled in one pass, of every length, group size and cut into parts: laws, streams, invariance, and the
same draws on both devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.bernoulli import bernoulli, draw, feature_major
from helpers.inputs import SAMPLED, make_qkv, repeat_rows, working_dtype
from helpers.one_pass import BUDGETS, KV_LEN, LONG_KV_LEN, SAMPLERS, assert_mean, assert_unbiased, draws_of, gaussian

import santa
from santa import reference, reference_bernoulli

N = 4096
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513]


@pytest.fixture(params=SAMPLED, ids="-".join)
def combination(request) -> dict[str, str]:
    return dict(zip(("sampler", "budget"), request.param, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kv_len", LENGTHS)
def test_every_length(device, kv_len, sampler, budget):
    """The mean over seeds, the log-sum-exp and the rows read, where tiles and pilots are cut short or just not."""
    problem = gaussian(device, kv_len=kv_len, group=3)
    out, lse, rows = draws_of(
        *problem.qkv, count=N, num_samples=8, sampler=sampler, budget=budget, return_rows_read=True
    )
    assert_unbiased(out, problem.expected)
    assert (lse.cpu() - problem.lse).abs().max() < 1e-4
    expected_rows = reference.one_pass_rows(problem.p, 8, sampler, budget)
    assert_mean(rows[:, 0], expected_rows, slack=1e-3 * expected_rows)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("group", [1, 3, 8, 12, 16])
def test_every_group_size(device, group, sampler, budget):
    """Groups above 8 heads are cut into blocks, and each block draws rows of its own."""
    kv_len, num_samples = 1300, 32
    problem = gaussian(device, kv_len=kv_len, group=group)
    out, lse, rows = draws_of(
        *problem.qkv, count=N, num_samples=num_samples, sampler=sampler, budget=budget, return_rows_read=True
    )
    for block in reference.head_blocks(group):  # of at most 512 elements
        assert_unbiased(out[:, block], problem.expected[block])
    assert (lse.cpu() - problem.lse).abs().max() < 1e-4
    _, variance = reference.moments(problem.p, problem.values, num_samples, sampler, budget)
    squared = (out.double().cpu() - problem.expected).pow(2).sum(dim=-1)
    for h in range(group):
        assert_mean(squared[:, h], float(variance[h].sum()), slack=2e-3 * float(variance[h].sum()))
    expected_rows = reference.one_pass_rows(problem.p, num_samples, sampler, budget)
    assert_mean(rows[:, 0], expected_rows, slack=1e-3 * expected_rows)


@pytest.mark.sanitize
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("group", [3, 12])
def test_rows_read_counts_the_rows_read(device, group, sampler, budget):
    """Draw by draw, with the identity for V: the rows that have a weight in any head of a block, added up over
    blocks."""
    q, k, _ = make_qkv(1, group, 1, 256, 256, dtype=working_dtype(device), device=device, logit_std=1.5, seed=5)
    v = torch.eye(256, dtype=q.dtype, device=device).reshape(1, 256, 1, 256)
    out, _, rows = draws_of(q, k, v, count=256, num_samples=8, sampler=sampler, budget=budget, return_rows_read=True)
    read = sum((out[:, block] != 0).any(dim=1).sum(dim=-1) for block in reference.head_blocks(group))
    assert torch.equal(rows[:, 0], read.to(torch.int32))


def test_rows_read_changes_nothing(device, combination):
    q, k, v = make_qkv(2, 8, 2, KV_LEN, 64, dtype=working_dtype(device), device=device)
    options = {"num_samples": 32, "min_sampled_len": 0, **combination}
    out, lse, _ = santa.decode(q, k, v, return_rows_read=True, **options)
    for a, b in zip(santa.decode(q, k, v, **options), (out, lse), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_kv_heads", [1, 20, 40, 72])  # parts of 256, 512, 1,024 and 2,048 keys
@pytest.mark.parametrize("budget", BUDGETS)
def test_parts_of_every_size(device, num_kv_heads, budget):
    q, k, v = make_qkv(
        1, num_kv_heads, num_kv_heads, KV_LEN, 64, dtype=working_dtype(device), device=device, logit_std=1.5
    )
    out, lse = draws_of(q, k, v, count=256, num_samples=32, budget=budget)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu())
    assert (lse.cpu() - expected_lse).abs().max() < 1e-4
    for head in (0, num_kv_heads - 1):
        assert_unbiased(out[:, head], expected[0, head])
    # Heads of different streams: no two are off in the same way.
    error = (out.double().cpu() - expected)[:, :, 0]
    if num_kv_heads > 1:
        correlation = torch.corrcoef(error.T).fill_diagonal_(0.0).abs().max()
        assert correlation < 6 / 256**0.5


def test_streams_follow_positions(device, combination):
    """Positions take the place of kv_len in the identity of a stream, and of nothing else."""
    q, k, v = make_qkv(1, 4, 1, KV_LEN, 64, dtype=working_dtype(device), device=device)
    batch = [repeat_rows(x, 4) for x in (q, k, v)]
    options = {"num_samples": 32, "min_sampled_len": 0, **combination}
    positions = torch.tensor([KV_LEN, 5, 5, 7], dtype=torch.int32, device=device)
    out, lse = santa.decode(*batch, positions=positions, **options)
    assert torch.equal(out[:1], santa.decode(q, k, v, **options)[0])
    assert torch.equal(out[1], out[2])
    for row in (0, 3):
        assert not torch.equal(out[1], out[row])
    assert (lse == lse[:1]).all()
    # A window of constant length: fresh numbers at each step, and not those of a growing row by chance.
    lens = torch.full((4,), 2000, dtype=torch.int32, device=device)
    window = santa.decode(*batch, kv_lens=lens, positions=positions, **options)[0]
    assert torch.equal(window[1], window[2]) and not torch.equal(window[1], window[3])


def test_streams_of_heads(device, combination):
    """Equal queries, keys and values: heads that share their samples have the same output, all others have others."""
    q, k, v = make_qkv(1, 1, 1, KV_LEN, 64, dtype=working_dtype(device), device=device)
    q, k, v = q.repeat(1, 24, 1), k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
    out = santa.decode(q, k, v, num_samples=32, min_sampled_len=0, **combination)[0][0].unflatten(0, (2, 12))
    if combination["sampler"] != "grouped":
        sharing = [out[kv_head, h : h + 1] for kv_head in range(2) for h in range(12)]
    elif combination["budget"] == "proportional":
        sharing = list(out)
    else:
        sharing = [out[kv_head, block] for kv_head in range(2) for block in reference.head_blocks(12)]
    for heads in sharing:
        assert (heads == heads[:1]).all()
    # The one number of systematic draws has some 4,000 outcomes, of which two heads can have the same by chance.
    assert len({tuple(heads[0].tolist()) for heads in sharing}) >= len(sharing) - 1


def test_scores_follow_positions(device):
    """Bernoulli scores are keyed by the position as the values are."""
    q, k, v = make_qkv(1, 4, 1, 300, 64, dtype=working_dtype(device), device=device)
    batch = [repeat_rows(x, 4) for x in (q, feature_major(k), v)]
    positions = torch.tensor([300, 5, 5, 7], dtype=torch.int32, device=device)
    _, lse = bernoulli(*batch, positions=positions)
    assert torch.equal(lse[:1], bernoulli(q, feature_major(k), v)[1])
    assert torch.equal(lse[1], lse[2])
    for row in (0, 3):
        assert not torch.equal(lse[1], lse[row])


@pytest.mark.sanitize
@pytest.mark.parametrize("heads", [(8, 2), (12, 1), (40, 40)])
def test_alone_or_in_a_batch(device, combination, heads):
    """Bit for bit, whatever the other rows of the batch are."""
    assert_the_same_alone(device, [KV_LEN, 600, 129, 0, 1], heads, combination)


def test_tiles_of_either_size_in_a_batch(device, combination):
    assert_the_same_alone(device, [LONG_KV_LEN, 16_384, 16_385, 600], (8, 2), combination)


def assert_the_same_alone(device: str, lengths: list[int], heads: tuple[int, int], combination: dict[str, str]) -> None:
    q, k, v = make_qkv(len(lengths), *heads, max(lengths), 64, dtype=working_dtype(device), device=device)
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    options = {"num_samples": 16, "min_sampled_len": 128, "return_rows_read": True, **combination}
    together = santa.decode(q, k, v, kv_lens=kv_lens, **options)
    for b, length in enumerate(lengths):
        alone = santa.decode(
            q[b : b + 1],
            k[b : b + 1, : max(length, 1)],
            v[b : b + 1, : max(length, 1)],
            kv_lens=kv_lens[b : b + 1],
            **options,
        )
        for a, x in zip(alone, together, strict=True):
            assert torch.equal(a, x[b : b + 1])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_head_without_a_softmax_is_alone_with_it(device, sampler, budget):
    """NaN in one query, +inf in another: their outputs are NaN, and their neighbours' are still unbiased."""
    problem = gaussian(device, kv_len=1300)
    q, k, v = problem.qkv
    q = q.clone()
    q[0, 1, 0], q[0, 2] = float("nan"), float("inf")
    out, lse = draws_of(q, k, v, count=N, num_samples=32, sampler=sampler, budget=budget)
    assert out[:, 1:3].isnan().all()
    whole = [0, 3]
    assert_unbiased(out[:, whole], problem.expected[whole])
    assert (lse.cpu()[:, whole] - problem.lse[whole]).abs().max() < 1e-4


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keys_of_minus_infinity(device, sampler, budget):
    """Keys whose scores are -inf weigh nothing, in whole tiles too, and are never read."""
    problem = gaussian(device, kv_len=1300)
    q, k, v = (x.clone() for x in problem.qkv)
    q[..., 0], k[..., 0] = 1.0, 0.0
    hidden = torch.zeros(1300, dtype=torch.bool)
    hidden[100:600] = hidden[1299] = True
    expected, expected_lse = reference.exact(q.cpu(), k[:, ~hidden].cpu(), v[:, ~hidden].cpu())
    k[:, hidden, :, 0] = -float("inf")
    v[:, hidden] = float("nan")
    out, lse = draws_of(q, k, v, count=N, num_samples=32, sampler=sampler, budget=budget)
    assert_unbiased(out, expected[0])
    assert (lse.cpu() - expected_lse).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_extreme_logits(device, sampler, budget, scale):
    """One key with all of the mass is read exactly; equal keys are a plain mean."""
    q, k, v = make_qkv(1, 4, 1, KV_LEN, 64, dtype=working_dtype(device), device=device)
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu(), sm_scale=scale)
    out, lse = draws_of(q, k, v, count=1024, num_samples=64, sampler=sampler, budget=budget, sm_scale=scale)
    torch.testing.assert_close(lse.double().cpu(), expected_lse.expand(1024, -1), rtol=1e-5, atol=1e-4)
    assert_unbiased(out, expected[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bernoulli_values_in_one_pass(device, sampler):
    """Given its noisy scores, a row's values are unbiased, its log-sum-exp is theirs, and the pilot takes its keys in
    runs of 8, as the rows read show: keys of these runs weigh more than others, by a feature that every draw reads."""
    count, num_draws, num_samples = 512, 8, 64
    q, k, v = make_qkv(1, 4, 1, KV_LEN, 64, dtype=working_dtype(device), device=device, logit_std=1.5)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, reference.pilot(KV_LEN, 8)[0][16:208], :, 0] = 2.0
    k = feature_major(k)
    batch = [repeat_rows(x, count) for x in (q, k, v)]
    row_seeds = torch.arange(count, dtype=torch.int64, device=device)
    options = {"row_seeds": row_seeds, "num_draws": num_draws}
    exact, exact_lse = bernoulli(*batch, **options)
    out, lse, rows = bernoulli(*batch, num_samples=num_samples, sampler=sampler, return_rows_read=True, **options)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-4)
    error = (out.double() - exact.double()).cpu()
    assert_unbiased(error + exact.double().cpu().mean(dim=0), exact.double().cpu().mean(dim=0))

    lens = torch.full((count,), KV_LEN)
    counts = draw(batch[0], 1, num_draws, "independent", row_seeds=row_seeds, kv_lens=lens)
    off = []
    for row in range(64):
        scores = reference_bernoulli.logits(q[0].cpu(), k[0].cpu(), counts[row], num_draws)
        expected_rows = reference.one_pass_rows(scores.softmax(dim=-1), num_samples, sampler, "streaming", pilot_run=8)
        off.append(rows[row, 0].item() - expected_rows)
    assert_mean(torch.tensor(off), 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [0, 384, KV_LEN - 256])
def test_same_rows_on_both_devices(combination, first):
    """At least 999 of 1,000 drawn rows agree, at the start of a row, around the end of a part and in the ragged tile:
    scores differ in the last bits. V is the identity for 256 keys, so the output shows which of them were drawn."""
    count = 256
    q, k, _ = make_qkv(1, 8, 2, KV_LEN, 256, dtype=torch.float16, logit_std=2.0)
    v = torch.zeros_like(k)
    v[0, first : first + 256] = torch.eye(256, dtype=torch.float16)[:, None]
    drawn = [
        draws_of(*(x.to(device) for x in (q, k, v)), count=count, num_samples=64, **combination)[0].cpu() != 0
        for device in ("cpu", "cuda")
    ]
    assert (drawn[0] != drawn[1]).sum() <= 1e-3 * drawn[0].sum()


def offsets_of(seed: int, row_seeds: list[int], tiles: int, unit_bits: int) -> np.ndarray:
    """The random offset of each tile [rows, tiles], from the definition: the top bits of draw 0 of the tile."""
    offsets = np.zeros((len(row_seeds), tiles), dtype=np.uint64)
    for row, row_seed in enumerate(row_seeds):
        identity = [row_seed & 0xFFFFFFFF, row_seed >> 32 & 0xFFFFFFFF, 0, 0]
        key = reference_bernoulli.philox(identity, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
        words = reference_bernoulli.philox([0, np.arange(tiles, dtype=np.uint64), 0, 0], (key[0], key[1]))
        bits = words[1] << np.uint64(32) | words[0]
        offsets[row] = bits >> np.uint64(64 - unit_bits) if unit_bits else 0
    return offsets


def units_of(unit_bits: int, rows: int = 16, tiles: int = 40) -> torch.Tensor:
    """Random and extreme tiles, [rows, tiles, 128], each adding up to 2^31 units at most."""
    generator = torch.Generator().manual_seed(unit_bits)
    units = torch.randint(0, 1 << min(24, unit_bits + 2), (rows, tiles, 128), generator=generator, dtype=torch.int32)
    units[1] = 1
    units[2, :, 1:] = 0
    units[3] = 0
    units[3, :, 77] = 2**31 - 256
    units[4] = 1 << 24
    units[5] = torch.randint(0, 3, (tiles, 128), generator=generator, dtype=torch.int32)
    return units


@pytest.mark.sanitize
@pytest.mark.parametrize("unit_bits", [0, 1, 10, 23, 24])
def test_draws_of_given_units(device, unit_bits):
    """Thresholds at whole draws, all off by the tile's random offset: in Python's integers, bit for bit."""
    units = units_of(unit_bits)
    row_seeds = torch.randint(-(2**62), 2**62, (len(units),), generator=torch.Generator().manual_seed(0))
    counts = torch.ops.santa._draw(units.to(device), row_seeds.to(device), unit_bits, 11).cpu().numpy()
    ends = np.cumsum(units.numpy().astype(np.uint64), axis=-1)
    offsets = offsets_of(11, row_seeds.tolist(), units.shape[1], unit_bits)[:, :, None]
    above = np.concatenate([offsets, ends + offsets], axis=-1) >> np.uint64(unit_bits)
    assert np.array_equal(counts, np.diff(above.astype(np.int64), axis=-1))
    assert counts[4].min() == counts[4].max() == (1 << 24) >> unit_bits
