"""The CUDA backend on the host: tests/emulator, compiled, and santa's operators led to it.

Needs g++ and the headers of the CUDA toolkit (cuda_runtime.h, cuda_fp16.h, cuda_bf16.h), no nvcc and no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "emulator"
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++20", "-O2", "-w", "-fPIC", "-DTORCH_TARGET_VERSION=0x020A000000000000"),
    "-fno-strict-aliasing",  # kernels read memory as what it is not, which nvcc allows
    "-ffp-contract=off",  # as the CPU backend, whose results are to be the same
    "-U_FORTIFY_SOURCE",  # which forbids longjmp from one stack to another
]


def cuda_headers() -> Path | None:
    def candidates() -> Iterator[Path]:
        if "CUDA_HOME" in os.environ:
            yield Path(os.environ["CUDA_HOME"]) / "include"
        if nvcc := shutil.which("nvcc"):
            yield Path(nvcc).resolve().parents[1] / "include"
        yield Path("/usr/local/cuda/include")
        yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))

    needed = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
    return next((path for path in candidates() if all((path / name).exists() for name in needed)), None)


@functools.cache
def build() -> Path | str:
    """The library, or why there is none."""
    headers, compiler = cuda_headers(), os.environ.get("CXX") or shutil.which("g++")
    if headers is None or compiler is None:
        return "needs the CUDA toolkit's headers" if compiler else "needs g++"
    options = [*FLAGS, *(f"-I{folder}" for folder in (FOLDER, ROOT / "csrc", headers, TORCH / "include"))]
    sources = [path for folder in (FOLDER, ROOT / "csrc") for path in sorted(folder.rglob("*.[ch]*")) if path.is_file()]
    contents = [path.read_bytes() for path in sources]
    digest = hashlib.sha256(b"\0".join([repr((torch.__version__, options)).encode(), *contents])).hexdigest()[:16]
    library = ROOT / "build" / "emulator" / f"santa_emulator_{digest}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes run tests too
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                _compile(compiler, options, Path(folder) / library.name).replace(library)
    return library


def _compile(compiler: str, options: list[str], made: Path) -> Path:
    def run(*arguments: Any) -> None:
        result = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the emulator does not compile: {result.stderr[:3000]}")

    def compile_object(source: Path) -> Path:
        made_object = made.with_name(source.stem + ".o")
        run(*options, "-c", source, "-o", made_object)
        return made_object

    sources = sorted(FOLDER.glob("*.cpp"), key=lambda path: path.stem not in ("decode", "proposal"))  # these take long
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_object, sources))
    run("-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", made)
    return made


class _ToEmulator(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "santa":
            func = getattr(torch.ops.santa_emulator, func._opname).default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def device(library: Path, *, num_sms: int = 3, sm_kb: int = 228, order: int = 1) -> Iterator[None]:
    """In the block, santa's operators on CPU tensors run the CUDA kernels, on a device of so many multiprocessors. What
    they allocate is NaN at first.

    Args:
        order: threads run in steps of it, which has no factor in common with their number.
    """
    torch.ops.load_library(library)
    ctypes.CDLL(str(library)).set_device(num_sms, sm_kb * 1024, order)
    were = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills what is allocated
    try:
        with _ToEmulator():
            yield
    finally:
        torch.use_deterministic_algorithms(were)


def num_launches(library: Path) -> int:
    """How many kernels have run."""
    function = ctypes.CDLL(str(library)).num_launches
    function.restype = ctypes.c_int64
    return function()
