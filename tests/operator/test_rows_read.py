"""rows_read, an output that is written in place if it is given: what it may be, and PyTorch's tracing around it."""

from __future__ import annotations

import pytest
import torch
from helpers.bernoulli import feature_major
from helpers.inputs import make_qkv, working_dtype

import santa


@pytest.fixture(params=["decode", "decode_bernoulli"])
def op(request):
    return getattr(torch.ops.santa, request.param)


def inputs(device, op, batch=2, kv_len=700):
    q, k, v = make_qkv(batch, 8, 2, kv_len, 64, dtype=working_dtype(device), device=device)
    kv_lens = torch.tensor([kv_len, 300], dtype=torch.int32, device=device)
    return q, feature_major(k) if op is torch.ops.santa.decode_bernoulli else k, v, kv_lens


def rows_for(device, **options):
    return torch.full((2, 2), -7, dtype=torch.int32, device=device, **options)


@pytest.mark.parametrize("num_samples", [0, 32])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, op, num_samples, requires_grad):
    q, k, v, kv_lens = inputs(device, op)
    options = {"kv_lens": kv_lens, "positions": kv_lens + 3, "num_samples": num_samples, "min_sampled_len": 0}
    if requires_grad:
        q.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # that check runs a backward pass where a gradient is required
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, (q, k, v), options | {"rows_read": rows_for(device)}, test_utils=checks)


@pytest.mark.parametrize("score", ["exact", "bernoulli"])
@pytest.mark.parametrize("inference", [False, True])
def test_compile_fullgraph(device, score, inference):
    op = torch.ops.santa.decode_bernoulli if score == "bernoulli" else torch.ops.santa.decode
    q, k, v, kv_lens = inputs(device, op)

    def step(q, k, v, kv_lens):
        out, lse, rows = santa.decode(
            q * 2, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0, return_rows_read=True, score=score
        )
        return out + 1, lse, rows

    backend = "inductor" if device == "cuda" else "aot_eager"
    with torch.inference_mode(inference):
        eager = step(q, k, v, kv_lens)
        compiled = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, kv_lens)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


def test_compile_writes_the_tensor_given(device, op):
    q, k, v, kv_lens = inputs(device, op)
    rows = rows_for(device)

    def step(q, k, v, kv_lens, rows):
        out = op(q * 2, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0, rows_read=rows)[0]
        return out, rows.sum()

    _, total = step(q, k, v, kv_lens, rows)
    expected = rows.clone()
    rows.fill_(-7)
    backend = "inductor" if device == "cuda" else "aot_eager"
    _, compiled_total = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, kv_lens, rows)
    assert torch.equal(rows, expected) and torch.equal(compiled_total, total)


def test_export(device):
    q, k, v, kv_lens = inputs(device, None)

    class Step(torch.nn.Module):
        def forward(self, q, k, v, kv_lens):
            return santa.decode(q, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0, return_rows_read=True)

    length = torch.export.Dim("length", min=2, max=100000)
    program = torch.export.export(
        Step(), (q, k, v, kv_lens), dynamic_shapes=({}, {1: length}, {1: length}, {}), strict=False
    )
    longer = inputs(device, None, kv_len=900)
    for module in (program.module(), program.run_decompositions().module()):
        for a, b in zip(module(*longer), Step()(*longer), strict=True):
            assert torch.equal(a, b)


def test_written_in_place(device, op):
    """Every element, by exact, sampled and empty rows; autograd knows."""
    q, k, v, _ = inputs(device, op)
    kv_lens = torch.tensor([0, 700], dtype=torch.int32, device=device)
    for num_samples, low, high in ((0, 700, 700), (8, 1, 699)):
        rows = rows_for(device)
        version = rows._version
        op(q, k, v, kv_lens=kv_lens, num_samples=num_samples, min_sampled_len=0, rows_read=rows)
        assert rows._version > version
        assert (rows[0] == 0).all() and ((rows[1] >= low) & (rows[1] <= high)).all()


def test_with_gradients_and_inference_tensors(device, op):
    q, k, v, _ = inputs(device, op)
    with torch.inference_mode():
        rows = rows_for(device)
    q.requires_grad_()
    out = op(q, k, v, rows_read=rows)[0]
    assert (rows == 700).all()
    with pytest.raises(RuntimeError, match=r"santa: decode(_bernoulli)? has no backward pass"):
        out.sum().backward()


@pytest.mark.parametrize(
    "rows_read, message",
    [
        (lambda device: rows_for(device).long(), "santa: rows_read is int64; it needs to be int32"),
        (lambda device: rows_for(device)[0], "santa: rows_read has shape [2]; it needs 2 dimensions, [batch, num_kv"),
        (
            lambda device: rows_for(device)[:1],
            "santa: rows_read has shape [1, 2]; dimension 0 (batch) is 1 and needs to be 2",
        ),
        (
            lambda device: rows_for(device)[:, :1].contiguous(),
            "santa: rows_read has shape [2, 1]; dimension 1 (num_kv_heads) is 1 and needs to be 2",
        ),
        (lambda device: rows_for(device).t(), "santa: rows_read has strides [1, 2]; it needs to be contiguous"),
        (
            lambda device: rows_for("cpu" if device == "cuda" else "meta"),
            "santa: rows_read is on .*; it needs to be on q's device",
        ),
    ],
)
def test_errors(device, op, rows_read, message):
    q, k, v, _ = inputs(device, op)
    tensor = rows_read(device)
    pattern = message if ".*" in message else "^" + message.translate(str.maketrans({c: "\\" + c for c in "[]()"}))
    with pytest.raises((ValueError, RuntimeError), match=pattern):
        op(q, k, v, rows_read=tensor)


@pytest.mark.gpu
def test_cuda_graph():
    """A replay writes the tensor that was given when the graph was captured."""
    q, k, v, kv_lens = inputs("cuda", None)
    rows = rows_for("cuda")

    def step():
        return torch.ops.santa.decode(
            q, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0, positions=kv_lens, rows_read=rows
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([700, 300], [0, 700]):
        kv_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        rows.fill_(-7)
        graph.replay()
        replayed = rows.clone()
        step()
        assert torch.equal(replayed, rows) and (rows >= 0).all()
