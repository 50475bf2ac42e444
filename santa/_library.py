"""Loads the two shared libraries and records what became of each.

``_ops.so`` holds the operator schemas and the CPU kernels, ``_ops_cuda.so`` the CUDA kernels. Both are plain
libraries on the LibTorch stable ABI: loading them registers the operators.
"""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_PACKAGE_DIR = Path(__file__).resolve().parent
_OLDEST_TORCH = "2.10"


@dataclass(frozen=True)
class LibraryStatus:
    """What was loaded. ``cuda_reason`` says why there are no CUDA kernels; it is empty if there are."""

    cpu_path: Path
    cuda_path: Path
    cuda_loaded: bool
    cuda_reason: str
    build_info: dict[str, Any] = field(default_factory=dict)

    def covers(self, capability: tuple[int, int]) -> bool:
        """Whether the compiled architectures include code for a GPU of this compute capability.

        Machine code runs on the same major version from its minor version on; PTX on every later GPU; code of
        an architecture-specific target ("sm_90a") on exactly that one.
        """
        major, minor = capability
        for code in self.build_info.get("cuda_archs", []):
            kind, name = code.split("_")
            digits = name.rstrip("a")
            built = (int(digits[:-1]), int(digits[-1]))
            if name.endswith("a"):
                covered = built == capability
            elif kind == "compute":
                covered = built <= capability
            else:
                covered = built[0] == major and built[1] <= minor
            if covered:
                return True
        return False


@functools.cache
def load() -> LibraryStatus:
    """Load what this torch can use, once per process.

    Raises:
        ImportError: the CPU library is missing or does not load, or another copy of santa is in the process.

    A CUDA library that is there but does not load gives a RuntimeWarning with the reason; CPU tensors still
    work.
    """
    cpu_path, cuda_path = _PACKAGE_DIR / "_ops.so", _PACKAGE_DIR / "_ops_cuda.so"
    if not cpu_path.exists():
        raise ImportError(
            f"santa's library {cpu_path} is missing. In a source tree, build it with "
            "`pip install -e . --no-build-isolation`; otherwise leave the source tree or reinstall santa."
        )
    # Registering the operators twice aborts the process, so look before loading.
    if torch._C._dispatch_has_kernel("santa::decode") and str(cpu_path) not in torch.ops.loaded_libraries:
        raise ImportError(
            "the operators of another copy of santa are already registered in this process; "
            f"cannot load {cpu_path} as well. Import only one copy."
        )
    try:
        torch.ops.load_library(cpu_path)
    except OSError as error:
        raise ImportError(
            f"cannot load {cpu_path}: {error}. It needs torch >= {_OLDEST_TORCH}; this is {torch.__version__}."
        ) from error

    reason = _load_cuda(cuda_path)
    info_path = _PACKAGE_DIR / "build_info.json"
    build_info = json.loads(info_path.read_text()) if info_path.exists() else {}
    return LibraryStatus(cpu_path, cuda_path, not reason, reason, build_info)


def _load_cuda(path: Path) -> str:
    """Load the CUDA library; return why not, or an empty string."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    if not path.exists():
        return "santa was built without CUDA: reinstall it from source with nvcc on PATH and SANTA_CUDA=1"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path.name} does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"santa has no CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return ""
