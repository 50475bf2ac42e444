"""Dense decode attention of others, each behind the same small interface.

    torch SDPA            scaled_dot_product_attention(enable_gqa=True)
    FlashInfer            BatchDecodeWithPagedKVCacheWrapper, tensor cores, pages of 16 keys in its NHD layout, in order
    FlashInfer fp8        the same with K and V in float8_e4m3fn
    FlashInfer XQA        flashinfer.xqa of 0.6.6, pages of 64 keys in its HND layout, in order
    FlashInfer XQA fp8    the same with K and V in float8_e4m3fn; on sm_90 q and the probabilities are rounded to it too
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
XQA_PAGE_SIZE = 64


class Unsupported(Exception):
    """A competitor cannot run a problem; the message says why."""


def as_nhd(x: Tensor, layout: str) -> Tensor:
    return x if layout == "NHD" else x.transpose(1, 2)


class Competitor:
    """`calls(problem)` gives one call for each set, of output [batch, num_qo_heads, head_dim]."""

    name: str
    storage: torch.dtype | None = None  # of K and V; None: the problem's
    tolerance = ROUNDING
    compiles = False  # a module for each dtype and head_dim, at run time

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


def to_pages(x: Tensor, layout: str, row_lens: list[int], page_size: int = PAGE_SIZE) -> Tensor:
    """[pages, page_size, num_kv_heads, head_dim]: the pages of each row, in order; last pages end in zeros."""
    rows = as_nhd(x, layout)
    batch, kv_len = rows.shape[:2]
    if kv_len % page_size == 0 and row_lens == [kv_len] * batch:
        return rows.reshape(-1, page_size, *rows.shape[2:])
    padded = [
        F.pad(row[:length], (0, 0, 0, 0, 0, -length % page_size)) for row, length in zip(rows, row_lens, strict=True)
    ]
    return torch.cat(padded).reshape(-1, page_size, *rows.shape[2:])


def page_table(row_lens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's indptr, indices and last_page_len for `to_pages`, int32 on the CPU."""
    lens = torch.tensor(row_lens)
    pages = (lens + PAGE_SIZE - 1) // PAGE_SIZE
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), pages.cumsum(0)]).int()
    return indptr, torch.arange(int(indptr[-1]), dtype=torch.int32), ((lens - 1) % PAGE_SIZE + 1).int()


def block_table(row_lens: list[int], page_size: int = PAGE_SIZE) -> Tensor:
    """The pages of each row for `to_pages`, int32 [batch, most pages of a row] on the CPU; short rows end in zeros."""
    pages = [-(-length // page_size) for length in row_lens]
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    first = 0
    for row, count in zip(table, pages, strict=True):
        row[:count] = torch.arange(first, first + count, dtype=torch.int32)
        first += count
    return table


class FlashInfer(Competitor):
    name = "FlashInfer"
    compiles = True

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


class FlashInferXqa(Competitor):
    name = "FlashInfer XQA"
    compiles = True

    def __init__(self) -> None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10, 12):
            raise RuntimeError("its kernels are for compute capability 9.x, 10.x and 12.x")
        import flashinfer
        from flashinfer.xqa import xqa

        self.version = flashinfer.__version__
        self.xqa = xqa
        self.workspace: Tensor | None = None
        self.semaphores: Tensor | None = None

    def calls(self, problem: Problem) -> list[Call]:
        if problem.dtype not in (torch.bfloat16, torch.float16):
            raise Unsupported(f"it takes no {problem.dtype}")
        if problem.group_size > 32:
            raise Unsupported("it takes up to 32 query heads for each KV head")
        device = problem.sets[0][0].device
        if self.workspace is None or self.semaphores is None:
            self.workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
            self.semaphores = torch.zeros(2 << 20, dtype=torch.int32, device=device)
        # Calls on one stream share both: a launch waits for the one before it, and its last CTA of a row and head
        # leaves the semaphore at zero. A launch that failed may have left it elsewhere.
        self.semaphores.zero_()
        workspace, semaphores = self.workspace, self.semaphores.view(torch.uint32)
        lens = problem.row_lens
        table = block_table(lens, XQA_PAGE_SIZE).to(device)
        used = torch.tensor(lens, dtype=torch.int32, device=device).unsqueeze(1).view(torch.uint32)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            # It scales logits by head_dim ** -0.5 itself; one beam.
            self.xqa(
                q.unsqueeze(1),
                k,
                v,
                table,
                used,
                out.unsqueeze(1),
                workspace,
                semaphores,
                problem.num_kv_heads,
                XQA_PAGE_SIZE,
                kv_layout="HND",
            )
            return out

        def pages(x: Tensor) -> Tensor:
            stored = to_pages(x, problem.layout, lens, XQA_PAGE_SIZE).to(self.storage or problem.dtype)
            return stored.transpose(1, 2).contiguous()

        sets = [(q, pages(k), pages(v)) for q, k, v in problem.sets]
        return [lambda s=s: call(*s) for s in sets]


class FlashInferXqaFp8(FlashInferXqa):
    name = "FlashInfer XQA fp8"
    storage = torch.float8_e4m3fn
    # With 8-bit queries and probabilities the result of exact arithmetic errs by 5.4% at logits of standard deviation
    # 2. A wrong page, length or scale errs by more than half.
    tolerance = 0.2


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
        table = block_table(lens).cuda()
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
    "xqa": lambda fa3: FlashInferXqa(),
    "xqa-fp8": lambda fa3: FlashInferXqaFp8(),
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
