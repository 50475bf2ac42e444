"""Valid arguments of the operator, and the check that a changed one is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import santa

BATCH, NUM_QO_HEADS, NUM_KV_HEADS, MAX_KV_LEN, HEAD_DIM = 2, 4, 2, 300, 64
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


def call(operator: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    tensors = [arguments[name] for name in ("q", "k", "v")]
    return operator(*tensors, **{name: x for name, x in arguments.items() if name not in ("q", "k", "v")})


def assert_refused(operator, arguments, error, match: str) -> None:
    with pytest.raises(error) as caught:
        call(operator, arguments)
    assert re.fullmatch(match, str(caught.value), re.DOTALL), f"{caught.value}\ndoes not match\n{match}"
