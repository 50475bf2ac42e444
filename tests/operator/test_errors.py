"""Bad input: each argument wrong in each way that it can be, and what the message then says.

Every message names the argument, what it got and what it needs. A case says which: `match` is a regular
expression that the whole message fulfils.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import make_qkv, repeat_rows

import santa
from santa import reference

BATCH, NUM_QO_HEADS, NUM_KV_HEADS, MAX_KV_LEN, HEAD_DIM = 2, 4, 2, 300, 64
OPERATORS = {
    "santa.decode": santa.decode,
    "santa.decode rows_read": lambda *args, **options: santa.decode(*args, **options, return_rows_read=True),
    "ops.decode": torch.ops.santa.decode,
    "ops.decode_rows_read": torch.ops.santa.decode_rows_read,
}


@pytest.fixture(params=OPERATORS)
def operator(request) -> Callable[..., Any]:
    return OPERATORS[request.param]


def empty(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def qkv(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Valid arguments; dtype float16, which both devices take."""
    return {
        "q": empty(BATCH, NUM_QO_HEADS, HEAD_DIM, device=device),
        "k": empty(BATCH, MAX_KV_LEN, NUM_KV_HEADS, HEAD_DIM, device=device),
        "v": empty(BATCH, MAX_KV_LEN, NUM_KV_HEADS, HEAD_DIM, device=device),
    }


def call(operator: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    tensors = [arguments[name] for name in ("q", "k", "v")]
    return operator(*tensors, **{name: x for name, x in arguments.items() if name not in ("q", "k", "v")})


def assert_refused(operator, arguments, error, match: str) -> None:
    with pytest.raises(error) as caught:
        call(operator, arguments)
    assert re.fullmatch(match, str(caught.value), re.DOTALL), f"{caught.value}\ndoes not match\n{match}"


def test_the_valid_arguments_are_valid(operator, device):
    """What the cases below change one thing of."""
    outputs = call(operator, qkv(device))
    assert [tuple(x.shape) for x in outputs[:2]] == [(BATCH, NUM_QO_HEADS, HEAD_DIM), (BATCH, NUM_QO_HEADS)]
    per_row = {
        name: torch.zeros(BATCH, dtype=dtype, device=device)
        for name, dtype in [("kv_lens", torch.int32), ("kv_starts", torch.int32), ("row_seeds", torch.int64)]
    }
    call(operator, {**qkv(device), **per_row})


# Tensors ----------------------------------------------------------------------------------------------


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
            r"santa: q has shape \[4, 64\]; it needs 3 dimensions, \[batch, num_qo_heads, head_dim\]",
        ),
        Case(
            "q rank 4",
            of("q", 2, 1, 4, 64),
            r"santa: q has shape \[2, 1, 4, 64\]; it needs 3 dimensions, .*",
        ),
        Case("q rank 0", of("q"), r"santa: q has shape \[\]; it needs 3 dimensions, .*"),
        Case(
            "q head_dim 80",
            of("q", 2, 4, 80),
            r"santa: q has head_dim 80; it needs to be one of 64, 96, 128, 192, 256",
        ),
        Case("q head_dim 0", of("q", 2, 4, 0), r"santa: q has head_dim 0; it needs to be one of .*"),
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
            r"santa: k has 3 KV heads; num_qo_heads \(4\) needs to be a multiple of it, at most 1024 times",
        ),
        Case(
            "k without heads",
            lambda device: {name: empty(2, 300, 0, 64, device=device) for name in "kv"},
            r"santa: k has 0 KV heads; num_qo_heads \(4\) needs to be a multiple of it, at most 1024 times",
        ),
        Case(
            "k heads too few",
            lambda device: {
                "q": empty(2, 1025, 64, device=device),
                **{name: empty(2, 300, 1, 64, device=device) for name in "kv"},
            },
            r"santa: k has 1 KV heads; num_qo_heads \(1025\) needs to be a multiple of it, at most 1024 times",
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
            for dim, shape in enumerate([(3, 300, 2, 64), (2, 299, 2, 64), (2, 300, 1, 64), (2, 300, 2, 96)])
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
    ]:
        right = getattr(torch, dtype)
        cases += [
            Case(
                f"{name} {str(wrong)[6:]}",
                of(name, 2, dtype=wrong),
                rf"santa: {name} is {str(wrong)[6:]}; it needs to be {dtype}",
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
    per_row = {"kv_lens": torch.int32, "kv_starts": torch.int32, "row_seeds": torch.int64}
    if name in per_row:
        return torch.empty(BATCH, dtype=per_row[name], device=device)
    return qkv(device)[name]


TENSORS_BESIDE_Q = ["k", "v", "kv_lens", "kv_starts", "row_seeds"]


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


# Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("num_samples", -1, r"santa: num_samples is -1; it needs to be in \[0, 1048576\]"),
        ("num_samples", 2**20 + 1, r"santa: num_samples is 1048577; it needs to be in \[0, 1048576\]"),
        ("num_samples", 2**32, r"santa: num_samples is 4294967296; it needs to be in \[0, 1048576\]"),
        ("sampler", -1, r"santa: sampler is -1; it needs to be (in|one of) .*\b0\b.*\b3\b.*"),
        ("sampler", 4, r"santa: sampler is 4; it needs to be (in|one of) .*\b0\b.*\b3\b.*"),
        ("budget", -1, r"santa: budget is -1; it needs to be (in|one of) .*\b0\b.*\b1\b.*"),
        ("budget", 2, r"santa: budget is 2; it needs to be (in|one of) .*\b0\b.*\b1\b.*"),
        ("kv_layout", -1, r"santa: kv_layout is -1; it needs to be (in|one of) .*\b0\b.*\b1\b.*"),
        ("kv_layout", 2, r"santa: kv_layout is 2; it needs to be (in|one of) .*\b0\b.*\b1\b.*"),
        ("sm_scale", 1e31, r"santa: sm_scale is 1e\+31; it needs to be finite and at most 1e\+30 in magnitude"),
        ("sm_scale", math.nan, r"santa: sm_scale is -?nan; it needs to be finite and at most 1e\+30 in magnitude"),
        ("sm_scale", math.inf, r"santa: sm_scale is inf; it needs to be finite and at most 1e\+30 in magnitude"),
        ("sm_scale", -math.inf, r"santa: sm_scale is -inf; it needs to be finite and at most 1e\+30 in magnitude"),
        ("min_sampled_len", -1, r"santa: min_sampled_len is -1; it needs to be at least 0"),
    ],
)
def test_number_out_of_range(operator, device, argument, value, match):
    assert_refused(operator, {**qkv(device), argument: value}, ValueError, match)


def test_numbers_at_the_ends_of_their_ranges(operator):
    """None of these is refused."""
    for accepted in [
        {"num_samples": 0},
        {"num_samples": 2**20},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"min_sampled_len": 0},
        {"min_sampled_len": 2**63 - 1},
        {"sm_scale": 0.0},
        {"sm_scale": -1},
    ]:
        call(operator, {**qkv(), **accepted})


@pytest.mark.parametrize("argument", ["num_samples", "seed", "min_sampled_len"])
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_integer_beyond_64_bits(argument, value):
    """santa.decode says which range it needs; in torch.ops, Torch's schema check comes first (below)."""
    match = rf"santa: {argument} is {value}; it needs to be .*"
    assert_refused(santa.decode, {**qkv(), argument: value}, ValueError, match)


# Python types -----------------------------------------------------------------------------------------


TENSOR = r"a torch\.Tensor"
OPTIONAL_TENSOR = r"a torch\.Tensor or None"
WRONG_TYPES = [
    *((name, value, TENSOR) for name in ("q", "k", "v") for value in (None, 1.0, [1.0], "x")),
    *(
        (name, value, OPTIONAL_TENSOR)
        for name in ("kv_lens", "kv_starts", "row_seeds", "k_scale", "v_scale")
        for value in (3, [3, 3], "x")
    ),
    *(
        (name, value, r"an int.*")
        for name in ("num_samples", "seed", "min_sampled_len")
        for value in (1.5, "x", [1], True)
    ),
    *((name, None, r"an int.*") for name in ("num_samples", "seed")),
    *(
        (name, value, rf"a santa\.{kind}, an int or a str")
        for name, kind in [("sampler", "Sampler"), ("budget", "Budget"), ("kv_layout", "KvLayout")]
        for value in (1.5, None, [0], True)
    ),
    *(("sm_scale", value, r"a float.*") for value in ("x", [1.0], 1j)),
]


@pytest.mark.parametrize(
    ("argument", "value", "needs"),
    [pytest.param(*case, id=f"{case[0]}={case[1]!r}") for case in WRONG_TYPES],
)
def test_wrong_python_type(argument, value, needs):
    got = type(value).__name__
    assert_refused(
        santa.decode,
        {**qkv(), argument: value},
        TypeError,
        rf"santa: {argument} is an? {got}; it needs to be {needs}",
    )


@pytest.mark.parametrize(
    ("argument", "value", "needs"),
    [
        pytest.param(*case, id=f"{case[0]}={case[1]!r}")
        for case in WRONG_TYPES
        if case[1] is not True and not (case[0] in "qkv" and case[1] is None)
    ],
)
def test_wrong_python_type_in_torch_ops(argument, value, needs):
    """Torch refuses what its schema does not take, with its own message: a RuntimeError that names the
    argument, the type it got and the type it needs. (A bool passes as the integer that it is.)"""
    got = type(value).__name__
    assert_refused(
        torch.ops.santa.decode,
        {**qkv(), argument: value},
        (TypeError, RuntimeError),
        rf".*'(Tensor|Optional\[Tensor\]|int|Optional\[int\]|Optional\[float\])' for argument '{argument}' "
        rf"but instead found type '{got}'.*",
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("grad", [True, False])
def test_none_for_a_tensor_in_torch_ops(name, grad):
    """Torch's schema check lets None through, as an undefined tensor."""
    with torch.set_grad_enabled(grad):
        assert_refused(
            torch.ops.santa.decode, {**qkv(), name: None}, (ValueError, TypeError), rf"santa: {name} .*needs.*"
        )


@pytest.mark.parametrize(
    ("argument", "value", "names"),
    [
        ("sampler", "gruoped", "'multinomial', 'stratified', 'systematic', 'grouped'"),
        ("budget", "", "'proportional', 'uniform'"),
        ("kv_layout", "HDN", "'NHD', 'HND'"),
    ],
)
def test_unknown_name(argument, value, names):
    match = rf"santa: {argument} is {value!r}; it needs to be one of {names} .*"
    assert_refused(santa.decode, {**qkv(), argument: value}, ValueError, match)


def test_names_members_and_integers_are_the_same():
    q, k, v = make_qkv(1, 4, 2, 600, 64)
    for argument, kind, names in [
        ("sampler", santa.Sampler, ["multinomial", "stratified", "systematic", "grouped"]),
        ("budget", santa.Budget, ["proportional", "uniform"]),
        ("kv_layout", santa.KvLayout, ["NHD", "HND"]),
    ]:
        assert [member.name.lower() for member in kind] == [name.lower() for name in names]
        for number, name in enumerate(names):
            keys, values = (k, v) if name != "HND" else (k.transpose(1, 2), v.transpose(1, 2))
            outs = [
                santa.decode(q, keys, values, num_samples=16, min_sampled_len=0, **{argument: value})[0]
                for value in (name, kind(number), number)
            ]
            for out in outs[1:]:
                assert torch.equal(out, outs[0])


def test_options_are_keywords(operator):
    """A fourth positional argument would be guessed to be something."""
    with pytest.raises((TypeError, RuntimeError), match="positional argument"):
        operator(*qkv().values(), torch.full((BATCH,), 3, dtype=torch.int32))


# Ranges of rows ---------------------------------------------------------------------------------------


BAD_ROWS = {
    "kv_lens negative": ({"kv_lens": [7, -1]}, r"kv_lens -1"),
    "kv_lens beyond": ({"kv_lens": [7, 301]}, r"kv_lens 301"),
    "kv_lens far beyond": ({"kv_lens": [7, 2**31 - 1]}, r"kv_lens 2147483647"),
    "kv_starts negative": ({"kv_starts": [7, -1]}, r"kv_starts -1"),
    "kv_starts beyond": ({"kv_starts": [7, 301]}, r"kv_starts 301"),
    "start and length beyond": (
        {"kv_lens": [7, 100], "kv_starts": [7, 201]},
        r"kv_lens 100 and kv_starts 201",
    ),
    "sum above 2^31": (
        {"kv_lens": [7, 2**31 - 1], "kv_starts": [7, 2**31 - 1]},
        r"kv_lens 2147483647 and kv_starts 2147483647",
    ),
    "negative start, long row": (
        {"kv_lens": [7, 300], "kv_starts": [7, -100]},
        r"kv_lens 300 and kv_starts -100",
    ),
    "negative length, late start": (
        {"kv_lens": [7, -100], "kv_starts": [7, 200]},
        r"kv_lens -100 and kv_starts 200",
    ),
}
ROWS = [pytest.param(*case, id=name) for name, case in BAD_ROWS.items()]


def rows_of(lists: dict[str, list[int]], device: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(x, dtype=torch.int32, device=device) for name, x in lists.items()}


@pytest.mark.parametrize(("rows", "got"), ROWS)
@pytest.mark.parametrize("num_samples", [0, 16])
def test_row_outside_the_cache_raises_on_the_cpu(operator, rows, got, num_samples):
    assert_refused(
        operator,
        {**qkv(), **rows_of(rows, "cpu"), "num_samples": num_samples, "min_sampled_len": 0},
        ValueError,
        rf"santa: row 1 has {got}; .*max_kv_len \(300\).*needed",
    )


@pytest.mark.parametrize(
    "rows",
    [
        {"kv_lens": [0, 300]},
        {"kv_starts": [0, 300]},
        {"kv_lens": [0, 300], "kv_starts": [300, 0]},
        {"kv_lens": [99, 100], "kv_starts": [201, 200]},
    ],
)
def test_rows_that_just_fit(operator, device, rows):
    out = call(operator, {**qkv(device), **rows_of(rows, device)})[0]
    assert torch.isfinite(out).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "got"), ROWS)
@pytest.mark.parametrize("num_samples", [0, 16])
@pytest.mark.parametrize("sampler", ["systematic", "grouped"])
def test_row_outside_the_cache_is_nan_on_cuda(rows, got, num_samples, sampler):
    """Looking would stop the stream, so the row reads nothing and says so in its outputs: NaN, NaN and -1.
    The row beside it comes out as it does alone."""
    q, k, v = make_qkv(BATCH, NUM_QO_HEADS, NUM_KV_HEADS, MAX_KV_LEN, HEAD_DIM, dtype=torch.float16, device="cuda")
    options = {
        "num_samples": num_samples,
        "min_sampled_len": 0,
        "sampler": sampler,
        "return_rows_read": True,
    }
    lists = rows_of(rows, "cuda")
    out, lse, rows_read = santa.decode(q, k, v, **lists, **options)
    torch.cuda.synchronize()
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert (rows_read[1] == -1).all()

    alone = {name: x[:1] for name, x in lists.items()}
    for ours, expected in zip(
        (out, lse, rows_read), santa.decode(q[:1], k[:1], v[:1], **alone, **options), strict=True
    ):
        assert torch.equal(ours[:1], expected)
    exact, exact_lse = reference.exact(
        q[:1].cpu(), k[:1].cpu(), v[:1].cpu(), **{name: x.cpu() for name, x in alone.items()}
    )
    torch.testing.assert_close(lse[:1].cpu().double(), exact_lse, rtol=1e-5, atol=1e-4)
    if num_samples == 0:
        torch.testing.assert_close(out[:1].cpu().double(), exact, rtol=5e-3, atol=5e-3)


# Gradients --------------------------------------------------------------------------------------------


NO_BACKWARD = "santa: decode has no backward pass .* torch.no_grad"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_backward_is_refused_and_forward_is_not(operator, device, name):
    """The forward pass of tensors that require gradients works and gives the same bits; only a backward pass
    raises."""
    q, k, v = make_qkv(BATCH, NUM_QO_HEADS, NUM_KV_HEADS, MAX_KV_LEN, HEAD_DIM, dtype=torch.float16, device=device)
    arguments = {"q": q, "k": k, "v": v, "num_samples": 16, "min_sampled_len": 0}
    expected = call(operator, arguments)
    assert not any(x.requires_grad for x in expected)
    arguments[name] = arguments[name].clone().requires_grad_()
    actual = call(operator, arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert actual[0].requires_grad
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        actual[0].sum().backward()
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        torch.autograd.grad(call(operator, arguments)[0].sum(), arguments[name])
    assert arguments[name].grad is None


def test_backward_is_refused_for_keyword_tensors():
    arguments = qkv()
    arguments["v"].requires_grad_()
    for operator in (santa.decode, torch.ops.santa.decode):
        with pytest.raises(RuntimeError, match=NO_BACKWARD):
            operator(**arguments)[0].sum().backward()


def test_gradient_through_lse_is_refused(operator, device):
    """The log-sum-exp depends on q and k as well: its gradient must not come out as nothing in silence."""
    arguments = qkv(device)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError):
        call(operator, arguments)[1].sum().backward()


def test_no_graph_without_gradients(operator, device):
    arguments = {name: x.requires_grad_() for name, x in qkv(device).items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not any(x.requires_grad for x in call(operator, arguments))


def test_errors_do_not_depend_on_gradients(operator):
    """The checks come before the forward pass of the tensors that require gradients, too."""
    arguments = {name: x.requires_grad_() for name, x in qkv().items()}
    assert_refused(operator, {**arguments, "num_samples": -1}, ValueError, r"santa: num_samples is -1; .*1048576\]")
    with torch.no_grad():
        assert_refused(operator, {**arguments, "num_samples": -1}, ValueError, r"santa: num_samples is -1; .*1048576\]")
