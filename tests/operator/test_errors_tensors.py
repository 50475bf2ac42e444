"""Bad tensors: each wrong in each way that it can be, and what the message then says.

Every message names the argument, what it got and what it needs: `match` is a regular expression that the whole message
fulfils.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.errors import BATCH, assert_refused, empty, qkv
from helpers.inputs import repeat_rows

import santa


class Case(NamedTuple):
    name: str
    change: Callable[[str], dict[str, Any]]  # of the device: the arguments that are wrong, and what they need
    match: str


def tensor_cases() -> list[Case]:
    def of(argument: str, *shape: int, **options: Any) -> Callable[[str], dict[str, Any]]:
        return lambda device: {argument: empty(*shape, device=device, **options)}

    cases = [
        # q
        Case(
            "q float64",
            of("q", 2, 4, 64, dtype=torch.float64),
            r"santa: q is float64; it needs to be bfloat16 or float16( or float32| on CUDA)",
        ),
        Case(
            "q int8",
            of("q", 2, 4, 64, dtype=torch.int8),
            r"santa: q is int8; it needs to be bfloat16 or float16( or float32| on CUDA)",
        ),
        Case(
            "q float8",
            lambda device: {"q": empty(2, 4, 64, device=device).to(torch.float8_e4m3fn)},
            r"santa: q is float8_e4m3fn; it needs to be bfloat16 or float16( or float32| on CUDA)",
        ),
        Case(
            "q rank 2",
            of("q", 4, 64),
            r"santa: q has shape \[4, 64\]; it needs 3 dimensions, \[batch, num_qo_heads, head_dim\], or 4, "
            r"\[batch, q_len, num_qo_heads, head_dim\]",
        ),
        Case("q rank 5", of("q", 2, 1, 1, 4, 64), r"santa: q has shape .*; it needs 3 dimensions, .*, or 4, .*"),
        *(
            Case(
                f"q of {q_len} tokens",
                of("q", 2, q_len, 4, 64),
                rf"santa: q has shape .*; dimension 1 \(q_len\) is {q_len} and needs to be in \[1, 8\]",
            )
            for q_len in (0, 9)
        ),
        # Attention elsewhere has the query dimension behind the heads.
        Case(
            "q with a query dimension in another place",
            of("q", 2, 16, 1, 64),
            r"santa: q has shape \[2, 16, 1, 64\]; dimension 1 \(q_len\) is 16 and needs to be in \[1, 8\]: "
            r"pass q\.squeeze\(2\)",
        ),
        Case(
            "q of too many tokens and heads",
            lambda device: {
                "q": empty(2, 8, 129, 64, device=device),
                **{name: empty(2, 300, 1, 64, device=device) for name in "kv"},
            },
            r"santa: q has 8 tokens of 129 heads per KV head; their product needs to be at most 1024",
        ),
        Case("q rank 0", of("q"), r"santa: q has shape \[\]; it needs 3 dimensions, .*"),
        Case(
            "q without heads",
            of("q", 2, 0, 64),
            r"santa: q has shape \[2, 0, 64\]; it needs at least one head",
        ),
        Case(
            "q stride",
            lambda device: {"q": empty(2, 4, 128, device=device)[..., ::2]},
            r"santa: q has stride 2 in its last dimension; it needs a contiguous last dimension \(stride 1\)",
        ),
        Case(
            "q batch above 65535",
            lambda device: {name: repeat_rows(x[:1], 65536) for name, x in qkv(device).items()},
            r"santa: q has batch 65536; it needs to be at most 65535",
        ),
        # k against q
        Case(
            "k batch",
            of("k", 3, 300, 2, 64),
            r"santa: k has shape \[3, 300, 2, 64\]; dimension 0 \(batch\) is 3 and needs to be 2",
        ),
        Case(
            "k head_dim",
            of("k", 2, 300, 2, 128),
            r"santa: k has shape \[2, 300, 2, 128\]; dimension 3 \(head_dim\) is 128 and needs to be 64",
        ),
        Case(
            "k heads do not divide q's",
            lambda device: {name: empty(2, 300, 3, 64, device=device) for name in "kv"},
            r"santa: k has 3 KV heads; num_qo_heads \(4\) needs to be a multiple of it, at most 1024 times; "
            r"k has shape \[2, 300, 3, 64\], and kv_layout 'NHD' has its heads in dimension 2",
        ),
        Case(
            "k without heads",
            lambda device: {name: empty(2, 300, 0, 64, device=device) for name in "kv"},
            r"santa: k has 0 KV heads; num_qo_heads \(4\) needs to be a multiple of it, at most 1024 times; .*",
        ),
        Case(
            "k heads too few",
            lambda device: {
                "q": empty(2, 1025, 64, device=device),
                **{name: empty(2, 300, 1, 64, device=device) for name in "kv"},
            },
            r"santa: k has 1 KV heads; num_qo_heads \(1025\) needs to be a multiple of it, at most 1024 times; .*",
        ),
        *(
            Case(
                f"{other} given as {layout}",
                lambda device, shape=shape, layout=layout: {
                    **{name: empty(*shape, device=device) for name in "kv"},
                    "kv_layout": ["NHD", "HND"].index(layout),
                },
                rf"santa: k has 300 KV heads; .*; k has shape .*, and kv_layout '{layout}' has its heads in dimension "
                rf"{axis}: pass kv_layout='{other}' if they are in dimension {3 - axis}",
            )
            for layout, other, axis, shape in [
                ("NHD", "HND", 2, (2, 2, 300, 64)),
                ("HND", "NHD", 1, (2, 300, 2, 64)),
            ]
        ),
        Case(
            "k too long",
            lambda device: {name: empty(1, 1, 1, 64, device=device).expand(2, 2**31, 2, 64) for name in ("k", "v")},
            r"santa: k has max_kv_len 2147483648; it needs to be at most 2147483647",
        ),
        # v against k
        *(
            Case(
                f"v dimension {dim}",
                of("v", *shape),
                rf"santa: v has shape .*; dimension {dim} \(as in k\) is {shape[dim]} "
                rf"and needs to be {(2, 300, 2, 64)[dim]}",
            )
            for dim, shape in enumerate([(3, 300, 2, 64), (2, 299, 2, 64), (2, 300, 1, 64)])
        ),
    ]
    for name, float8 in (("k", ", or float8_e4m3fn"), ("v", "")):
        cases += [
            *(
                Case(
                    f"{name} {str(dtype)[6:]}",
                    of(name, 2, 300, 2, 64, dtype=dtype),
                    rf"santa: {name} is {str(dtype)[6:]}; it needs to be float16, q's dtype{float8}",
                )
                for dtype in (torch.bfloat16, torch.uint8, torch.float8_e5m2)
            ),
            Case(
                f"{name} rank 3",
                of(name, 300, 2, 64),
                rf"santa: {name} has shape \[300, 2, 64\]; it needs 4 dimensions, "
                r"\[batch, max_kv_len, num_kv_heads, head_dim\] \(NHD\)",
            ),
            Case(
                f"{name} rank 3, HND",
                lambda device, name=name: {
                    "k": empty(2, 2, 300, 64, device=device),
                    "v": empty(2, 2, 300, 64, device=device),
                    name: empty(2, 300, 64, device=device),
                    "kv_layout": 1,
                },
                rf"santa: {name} has shape \[2, 300, 64\]; it needs 4 dimensions, "
                r"\[batch, num_kv_heads, max_kv_len, head_dim\] \(HND\)",
            ),
            Case(
                f"{name} stride",
                lambda device, name=name: {name: empty(2, 300, 2, 128, device=device)[..., ::2]},
                rf"santa: {name} has stride 2 in its last dimension; it needs a contiguous last dimension "
                r"\(stride 1\)",
            ),
        ]
    for name, dtype, wrong in [
        ("kv_lens", "int32", torch.int64),
        ("kv_starts", "int32", torch.int64),
        ("row_seeds", "int64", torch.int32),
        ("positions", "int32", torch.int64),
    ]:
        right = getattr(torch, dtype)
        cases += [
            Case(
                f"{name} {str(wrong)[6:]}",
                of(name, 2, dtype=wrong),
                rf"santa: {name} is {str(wrong)[6:]}; it needs to be {dtype}: pass {name}\.to\(torch\.{dtype}\)",
            ),
            Case(
                f"{name} float32",
                of(name, 2, dtype=torch.float32),
                rf"santa: {name} is float32; it needs to be {dtype}",
            ),
            Case(
                f"{name} bool",
                of(name, 2, dtype=torch.bool),
                rf"santa: {name} is bool; it needs to be {dtype}",
            ),
            Case(
                f"{name} rank 0",
                of(name, dtype=right),
                rf"santa: {name} has shape \[\]; it needs 1 dimensions?, \[batch\]",
            ),
            Case(
                f"{name} rank 2",
                of(name, 2, 1, dtype=right),
                rf"santa: {name} has shape \[2, 1\]; it needs 1 dimensions?, \[batch\]",
            ),
            Case(
                f"{name} size",
                of(name, 3, dtype=right),
                rf"santa: {name} has shape \[3\]; dimension 0 \(batch\) is 3 and needs to be 2",
            ),
            Case(
                f"{name} stride",
                lambda device, name=name, right=right: {name: empty(4, dtype=right, device=device)[::2]},
                rf"santa: {name} has stride 2; it needs to be contiguous",
            ),
        ]
    return cases


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in tensor_cases()])
def test_bad_tensor(operator, device, case):
    assert_refused(operator, {**qkv(device), **case.change(device)}, ValueError, case.match)


def elsewhere(name: str, device: str) -> torch.Tensor:
    """Argument `name`, as it has to be, but on another device."""
    per_row = {"kv_lens": torch.int32, "kv_starts": torch.int32, "row_seeds": torch.int64, "positions": torch.int32}
    if name in per_row:
        return torch.empty(BATCH, dtype=per_row[name], device=device)
    return qkv(device)[name]


TENSORS_BESIDE_Q = ["k", "v", "kv_lens", "kv_starts", "row_seeds", "positions"]


@pytest.mark.parametrize("name", TENSORS_BESIDE_Q)
def test_tensor_on_the_meta_device(operator, device, name):
    """A tensor without data among tensors with data. The meta kernel must not answer for the real one: its
    outputs are never written."""
    assert_refused(
        operator,
        {**qkv(device), name: elsewhere(name, "meta")},
        ValueError,
        rf"santa: {name} is on meta; it needs to be on q's device, {device}(:0)?",
    )


def test_q_alone_on_the_meta_device(operator, device):
    assert_refused(
        operator,
        {**qkv(device), "q": elsewhere("q", "meta")},
        ValueError,
        rf"santa: k is on {device}(:0)?; it needs to be on q's device, meta",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", TENSORS_BESIDE_Q)
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_tensors_on_different_devices(operator, name, here, there):
    assert_refused(
        operator,
        {**qkv(here), name: elsewhere(name, there)},
        ValueError,
        rf"santa: {name} is on {there}; it needs to be on q's device, {here}",
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", TENSORS_BESIDE_Q)
def test_tensors_on_different_gpus(operator, name):
    assert_refused(
        operator,
        {**qkv("cuda:0"), name: elsewhere(name, "cuda:1")},
        ValueError,
        rf"santa: {name} is on cuda:1; it needs to be on q's device, cuda:0",
    )


@pytest.mark.gpu
def test_float32_on_cuda(operator):
    arguments = {name: x.float() for name, x in qkv("cuda").items()}
    assert_refused(
        operator,
        arguments,
        ValueError,
        r"santa: q is float32; it needs to be bfloat16 or float16 on CUDA",
    )


def test_heads_where_tokens_are(device):
    """q as torch's attention has it, with few enough heads to be taken for tokens."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = (torch.zeros(*sizes, dtype=dtype, device=device) for sizes in ((2, 8, 1, 64), (2, 100, 2, 64)))
    with pytest.raises(ValueError, match=r"k has 2 KV heads; num_qo_heads \(1\).*: pass q\.squeeze\(2\) if"):
        santa.decode(q, k, k)
