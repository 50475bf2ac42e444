"""Bad caches and pages of decode_paged: each wrong in each way that it can be, and what the message then says.

Every message names the argument, what it got and what it needs: `match` is a regular expression that the whole message
fulfils.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.errors import NUM_PAGES, PAGE_SIZE, assert_refused, call, empty, lists, paged, parts
from helpers.float8 import FLOAT8

import santa

PAGED = {"santa.decode_paged": santa.decode_paged, "ops.decode_paged": torch.ops.santa.decode_paged}


@pytest.mark.parametrize("operator", PAGED)
def test_the_valid_arguments_are_valid(operator, device):
    """What the cases below change one thing of."""
    for arguments in (paged(device), lists(device), paged(device) | parts(device), lists(device) | parts(device)):
        out, lse = call(PAGED[operator], arguments)
        assert out.shape == (2, 4, 64) and lse.shape == (2, 4) and out.isfinite().all()


class Case(NamedTuple):
    name: str
    base: Callable[[str], dict[str, Any]]  # of the device: valid arguments,
    change: Callable[[str], dict[str, Any]]  # and those that are wrong
    match: str


def of(argument: str, *shape: int, **options: Any) -> Callable[[str], dict[str, Any]]:
    return lambda device: {argument: empty(*shape, device=device, **options)}


def caches(*shape: int, **options: Any) -> Callable[[str], dict[str, Any]]:
    return lambda device: {name: empty(*shape, device=device) for name in ("k_cache", "v_cache")} | options


def without(*names: str, **others: Any) -> Callable[[str], dict[str, Any]]:
    return lambda device: dict.fromkeys(names) | others


NHD = r"\[num_pages, page_size, num_kv_heads, head_dim\] \(NHD\)"
HND = r"\[num_pages, num_kv_heads, page_size, head_dim\] \(HND\)"


def cache_cases() -> list[Case]:
    cases = [
        *(
            Case(
                f"page_size {size}, {layout}",
                paged,
                caches(*shape, kv_layout=number),
                rf"santa: k_cache has page_size {size} \(shape .*, kv_layout '{layout}'\); it needs to be a power of "
                r"two from 1 to 256",
            )
            for size in (0, 3, 24, 512)
            for layout, number, shape in (("NHD", 0, (4, size, 2, 64)), ("HND", 1, (4, 2, size, 64)))
        ),
        Case(
            "HND given as NHD",
            paged,
            caches(NUM_PAGES, 2, 16, 64),
            r"santa: k_cache has 16 KV heads; num_qo_heads \(4\) needs to be a multiple of it, .*; k_cache has shape "
            r"\[20, 2, 16, 64\], and kv_layout 'NHD' has its heads in dimension 2: pass kv_layout='HND' if they are in "
            r"dimension 1",
        ),
        Case(
            "k_cache too many pages",
            paged,
            lambda device: {
                name: empty(1, 1, 1, 64, device=device).expand(2**31, 16, 2, 64) for name in ("k_cache", "v_cache")
            },
            r"santa: k_cache has 2147483648 pages; it needs to have at most 2147483647",
        ),
        Case(
            "k_cache head_dim",
            paged,
            of("k_cache", NUM_PAGES, PAGE_SIZE, 2, 128),
            r"santa: k_cache has shape \[20, 16, 2, 128\]; dimension 3 \(head_dim\) is 128 and needs to be 64",
        ),
        Case(
            "q without kernels",
            paged,
            lambda device: {"q": empty(2, 4, 72, device=device)} | caches(NUM_PAGES, PAGE_SIZE, 2, 72)(device),
            r"santa: q has head_dim 72; it needs to be one of 64, 96, 128, 192, 256 .*",
        ),
        Case(
            "v_cache float8 alone",
            paged,
            lambda device: {"v_cache": empty(NUM_PAGES, PAGE_SIZE, 2, 64, device=device).to(FLOAT8)},
            r"santa: v_cache is float8_e4m3fn while k_cache is float16; it needs to be float16 too, or k_cache to be "
            r"float8_e4m3fn",
        ),
        Case(
            "k_scale beside 16 bits",
            paged,
            of("k_scale", 2, dtype=torch.float32),
            r"santa: k_scale is given while k_cache is float16; it needs k_cache to be float8_e4m3fn, or to be None",
        ),
        *(
            Case(
                f"v_cache dimension {dim}",
                paged,
                of("v_cache", *shape),
                rf"santa: v_cache has shape .*; dimension {dim} \(as in k_cache\) is {shape[dim]} and needs to be "
                rf"{(NUM_PAGES, PAGE_SIZE, 2, 64)[dim]}",
            )
            for dim, shape in enumerate([(19, 16, 2, 64), (20, 8, 2, 64), (20, 16, 1, 64), (20, 16, 2, 96)])
        ),
    ]
    for name, float8 in (("k_cache", ", or float8_e4m3fn"), ("v_cache", "")):
        cases += [
            Case(
                f"{name} bfloat16",
                paged,
                of(name, NUM_PAGES, PAGE_SIZE, 2, 64, dtype=torch.bfloat16),
                rf"santa: {name} is bfloat16; it needs to be float16, q's dtype{float8}",
            ),
            Case(
                f"{name} rank 3",
                paged,
                of(name, NUM_PAGES, 2, 64),
                rf"santa: {name} has shape \[20, 2, 64\]; it needs 4 dimensions, {NHD}",
            ),
            Case(
                f"{name} rank 5, HND",
                paged,
                lambda device, name=name: {
                    **caches(NUM_PAGES, 2, PAGE_SIZE, 64)(device),
                    name: empty(NUM_PAGES, 2, PAGE_SIZE, 2, 64, device=device),
                    "kv_layout": 1,
                },
                rf"santa: {name} has shape \[20, 2, 16, 2, 64\]; it needs 4 dimensions, {HND}",
            ),
            Case(
                f"{name} stride",
                paged,
                lambda device, name=name: {name: empty(NUM_PAGES, PAGE_SIZE, 2, 128, device=device)[..., ::2]},
                rf"santa: {name} has stride 2 in its last dimension; it needs a contiguous last dimension \(stride 1\)",
            ),
        ]
    return cases


def page_cases() -> list[Case]:
    one_of_two = r"; one of the two is needed: page_table with kv_lens, or those three"
    cases = [
        Case(
            "neither table nor lists",
            paged,
            without("page_table"),
            rf"santa: page_table is None, and so are kv_indptr, kv_indices and kv_last_page_len{one_of_two}",
        ),
        *(
            Case(
                f"page_table and {name}",
                paged,
                lambda device, name=name: {name: lists(device)[name]},
                rf"santa: page_table is given beside kv_indptr, kv_indices or kv_last_page_len{one_of_two}",
            )
            for name in ("kv_indptr", "kv_indices", "kv_last_page_len")
        ),
        Case("kv_lens missing", paged, without("kv_lens"), r"santa: kv_lens is None; page_table needs it"),
        *(
            Case(
                f"{name} missing",
                lists,
                without(name),
                rf"santa: {name} is None; kv_indptr, kv_indices and kv_last_page_len need each other",
            )
            for name in ("kv_indptr", "kv_indices", "kv_last_page_len")
        ),
        Case(
            "lists and kv_lens",
            lists,
            lambda device: {"kv_lens": paged(device)["kv_lens"]},
            r"santa: kv_lens is given beside kv_indptr, which says what it would: pass None",
        ),
        Case(
            "lists and kv_starts",
            lists,
            of("kv_starts", 2, dtype=torch.int32),
            r"santa: kv_starts is given beside kv_indptr, which lists the pages of a row's keys: pass None",
        ),
        *(
            Case(
                f"max_kv_len {value}",
                paged,
                without(max_kv_len=value),
                rf"santa: max_kv_len is {value}; it needs to be in \[0, 2147483647\]",
            )
            for value in (-1, 2**31)
        ),
        Case(
            "page_table rank 1",
            paged,
            of("page_table", 2, dtype=torch.int32),
            r"santa: page_table has shape \[2\]; it needs 2 dimensions, \[batch, max_pages\]",
        ),
        Case(
            "page_table batch",
            paged,
            of("page_table", 3, 5, dtype=torch.int32),
            r"santa: page_table has shape \[3, 5\]; dimension 0 \(batch\) is 3 and needs to be 2",
        ),
        Case(
            "page_table stride",
            paged,
            lambda device: {"page_table": empty(5, 2, device=device, dtype=torch.int32).t()},
            r"santa: page_table has stride 2 in its last dimension; it needs a contiguous last dimension .*",
        ),
    ]
    shapes = {"kv_indptr": r"\[batch \+ 1\]", "kv_indices": r"\[number of pages of all rows\]"}
    shapes |= {"kv_last_page_len": r"\[batch\]"}
    for name, size in (("page_table", (2, 5)), ("kv_indptr", (3,)), ("kv_indices", (6,)), ("kv_last_page_len", (2,))):
        base = paged if name == "page_table" else lists
        cases += [
            Case(
                f"{name} int64",
                base,
                of(name, *size, dtype=torch.int64),
                rf"santa: {name} is int64; it needs to be int32: pass {name}\.to\(torch\.int32\)",
            ),
            Case(
                f"{name} float32",
                base,
                of(name, *size, dtype=torch.float32),
                rf"santa: {name} is float32; it needs to be int32",
            ),
            Case(
                f"{name} on meta",
                base,
                lambda device, name=name, size=size: {name: empty(*size, device="meta", dtype=torch.int32)},
                rf"santa: {name} is on meta; it needs to be on q's device, (cpu|cuda:0|cuda)",
            ),
        ]
        if base is paged:
            continue
        cases += [
            Case(
                f"{name} rank 2",
                base,
                of(name, *size, 1, dtype=torch.int32),
                rf"santa: {name} has shape \[{size[0]}, 1\]; it needs 1 dimensions?, {shapes[name]}",
            ),
            Case(
                f"{name} stride",
                base,
                lambda device, name=name, size=size: {name: empty(2 * size[0], device=device, dtype=torch.int32)[::2]},
                rf"santa: {name} has strides? .*2.*; it needs to be contiguous",
            ),
        ]
        if name != "kv_indices":
            meaning = "batch" + r" \+ 1" * (name == "kv_indptr")
            cases.append(
                Case(
                    f"{name} size",
                    base,
                    of(name, size[0] + 1, dtype=torch.int32),
                    rf"santa: {name} has shape .*; dimension 0 \({meaning}\) is {size[0] + 1} and needs to be .*",
                )
            )
    return cases


@pytest.mark.parametrize("operator", PAGED)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cache_cases() + page_cases()])
def test_bad_pages(operator, device, case):
    assert_refused(PAGED[operator], case.base(device) | case.change(device), ValueError, case.match)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", PAGED)
@pytest.mark.parametrize("name", [*list(paged())[1:], *list(lists())[3:]])
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_tensors_on_different_devices(operator, name, here, there):
    arguments = (paged if name in paged() else lists)(here)
    assert_refused(
        PAGED[operator],
        arguments | {name: arguments[name].to(there)},
        ValueError,
        rf"santa: {name} is on {there}; it needs to be on q's device, {here}",
    )


# Python types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "needs"),
    [
        *((name, None, "a torch.Tensor") for name in ("q", "k_cache", "v_cache")),
        *(
            (name, [0], "a torch.Tensor or None")
            for name in ("page_table", "kv_lens", "kv_indptr", "kv_indices", "kv_last_page_len", "kv_starts")
        ),
        *((name, 1, "a torch.Tensor or None") for name in ("sinks", "whole_lens", "shard_starts", "levels", "out")),
        *((name, "x", "a torch.Tensor, a float or None") for name in ("k_scale", "v_scale")),
        ("max_kv_len", 1.5, "an int"),
        ("max_kv_len", True, "an int"),
        ("window_left", None, "an int"),
        ("first_kv_head", 0.0, "an int"),
        ("logits_soft_cap", "2", "a float or None"),
        ("sampler", 1.5, r"a santa\.Sampler, an int or a str"),
    ],
)
def test_wrong_python_type(argument, value, needs):
    got = type(value).__name__
    assert_refused(
        santa.decode_paged,
        paged() | {argument: value},
        TypeError,
        rf"santa: {argument} is an? {got}; it needs to be {needs}",
    )


def test_options_are_keywords():
    with pytest.raises((TypeError, RuntimeError), match="positional argument"):
        santa.decode_paged(*(paged()[name] for name in ("q", "k_cache", "v_cache", "page_table")))
