"""Dense decode attention of others, each behind the same small interface.

    torch SDPA            scaled_dot_product_attention(enable_gqa=True)
    FlashInfer            BatchDecodeWithPagedKVCacheWrapper, tensor cores, pages of 16 keys in its NHD layout, in order
    FlashInfer fp8        the same with K and V in float8_e4m3fn
    FlashAttention-3      torch.ops._vllm_fa3_C.fwd of vLLM 0.20.2, pages of 16 keys, automatic number of splits

What depends on lengths alone (FlashInfer's plan, FlashAttention's scheduler metadata) is prepared outside the timing,
as a serving system does once for all layers. Copies into pages are made before the timing as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import ROUNDING, Problem
from torch import Tensor

Call = Callable[[], Tensor]
PAGE_SIZE = 16


class Unsupported(Exception):
    """A competitor cannot run a problem; the message says why."""


def as_nhd(x: Tensor, layout: str) -> Tensor:
    return x if layout == "NHD" else x.transpose(1, 2)


class Competitor:
    """`calls(problem)` gives one call for each set, of output [batch, num_qo_heads, head_dim]."""

    name: str
    storage: torch.dtype | None = None  # of K and V; None: the problem's
    tolerance = ROUNDING

    def calls(self, problem: Problem) -> list[Call]:
        raise NotImplementedError


class Sdpa(Competitor):
    name = "torch SDPA"

    def calls(self, problem: Problem) -> list[Call]:
        if problem.kv_lens is not None:
            raise Unsupported("it takes no lengths")

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x if problem.layout == "HND" else x.transpose(1, 2) for x in (k, v))
            return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

        return [lambda s=s: call(*s) for s in problem.sets]


def to_pages(x: Tensor, layout: str, row_lens: list[int]) -> Tensor:
    """[pages, PAGE_SIZE, num_kv_heads, head_dim]: the pages of each row, in order; last pages end in zeros."""
    rows = as_nhd(x, layout)
    batch, kv_len = rows.shape[:2]
    if kv_len % PAGE_SIZE == 0 and row_lens == [kv_len] * batch:
        return rows.reshape(-1, PAGE_SIZE, *rows.shape[2:])
    padded = [
        F.pad(row[:length], (0, 0, 0, 0, 0, -length % PAGE_SIZE)) for row, length in zip(rows, row_lens, strict=True)
    ]
    return torch.cat(padded).reshape(-1, PAGE_SIZE, *rows.shape[2:])


def page_table(row_lens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's indptr, indices and last_page_len for `to_pages`, int32 on the CPU."""
    lens = torch.tensor(row_lens)
    pages = (lens + PAGE_SIZE - 1) // PAGE_SIZE
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), pages.cumsum(0)]).int()
    return indptr, torch.arange(int(indptr[-1]), dtype=torch.int32), ((lens - 1) % PAGE_SIZE + 1).int()


class FlashInfer(Competitor):
    name = "FlashInfer"

    def __init__(self) -> None:
        import flashinfer

        self.version = flashinfer.__version__
        self.flashinfer = flashinfer
        self.workspace: Tensor | None = None

    def calls(self, problem: Problem) -> list[Call]:
        if self.workspace is None:
            self.workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", use_tensor_cores=True)
        lens = problem.row_lens
        indptr, indices, last_page_len = page_table(lens)
        storage = self.storage or problem.dtype
        wrapper.plan(
            indptr,
            indices.cuda(),
            last_page_len,
            problem.num_qo_heads,
            problem.num_kv_heads,
            problem.head_dim,
            PAGE_SIZE,
            q_data_type=problem.dtype,
            kv_data_type=storage,
        )
        sets = [(q, *(to_pages(x, problem.layout, lens).to(storage) for x in kv)) for q, *kv in problem.sets]
        return [lambda q=q, k=k, v=v: wrapper.run(q, (k, v)) for q, k, v in sets]


class FlashInferFp8(FlashInfer):
    name = "FlashInfer fp8"
    storage = torch.float8_e4m3fn


def call_with_nones(op: torch._ops.OpOverload, **given: object) -> object:
    """Call an operator whose optional arguments have no defaults; those not given are None."""
    return op(**{**dict.fromkeys(argument.name for argument in op._schema.arguments), **given})


class FlashAttention3(Competitor):
    name = "FlashAttention-3"

    def __init__(self, folder: Path | None) -> None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            raise RuntimeError("its kernels are for compute capability 9.x")
        if folder is None:
            import vllm.vllm_flash_attn  # noqa: F401 - registers torch.ops._vllm_fa3_C
        else:
            library = Path(folder) / "_vllm_fa3_C.abi3.so"
            if not library.is_file():
                raise RuntimeError(f"{library} does not exist")
            torch.ops.load_library(str(library))
        # An AttributeError if vLLM imports without the library.
        self.fwd = torch.ops._vllm_fa3_C.fwd.default
        self.scheduler_metadata = torch.ops._vllm_fa3_C.get_scheduler_metadata.default

    def calls(self, problem: Problem) -> list[Call]:
        if problem.dtype not in (torch.bfloat16, torch.float16):
            raise Unsupported(f"it takes no {problem.dtype}")
        # As vLLM calls it: variable lengths, pages, unmasked, the numbers of splits left to its heuristic.
        lens = problem.row_lens
        pages = [-(-length // PAGE_SIZE) for length in lens]
        first = 0
        table = torch.zeros(problem.batch, max(pages), dtype=torch.int32, device="cuda")
        for row, count in enumerate(pages):
            table[row, :count] = torch.arange(first, first + count, dtype=torch.int32)
            first += count
        queries = torch.arange(problem.batch + 1, dtype=torch.int32, device="cuda")
        used = torch.tensor(lens, dtype=torch.int32, device="cuda")
        common = {"is_causal": False, "window_size_left": -1, "window_size_right": -1, "num_splits": 0, "sm_margin": 0}
        metadata = call_with_nones(
            self.scheduler_metadata,
            **common,
            batch_size=problem.batch,
            max_seqlen_q=1,
            max_seqlen_k=max(lens),
            max_seqlen_k_new=0,
            num_heads=problem.num_qo_heads,
            num_heads_k=problem.num_kv_heads,
            headdim=problem.head_dim,
            headdim_v=problem.head_dim,
            qkv_dtype=problem.dtype,
            seqused_k=used,
            cu_seqlens_q=queries,
            page_size=PAGE_SIZE,
            has_softcap=False,
        )

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = call_with_nones(
                self.fwd,
                **common,
                q=q,
                k=k,
                v=v,
                cu_seqlens_q=queries,
                seqused_k=used,
                max_seqlen_q=1,
                max_seqlen_k=max(lens),
                page_table=table,
                softmax_scale=problem.head_dim**-0.5,
                softcap=0.0,
                is_rotary_interleaved=True,
                scheduler_metadata=metadata,
                cp_world_size=1,
                cp_rank=0,
            )
            return outputs[0]

        sets = [(q, *(to_pages(x, problem.layout, lens) for x in kv)) for q, *kv in problem.sets]
        return [lambda s=s: call(*s) for s in sets]


FACTORIES: dict[str, Callable[[Path | None], Competitor]] = {
    "sdpa": lambda fa3: Sdpa(),
    "flashinfer": lambda fa3: FlashInfer(),
    "flashinfer-fp8": lambda fa3: FlashInferFp8(),
    "fa3": FlashAttention3,
}


def load(names: list[str], fa3: Path | None) -> tuple[list[Competitor], dict[str, str]]:
    """The competitors that load, and for each of the others its reason."""
    loaded, missing = [], {}
    for name in names:
        try:
            loaded.append(FACTORIES[name](fa3))
        except Exception as error:  # anything that a foreign package may raise at import
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} is left out: {missing[name]}", file=sys.stderr)
    return loaded, missing
