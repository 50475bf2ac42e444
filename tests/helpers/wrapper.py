"""FlashInfer's interface of paged decode, and rows in pages that go through it, with what should come out.

Caches are those of helpers/paged.py: NaN wherever no row has a key, and page ids that no cache has behind the last row.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

import santa
from helpers.inputs import make_qkv, working_dtype
from helpers.paged import PagedCache
from helpers.statistics import relative_rms
from santa import reference

LENS = [1100, 0, 129, 700]
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 64, 16
LOG2_E = 1 / math.log(2)
FLOAT8 = torch.float8_e4m3fn


class Problem:
    """Rows in pages, and the arguments that FlashInfer's interface takes them by."""

    def __init__(
        self,
        device: str,
        *,
        dtype: torch.dtype | None = None,
        float8: bool = False,
        lens: list[int] | None = None,
        heads: int = HEADS,
        kv_heads: int = KV_HEADS,
        head_dim: int = HEAD_DIM,
        page_size: int = PAGE_SIZE,
        layout: str = "NHD",
        storage: str = "separate",
        q_len: int = 1,
        seed: int = 0,
    ):
        self.dtype = working_dtype(device) if dtype is None else dtype
        self.lens = LENS if lens is None else lens
        self.sizes = (heads, kv_heads, head_dim, page_size)
        shape = (len(self.lens), heads, kv_heads, max(self.lens), head_dim)
        q, self.k, self.v = make_qkv(*shape, dtype=self.dtype, device=device, logit_std=2.0, seed=seed)
        if float8:
            self.k, self.v = self.k.to(FLOAT8), self.v.to(FLOAT8)
        self.q_len = q_len
        self.q = q
        if q_len > 1:
            factors = torch.linspace(1.0, 0.5, q_len, device=device).repeat(len(self.lens)).view(-1, 1, 1)
            self.q = (q.repeat_interleave(q_len, 0) * factors).to(self.dtype)
        self.cache = PagedCache(
            self.k, self.v, page_size, lens=self.lens, layout=layout, storage=storage, seed=seed
        ).arguments("csr")
        self.kv = (self.cache["k_cache"], self.cache["v_cache"])
        self.pages = tuple(self.cache[name] for name in ("kv_indptr", "kv_indices", "kv_last_page_len"))
        self.kv_lens = torch.tensor(self.lens, dtype=torch.int32, device=device)

    def workspace(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.q.device)

    def wrapper(self, **arguments: Any) -> santa.BatchDecodeWithPagedKVCacheWrapper:
        return santa.BatchDecodeWithPagedKVCacheWrapper(self.workspace(), self.cache["kv_layout"], **arguments)

    def plan(self, made: Any, **arguments: Any) -> Any:
        """Plans; returns the wrapper."""
        dtypes = {"q_data_type": self.dtype, "kv_data_type": self.k.dtype}
        made.plan(*self.pages, *self.sizes, **dtypes | arguments)
        return made

    def planned(self, **arguments: Any) -> santa.BatchDecodeWithPagedKVCacheWrapper:
        return self.plan(self.wrapper(), **arguments)

    def decode_paged(self, **options: Any) -> tuple[Tensor, Tensor]:
        """What the wrapper has to return: lse to base 2."""
        q = self.q if self.q_len == 1 else self.q.unflatten(0, (-1, self.q_len))
        out, lse = santa.decode_paged(q, **self.cache, **options)
        return out.reshape(*self.q.shape[:-1], -1), lse.reshape(self.q.shape[:-1]) * LOG2_E

    def oracle(self, **options: Any) -> tuple[Tensor, Tensor]:
        q = self.q if self.q_len == 1 else self.q.unflatten(0, (-1, self.q_len))
        out, lse = reference.exact(*(x.cpu() for x in (q, self.k, self.v)), kv_lens=self.kv_lens.cpu(), **options)
        return out.reshape(*self.q.shape[:-1], -1), lse.reshape(self.q.shape[:-1]) * LOG2_E


def assert_exact(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Against float64: out rounded once, lse of float32."""
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert relative_rms(actual[0], expected[0]) < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    torch.testing.assert_close(actual[1].double().cpu(), expected[1], rtol=1e-5, atol=2e-5)


def graph_buffers(problem: Problem, *, room: int = 200) -> dict[str, Any]:
    """The arguments of __init__; what is in the buffers is no page and no length."""
    batch = len(problem.lens)

    def buffer(size: int) -> Tensor:
        return torch.full((size,), 2147480000, dtype=torch.int32, device=problem.q.device)

    return {
        "use_cuda_graph": True,
        "paged_kv_indptr_buffer": buffer(batch + 1),
        "paged_kv_indices_buffer": buffer(room),
        "paged_kv_last_page_len_buffer": buffer(batch),
    }


NEEDED = inspect.Parameter.empty
# Names, order and defaults of FlashInfer 0.6.6, without self.
INTERFACE = {
    "__init__": {
        "float_workspace_buffer": NEEDED,
        "kv_layout": "NHD",
        "use_cuda_graph": False,
        "use_tensor_cores": False,
        "paged_kv_indptr_buffer": None,
        "paged_kv_indices_buffer": None,
        "paged_kv_last_page_len_buffer": None,
        "backend": "auto",
        "jit_args": None,
    },
    "reset_workspace_buffer": {"float_workspace_buffer": NEEDED, "int_workspace_buffer": NEEDED},
    "plan": {
        "indptr": NEEDED,
        "indices": NEEDED,
        "last_page_len": NEEDED,
        "num_qo_heads": NEEDED,
        "num_kv_heads": NEEDED,
        "head_dim": NEEDED,
        "page_size": NEEDED,
        "pos_encoding_mode": "NONE",
        "window_left": -1,
        "logits_soft_cap": None,
        "q_data_type": "float16",
        "kv_data_type": None,
        "o_data_type": None,
        "data_type": None,
        "sm_scale": None,
        "rope_scale": None,
        "rope_theta": None,
        "non_blocking": True,
        "block_tables": None,
        "seq_lens": None,
        "fixed_split_size": None,
        "disable_split_kv": False,
    },
    "run": {
        "q": NEEDED,
        "paged_kv_cache": NEEDED,
        "args": NEEDED,
        "q_scale": None,
        "k_scale": None,
        "v_scale": None,
        "out": None,
        "lse": None,
        "return_lse": False,
        "enable_pdl": None,
        "window_left": None,
        "sinks": None,
        "q_len_per_req": 1,
        "skip_softmax_threshold_scale_factor": None,
    },
    "forward": {
        "q": NEEDED,
        "paged_kv_cache": NEEDED,
        "pos_encoding_mode": "NONE",
        "q_scale": None,
        "k_scale": None,
        "v_scale": None,
        "window_left": -1,
        "logits_soft_cap": None,
        "sm_scale": None,
        "rope_scale": None,
        "rope_theta": None,
    },
    "end_forward": {},
}
INTERFACE["begin_forward"] = INTERFACE["plan"]


def parameters(cls: type, method: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
