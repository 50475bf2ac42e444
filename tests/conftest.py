"""Fixtures of all tests. Tests that take `device` run on the CPU and, marked `gpu`, on CUDA."""

from __future__ import annotations

import pytest
import torch

# Before anything imports them: their asserts report values as those of a test do.
pytest.register_assert_rewrite("helpers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run where `-m` names them; GPU tests skip where there is none, with the reason in the report."""
    if "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
