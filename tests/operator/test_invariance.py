"""Same inputs and seed, same bits: repeated, alone or in a batch, in any layout, padded or not, on either device."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import SAMPLED, make_qkv, num_threads, working_dtype

import santa

pytestmark = pytest.mark.emulate

OPTIONS = [(*combination, 64) for combination in SAMPLED] + [("grouped", "proportional", 0)]


def run(q, k, v, *, sampler, budget, num_samples, **options):
    return santa.decode(
        q,
        k,
        v,
        sampler=sampler,
        budget=budget,
        num_samples=num_samples,
        min_sampled_len=0,
        return_rows_read=True,
        **options,
    )


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}")
def options(request):
    sampler, budget, num_samples = request.param
    return {"sampler": sampler, "budget": budget, "num_samples": num_samples}


def problem(device, batch=3, kv_len=1300):
    q, k, v = make_qkv(batch, 8, 2, kv_len, 64, dtype=working_dtype(device), device=device, logit_std=2.0)
    kv_lens = torch.tensor([kv_len, 700, 129][:batch], dtype=torch.int32, device=device)
    row_seeds = torch.tensor([5, -6, 7][:batch], device=device)
    return q, k, v, kv_lens, row_seeds


def test_repeated(device, options):
    q, k, v, kv_lens, row_seeds = problem(device)
    first = run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    for _ in range(5):
        assert_same_bits(run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options), first)


def test_threads(options):
    """Of the CPU backend, fewer and more than there are rows."""
    q, k, v, kv_lens, row_seeds = problem("cpu")
    results = []
    for count in (1, 2, 5):
        with num_threads(count):
            results.append(run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.sanitize
def test_alone_or_in_a_batch(device, options):
    q, k, v, kv_lens, row_seeds = problem(device)
    together = run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    order = [2, 0, 1]
    permuted = run(q[order], k[order], v[order], kv_lens=kv_lens[order], row_seeds=row_seeds[order], **options)
    assert_same_bits(permuted, [x[order] for x in together])
    for b in range(3):
        one = slice(b, b + 1)
        alone = run(q[one], k[one], v[one], kv_lens=kv_lens[one], row_seeds=row_seeds[one], **options)
        assert_same_bits(alone, [x[one] for x in together])


def test_layout(device, options):
    q, k, v, kv_lens, row_seeds = problem(device)
    nhd = run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    for contiguous in (True, False):
        hnd = [x.transpose(1, 2) for x in (k, v)]
        if contiguous:
            hnd = [x.contiguous() for x in hnd]
        assert_same_bits(run(q, *hnd, kv_lens=kv_lens, row_seeds=row_seeds, kv_layout="HND", **options), nhd)


def test_padding_on_the_right(device, options):
    """A longer cache (StaticCache) around the same rows changes nothing, whatever lies in it."""
    q, k, v, kv_lens, row_seeds = problem(device)
    expected = run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    padded = [torch.cat([x, torch.full_like(x[:, :1], float("nan")).expand(-1, 5000, -1, -1)], dim=1) for x in (k, v)]
    assert_same_bits(run(q, *padded, kv_lens=kv_lens, row_seeds=row_seeds, **options), expected)


def test_padding_on_the_left(device, options):
    """kv_starts moves a row inside its cache and changes nothing else; NaN before the start is never read."""
    q, k, v, kv_lens, row_seeds = problem(device)
    expected = run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    starts = torch.tensor([3, 600, 1], dtype=torch.int32, device=device)
    moved = []
    for x in (k, v):
        target = torch.full((3, 1400, 2, 64), float("nan"), dtype=x.dtype, device=device)
        for b in range(3):
            length, start = int(kv_lens[b]), int(starts[b])
            target[b, start : start + length] = x[b, :length]
        moved.append(target)
    assert_same_bits(run(q, *moved, kv_lens=kv_lens, kv_starts=starts, row_seeds=row_seeds, **options), expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("gap", [8, 1])
def test_strides_with_gaps(device, options, gap):
    """Rows at any distance, aligned to 16 bytes or not; NaN between them is never read."""
    q, k, v, kv_lens, row_seeds = problem(device)
    expected = run(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, **options)
    spread = []
    for x in (q, k, v):
        wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype, device=device)
        wide[..., gap:] = x
        spread.append(wide[..., gap:])
    assert_same_bits(run(*spread, kv_lens=kv_lens, row_seeds=row_seeds, **options), expected)


def test_without_kv_lens(device, options):
    q, k, v, _, row_seeds = problem(device)
    full = torch.full((3,), k.shape[1], dtype=torch.int32, device=device)
    assert_same_bits(
        run(q, k, v, row_seeds=row_seeds, **options), run(q, k, v, kv_lens=full, row_seeds=row_seeds, **options)
    )


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("sampler", [0, 1, 2, 3])
def test_same_rows_on_both_devices_given_the_cdf(sampler):
    """Bit for bit: the draws of one integer CDF, over random and extreme CDFs, budgets and seeds."""
    generator = torch.Generator().manual_seed(0)
    for num_draws, tiles, tile_kv in ((1, 1, 1), (7, 3, 128), (512, 64, 512), (8192, 40, 256), (1 << 20, 2, 512)):
        rows = 16
        weights = torch.randint(0, 1 << 20, (rows, tiles, tile_kv), generator=generator, dtype=torch.int32)
        weights[1] = 1
        weights[2, :, 1:] = 0
        # A row's masses sum below 2^32: up to 2^31, and 2^31 more in one tile of row 3; next to the limit in row 5.
        masses = torch.randint(1, 1 << 25, (rows, tiles), generator=generator)
        masses[3, tiles // 2] = 1 << 31
        masses[4] = 0
        masses[4, -1] = 3
        masses[5] = ((1 << 32) - 1) // tiles
        assert masses.sum(dim=1).max() < 1 << 32
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
        arguments = (masses, weights, seeds)
        cpu = torch.ops.santa._select(*arguments, num_draws, sampler, 11)
        gpu = torch.ops.santa._select(*(x.cuda() for x in arguments), num_draws, sampler, 11)
        assert torch.equal(cpu, gpu.cpu())
        # Tiles whose weights are all zero draw nothing; everywhere else the budget is met exactly.
        drawable = (weights.sum(-1) > 0) | (masses == 0)
        complete = drawable.all(dim=-1)
        assert (cpu.sum(dim=(1, 2))[complete] == num_draws).all()


@pytest.mark.gpu
@pytest.mark.parametrize("sampler, budget", SAMPLED)
def test_same_rows_on_both_devices_end_to_end(sampler, budget):
    """At least 999 of 1,000 drawn rows agree: scores differ in the last bits, so a row may differ where a threshold
    falls within rounding of a boundary. V is the identity, so the output shows the rows."""
    count, head_dim = 512, 256
    q, k, _ = make_qkv(count, 8, 2, head_dim, head_dim, dtype=torch.float16, logit_std=2.0)
    v = torch.eye(head_dim, dtype=torch.float16).reshape(1, head_dim, 1, head_dim).expand(count, -1, 2, -1)
    out = [
        santa.decode(
            *(x.to(device) for x in (q, k, v)),
            num_samples=16,
            sampler=sampler,
            budget=budget,
            row_seeds=torch.arange(count, device=device),
            min_sampled_len=0,
        )[0].cpu()
        for device in ("cpu", "cuda")
    ]
    drawn = [x != 0 for x in out]
    differing = (drawn[0] != drawn[1]).sum().item()
    assert differing <= 1e-3 * drawn[0].sum().item()
