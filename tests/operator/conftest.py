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
