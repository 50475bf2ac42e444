"""Bernoulli scores inside PyTorch: opcheck, compile, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from helpers.bernoulli import NAN, bernoulli, feature_major
from helpers.inputs import make_qkv, working_dtype

import santa


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    q, k, v = make_qkv(2, 8, 2, 300, 64, dtype=working_dtype(device), device=device)
    options = {"kv_lens": torch.tensor([300, 20], dtype=torch.int32, device=device), "min_sampled_len": 0, "seed": 3}
    if requires_grad:
        q.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # that check runs a backward pass where a gradient is required
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.santa.decode_bernoulli.default,
        (q, feature_major(k), v),
        options | {"num_samples": 16},
        test_utils=checks,
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
