"""Fixtures of all tests. Tests that take `device` run on the CPU, unless they are marked `cuda`, and, marked `gpu`, on
CUDA. Those marked `emulate` also run with the CUDA kernels on the host (helpers/emulator.py); with --emulate all of
them do, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Before anything imports them: their asserts report values as those of a test do.
pytest.register_assert_rewrite("helpers")

from helpers import emulator  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", action="store_true", help="CUDA tests that take `device`, on the host; many are slow")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The devices of a test that takes `device` and does not name them itself."""
    named = any("device" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "device" not in metafunc.fixturenames or named:
        return

    def is_marked(name: str) -> bool:
        return metafunc.definition.get_closest_marker(name) is not None

    devices: list[Any] = [pytest.param("cuda", marks=pytest.mark.gpu)]
    if not is_marked("cuda"):
        devices.insert(0, "cpu")
    if metafunc.config.option.emulate:
        devices = ["emulated"]
    elif is_marked("emulate"):
        devices.append("emulated")
    metafunc.parametrize("device", devices, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run where `-m` names them; GPU tests skip where there is none, with the reason in the report."""
    if "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]
    if config.option.emulate:
        config.hook.pytest_deselected(items=[item for item in items if not _is_emulated(item)])
        items[:] = [item for item in items if _is_emulated(item)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _is_emulated(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("device") == "emulated"


class EmulatedCuda(str):
    """A device that is CUDA to a test and where torch puts tensors on the CPU."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "emulated":
        yield request.param
        return
    library = emulator.build()
    if isinstance(library, str):
        pytest.skip(f"emulator: {library}")
    with emulator.device(library):
        yield EmulatedCuda("cpu")
