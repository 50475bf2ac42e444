"""`santa.sample_select` as an operator: the same bits, inside PyTorch, and bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.selection import make_qk, same

import santa

# Invariance -------------------------------------------------------------------------------------------


@pytest.mark.sanitize
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
    # The masses among the statistics depend on q; what is chosen has no derivative to ask for.
    assert [x.requires_grad for x in santa.sample_select(q, k)] == [False, False, requires_grad]


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
    "too few keys": (
        changed("k", lambda x: x[:, :, :172]),
        ValueError,
        r"k has kv_len 172; .*q_len \(300\) plus .*k has shape \[2, 2, 172, 64\], \[batch, num_kv_heads, kv_len, ",
    ),
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
