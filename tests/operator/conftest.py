"""Fixtures of the tests of the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.errors import OPERATORS
from helpers.float8 import KINDS


@pytest.fixture(params=OPERATORS)
def operator(request) -> Callable[..., Any]:
    """santa.decode and torch.ops.santa.decode, with and without rows_read."""
    return OPERATORS[request.param]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """What is in float8: K alone, or K and V."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Until there are CUDA kernels for proposal keys."""
    skip = pytest.mark.skip(reason="proposal keys are not on CUDA yet")
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        ours = item.path.name.startswith("test_proposal") or parameters.get("operator") == "decode_proposal"
        if ours and parameters.get("device") == "cuda":
            item.add_marker(skip)
