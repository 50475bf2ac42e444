"""The CUDA kernels of csrc/cuda/decode on the host: tests/emulator, compiled and called.

Needs g++ and the headers of the CUDA toolkit (cuda_runtime.h, cuda_fp16.h, cuda_bf16.h), no nvcc and no GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import santa
from santa.arguments import Budget, KvLayout, Sampler

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "emulator"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 3}  # santa::Dtype
POINTERS = ("q", "k", "v", "kv_lens", "kv_starts", "page_table", "row_seeds", "out", "lse", "rows_read")
PROPOSAL = ("codes", "scales", "center", "channel_scale")
SIZES = ("batch", "q_len", "num_kv_heads", "head_group", "head_dim", "cache_kv_len", "page_size")
SETTINGS = ("sampler", "budget", "num_samples", "min_sampled_len", "seed", "window_left")


class Call(ctypes.Structure):
    """`Call` of tests/emulator/decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_int64 * 3) for name in ("k_strides", "v_strides")),
        *((name, ctypes.c_int64) for name in ("dtype", "k_dtype", "v_dtype")),
        *((name, ctypes.c_int64) for name in SETTINGS),
        ("logits_soft_cap", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("num_sms", "sm_bytes", "order")),
        *((name, ctypes.c_void_p) for name in PROPOSAL),
        *((name, ctypes.c_int64 * 3) for name in ("codes_strides", "scales_strides")),
        *((name, ctypes.c_int64) for name in ("shared_statistics", "scales_side_by_side")),
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


def build() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    headers, compiler = cuda_headers(), os.environ.get("CXX") or shutil.which("g++")
    if headers is None or compiler is None:
        return "needs the CUDA toolkit's headers" if compiler else "needs g++"
    sources = sorted(p for folder in (FOLDER, ROOT / "csrc") for p in folder.rglob("*.*") if p.suffix != ".pyc")
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    library = ROOT / "build" / "emulator" / f"decode_{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        options = ["-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared"]
        include = [f"-I{FOLDER}", f"-I{ROOT / 'csrc'}", f"-I{headers}"]
        command = [compiler, *options, *include, str(FOLDER / "decode.cpp"), "-o", str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the emulator does not compile: {result.stderr[:3000]}")
        unfinished.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_decode.restype = ctypes.c_char_p
    return loaded


def decode(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    proposal: santa.ProposalKeys | None = None,
    num_samples: int = 0,
    min_sampled_len: int = 0,
    sampler: str = "grouped",
    budget: str = "streaming",
    kv_layout: str = "NHD",
    seed: int = 0,
    row_seeds: Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    num_sms: int = 3,
    sm_kb: int = 228,
    order: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`santa.decode`, or with a page_table `santa.decode_paged`, on a device of so many multiprocessors.

    Args:
        order: threads run in steps of it, which has no factor in common with their number.
    """
    token, head = (1, 2) if KvLayout[kv_layout] == KvLayout.NHD else (2, 1)
    queries = q if q.dim() == 4 else q[:, None]
    batch, q_len, num_qo_heads, head_dim = queries.shape
    num_kv_heads = k.shape[head]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    rows_read = torch.full((batch, num_kv_heads), -7, dtype=torch.int32)
    page_size = 0 if page_table is None else k.shape[token]
    tensors: dict[str, Tensor | None] = dict(zip(POINTERS, (q, k, v, kv_lens, kv_starts, page_table), strict=False))
    tensors |= {"row_seeds": row_seeds, "out": out, "lse": lse, "rows_read": rows_read}
    call = Call(**{name: None if x is None else x.data_ptr() for name, x in tensors.items()})
    sizes: dict[str, Any] = dict(batch=batch, q_len=q_len, num_kv_heads=num_kv_heads, head_dim=head_dim)
    sizes |= {"head_group": num_qo_heads // num_kv_heads, "page_size": page_size}
    sizes["cache_kv_len"] = k.shape[token] if page_table is None else page_table.shape[1] * page_size
    settings: dict[str, Any] = dict(sampler=Sampler[sampler.upper()], budget=Budget[budget.upper()], seed=seed)
    settings |= {"num_samples": num_samples, "min_sampled_len": min_sampled_len, "window_left": window_left}
    settings |= {"logits_soft_cap": logits_soft_cap, "num_sms": num_sms, "sm_bytes": sm_kb * 1024, "order": order}
    settings |= {"dtype": DTYPES[q.dtype], "k_dtype": DTYPES[k.dtype], "v_dtype": DTYPES[v.dtype]}
    for name, value in (sizes | settings).items():
        setattr(call, name, value)
    for name, x in (("k_strides", k), ("v_strides", v)):
        setattr(call, name, (ctypes.c_int64 * 3)(x.stride(0), x.stride(token), x.stride(head)))
    if proposal is not None:
        codes, scales = proposal.codes, proposal.scales
        for name, x in proposal.tensors().items():
            setattr(call, name, x.data_ptr())
        for name, x in (("codes_strides", codes), ("scales_strides", scales)):
            setattr(call, name, (ctypes.c_int64 * 3)(x.stride(0), x.stride(token), x.stride(head)))
        call.shared_statistics = int(proposal.center.shape[0] == 1)
        aligned = all(x % 8 == 0 for x in (scales.stride(0), scales.stride(head))) and scales.data_ptr() % 16 == 0
        call.scales_side_by_side = int(scales.stride(token) == 1 and aligned and page_size % 8 == 0)
    if error := library.emulate_decode(ctypes.byref(call)):
        raise RuntimeError(error.decode())
    return out, lse, rows_read
