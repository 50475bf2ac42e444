"""merge_state and merge_states: attention over all keys from attention over disjoint parts of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers.inputs import SAMPLED, dtypes_of, make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z, relative_rms
from torch import Tensor

import santa
from santa import reference

CUTS = [0, 1, 130, 700, 1000]


def shards(q: Tensor, k: Tensor, v: Tensor, cuts: list[int], **options) -> tuple[Tensor, Tensor]:
    """[batch, num_states, ...] of attention over k[:, a:b] for neighbouring cuts; each shard has a seed of its own."""
    states = [santa.decode(q, k[:, a:b], v[:, a:b], seed=seed, **options) for seed, (a, b) in enumerate(pairwise(cuts))]
    outs, lses = zip(*states, strict=True)
    return torch.stack(outs, 1), torch.stack(lses, 1)


def random_states(num_states: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(3, num_states, 8, 64, generator=generator)
    lses = 4 * torch.randn(3, num_states, 8, generator=generator)
    return outs.to(device), lses.to(device)


def test_exact_shards_give_exact_attention(device: str) -> None:
    """Against float64; shards of one key and more."""
    for dtype in dtypes_of(device):
        q, k, v = make_qkv(2, 8, 2, CUTS[-1], 64, dtype=dtype, device=device, logit_std=2.0)
        out, lse = santa.merge_states(*shards(q, k, v, CUTS, num_samples=0))
        assert out.dtype == dtype and lse.dtype == torch.float32
        for b in range(2):
            p, values, expected_lse = reference.probabilities(q[b], k[b], v[b])
            expected = (p @ values).flatten(0, 1)
            # Every shard is rounded once more than attention over all keys.
            assert relative_rms(out[b], expected) < (1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
            torch.testing.assert_close(
                lse[b].double().cpu(), expected_lse.flatten().double().cpu(), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(("sampler", "budget"), SAMPLED)
def test_estimates_over_shards_stay_unbiased(sampler: str, budget: str, device: str) -> None:
    dtype, draws = working_dtype(device), 4000
    q, k, v = make_qkv(1, 4, 1, 700, 64, dtype=dtype, device=device, logit_std=1.5)
    p, values, _ = reference.probabilities(q[0], k[0], v[0])
    many = [repeat_rows(x, draws) for x in (q, k, v)]
    options = {"num_samples": 4, "sampler": sampler, "budget": budget, "min_sampled_len": 0}
    options["row_seeds"] = torch.arange(draws, device=device)
    out, _ = santa.merge_states(*shards(*many, [0, 250, 300, 700], **options))
    projected, largest = mean_z(out, (p @ values).flatten(0, 1), rounding=2.0**-11 if dtype == torch.float16 else 0.0)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST


def test_a_set_without_keys_changes_no_bit(device: str) -> None:
    """Whatever its out holds: memory that was never written, for one."""
    outs, lses = random_states(1, device)
    out, lse = outs[:, 0], lses[:, 0]
    nothing = torch.full_like(lse, -math.inf)
    for junk in (0.0, math.nan, math.inf):
        for merged in (
            santa.merge_state(out, lse, torch.full_like(out, junk), nothing),
            santa.merge_state(torch.full_like(out, junk), nothing, out, lse),
        ):
            assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    empty = santa.merge_state(out, nothing, out, nothing)
    assert torch.equal(empty[0], torch.zeros_like(out)) and torch.equal(empty[1], nothing)


def test_order_and_grouping_do_not_matter(device: str) -> None:
    """Commutative to the bit for two; associative, and the same as all at once, to rounding."""
    outs, lses = random_states(5, device)
    state = [(outs[:, i], lses[:, i]) for i in range(5)]
    for one, other in zip(
        santa.merge_state(*state[0], *state[1]), santa.merge_state(*state[1], *state[0]), strict=True
    ):
        assert torch.equal(one, other)
    left = state[0]
    for other in state[1:]:
        left = santa.merge_state(*left, *other)
    right = state[-1]
    for other in state[-2::-1]:
        right = santa.merge_state(*other, *right)
    at_once = santa.merge_states(outs, lses)
    for merged in (left, right, santa.merge_states(outs.flip(1), lses.flip(1))):
        torch.testing.assert_close(merged[0], at_once[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged[1], at_once[1], rtol=1e-6, atol=1e-6)


def test_logits_of_any_size(device: str) -> None:
    """exp(lse) would overflow, or be zero; adding the same number to all changes only lse."""
    outs, lses = random_states(3, device)
    out, lse = santa.merge_states(outs, lses)
    for shift in (-1e4, 1e4):
        moved_out, moved_lse = santa.merge_states(outs, lses + shift)
        torch.testing.assert_close(moved_out, out, rtol=2e-3, atol=2e-3)  # lses of 1e4 are rounded to 1e-3
        torch.testing.assert_close(moved_lse, lse + shift, rtol=1e-6, atol=2e-3)
    far = lses.clone()
    far[:, 0] += 200
    assert torch.equal(santa.merge_states(outs, far)[0], outs[:, 0])


def test_nan_stays_in_its_head(device: str) -> None:
    outs, lses = random_states(3, device)
    clean = santa.merge_states(outs, lses)
    outs[0, 1, 2], lses[1, 0, 5] = math.nan, math.nan
    out, lse = santa.merge_states(outs, lses)
    bad = torch.zeros(3, 8, dtype=torch.bool, device=device)
    bad[0, 2] = bad[1, 5] = True
    assert out[bad].isnan().all() and torch.equal(out[~bad], clean[0][~bad])
    assert lse[1, 5].isnan() and torch.equal(lse[~bad], clean[1][~bad])


def test_float64_and_compiled(device: str) -> None:
    outs, lses = random_states(4, device)
    out, lse = santa.merge_states(outs.double(), lses.double())
    assert out.dtype == lse.dtype == torch.float64
    weights = lses.double().softmax(1)
    torch.testing.assert_close(out, (outs.double() * weights.unsqueeze(-1)).sum(1))
    torch.testing.assert_close(lse, lses.double().logsumexp(1))
    backend = "inductor" if device == "cuda" else "eager"
    compiled = torch.compile(santa.merge_states, fullgraph=True, backend=backend)(outs, lses)
    torch.testing.assert_close(compiled, santa.merge_states(outs, lses), rtol=1e-5, atol=1e-6)


OUT, LSE = torch.zeros(2, 8, 64), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_a": OUT[0]}, r"out_a has shape \[8, 64\]; it needs 3 dimensions, \[batch, num_qo_heads, head_dim\]"),
        ({"out_a": OUT.int()}, "out_a is int32; it needs to be of floating point"),
        ({"lse_a": LSE.T}, r"lse_a has shape \[8, 2\]; it needs that of out_a without head_dim, \[2, 8\]"),
        ({"lse_a": LSE.half()}, "lse_a is float16; it needs to be float32 beside out_a of float32"),
        ({"lse_a": LSE.to("meta")}, "lse_a is on meta; it needs to be on cpu, where out_a is"),
        ({"out_b": OUT[:1]}, r"out_b has shape \[1, 8, 64\]; it needs that of out_a, \[2, 8, 64\]"),
        ({"out_b": OUT.half()}, "out_b has dtype float16; it needs that of out_a, float32"),
        ({"lse_b": LSE.double()}, "lse_b has dtype float64; it needs that of lse_a, float32"),
    ],
)
def test_errors_of_two(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^santa: {message}$"):
        santa.merge_state(**{"out_a": OUT, "lse_a": LSE, "out_b": OUT, "lse_b": LSE, **change})


def test_errors_of_many() -> None:
    with pytest.raises(ValueError, match=r"outs has shape \[2, 8, 64\]; it needs 4 dimensions, \[batch, num_states"):
        santa.merge_states(OUT, LSE)
    with pytest.raises(ValueError, match=r"outs has shape \[2, 0, 8, 64\]; it needs one state at least"):
        santa.merge_states(torch.zeros(2, 0, 8, 64), torch.zeros(2, 0, 8))
    with pytest.raises(TypeError, match="lses is a list"):
        santa.merge_states(torch.zeros(2, 1, 8, 64), [0.0])
