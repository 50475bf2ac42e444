"""santa's wrapper of paged decode beside FlashInfer's, where that is installed: same arguments, same results."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.statistics import relative_rms
from helpers.wrapper import FLOAT8, INTERFACE, Problem, parameters

import santa

# Rows of one length, and of several.
LENS = [[54], [97] * 12, [512] * 17, [2048] * 12, [54, 4096, 97, 2048, 512]]
# q, cache, head_dim, plan, tensor cores. FlashInfer compiles a module for each when it first meets it, which takes
# minutes for all; the two with tensor cores are those that bench/ uses.
KINDS = {
    "float16-128": (torch.float16, torch.float16, 128, {}, False),
    "float16-256": (torch.float16, torch.float16, 256, {}, False),
    "float16-128-capped": (torch.float16, torch.float16, 128, {"logits_soft_cap": 30.0}, False),
    "float16-128-window": (torch.float16, torch.float16, 128, {"window_left": 127}, False),
    "float16-float8-128": (torch.float16, FLOAT8, 128, {}, False),
    "bfloat16-256-scaled": (torch.bfloat16, torch.bfloat16, 256, {"sm_scale": 0.1}, False),
    "bfloat16-128-tensor-cores": (torch.bfloat16, torch.bfloat16, 128, {}, True),
    "bfloat16-float8-128-tensor-cores": (torch.bfloat16, FLOAT8, 128, {}, True),
}


@pytest.fixture(scope="module")
def flashinfer() -> Any:
    return pytest.importorskip("flashinfer", reason="FlashInfer is not installed")


@pytest.mark.gpu
def test_arguments_of_the_flashinfer_that_is_installed(flashinfer: Any) -> None:
    """INTERFACE is that of 0.6.6; a newer one may have more."""
    for method, expected in INTERFACE.items():
        theirs = parameters(flashinfer.BatchDecodeWithPagedKVCacheWrapper, method)
        assert [(p.name, p.default) for p in theirs][: len(expected)] == list(expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_flashinfer(flashinfer: Any, kind: str, layout: str, page_size: int) -> None:
    """Shapes of the kind that its own tests of decode have: 4 KV heads with 1 and 8 query heads each. out is rounded to
    16 bits once, in FlashInfer twice with v_scale; FlashInfer's tanh is good to 11 bits, of a cap of 30."""
    q_dtype, kv_dtype, head_dim, plan, tensor_cores = KINDS[kind]
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    wrappers = [
        module.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores=tensor_cores)
        for module in (santa, flashinfer)
    ]
    scales = {"k_scale": 0.7, "v_scale": 1.3} if kv_dtype == FLOAT8 else {"q_scale": 1.2}
    cap = plan.get("logits_soft_cap", 0.0)
    for lens, heads in itertools.product(LENS, [4, 32]):
        problem = Problem(
            "cuda",
            dtype=q_dtype,
            float8=kv_dtype == FLOAT8,
            lens=lens,
            heads=heads,
            kv_heads=4,
            head_dim=head_dim,
            page_size=page_size,
            layout=layout,
            seed=len(lens) + heads,
        )
        # FlashInfer multiplies masked keys of the last page with zero, so what is there has to be finite.
        kv = tuple(x.float().nan_to_num().to(x.dtype) for x in problem.kv)
        results = []
        for made, exact in zip(wrappers, ({"num_samples": 0}, {}), strict=True):
            problem.plan(made, **plan, **exact)
            results.append(made.run(problem.q, kv, return_lse=True, **scales))
        (ours, our_lse), (theirs, their_lse) = results
        assert relative_rms(ours, theirs) < 2 * torch.finfo(q_dtype).eps + (0.01 if cap else 0.0)
        # Ours is held against float64 in test_flashinfer_wrapper.py; theirs is off by 1.3e-3 with tensor cores.
        close = 4e-3 if tensor_cores else 1e-3 + cap * 2.0**-10
        torch.testing.assert_close(our_lse, their_lse, rtol=0, atol=close)
