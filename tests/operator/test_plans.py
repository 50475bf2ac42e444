"""How the CUDA kernels that score sampled rows are set up (warps, ring slots, parts or tiles of one CTA) changes no bit
of a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers.bernoulli import feature_major
from helpers.float8 import quantised
from helpers.inputs import HEAD_DIMS, make_qkv
from helpers.one_pass import BUDGETS, KV_LEN, LONG_KV_LEN, SAMPLERS
from torch import Tensor

import santa

pytestmark = pytest.mark.cuda

Force = Callable[[int, int, int], None]

# num_warps, num_slots, and for how many CTAs the parts of all rows are cut into runs; 0: what the heuristics say. Warps
# and slots are at most what fits. 1: a run for each row; a million: one for each part.
PLANS = [
    (1, 2, 10**6),
    (1, 8, 20),
    (2, 3, 1),
    (3, 2, 40),
    (4, 2, 10**6),
    (4, 4, 12),
    (6, 2, 25),
    (5, 3, 8),
    (0, 0, 10**6),
]


@pytest.fixture
def force_plan(device: str) -> Iterator[Force]:
    force = torch.ops.santa._force_plan
    force(0, 0, 0)
    yield force
    force(0, 0, 0)


def call_of(
    device: str, scores: str, group: int, lengths: list[int], head_dim: int = 128
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator on a batch of rows of two KV heads, with these scores: bf16 keys, float8 K, float8 K and V, or
    Bernoulli."""
    q, k, v = make_qkv(
        len(lengths), 2 * group, 2, max(lengths), head_dim, dtype=torch.bfloat16, device=device, logit_std=1.5
    )
    options = {"kv_lens": torch.tensor(lengths, dtype=torch.int32, device=device), "min_sampled_len": 0}
    options |= {"return_rows_read": True, "row_seeds": torch.arange(len(lengths), device=device)}
    if scores == "bernoulli":
        k = feature_major(k)
        options |= {"score": "bernoulli", "num_draws": 8}
    elif scores != "bf16":
        k, v, scales = quantised(scores, k, v)
        options |= scales
    return lambda **more: santa.decode(q, k, v, **options | more)


def assert_one_result(force_plan: Force, call: Callable[..., tuple[Tensor, ...]], plans, **options) -> None:
    names = ("out", "lse", "rows_read")
    expected = call(**options)
    assert torch.isfinite(expected[0]).all() and (expected[2] > 0).all()
    for plan in plans:
        force_plan(*plan)
        for name, ours, theirs in zip(names, call(**options), expected, strict=True):
            assert torch.equal(ours, theirs), (name, plan)
    force_plan(0, 0, 0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("scores", ["bf16", "fp8-k", "fp8"])
def test_exact_rows(device, force_plan, scores, known, head_dim):
    """A CTA for each tile, for some of them, and for whole rows. Where lengths are known a row's only CTA combines it,
    or both of its two, elsewhere a kernel of its own."""
    call = call_of(device, scores, 5, [2300, 2300, 2300] if known else [2300, 40, 4700], head_dim)
    options = {"num_samples": 0} | ({"kv_lens": None} if known else {})
    assert_one_result(force_plan, call, [(0, 0, ctas) for ctas in (1, 9, 10**6)], **options)
    if known:
        for ours, theirs in zip(call(**options), call(num_samples=0), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("group", [4, 8, 12])
@pytest.mark.parametrize("scores", ["bf16", "fp8-k", "fp8", "bernoulli"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_results_do_not_depend_on_the_plan(device, force_plan, sampler, budget, scores, group):
    """Rows of tiles of either size, of many parts, of fewer tiles than warps, and cut short in the first tile."""
    call = call_of(device, scores, group, [KV_LEN, LONG_KV_LEN, 300, 65, 7])
    assert_one_result(force_plan, call, PLANS, sampler=sampler, budget=budget, num_samples=64)


@pytest.mark.emulate
@pytest.mark.parametrize("head_dim", [64, 96, 192, 256])
@pytest.mark.parametrize("scores", ["bf16", "fp8"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_head_dims(device, force_plan, budget, scores, head_dim):
    """Slots and warps that fit differ from one head_dim to the next."""
    call = call_of(device, scores, 4, [KV_LEN, 300], head_dim)
    assert_one_result(force_plan, call, PLANS, budget=budget, num_samples=64)


@pytest.mark.emulate
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_draws(device, force_plan, sampler):
    """Tiles whose draws fill a queue several times over."""
    call = call_of(device, "bf16", 4, [KV_LEN, 300])
    assert_one_result(force_plan, call, PLANS, sampler=sampler, num_samples=4096)


@pytest.mark.parametrize("group", [1, 4, 12])
@pytest.mark.parametrize("scores", ["bf16", "fp8"])
@pytest.mark.parametrize("sampler", ["grouped", "stratified"])
def test_proportional_rows(device, force_plan, sampler, scores, group):
    """Rows of tiles of all three sizes, beside exact ones."""
    call = call_of(device, scores, group, [40_000, 9000, 1500, 300, 7])
    options = {"budget": "proportional", "sampler": sampler, "num_samples": 64}
    assert_one_result(force_plan, call, PLANS, **options)
    assert_one_result(force_plan, call, PLANS, **options | {"min_sampled_len": 1500})


@pytest.mark.emulate
@pytest.mark.sanitize
@pytest.mark.parametrize("scores", ["bf16", "fp8", "bernoulli"])
def test_a_small_row(device, force_plan, scores):
    call = call_of(device, scores, 4, [700])
    assert_one_result(force_plan, call, [(1, 2, 10**6), (3, 2, 6)], num_samples=32)
    if scores != "bernoulli":
        assert_one_result(force_plan, call, [(1, 2, 10**6), (3, 2, 2)], num_samples=32, budget="proportional")


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("kv_len", [33_000, 66_000])
def test_proposal_keys(device, force_plan, kv_len, group):
    """Parts of several tiles, one warp's (1) or shared by four (2 and on); the longer ones are always shared."""
    q, k, v = make_qkv(2, 8 * group, 8, kv_len, 64, dtype=torch.bfloat16, device=device, logit_std=1.5)
    lengths = torch.tensor([kv_len, kv_len - 1234], dtype=torch.int32, device=device)
    options = {"kv_lens": lengths, "min_sampled_len": 0, "return_rows_read": True, "seed": 3}
    proposal = santa.make_proposal_keys(k, lengths)

    def call(**more):
        return santa.decode(q, k, v, proposal=proposal, **options, **more)

    assert_one_result(force_plan, call, PLANS, num_samples=64)
    assert_one_result(force_plan, call, PLANS, num_samples=5000)
    for row in range(2):
        of_row = {name: x[row : row + 1] for name, x in proposal.tensors().items()}
        alone = santa.decode(
            *(x[row : row + 1] for x in (q, k, v)),
            proposal=replace(proposal, **of_row),
            num_samples=64,
            **options | {"kv_lens": lengths[row : row + 1]},
        )
        for ours, together in zip(alone, call(num_samples=64), strict=True):
            assert torch.equal(ours[0], together[row])
