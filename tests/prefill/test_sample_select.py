"""The selection of key blocks for prefill: `santa.sample_select` against its oracle and its laws.

An operator in float32 and the oracle in float64 may differ where a mass lies within rounding of a threshold or of
another mass. `Oracle` bounds the error of every mass and gives the blocks that have to be kept and those that may be;
what the operator keeps has to lie between the two, and its statistics have to be those of what it keeps. No assertion
here can fail by chance: inputs and examples are the same in every run.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import santa
from santa import reference_prefill as reference
from santa.reference_prefill import BLOCK, num_blocks

DENSITY, MEAN, MINIMUM, PERCENTILE, COLUMNS, SLASHES = range(6)


def make_qk(
    q_len: int,
    past_blocks: int = 0,
    *,
    batch: int = 1,
    num_qo_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention with columns, a window and far slashes over Gaussian noise, of different weight and sharpness in every
    head."""
    generator = torch.Generator().manual_seed(seed)
    kv_len = q_len + past_blocks * BLOCK
    codes = torch.randn(num_blocks(kv_len) + 8, head_dim, generator=generator) / math.sqrt(head_dim)
    block = torch.arange(kv_len) // BLOCK
    anchors = (torch.rand(num_kv_heads, num_blocks(kv_len), generator=generator) < 0.15).float()
    q = torch.randn(batch, num_qo_heads, q_len, head_dim, generator=generator)
    k = torch.randn(batch, num_kv_heads, kv_len, head_dim, generator=generator)
    weight = torch.rand(3, num_qo_heads, 1, 1, generator=generator) * 8
    ends = block[kv_len - q_len :]
    q += weight[0] * codes[ends] * 6 + weight[1] * codes[ends + 3] * 6
    q[..., 0] += weight[2, ..., 0] * 2
    q *= 0.05 + 0.35 * torch.rand(num_qo_heads, 1, 1, generator=generator)
    k += codes[block + 3] * 3 + codes[block] * 3
    k[..., 0] += anchors[:, block] * 4
    return q.to(device, dtype), k.to(device, dtype)


def keep_of(kv_cnt: Tensor, kv_idx: Tensor) -> Tensor:
    """bool [batch, num_qo_heads, nq, nk] of the lists, which have to be well formed."""
    kv_cnt, kv_idx = kv_cnt.cpu().long(), kv_idx.cpu().long()
    nq, nk = kv_idx.shape[2:]
    listed = torch.arange(nk) < kv_cnt.unsqueeze(-1)
    assert ((kv_cnt >= 1) & (kv_cnt <= torch.arange(nq) + nk - nq + 1)).all()
    assert (kv_idx[~listed] == 0).all()
    ascending = kv_idx.diff(dim=-1) > 0
    assert (ascending | ~listed[..., 1:]).all()
    last = kv_idx.gather(-1, (kv_cnt - 1).unsqueeze(-1)).squeeze(-1)
    assert (last == torch.arange(nq) + nk - nq).all(), "the diagonal block is the last one, and there is none after it"
    return torch.zeros(kv_idx.shape, dtype=torch.bool).scatter_(-1, kv_idx.where(listed, last.unsqueeze(-1)), True)


class Oracle:
    """Masses in float64, and how far the operator's may be from them."""

    def __init__(self, q: Tensor, k: Tensor, num_chunks: int = 0):
        self.nq, self.nk = num_blocks(q.shape[2]), num_blocks(k.shape[2])
        self.group_size = q.shape[1] // k.shape[1]
        self.sampled = reference.sampled_blocks(self.nq, num_chunks)
        self.masses, self.valid = reference.block_masses(q, k, self.sampled)
        # A float32 dot product of D terms, summed in any order, is within (D + 2) u of sum |q_i k_i|, u = 2^-23 with
        # room for matrix units that truncate. A share of a softmax moves by at most twice that in its logarithm;
        # exponentials add 2^-20 in all.
        norms = q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() / math.sqrt(q.shape[-1])
        self.error = math.expm1(2 * (q.shape[-1] + 2) * 2.0**-23 * float(norms)) + 2.0**-20

    def stats(self, keep: Tensor) -> Tensor:
        """Density and retained mass of a mask: [batch, num_qo_heads, 4]."""
        retained = reference.retained_mass(self.masses, keep, self.sampled)[:, :, self.valid].sort(dim=-1).values
        causal = self.nq * (self.nk - self.nq + 1) + self.nq * (self.nq - 1) // 2
        return torch.stack(
            [
                keep.sum(dim=(-2, -1)) / causal,
                retained.mean(dim=-1),
                retained[..., 0],
                retained[..., (retained.shape[-1] - 1) // 20],
            ],
            dim=-1,
        )

    def cover(self, x: Tensor, alpha: float, forced: int) -> tuple[Tensor, Tensor]:
        """Entries of x [nk] that have to be selected, and those that may be."""
        always = torch.arange(len(x)) < forced
        if alpha <= 0 or alpha >= 1:
            return always | (alpha >= 1), always | (alpha >= 1)
        x = x / x.sum()
        low, high = x * (1 - self.error), x * (1 + self.error) + 2.0**-39
        others = ~torch.eye(len(x), dtype=torch.bool)
        before_at_most = (others & (high >= low[:, None])).double() @ high
        before_at_least = (others & (low > high[:, None])).double() @ low
        return always | (before_at_most < alpha * (1 - self.error)), always | (
            before_at_least < alpha * (1 + self.error)
        )

    def bounds(self, options: dict) -> tuple[Tensor, Tensor]:
        """The masks between which the paper's rule has to be."""
        offset = self.nk - self.nq
        must, may = [], []
        for by_block in self.masses.sum(dim=3).flatten(0, 1):
            slash_scores = sum(reference._shifted(w, a + offset) for w, a in zip(by_block, self.sampled, strict=True))
            columns = self.cover(by_block.sum(dim=0), options["alpha_c"], options["sink_blocks"])
            slashes = self.cover(slash_scores, options["alpha_s"], options["window_blocks"])
            must.append(reference.expand(columns[0], slashes[0], self.nq))
            may.append(reference.expand(columns[1], slashes[1], self.nq))
        masks = (torch.stack(x).unflatten(0, self.masses.shape[:2]) for x in (must, may))
        if options.get("gqa") == "union":
            masks = (
                x.unflatten(1, (-1, self.group_size)).any(dim=2).repeat_interleave(self.group_size, dim=1)
                for x in masks
            )
        return tuple(masks)


DEFAULTS = {"alpha_c": 0.95, "alpha_s": 0.95, "num_chunks": 0, "sink_blocks": 1, "window_blocks": 2}


def check_laws(q: Tensor, k: Tensor, select=santa.sample_select, **options) -> Tensor:
    """What holds for every selection; returns its mask."""
    options = {**DEFAULTS, **options}
    oracle = Oracle(q, k, options["num_chunks"])
    kv_cnt, kv_idx, stats = select(q, k, **options)
    keep = keep_of(kv_cnt, kv_idx)
    stats = stats.cpu().double()
    distance = (torch.arange(oracle.nq) + oracle.nk - oracle.nq).unsqueeze(-1) - torch.arange(oracle.nk)
    causal = distance >= 0
    forced = (torch.arange(oracle.nk) < options["sink_blocks"]) | (distance < options["window_blocks"])
    assert not (keep & ~causal).any()
    assert (keep | ~(forced & causal)).all()

    expected = oracle.stats(keep)
    torch.testing.assert_close(stats[..., DENSITY], expected[..., DENSITY], rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[..., MEAN : PERCENTILE + 1], expected[..., 1:], rtol=0, atol=oracle.error)
    alpha = max(options["alpha_c"], options["alpha_s"])
    assert (expected[..., MEAN] >= min(alpha, 1) - 2 * oracle.error).all()
    assert (expected[..., MINIMUM] >= options.get("min_mass", 0) - 2 * oracle.error).all()
    everything = alpha >= 1 or options.get("min_mass", 0) == 1
    if everything:
        assert (keep == causal).all() and (stats[..., : PERCENTILE + 1] == 1).all()
    if options.get("gqa") == "union":
        grouped = keep.unflatten(1, (-1, oracle.group_size))
        assert (grouped == grouped[:, :, :1]).all()
    if options.get("selection", "paper") == "paper" and options.get("min_mass", 0) == 0:
        must, may = oracle.bounds(options)
        assert (keep | ~must).all() and (may | ~keep).all()
    return keep


# Laws -------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    q_len=st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 1024, 1500])),
    past_blocks=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    options=st.fixed_dictionaries(
        {
            "alpha_c": st.one_of(st.floats(0.01, 0.99), st.sampled_from([-1.0, 0.0, 0.5, 0.95, 1.0, 2.0])),
            "alpha_s": st.one_of(st.floats(0.01, 0.99), st.sampled_from([-1.0, 0.0, 0.5, 0.95, 1.0, 2.0])),
            "num_chunks": st.integers(0, 5),
            "sink_blocks": st.integers(0, 3),
            "window_blocks": st.integers(1, 3),
            "gqa": st.sampled_from(["per_head", "union"]),
            "selection": st.sampled_from(["paper", "paper", "joint"]),
            "min_mass": st.sampled_from([0, 0, 0.5, 0.9, 1.0]),
        }
    ),
    seed=st.integers(0, 2**31),
)
def test_laws(q_len, past_blocks, heads, options, seed):
    q, k = make_qk(q_len, past_blocks, num_qo_heads=heads[0], num_kv_heads=heads[1], seed=seed)
    check_laws(q, k, **options)


SHAPES = [(1, 0), (77, 1), (128, 0), (1000, 2), (2600, 0), (2304, 5)]


@pytest.mark.parametrize(("q_len", "past_blocks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_laws_on_devices(device, q_len, past_blocks, dtype, head_dim):
    """The 16-bit types, on both devices, through several ranges of key blocks."""
    q, k = make_qk(
        q_len, past_blocks, num_qo_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype, device=device, seed=q_len
    )
    check_laws(q, k, alpha_c=0.8, alpha_s=0.7)
    check_laws(q, k, alpha_c=0.0, alpha_s=0.9, gqa="union", num_chunks=3)
    check_laws(q, k, alpha_c=0.6, alpha_s=0.0, selection="joint", min_mass=0.5)


@pytest.mark.parametrize("selection", ["paper", "joint"])
@pytest.mark.parametrize("min_mass", [0.0, 0.8])
@pytest.mark.parametrize("gqa", ["per_head", "union"])
@pytest.mark.parametrize(("q_len", "past_blocks"), [(1700, 0), (1700, 3)])
def test_oracle_keeps_the_same(device, selection, min_mass, gqa, q_len, past_blocks):
    """Greedy choices depend on the ones before, so there are no bounds for them: on these inputs no two candidates are
    close, and the lists are the oracle's."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k = make_qk(q_len, past_blocks, batch=2, num_qo_heads=4, num_kv_heads=2, dtype=dtype, device=device, seed=5)
    options = {"alpha_c": 0.7, "alpha_s": 0.8, "selection": selection, "min_mass": min_mass, "gqa": gqa}
    options |= {"sink_blocks": 0, "window_blocks": 1, "num_chunks": 3}
    ours = santa.sample_select(q, k, **options)
    assert ours[2][..., COLUMNS:].sum(dim=-1).mean() > 3.5, "the input has to leave something to choose"
    names = {"selection": int(santa.Selection[selection.upper()]), "gqa": int(santa.Gqa[gqa.upper()])}
    expected = reference.sample_select(q, k, **{**options, **names})
    assert torch.equal(ours[0].cpu(), expected[0]) and torch.equal(ours[1].cpu(), expected[1])
    torch.testing.assert_close(ours[2].cpu(), expected[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("selection", ["paper", "joint"])
def test_nested_in_alpha(device, selection):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k = make_qk(1800, 2, num_qo_heads=4, num_kv_heads=2, dtype=dtype, device=device, seed=1)
    alphas = [0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999999, 1.0]
    masks = [
        keep_of(*santa.sample_select(q, k, alpha_c=alpha, alpha_s=alpha, selection=selection)[:2]) for alpha in alphas
    ]
    for smaller, larger in itertools.pairwise(masks):
        assert (larger | ~smaller).all()
    assert len({int(mask.sum()) for mask in masks}) > 4, "the input has to tell the alphas apart"


def select_by_token_offsets(q: Tensor, k: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The planted bug: mass by token offset, in bins of 128, each of which is then expanded into one block diagonal.
    The tokens of a bin lie on two."""
    sampled = reference.sampled_blocks(num_blocks(q.shape[2]), options["num_chunks"])
    nk, past = num_blocks(k.shape[2]), k.shape[2] - q.shape[2]
    kept = []
    for h in range(q.shape[1]):
        bins = torch.zeros(nk, dtype=torch.float64)
        for row in (a * BLOCK + r for a in sampled for r in range(BLOCK)):
            scores = k[0, h].double()[: past + row + 1] @ q[0, h, row].double() / math.sqrt(q.shape[-1])
            offsets = (past + row - torch.arange(past + row + 1)) // BLOCK
            bins.index_add_(0, offsets, torch.softmax(scores, dim=0))
        slashes = reference.cover(bins, options["alpha_s"]) | (torch.arange(nk) < options["window_blocks"])
        kept.append(reference.expand(torch.arange(nk) < options["sink_blocks"], slashes, num_blocks(q.shape[2])))
    keep = torch.stack(kept).unsqueeze(0)
    kv_idx = keep.int().sort(dim=-1, descending=True, stable=True).indices
    kv_cnt = keep.sum(dim=-1)
    stats = Oracle(q, k, options["num_chunks"]).stats(keep)
    stats = torch.cat([stats, torch.zeros_like(stats[..., :2])], dim=-1)
    return kv_cnt, kv_idx.where(torch.arange(nk) < kv_cnt.unsqueeze(-1), 0), stats


def test_token_offset_bins_are_caught():
    """All attention goes to one key, 3 blocks and 60 tokens back: one bin of offsets, two block diagonals."""
    q_len, lag = 1024, 3 * BLOCK + 60
    codes = torch.randn(q_len + lag, 64, generator=torch.Generator().manual_seed(0))
    q, k = codes[None, None, :q_len] * 8, codes[None, None, lag : lag + q_len] * 0
    k[0, 0, : q_len - lag] = codes[lag:q_len]
    options = {"alpha_c": 0.0, "alpha_s": 0.9, "num_chunks": 2, "sink_blocks": 0, "window_blocks": 1}
    check_laws(q, k, **options)
    with pytest.raises(AssertionError):
        check_laws(q, k, select_by_token_offsets, **options)
    stats = select_by_token_offsets(q, k, **options)[2]
    assert stats[0, 0, MEAN] < 0.8, "it loses mass, which is what is to be caught"


# Hostile input ----------------------------------------------------------------------------------------


def padded(x: Tensor, *, rows: int, columns: int) -> Tensor:
    """x as a view into a larger buffer of NaN."""
    buffer = x.new_full((*x.shape[:2], x.shape[2] + rows, x.shape[3] + columns), torch.nan)
    view = buffer[:, :, : x.shape[2], columns:]
    return view.copy_(x)


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


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


# Invariance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gqa": "union"}, {"selection": "joint", "min_mass": 0.7}])
def test_alone_or_in_a_batch(device, options):
    """The same bits in every call, and for each row and KV head by itself."""
    q, k = make_qk(1200, 4, batch=3, num_qo_heads=6, num_kv_heads=2, dtype=torch.bfloat16, device=device)
    options = {"alpha_c": 0.8, "alpha_s": 0.6, **options}
    outputs = santa.sample_select(q, k, **options)
    assert same(santa.sample_select(q, k, **options), outputs)
    for b, g in itertools.product(range(3), range(2)):
        alone = santa.sample_select(q[b : b + 1, 3 * g : 3 * g + 3], k[b : b + 1, g : g + 1], **options)
        assert same([x[b : b + 1, 3 * g : 3 * g + 3] for x in outputs], alone)


@pytest.mark.gpu
def test_heads_in_passes():
    """64 heads with 64 sampled blocks of 256 need more scratch memory than one pass takes."""
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 64, 32768, 64, dtype=torch.float16, device="cuda", generator=generator) * 2
    k = torch.randn(1, 16, 32768, 64, dtype=torch.float16, device="cuda", generator=generator)
    outputs = santa.sample_select(q, k, num_chunks=64, alpha_c=0.7, alpha_s=0.7)
    for g in (0, 7, 15):
        alone = santa.sample_select(q[:, 4 * g : 4 * g + 4], k[:, g : g + 1], num_chunks=64, alpha_c=0.7, alpha_s=0.7)
        assert same([x[:, 4 * g : 4 * g + 4] for x in outputs], alone)


# PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    q, k = make_qk(300, 1, dtype=torch.float16, device=device)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:
        checks.append("test_aot_dispatch_dynamic")
    q.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.santa.sample_select.default, (q, k), {"alpha_c": 0.7}, test_utils=checks)
    assert not any(x.requires_grad for x in santa.sample_select(q, k))


def test_compile_fullgraph(device):
    q, k = make_qk(300, 1, dtype=torch.float16, device=device)

    def step(q, k):
        return santa.sample_select(q * 2, k, gqa="union", selection="joint", alpha_c=0.7)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert same(compiled(q, k), step(q, k))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"selection": "joint", "min_mass": 0.9, "gqa": "union"}])
def test_cuda_graph(options):
    """Nothing in the operator waits for the device."""
    q, k = make_qk(3000, 1, num_qo_heads=4, num_kv_heads=2, dtype=torch.float16, device="cuda")
    santa.sample_select(q, k, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = santa.sample_select(q, k, **options)
    new_q, new_k = make_qk(3000, 1, num_qo_heads=4, num_kv_heads=2, dtype=torch.float16, device="cuda", seed=9)
    q.copy_(new_q), k.copy_(new_k)
    graph.replay()
    assert same(outputs, santa.sample_select(new_q, new_k, **options))


# Errors -----------------------------------------------------------------------------------------------


def changed(name: str, change):
    return lambda arguments: {**arguments, name: change(arguments[name])}


BAD = {
    "q rank": (changed("q", lambda x: x[0]), ValueError, r"q has shape \[4, 300, 64\]; it needs 4 dimensions"),
    "k rank": (changed("k", lambda x: x[0]), ValueError, r"k has shape \[2, 428, 64\]; it needs 4 dimensions"),
    "q dtype": (changed("q", lambda x: x.double()), ValueError, r"q is float64; it needs to be bfloat16 or float16"),
    "k dtype": (changed("k", lambda x: x.bfloat16()), ValueError, r"k is bfloat16; it needs to be float16, q's dtype"),
    "head_dim": (changed("q", lambda x: x[..., :32]), ValueError, r"q has head_dim 32; it needs to be 64 or 128"),
    "k head_dim": (
        changed("k", lambda x: x[..., :32]),
        ValueError,
        r"k has shape .* \(head_dim\) is 32 and needs to be 64",
    ),
    "batch": (
        changed("k", lambda x: x[:1]),
        ValueError,
        r"k has shape .* \(batch\) is 1 and needs to be 2",
    ),
    "heads": (changed("q", lambda x: x[:, :3]), ValueError, r"k has 2 KV heads; num_qo_heads \(3\)"),
    "no queries": (changed("q", lambda x: x[:, :, :0]), ValueError, r"q has q_len 0; it needs to be at least 1"),
    "too few keys": (changed("k", lambda x: x[:, :, :172]), ValueError, r"k has kv_len 172; .*q_len \(300\) plus"),
    "odd past": (changed("k", lambda x: x[:, :, :427]), ValueError, r"k has kv_len 427; .* a multiple of 128"),
    "q stride": (
        changed("q", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
        ValueError,
        r"q has stride 300 in its last dimension",
    ),
    "alpha_c": ({"alpha_c": math.nan}, ValueError, r"alpha_c is nan"),
    "alpha_s": ({"alpha_s": math.nan}, ValueError, r"alpha_s is nan"),
    "num_chunks": ({"num_chunks": -1}, ValueError, r"num_chunks is -1; it needs to be in \[0, 65535\]"),
    "sink_blocks": ({"sink_blocks": -1}, ValueError, r"sink_blocks is -1; it needs to be in \[0, "),
    "window_blocks": ({"window_blocks": 0}, ValueError, r"window_blocks is 0; it needs to be in \[1, "),
    "sm_scale": ({"sm_scale": math.inf}, ValueError, r"sm_scale is inf; it needs to be finite"),
    "min_mass": ({"min_mass": 1.5}, ValueError, r"min_mass is 1.5; it needs to be in \[0, 1\]"),
    "gqa": ({"gqa": 2}, ValueError, r"gqa is 2; it needs to be"),
    "selection": ({"selection": 2}, ValueError, r"selection is 2; it needs to be"),
}
BAD_IN_PYTHON = {
    "q type": ({"q": None}, TypeError, r"q is a NoneType; it needs to be a torch.Tensor"),
    "alpha type": ({"alpha_c": "all"}, TypeError, r"alpha_c is a str; it needs to be a float"),
    "scale type": ({"sm_scale": "1"}, TypeError, r"sm_scale is a str; it needs to be a float or None"),
    "chunks type": ({"num_chunks": 2.0}, TypeError, r"num_chunks is a float; it needs to be an int"),
    "gqa name": ({"gqa": "group"}, ValueError, r"gqa is 'group'; it needs to be one of 'per_head', 'union'"),
    "selection name": ({"selection": "best"}, ValueError, r"selection is 'best'; .* 'paper', 'joint'"),
}
CASES = [pytest.param(santa.sample_select, *case, id=name) for name, case in {**BAD, **BAD_IN_PYTHON}.items()] + [
    pytest.param(torch.ops.santa.sample_select, *case, id=f"op, {name}") for name, case in BAD.items()
]


@pytest.mark.parametrize(("operator", "change", "error", "message"), CASES)
def test_bad_arguments(device, operator, change, error, message):
    q, k = make_qk(300, 1, batch=2, num_qo_heads=4, num_kv_heads=2, dtype=torch.float16, device=device)
    arguments = {"q": q, "k": k}
    arguments = change(arguments) if callable(change) else {**arguments, **change}
    with pytest.raises(error, match=f"santa: {message}"):
        operator(**arguments)


@pytest.mark.gpu
def test_devices_have_to_agree():
    q, k = make_qk(300, 1, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match=r"santa: k is on cpu; it needs to be on q's device, cuda:0"):
        santa.sample_select(q, k.cpu())
