"""Names that stand for integers in operator schemas, and arguments of Python or NumPy as the operators take them."""

from __future__ import annotations

import enum
import numbers
from typing import Any

import torch
from torch import Tensor


class Sampler(enum.IntEnum):
    """How value rows are drawn from the softmax distribution; docs/estimators.md has the estimators."""

    MULTINOMIAL = 0
    STRATIFIED = 1
    SYSTEMATIC = 2
    GROUPED = 3


class Budget(enum.IntEnum):
    """How the draws are shared out along the KV axis.

    STREAMING: tile by tile as the keys stream by, in proportion to the tile's mass against a pilot's estimate of the
    row's. UNIFORM: the same, in proportion to the tile's keys (S2ANTA-Flash). PROPORTIONAL: over the whole row, in
    proportion to probability mass, once all keys are scored (S2ANTA-Prop).
    """

    PROPORTIONAL = 0
    UNIFORM = 1
    STREAMING = 2


class KvLayout(enum.IntEnum):
    """NHD: [batch, max_kv_len, num_kv_heads, head_dim]; HND: [batch, num_kv_heads, max_kv_len, head_dim]."""

    NHD = 0
    HND = 1


class ScoreSampler(enum.IntEnum):
    """How the features of Bernoulli scores are drawn (``score="bernoulli"``); docs/bernoulli.md has the laws.

    INDEPENDENT: each draw and feature by itself. SYSTEMATIC: the draws of a head hang together, which fixes their
    number to within 1. SHARED: independent, with the same random numbers for all heads of a KV head, which read fewer
    distinct features that way. The means are the same.
    """

    INDEPENDENT = 0
    SYSTEMATIC = 1
    SHARED = 2


# Plain dictionaries and integers: torch.compile of torch 2.11 traces little of enum.
_VALUES: dict[type[enum.IntEnum], dict[str, int]] = {}


def register_choices(kind: type[enum.IntEnum]) -> type[enum.IntEnum]:
    """For `choice`. Names are in lower case, layouts as they are."""
    _VALUES[kind] = {(member.name if kind is KvLayout else member.name.lower()): int(member) for member in kind}
    return kind


for _kind in (Sampler, Budget, KvLayout, ScoreSampler):
    register_choices(_kind)


def value_of(name: str, value: Any, kind: type[enum.IntEnum]) -> int:
    """The integer of an enum member given as the member, its integer or its name."""
    values = _VALUES[kind]
    if isinstance(value, kind):
        return value.value
    if isinstance(value, str):
        if value in values:
            return values[value]
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if 0 <= value < len(values):
            return int(value)
    else:
        raise TypeError(
            f"santa: {name} is a {type(value).__name__}; it needs to be a santa.{kind.__name__}, an int or a str"
        )
    names = ", ".join(repr(known) for known in values)
    raise ValueError(f"santa: {name} is {value!r}; it needs to be one of {names} (or 0 to {len(values) - 1})")


def check_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    if not (isinstance(value, Tensor) or (optional and value is None)):
        needed = "a torch.Tensor or None" if optional else "a torch.Tensor"
        raise TypeError(f"santa: {name} is a {type(value).__name__}; it needs to be {needed}")


def int64(name: str, value: Any) -> int:
    """An integer argument, of Python or of NumPy, as the operators take it."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"santa: {name} is a {type(value).__name__}; it needs to be an int")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"santa: {name} is {value}; it needs to be in [-2^63, 2^63)")
    return value if isinstance(value, int) else int(value)


def real(name: str, value: Any, *, optional: bool = False) -> float | None:
    """A floating-point argument, of Python or of NumPy, as the operators take it."""
    if isinstance(value, (float, int, torch.SymFloat)) or (optional and value is None):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    needed = "a float or None" if optional else "a float"
    raise TypeError(f"santa: {name} is a {type(value).__name__}; it needs to be {needed}")


def check_same_device(q: Tensor, whose: str = "q", /, **others: Tensor | None) -> None:
    """One meta tensor is enough for the fakes to be called, so they must not let the others pass for it."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"santa: {name} is on {tensor.device}; it needs to be on {whose}'s device, {q.device}")
