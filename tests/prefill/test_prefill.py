"""Sparse prefill: what executes the block lists, the choice of the backend, and bad input."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.statistics import relative_rms
from torch import Tensor

import santa
from santa.prefill import BLOCK, DENSE_BELOW, PrefillStats, block_mask, break_even_density, bucket

# Relative RMS error that rounding to the dtype may make.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_qkv(
    q_len: int,
    kv_len: int,
    *,
    batch: int = 1,
    num_qo_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Structured enough to be sparse: all queries favour key 5 and those about 300 tokens back."""
    generator = torch.Generator().manual_seed(q_len + 7 * kv_len)

    def randn(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, head_dim, generator=generator)

    q, k, v = randn(num_qo_heads, q_len), randn(num_kv_heads, kv_len), randn(num_kv_heads, kv_len) + 0.5
    angles = torch.arange(kv_len) / 40.0
    turning = torch.stack([angles.cos(), angles.sin()], dim=-1)
    behind = torch.stack([(angles - 7.5).cos(), (angles - 7.5).sin()], dim=-1)
    k[..., :2], q[..., :2] = 5 * turning, 5 * behind[kv_len - q_len :]
    k[..., min(5, kv_len - 1), 2], q[..., 2] = 12.0, 4.0
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def keep_of(kv_cnt: Tensor, kv_idx: Tensor) -> Tensor:
    """bool [batch, num_qo_heads, nq, nk] of the lists."""
    used = torch.arange(kv_idx.shape[-1], device=kv_idx.device) < kv_cnt.unsqueeze(-1)
    keep = torch.zeros(kv_idx.shape, dtype=torch.int32, device=kv_idx.device)
    return keep.scatter_add_(-1, kv_idx.long(), used.int()) > 0


def masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out, lse in float64 of causal attention, within the blocks of `keep` if given. Written with whole matrices."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    q_len, kv_len = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = torch.arange(kv_len) <= torch.arange(q_len)[:, None] + kv_len - q_len
    if keep is not None:
        tokens = keep.cpu().repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
        mask = mask & tokens[..., :q_len, :kv_len]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def selected(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    return keep_of(*santa.sample_select(q, k, **options)[:2])


SHAPES = [(1, 1), (128, 128), (700, 700), (256, 640), (1, 257), (300, 1068)]


@pytest.fixture(params=["reference", pytest.param("flex", marks=pytest.mark.gpu)])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("lens", SHAPES, ids=str)
def test_dense_is_exact_attention(lens, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = make_qkv(*lens, dtype=dtype, device=device)
    out, lse, stats = santa.prefill(q, k, v, backend="dense", return_stats=True)
    expected, expected_lse = masked_attention(q, k, v)
    assert relative_rms(out, expected) < ROUNDING[dtype]
    assert torch.allclose(lse.double().cpu(), expected_lse, atol=1e-2 if device == "cuda" else 1e-4)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert stats == PrefillStats("dense", None) and stats.density == 1.0


@pytest.mark.parametrize("lens", SHAPES, ids=str)
def test_alpha_1_is_dense(lens, backend):
    device, dtype = ("cuda", torch.bfloat16) if backend == "flex" else ("cpu", torch.float32)
    q, k, v = make_qkv(*lens, dtype=dtype, device=device)
    out, lse, stats = santa.prefill(q, k, v, alpha=1, backend=backend, return_stats=True)
    expected, expected_lse = masked_attention(q, k, v)
    assert stats.backend == backend and stats.density == 1.0
    assert relative_rms(out, expected) < ROUNDING[dtype]
    assert torch.allclose(lse.double().cpu(), expected_lse, atol=1e-2 if backend == "flex" else 1e-4)


@pytest.mark.parametrize("gqa", ["per_head", "union"])
@pytest.mark.parametrize("lens", [(700, 700), (512, 2048), (300, 1068)], ids=str)
def test_what_is_computed_is_attention_within_the_selected_blocks(lens, gqa, backend):
    device, dtype = ("cuda", torch.bfloat16) if backend == "flex" else ("cpu", torch.float32)
    q, k, v = make_qkv(*lens, batch=2, dtype=dtype, device=device)
    out, lse, stats = santa.prefill(q, k, v, alpha=0.5, gqa=gqa, backend=backend, return_stats=True)
    keep = selected(q, k, alpha_c=0.5, alpha_s=0.5, gqa=gqa)
    assert 0.2 < stats.density < 0.95
    expected, expected_lse = masked_attention(q, k, v, keep)
    assert relative_rms(out, expected) < ROUNDING[dtype]
    assert torch.allclose(lse.double().cpu(), expected_lse, atol=1e-2 if backend == "flex" else 1e-4)
    assert (expected_lse <= masked_attention(q, k, v)[1] + 1e-9).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (128, torch.bfloat16)])
def test_flex_is_the_reference(head_dim, dtype):
    """The lists are those of one selection, so that rounding cannot make two of them."""
    from santa.prefill import _flex, _reference

    q, k, v = make_qkv(1500, 2524, head_dim=head_dim, num_qo_heads=8, dtype=dtype, device="cuda")
    kv_cnt, kv_idx, _ = santa.sample_select(q, k, alpha_c=0.6, alpha_s=0.6)
    out, lse = _flex(q, k, v, kv_cnt, kv_idx, 0.1)
    expected, expected_lse = _reference(q, k, v, kv_cnt, kv_idx, 0.1)
    assert relative_rms(out, expected) < ROUNDING[dtype]
    assert torch.allclose(lse, expected_lse, atol=1e-2)


def test_the_statistics_are_those_of_the_lists(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = make_qkv(640, 1024, dtype=dtype, device=device)
    _, lse, stats = santa.prefill(q, k, v, alpha=(0.4, 0.6), backend="reference", return_stats=True)
    keep = selected(q, k, alpha_c=0.4, alpha_s=0.6)
    causal_blocks = sum(range(4, 9))
    assert torch.allclose(stats.heads[..., 0], keep.sum((-1, -2)).float() / causal_blocks)
    assert stats.density == pytest.approx(float(stats.heads[..., 0].mean()))
    # Sampled blocks: 2 of 5, whose tails are 1 and 4. The mass that a row keeps is exp(lse - dense lse).
    rows = torch.cat([torch.arange(128, 256), torch.arange(512, 640)])
    kept = (lse.double().cpu() - masked_attention(q, k, v)[1]).exp()[..., rows]
    assert torch.allclose(stats.heads[..., 1].double().cpu(), kept.mean(-1), atol=1e-2)
    assert torch.allclose(stats.heads[..., 2].double().cpu(), kept.amin(-1), atol=1e-2)
    assert (kept.mean(-1) > 0.6 - 1e-2).all()


def test_strides_and_padding_do_not_matter(backend):
    device, dtype = ("cuda", torch.bfloat16) if backend == "flex" else ("cpu", torch.float32)
    q, k, v = make_qkv(200, 456, dtype=dtype, device=device)
    expected = santa.prefill(q, k, v, alpha=0.5, backend=backend)
    # A cache that is longer, and tokens before heads: what lies around the tensors is NaN.
    around = [torch.full((1, 500, x.shape[1] + 1, 64), torch.nan, dtype=dtype, device=device) for x in (q, k, v)]
    views = []
    for x, whole in zip((q, k, v), around, strict=True):
        view = whole[:, 20 : 20 + x.shape[2], 1:].transpose(1, 2)
        views.append(view.copy_(x))
    for got, wanted in zip(santa.prefill(*views, alpha=0.5, backend=backend), expected, strict=True):
        assert torch.equal(got, wanted)


def test_equal_calls_give_equal_bits(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = make_qkv(640, 640, dtype=dtype, device=device)
    backend = "reference" if device == "cpu" else "flex"
    first, second = (santa.prefill(q, k, v, alpha=0.5, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# auto ---------------------------------------------------------------------------------------------------


def test_auto_is_dense_for_short_prompts_and_selects_nothing(monkeypatch):
    monkeypatch.setattr(sys.modules["santa.prefill"], "sample_select", None)
    q, k, v = make_qkv(256, 256)
    stats = santa.prefill(q, k, v, alpha=0.1, return_stats=True)[2]
    assert stats == PrefillStats("dense", None)


@pytest.mark.parametrize("alpha, backend", [(1, "dense"), (0.2, "reference")])
def test_auto_goes_by_density(alpha, backend, monkeypatch):
    kv_len, limit = DENSE_BELOW, break_even_density(DENSE_BELOW, cuda=True)
    monkeypatch.setattr(sys.modules["santa.prefill"], "break_even_density", lambda *_, **__: limit)
    q, k, v = make_qkv(256, kv_len, num_qo_heads=1, num_kv_heads=1)
    out, _, stats = santa.prefill(q, k, v, alpha=alpha, return_stats=True)
    assert stats.backend == backend and stats.heads.shape == (1, 1, 6)
    assert (float(stats.heads[..., 0].mean()) > limit) == (backend == "dense")
    assert torch.equal(out, santa.prefill(q, k, v, alpha=alpha, backend=backend)[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("q_len, kv_len", [(300, 300), (128, 384)])
@pytest.mark.parametrize("sm_scale", [-0.2, 0.0])
def test_dense_takes_every_scale(device, q_len, kv_len, sm_scale):
    """Kernels mask with -inf before they scale: with a scale of 0 or below that is NaN."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = make_qkv(q_len, kv_len, dtype=dtype, device=device)
    out, lse = santa.prefill(q, k, v, sm_scale=sm_scale, backend="dense")
    expected, expected_lse = santa.prefill(q, k, v, alpha=1, sm_scale=sm_scale, backend="reference")
    tolerance = 2e-2 if device == "cuda" else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3 if device == "cuda" else 1e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["dense", "flex"])
def test_rows_between_16_byte_boundaries(backend):
    q, k, v = (F.pad(x, (1, 7))[..., 1:-7] for x in make_qkv(256, 256, dtype=torch.bfloat16, device="cuda"))
    out, _ = santa.prefill(q, k, v, alpha=1, backend=backend)
    expected, _ = santa.prefill(q, k, v, alpha=1, backend="reference")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_auto_runs_flex_on_cuda():
    q, k, v = make_qkv(1024, DENSE_BELOW, dtype=torch.bfloat16, device="cuda")
    assert santa.prefill(q, k, v, alpha=0.15, return_stats=True)[2].backend == "flex"


# Buckets ------------------------------------------------------------------------------------------------


def test_buckets_are_fine_and_few():
    buckets = set()
    for length in range(1, 1 << 18, 37):
        size = bucket(length)
        assert size >= length and size % BLOCK == 0 and bucket(size) == size
        assert size - length < max(BLOCK, length / 8 + 1)
        buckets.add(size)
    assert len(buckets) <= 2048 // BLOCK + 7 * 8


def test_padded_lists_keep_their_blocks():
    kv_cnt = torch.tensor([[[1, 2, 2]]], dtype=torch.int32)
    kv_idx = torch.tensor([[[[1, 0, 0, 0], [0, 2, 0, 0], [1, 3, 0, 0]]]], dtype=torch.int32)
    mask = block_mask(kv_cnt, kv_idx, 1, 4 * BLOCK, 6 * BLOCK)
    assert mask.seq_lengths == (4 * BLOCK, 6 * BLOCK)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1, 0]]]
    assert mask.kv_indices[..., 0].tolist() == [[[1, 2, 3, 4]]]
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 1, 0]]]
    assert mask.full_kv_indices[..., 0].tolist() == [[[1, 0, 1, 0]]]
    assert mask.full_kv_indices.is_contiguous() and mask.full_kv_indices.stride() == mask.kv_indices.stride()


@pytest.mark.parametrize("dynamic", [False, True])
def test_lengths_are_traced_once_per_bucket(monkeypatch, dynamic):
    """What Dynamo does, without Inductor. There are more buckets here than one function may have compilations (8)."""
    from torch._dynamo.utils import counters

    module, compile = sys.modules["santa.prefill"], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    monkeypatch.setattr(module, "DYNAMIC_SHAPES", dynamic)
    module._compiled.cache_clear()
    graphs = []
    for q_len in [300, 290, 384, *range(400, 1500, 128), 1420]:
        q, k, v = make_qkv(q_len, q_len)
        lists = santa.sample_select(q, k, alpha_c=0.5, alpha_s=0.5)[:2]
        out, lse = module._flex(q, k, v, *lists, 0.125)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        graphs.append(counters["stats"]["unique_graphs"])
    module._compiled.cache_clear()
    assert graphs[0] == graphs[2] and graphs[-1] == graphs[-2]
    if dynamic:  # the first length, one more for each thing that is seen to change, and then no more
        assert graphs[-1] == graphs[5]
    else:
        assert graphs[-1] - graphs[0] == 9


@pytest.mark.gpu
def test_lengths_of_a_bucket_share_one_compilation():
    from torch._dynamo.utils import counters

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    def run(q_len: int, kv_len: int) -> None:
        q, k, v = make_qkv(q_len, kv_len, dtype=torch.bfloat16, device="cuda")
        out, lse = santa.prefill(q, k, v, alpha=0.5, backend="flex")
        keep = selected(q, k, alpha_c=0.5, alpha_s=0.5)
        assert relative_rms(out, masked_attention(q, k, v, keep)[0]) < ROUNDING[torch.bfloat16]
        assert lse.shape == (1, 4, q_len)

    torch._dynamo.reset()  # what other tests have compiled is not counted
    run(4000, 4000)
    before = graphs()
    for q_len in (3841, 3900, 4000):
        run(q_len, q_len)
    assert graphs() == before, "a length within the bucket was compiled again"
    run(256, 512)
    assert graphs() == before + 1


def test_flex_that_is_not_compiled_raises():
    """Without torch.compile FlexAttention would attend to every block."""
    from santa.prefill import _attend_blocks

    with pytest.raises(RuntimeError, match=r"santa: backend 'flex' needs torch\.compile, which is switched off .*"):
        _attend_blocks(*make_qkv(128, 128), None, 1.0)


@pytest.mark.gpu
def test_flex_raises_where_compilation_is_switched_off():
    code = (
        "import torch, santa\n"
        "q = torch.zeros(1, 1, 128, 64, device='cuda', dtype=torch.float16)\n"
        "santa.prefill(q, q, q, backend='flex')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    )
    assert run.returncode != 0 and "which is switched off" in run.stderr, run.stderr


# Bad input ----------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q no tensor": ({"q": 3}, TypeError, r"santa: q is a int; it needs to be a torch\.Tensor"),
    "q rank 3": (
        {"q": torch.zeros(1, 4, 64)},
        ValueError,
        r"santa: q has shape \[1, 4, 64\]; it needs 4 dimensions, \[batch, num_qo_heads, q_len, head_dim\]",
    ),
    "q empty": ({"q": torch.zeros(1, 4, 0, 64)}, ValueError, r"santa: q has shape \[1, 4, 0, 64\]; .*empty.*"),
    "q float64": (
        {"q": torch.zeros(1, 4, 256, 64, dtype=torch.float64)},
        ValueError,
        r"santa: q is float64; it needs to be bfloat16 or float16 or float32 on cpu",
    ),
    "q head_dim": (
        {"q": torch.zeros(1, 4, 256, 129)},
        ValueError,
        r"santa: q has head_dim 129; it needs to be from 1 to 128: kernels .*",
    ),
    "q strided": (
        {"q": torch.zeros(1, 4, 64, 256).transpose(2, 3)},
        ValueError,
        r"santa: q has strides .*; it needs a contiguous last dimension",
    ),
    "q heads": (
        {"q": torch.zeros(1, 3, 256, 64)},
        ValueError,
        r"santa: q has 3 heads; it needs a multiple of k's, 2: q is \[1, 3, 256, 64\] and k \[1, 2, 256, 64\], .*",
    ),
    "k dtype": (
        {"k": torch.zeros(1, 2, 256, 64, dtype=torch.float16)},
        ValueError,
        r"santa: k is float16; it needs to be q's dtype, float32",
    ),
    "k device": (
        {"k": torch.zeros(1, 2, 256, 64, device="meta")},
        ValueError,
        r"santa: k is on meta; it needs to be on q's device, cpu",
    ),
    "k batch": (
        {"k": torch.zeros(2, 2, 256, 64)},
        ValueError,
        r"santa: k has shape \[2, 2, 256, 64\]; it needs q's batch and head_dim, \[1, num_kv_heads, kv_len, 64\]",
    ),
    "v length": (
        {"v": torch.zeros(1, 2, 255, 64)},
        ValueError,
        r"santa: v has shape \[1, 2, 255, 64\]; it needs k's, \[1, 2, 256, 64\], up to head_dim",
    ),
    "fewer keys than queries": (
        {"k": torch.zeros(1, 2, 128, 64), "v": torch.zeros(1, 2, 128, 64)},
        ValueError,
        r"santa: k has 128 tokens for 256 of q; it needs at least as many: .*",
    ),
    "NHD": (
        {"q": torch.zeros(1, 256, 4, 64), "k": torch.zeros(1, 256, 2, 64), "v": torch.zeros(1, 256, 2, 64)},
        ValueError,
        r"santa: k has 2 tokens for 4 of q; it needs at least as many: q is \[1, 256, 4, 64\] and k "
        r"\[1, 256, 2, 64\], read as \[batch, heads, len, head_dim\]; for .* pass x.transpose\(1, 2\)",
    ),
    "NHD, a chunk": (
        {"q": torch.zeros(1, 128, 4, 64), "k": torch.zeros(1, 256, 2, 64), "v": torch.zeros(1, 256, 2, 64)},
        ValueError,
        r"santa: q has 128 heads; it needs a multiple of k's, 256: q is .* pass x.transpose\(1, 2\)",
    ),
    "offset no multiple of a block": (
        {"q": torch.zeros(1, 4, 100, 64)},
        ValueError,
        r"santa: k has 256 tokens for 100 of q, 156 more; it needs to have 0 or a multiple of 128 more: .*",
    ),
    "alpha high": ({"alpha": 1.5}, ValueError, r"santa: alpha is 1\.5; it needs to be from 0 to 1"),
    "alpha nan": ({"alpha": math.nan}, ValueError, r"santa: alpha is nan; it needs to be from 0 to 1"),
    "alpha of slashes": (
        {"alpha": (0.5, -1)},
        ValueError,
        r"santa: alpha of slashes is -1; it needs to be from 0 to 1",
    ),
    "alpha of three": ({"alpha": (0.5, 0.5, 0.5)}, ValueError, r"santa: alpha has 3 entries; .*"),
    "alpha str": ({"alpha": "high"}, TypeError, r"santa: alpha is a str; it needs to be a float"),
    "num_chunks": ({"num_chunks": -1}, ValueError, r"santa: num_chunks is -1; it needs to be from 0 to .*"),
    "num_chunks float": ({"num_chunks": 2.0}, TypeError, r"santa: num_chunks is a float; it needs to be an int"),
    "sink_blocks": ({"sink_blocks": True}, TypeError, r"santa: sink_blocks is a bool; it needs to be an int"),
    "window_blocks": ({"window_blocks": 0}, ValueError, r"santa: window_blocks is 0; it needs to be from 1 to .*"),
    "sm_scale": ({"sm_scale": "1"}, TypeError, r"santa: sm_scale is a str; it needs to be a float or None"),
    "sm_scale nan": ({"sm_scale": math.nan}, ValueError, r"santa: sm_scale is nan; it needs to be finite .*"),
    "many chunks": ({"num_chunks": 70000}, ValueError, r"santa: num_chunks is 70000; it needs to be from 0 to 65535"),
    "group": (
        {"q": torch.zeros(1, 2048, 256, 64), "k": torch.zeros(1, 1, 256, 64), "v": torch.zeros(1, 1, 256, 64)},
        ValueError,
        r"santa: q has 2048 heads, k has 1; it needs to be at most 1024 times as many",
    ),
    "min_mass": ({"min_mass": 2}, ValueError, r"santa: min_mass is 2; it needs to be from 0 to 1"),
    "gqa": ({"gqa": "all"}, ValueError, r"santa: gqa is 'all'; it needs to be one of 'per_head', 'union' .*"),
    "selection": ({"selection": 3}, ValueError, r"santa: selection is 3; it needs to be one of 'paper', 'joint' .*"),
    "backend": ({"backend": "fa3"}, ValueError, r"santa: backend is 'fa3'; it needs to be one of 'auto', 'flex', .*"),
    "flex on the CPU": ({"backend": "flex"}, ValueError, r"santa: backend is 'flex' with q on cpu; it needs CUDA .*"),
}


@pytest.mark.parametrize("change, error, match", CASES.values(), ids=CASES)
def test_bad_input(change, error, match):
    arguments = dict(zip("qkv", make_qkv(256, 256), strict=True)) | change
    with pytest.raises(error) as caught:
        santa.prefill(**arguments)
    assert re.fullmatch(match, str(caught.value)), f"{caught.value}\ndoes not match\n{match}"


def test_numbers_of_numpy():
    q, k, v = (torch.randn(1, heads, 256, 64, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2))
    options = {"num_chunks": 1, "sink_blocks": 0, "window_blocks": 1, "sm_scale": 0.25, "alpha": 0.5, "min_mass": 0.5}
    kinds = {int: np.int32, float: np.float32}
    numpy_options = {name: kinds[type(value)](value) for name, value in options.items()}
    expected = santa.prefill(q, k, v, backend="reference", **options)
    for ours, theirs in zip(santa.prefill(q, k, v, backend="reference", **numpy_options), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_forward_pass_runs_with_gradients_and_the_backward_pass_raises():
    q, k, v = make_qkv(128, 128)
    out, _ = santa.prefill(q.requires_grad_(), k, v)
    assert torch.equal(out, santa.prefill(q.detach(), k, v)[0])
    with pytest.raises(RuntimeError, match="santa: prefill has no backward pass"):
        out.sum().backward()


@pytest.mark.gpu
def test_float32_is_refused_on_cuda():
    q, k, v = make_qkv(128, 128, device="cuda")
    with pytest.raises(ValueError, match="santa: q is float32; it needs to be bfloat16 or float16 on cuda"):
        santa.prefill(q, k, v)
