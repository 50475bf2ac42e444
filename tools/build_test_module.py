"""Builds build/test_module/santa_core_test*.so: Python bindings of csrc/core, for the tests alone.

    python tools/build_test_module.py

or, in a test, `build()` returns the module. A second build of unchanged sources does nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent


def build(verbose: bool = False) -> ModuleType:
    # An environment that is used without being activated has its ninja beside Python, not on PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    folder = ROOT / "build" / "test_module"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        name="santa_core_test",
        sources=[str(ROOT / "tests" / "core" / "core_bindings.cpp")],
        extra_include_paths=[str(ROOT / "csrc")],
        # Contraction is off, as in the libraries: the tests compare results bit for bit.
        extra_cflags=["-O2", "-std=c++17", "-ffp-contract=off"],
        build_directory=str(folder),
        verbose=verbose,
    )


if __name__ == "__main__":
    print(build(verbose=True).__file__)
