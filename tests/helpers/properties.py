"""Property-based tests without chance."""

from __future__ import annotations

from hypothesis import given, settings


def for_all(*strategies):
    """200 examples, the same in every run."""
    return lambda test: settings(max_examples=200, deadline=None, derandomize=True)(given(*strategies)(test))
