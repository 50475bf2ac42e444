"""The operator inside PyTorch: opcheck, compile, export, CUDA graphs, streams, devices."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import SAMPLERS, make_qkv, working_dtype

import santa


def inputs(device, batch=2, kv_len=700):
    q, k, v = make_qkv(batch, 8, 2, kv_len, 64, dtype=working_dtype(device), device=device)
    return q, k, v, torch.tensor([kv_len, 300], dtype=torch.int32, device=device)


@pytest.mark.parametrize("num_samples", [0, 32])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, num_samples, requires_grad):
    q, k, v, kv_lens = inputs(device)
    options = {"kv_lens": kv_lens, "num_samples": num_samples, "min_sampled_len": 0, "seed": 3}
    if requires_grad:
        q.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # that check runs a backward pass where a gradient is required
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.santa.decode.default, (q, k, v), options, test_utils=checks)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_compile_fullgraph(device, sampler):
    q, k, v, kv_lens = inputs(device)

    def step(q, k, v, kv_lens):
        out, lse, rows = santa.decode(
            q * 2, k, v, kv_lens=kv_lens, num_samples=32, sampler=sampler, min_sampled_len=0, return_rows_read=True
        )
        return out + 1, lse, rows

    eager = step(q, k, v, kv_lens)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, kv_lens)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compile_does_not_recompile_for_numbers(device):
    """seed, num_samples and min_sampled_len are SymInt: changing them keeps the graph once it is dynamic."""
    q, k, v, kv_lens = inputs(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def step(seed, num_samples):
        return santa.decode(q, k, v, kv_lens=kv_lens, seed=seed, num_samples=num_samples, min_sampled_len=0)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for seed, num_samples in ((2, 16), (3, 17), (100, 64), (12345, 33)):
        assert torch.equal(compiled(seed, num_samples), step(seed, num_samples))
    assert counter.frame_count == 1


def test_export(device):
    q, k, v, kv_lens = inputs(device)

    class Step(torch.nn.Module):
        def forward(self, q, k, v, kv_lens):
            return torch.ops.santa.decode(q, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0)

    length = torch.export.Dim("length", min=2, max=100000)
    program = torch.export.export(
        Step(), (q, k, v, kv_lens), dynamic_shapes=({}, {1: length}, {1: length}, {}), strict=False
    )
    q, k, v, kv_lens = inputs(device, kv_len=900)
    for a, b in zip(program.module()(q, k, v, kv_lens), Step()(q, k, v, kv_lens), strict=True):
        assert torch.equal(a, b)


def test_default_is_grouped_256(device):
    q, k, v = make_qkv(1, 4, 1, 9000, 64, dtype=working_dtype(device), device=device)
    assert torch.equal(torch.ops.santa.decode(q, k, v)[0], santa.decode(q, k, v, num_samples=256, sampler="grouped")[0])
    assert torch.equal(santa.decode(q, k, v, sampler=3)[0], santa.decode(q, k, v, sampler=santa.Sampler.GROUPED)[0])


@pytest.mark.gpu
def test_cuda_graph_stays_random_and_deterministic():
    """A replayed graph follows kv_lens on the device: fresh numbers for a longer row, the same bits for the same."""
    q, k, v, _ = inputs("cuda", kv_len=700)
    kv_lens = torch.tensor([600, 300], dtype=torch.int32, device="cuda")
    row_seeds = torch.tensor([1, 2], device="cuda")

    def step():
        return santa.decode(q, k, v, kv_lens=kv_lens, row_seeds=row_seeds, num_samples=32, min_sampled_len=0)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step()
    results = []
    for lengths in ([600, 300], [601, 301], [600, 300], [0, 700]):
        kv_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        results.append(out.clone())
        assert torch.equal(out, step()[0])
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    assert (results[3][0] == 0).all()


@pytest.mark.gpu
def test_second_stream():
    """Work is queued on the caller's stream: it sees what that stream wrote before, however late."""
    q, k, v, kv_lens = inputs("cuda")
    expected = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0)[0]
    late_k = torch.zeros_like(k)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_k.copy_(k)
        out = santa.decode(q, late_k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0)[0]
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q, k, v, kv_lens = inputs("cuda:0")
    expected = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=32, min_sampled_len=0)[0]
    out = santa.decode(
        *(x.to("cuda:1") for x in (q, k, v)), kv_lens=kv_lens.to("cuda:1"), num_samples=32, min_sampled_len=0
    )[0]
    assert out.device.index == 1 and torch.equal(out.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0
