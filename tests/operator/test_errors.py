"""Bad numbers, Python types and ranges of rows, and what the message then says.

Every message names the argument, what it got and what it needs: `match` is a regular expression that the whole message
fulfils.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.bernoulli import feature_major
from helpers.errors import BATCH, HEAD_DIM, MAX_KV_LEN, NUM_KV_HEADS, NUM_QO_HEADS, assert_refused, call, qkv
from helpers.inputs import make_qkv

import santa
from santa import reference


def test_the_valid_arguments_are_valid(operator, device):
    """What the cases below change one thing of."""
    outputs = call(operator, qkv(device))
    assert [tuple(x.shape) for x in outputs[:2]] == [(BATCH, NUM_QO_HEADS, HEAD_DIM), (BATCH, NUM_QO_HEADS)]
    per_row = {
        name: torch.zeros(BATCH, dtype=dtype, device=device)
        for name, dtype in [
            ("kv_lens", torch.int32),
            ("kv_starts", torch.int32),
            ("row_seeds", torch.int64),
            ("positions", torch.int32),
        ]
    }
    call(operator, {**qkv(device), **per_row})


# Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("num_samples", -1, r"santa: num_samples is -1; it needs to be in \[0, 1048576\]"),
        ("num_samples", 2**20 + 1, r"santa: num_samples is 1048577; it needs to be in \[0, 1048576\]"),
        ("num_samples", 2**32, r"santa: num_samples is 4294967296; it needs to be in \[0, 1048576\]"),
        ("sampler", -1, r"santa: sampler is -1; it needs to be (in|one of) .*\b0\b.*\b3\b.*"),
        ("sampler", 4, r"santa: sampler is 4; it needs to be (in|one of) .*\b0\b.*\b3\b.*"),
        ("budget", -1, r"santa: budget is -1; it needs to be (in|one of) .*\b0\b.*\b2\b.*"),
        ("budget", 3, r"santa: budget is 3; it needs to be (in|one of) .*\b0\b.*\b2\b.*"),
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
        for name in ("kv_lens", "kv_starts", "row_seeds", "positions", "sinks", "whole_lens", "shard_starts", "levels")
        for value in (3, [3, 3], "x")
    ),
    *((name, value, r"a torch\.Tensor, a float or None") for name in ("k_scale", "v_scale") for value in ([3, 3], "x")),
    *(
        (name, value, r"an int.*")
        for name in ("num_samples", "seed", "min_sampled_len", "window_left", "first_kv_head")
        for value in (1.5, "x", [1], True)
    ),
    *((name, None, r"an int.*") for name in ("num_samples", "seed", "window_left", "first_kv_head")),
    *(
        (name, value, rf"a santa\.{kind}, an int or a str")
        for name, kind in [("sampler", "Sampler"), ("budget", "Budget"), ("kv_layout", "KvLayout")]
        for value in (1.5, None, [0], True)
        if value is not None or name != "budget"  # None: what the sampler takes
    ),
    *((name, value, r"a float.*") for name in ("sm_scale", "logits_soft_cap") for value in ("x", [1.0], 1j)),
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
        rf".*'(Tensor|int|float|Optional\[(Tensor|int|float)\])' for argument '{argument}' "
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
        ("budget", "", "'proportional', 'uniform', 'streaming'"),
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
        ("budget", santa.Budget, ["proportional", "uniform", "streaming"]),
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


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy(kind):
    q, k, v = make_qkv(1, 4, 2, 600, 64)
    options = {"num_samples": 16, "seed": 7, "min_sampled_len": 0, "sampler": 2, "budget": 0, "kv_layout": 0}
    numpy_options = {name: kind(value) for name, value in options.items()}
    out, _ = santa.decode(q, k, v, **numpy_options, sm_scale=np.float32(0.25))
    assert torch.equal(out, santa.decode(q, k, v, **options, sm_scale=0.25)[0])
    options = {"score": "bernoulli", "seed": 7}
    out, _ = santa.decode(q, feature_major(k), v, **options, num_draws=kind(2), score_sampler=kind(1))
    assert torch.equal(out, santa.decode(q, feature_major(k), v, **options, num_draws=2, score_sampler=1)[0])


@pytest.mark.parametrize("argument", ["num_samples", "seed", "min_sampled_len"])
@pytest.mark.parametrize("value", [np.bool_(True), np.float64(3.0), np.array([3])])
def test_other_numpy_types_are_no_integers(argument, value):
    match = rf"santa: {argument} is a {type(value).__name__}; it needs to be an int"
    assert_refused(santa.decode, {**qkv(), argument: value}, TypeError, match)


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
