"""Valid arguments of the operators, and the check that a changed one is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import santa

BATCH, NUM_QO_HEADS, NUM_KV_HEADS, MAX_KV_LEN, HEAD_DIM = 2, 4, 2, 300, 64
NUM_PAGES, PAGE_SIZE, MAX_PAGES = 20, 16, 5
OPERATORS = {
    "santa.decode": santa.decode,
    "santa.decode rows_read": lambda *args, **options: santa.decode(*args, **options, return_rows_read=True),
    "ops.decode": torch.ops.santa.decode,
    "ops.decode rows_read": lambda *args, **options: torch.ops.santa.decode(
        *args, **options, rows_read=rows_read(args)
    ),
}


def rows_read(args: tuple[Any, ...]) -> torch.Tensor:
    return torch.empty(BATCH, NUM_KV_HEADS, dtype=torch.int32, device=args[0].device)


def empty(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def qkv(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Valid arguments; dtype float16, which both devices take."""
    return {
        "q": empty(BATCH, NUM_QO_HEADS, HEAD_DIM, device=device),
        "k": empty(BATCH, MAX_KV_LEN, NUM_KV_HEADS, HEAD_DIM, device=device),
        "v": empty(BATCH, MAX_KV_LEN, NUM_KV_HEADS, HEAD_DIM, device=device),
    }


def paged(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Valid arguments of decode_paged with a table, q as above."""
    return {
        "q": qkv(device)["q"],
        "k_cache": empty(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, device=device),
        "v_cache": empty(NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, device=device),
        "page_table": empty(BATCH, MAX_PAGES, dtype=torch.int32, device=device),
        "kv_lens": int32([PAGE_SIZE * MAX_PAGES, 7], device),
    }


def lists(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Valid arguments of decode_paged with lists of pages."""
    rest = {name: x for name, x in paged(device).items() if name not in ("page_table", "kv_lens")}
    return rest | {
        "kv_indptr": int32([0, MAX_PAGES, MAX_PAGES + 1], device),
        "kv_indices": int32([0] * (MAX_PAGES + 1), device),
        "kv_last_page_len": int32([PAGE_SIZE, 7], device),
    }


def parts(device: str = "cpu") -> dict[str, torch.Tensor]:
    """What makes rows parts of longer ones, beside the arguments of any of these."""
    return {
        "whole_lens": int32([1000, 1000], device),
        "shard_starts": int32([128, 0], device),
        "levels": empty(BATCH, NUM_QO_HEADS, dtype=torch.float32, device=device),
    }


def int32(values: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def call(operator: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    names = ("q", "k_cache", "v_cache") if "k_cache" in arguments else ("q", "k", "v")
    tensors = [arguments[name] for name in names]
    return operator(*tensors, **{name: x for name, x in arguments.items() if name not in names})


def assert_refused(operator, arguments, error, match: str) -> None:
    with pytest.raises(error) as caught:
        call(operator, arguments)
    assert re.fullmatch(match, str(caught.value), re.DOTALL), f"{caught.value}\ndoes not match\n{match}"
