"""`santa.sample_select` against its oracle and its laws: inputs and examples are the same in every run."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.selection import COLUMNS, MEAN, Oracle, check_laws, keep_of, make_qk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import santa
from santa import reference_prefill as reference
from santa.reference_prefill import BLOCK, num_blocks


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


@pytest.mark.emulate
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


@pytest.mark.emulate
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
