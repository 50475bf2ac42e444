"""The K stream: a CUDA kernel that reads K with 16-byte loads and does nothing else, for use in a CUDA graph.

Compiled with nvcc at first use; the library is kept in build/bench/, under a name that changes with source and device.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
SOURCES = (FOLDER / "k_stream.cu", FOLDER / "native" / "k_stream.cuh")
UNIT = 16  # bytes of one load


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def build(capability: tuple[int, int], folder: Path) -> Path:
    """The shared library for a compute capability; raises RuntimeError with the compiler's words."""
    major, minor = capability
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:12]
    library = folder / f"k_stream_sm{major}{minor}_{digest}.so"
    if library.exists():
        return library
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found, on PATH or in CUDA_HOME")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    command = [nvcc, "-O3", "-std=c++17", arch, "-shared", "-Xcompiler", "-fPIC", "-o", str(unfinished)]
    result = subprocess.run([*command, str(SOURCES[0])], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc failed: {(result.stderr or result.stdout).strip()[-500:]}")
    unfinished.replace(library)
    return library


def kv_spans(k: Tensor, layout: str, row_lens: list[int]) -> list[tuple[int, int]]:
    """(first byte from the start of k, bytes) of each contiguous piece of the valid part of a contiguous k."""
    lens = torch.as_tensor(row_lens, dtype=torch.int64)
    element = k.element_size()
    if layout == "NHD":
        batch, kv_len, heads, head_dim = k.shape
        pieces = lens * (heads * head_dim * element)
        starts = torch.arange(batch) * (kv_len * heads * head_dim * element)
    else:
        batch, heads, kv_len, head_dim = k.shape
        pieces = (lens * (head_dim * element)).repeat_interleave(heads)
        starts = torch.arange(batch * heads) * (kv_len * head_dim * element)
    return [(start, size) for start, size in zip(starts.tolist(), pieces.tolist(), strict=True) if size]


def descriptors(spans: list[tuple[int, int]], address: int) -> Tensor:
    """`Span` of k_stream.cuh for pieces of memory that starts at `address`: int64 [n, 2] on the CPU."""
    starts, sizes = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return torch.stack([address + starts, (sizes // UNIT).cumsum(0)], dim=1)


class KStream:
    """calls(ks, ...) are callables that read each of the tensors on the current stream, for `harness.time_us`."""

    def __init__(self, folder: Path = FOLDER.parent / "build" / "bench"):
        self.library = ctypes.CDLL(str(build(torch.cuda.get_device_capability(), folder)))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.library.k_stream_read.argtypes = [pointer, size, pointer, pointer]
        self.library.k_stream_read_spans.argtypes = [pointer, ctypes.c_int, size, pointer, pointer]
        self.library.k_stream_error.argtypes, self.library.k_stream_error.restype = [ctypes.c_int], ctypes.c_char_p
        self.sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def _launch(self, function: Callable[..., int], *arguments: int) -> None:
        status = function(*arguments, self.sink.data_ptr(), torch.cuda.current_stream().cuda_stream)
        if status:
            raise RuntimeError(f"K stream: {self.library.k_stream_error(status).decode()}")

    def calls(self, ks: list[Tensor], layout: str, row_lens: list[int] | None = None) -> list[Callable[[], None]]:
        """Reads all of each k, or with row_lens the valid part of each row."""
        if not all(k.is_contiguous() and k.data_ptr() % UNIT == 0 and k.nbytes % UNIT == 0 for k in ks):
            raise ValueError("K stream: k is not contiguous and aligned to 16 bytes")
        if row_lens is None:
            return [lambda k=k: self._launch(self.library.k_stream_read, k.data_ptr(), k.nbytes) for k in ks]
        spans = kv_spans(ks[0], layout, row_lens)
        total = sum(size for _, size in spans)
        tables = [descriptors(spans, k.data_ptr()).to(k.device) for k in ks]
        return [
            lambda table=table: self._launch(self.library.k_stream_read_spans, table.data_ptr(), len(spans), total)
            for table in tables
        ]
