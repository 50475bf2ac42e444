"""Fixtures of the tests of the Transformers integration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import santa


@pytest.fixture
def decode_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every `santa.decode` call, tensors copied, and `q_shape`. For eager models."""
    calls: list[dict[str, Any]] = []
    decode = santa.decode

    def spy(*args: Any, **kwargs: Any) -> Any:
        copied = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        calls.append(copied | {"q_shape": tuple(args[0].shape)})
        return decode(*args, **kwargs)

    monkeypatch.setattr(santa, "decode", spy)
    return calls
