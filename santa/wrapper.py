"""Decode over a paged cache behind the interface of FlashInfer's wrapper: plan once for a step, run in every layer."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from santa.arguments import Budget, KvLayout, Sampler, check_tensor, int64, real, value_of
from santa.ops import decode_paged

_LOG2_E = 1 / math.log(2)
_BACKENDS = ("auto", "fa2", "fa3", "trtllm-gen")
_FLOAT8 = torch.float8_e4m3fn

PagedKvCache = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Plan:
    """What `plan` leaves for `run`."""

    kv_indptr: Tensor
    kv_indices: Tensor
    kv_last_page_len: Tensor
    max_kv_len: int | None  # None: all that kv_indices has room for
    batch: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    window_left: int
    logits_soft_cap: float | None
    sm_scale: float | None
    options: dict[str, Any]  # how values are sampled


class BatchDecodeWithPagedKVCacheWrapper:
    """FlashInfer's class of this name with `santa.decode_paged` in it: the arguments of version 0.6.6, in their order
    and with their defaults, and keyword arguments for sampling.

    **Results are estimates by default**, as those of `santa.decode`: ``num_samples`` is 256, and rows of at least
    `default_min_sampled_len` keys are sampled. ``plan(..., num_samples=0)`` is exact attention.

    ``lse`` is the logarithm **to base 2**, as FlashInfer returns it. Everything else in this package has natural
    logarithms: ``ln(2) * lse`` is what `santa.merge_state` takes.

    What only makes FlashInfer faster or repeatable is accepted and changes no result: use_tensor_cores, backend,
    enable_pdl, disable_split_kv, and non_blocking, which is obeyed. Workspaces may have any size: the operator takes
    its memory from torch, and all that counts is the device of float_workspace_buffer. Whatever would change results
    and is not there raises an error that names it.

    Args:
        float_workspace_buffer: a tensor on the device that all others are on or go to.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: keep the pages in the three buffers below, which `plan` writes. `run` can then be captured, and
            a replay computes what the last plan says of lengths and pages. The other arguments of plan, and those of
            run that are no tensors (``seed`` is one), are captured as they were; ``row_seeds`` and ``positions`` can
            be written in place.
        paged_kv_indptr_buffer: int32 [batch + 1]. Only with use_cuda_graph, as the next two.
        paged_kv_indices_buffer: int32 [pages of all rows, at most].
        paged_kv_last_page_len_buffer: int32 [batch], which fixes the batch.
        jit_args: None; nothing is compiled at run time.
        max_kv_len: bound of the keys of a row, which memory and launches are sized for; it changes no result, and a
            plan with a longer row raises. None: the longest row of each plan. With use_cuda_graph the bound has to hold
            for later plans too, so None is all that paged_kv_indices_buffer has room for, as if one row had every page.
            Each row of the batch takes memory for so many keys: give the longest row that there will be.

    Raises:
        ValueError, TypeError: as in `santa.decode_paged`.

    A step of a model, exact in rows of less than 8,192 keys::

        wrapper = santa.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(indptr, indices, last_page_len, 32, 8, 128, page_size=16, q_data_type=torch.bfloat16)
        for layer in range(num_layers):
            out = wrapper.run(q[layer], kv_cache[layer], seed=layer)
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        *,
        max_kv_len: int | None = None,
    ) -> None:
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        if backend not in _BACKENDS:
            raise ValueError(f"santa: backend is {backend!r}; it needs to be one of {', '.join(map(repr, _BACKENDS))}")
        _refuse("jit_args", jit_args, "None: santa compiles nothing at run time")
        self.device = float_workspace_buffer.device
        self._kv_layout = KvLayout(value_of("kv_layout", kv_layout, KvLayout))
        self._use_cuda_graph = use_cuda_graph
        self._use_tensor_cores = use_tensor_cores or backend == "trtllm-gen"
        self._max_kv_len = None if max_kv_len is None else int64("max_kv_len", max_kv_len)
        self._plan: _Plan | None = None
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        for name, buffer in buffers.items():
            if not use_cuda_graph:
                check_tensor(name, buffer, optional=True)
                if buffer is not None:
                    raise ValueError(f"santa: {name} is given with use_cuda_graph=False; it needs use_cuda_graph=True")
                continue
            if buffer is None:
                raise ValueError(f"santa: {name} is None; use_cuda_graph=True needs it")
            _check_list(name, buffer)
            if buffer.device != self.device:
                raise ValueError(
                    f"santa: {name} is on {buffer.device}; it needs to be on float_workspace_buffer's device, "
                    f"{self.device}"
                )
            if not buffer.is_contiguous():
                raise ValueError(f"santa: {name} has stride {buffer.stride(0)}; it needs to be contiguous")
        if use_cuda_graph:
            indptr, indices, last_page_len = buffers.values()
            _check_length("paged_kv_indptr_buffer", indptr, len(last_page_len) + 1, "batch + 1")
            self._buffers = (indptr, indices, last_page_len)

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Accepted, and nothing comes of it: neither is used. Both need to be on the wrapper's device."""
        for name, buffer in (
            ("float_workspace_buffer", float_workspace_buffer),
            ("int_workspace_buffer", int_workspace_buffer),
        ):
            check_tensor(name, buffer)
            if buffer.device != self.device:
                raise ValueError(f"santa: {name} is on {buffer.device}; it needs to be on {self.device}, as before")

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        num_samples: int = 256,
        sampler: Sampler | int | str = Sampler.GROUPED,
        budget: Budget | int | str | None = None,
        min_sampled_len: int | None = None,
    ) -> None:
        """Say what the next calls of `run` are about: the pages of each row, the shapes, and how values are sampled.

        It copies indptr and last_page_len to the host, so it waits for the device unless they are there already, and
        cannot be captured. A plan that raises leaves the one before in force.

        Args:
            indptr, indices, last_page_len: int32 [batch + 1], [any] and [batch], on the host or the wrapper's device:
                the pages of row b are indices[indptr[b]] to indices[indptr[b + 1] - 1], and the last of them has
                last_page_len[b] keys, 1 to page_size. A row without pages has no keys, whatever last_page_len says:
                its out is 0 and its lse -inf. Without use_cuda_graph, tensors that are on the wrapper's device are
                used as they are, not copied: leave them alone until the next plan.
            num_qo_heads, num_kv_heads, head_dim: of q and of the cache; head_dim is that of q (a cache that is kept
                padded is wider: docs/shapes.md).
            page_size: keys of a page, a power of two from 1 to 256.
            pos_encoding_mode: "NONE": keys are in the cache as they are to be attended to.
            window_left, logits_soft_cap, sm_scale: as in `santa.decode`.
            q_data_type: torch.float16, torch.bfloat16, on the CPU torch.float32; or the name.
            kv_data_type: q's, which None stands for, or torch.float8_e4m3fn.
            o_data_type: None, or q_data_type.
            data_type: for those of the first two that are None. q_data_type is not unless None is passed: by default it
                is "float16", here as in FlashInfer.
            rope_scale, rope_theta: None.
            block_tables: None; `santa.decode_paged` takes such tables.
            seq_lens: None, or the lengths that indptr and last_page_len give.
            fixed_split_size: None or -1. Results never depend on the batch or on how a row is split.
            non_blocking, disable_split_kv: hints.
            num_samples, sampler, budget, min_sampled_len: as in `santa.decode`. They are part of the plan, as they are
                what a step costs; `run` can change num_samples for a layer.

        Raises:
            ValueError: an argument has an unusable value, dtype or shape; the message names it.
            TypeError: an argument is of the wrong Python type.
        """
        _refuse_positions(pos_encoding_mode, rope_scale, rope_theta)
        _refuse("block_tables", block_tables, "None: rows have the pages that indices lists")
        if fixed_split_size not in (None, -1):
            raise ValueError(
                f"santa: fixed_split_size is {fixed_split_size!r}; it needs to be None: results do not depend on how "
                "rows are split"
            )
        q_dtype, kv_dtype = _planned_dtypes(q_data_type, kv_data_type, o_data_type, data_type)
        sizes = {
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "page_size": page_size,
        }
        for name, size in sizes.items():
            if int64(name, size) < 1:
                raise ValueError(f"santa: {name} is {size}; it needs to be at least 1")
        if num_qo_heads % num_kv_heads != 0:
            raise ValueError(
                f"santa: num_qo_heads is {num_qo_heads}; it needs to be a multiple of num_kv_heads, {num_kv_heads}"
            )
        if page_size > 256 or page_size & (page_size - 1):
            raise ValueError(f"santa: page_size is {page_size}; it needs to be a power of two from 1 to 256")
        lens = _row_lens(indptr, indices, last_page_len, page_size)
        longest = int(lens.max()) if len(lens) else 0
        if seq_lens is not None:
            check_tensor("seq_lens", seq_lens)
            if seq_lens.tolist() != lens.tolist():
                raise ValueError(
                    f"santa: seq_lens is {seq_lens.tolist()}; it needs to be what indptr and last_page_len say, "
                    f"{lens.tolist()}"
                )
        if self._max_kv_len is not None and longest > self._max_kv_len:
            raise ValueError(
                f"santa: indptr and last_page_len have a row of {longest} keys; it needs to have at most max_kv_len, "
                f"{self._max_kv_len}"
            )
        plan = {
            **sizes,
            "q_dtype": q_dtype,
            "kv_dtype": kv_dtype,
            "window_left": int64("window_left", window_left),
            "logits_soft_cap": real("logits_soft_cap", logits_soft_cap, optional=True),
            "sm_scale": real("sm_scale", sm_scale, optional=True),
            "options": {
                "num_samples": int64("num_samples", num_samples),
                "sampler": value_of("sampler", sampler, Sampler),
                "budget": None if budget is None else value_of("budget", budget, Budget),
                "min_sampled_len": None if min_sampled_len is None else int64("min_sampled_len", min_sampled_len),
            },
        }
        # Nothing above changed anything, so that a plan that raises does not.
        pages, bound = (indptr, indices, last_page_len), self._max_kv_len
        if self._buffers is not None:
            self._write_buffers(*pages, non_blocking)
            pages = self._buffers
        elif bound is None:
            bound = longest
        pages = (x.to(self.device, non_blocking=non_blocking).contiguous() for x in pages)
        self._plan = _Plan(*pages, max_kv_len=bound, batch=len(lens), **plan)

    begin_forward = plan

    def _write_buffers(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, non_blocking: bool) -> None:
        indptr_buffer, indices_buffer, last_page_len_buffer = self._buffers
        _check_length("last_page_len", last_page_len, len(last_page_len_buffer), "the batch of the buffers")
        if len(indices) > len(indices_buffer):
            raise ValueError(
                f"santa: indices has length {len(indices)}; it needs to fit paged_kv_indices_buffer, of length "
                f"{len(indices_buffer)}"
            )
        indptr_buffer.copy_(indptr, non_blocking=non_blocking)
        indices_buffer[: len(indices)].copy_(indices, non_blocking=non_blocking)
        last_page_len_buffer.copy_(last_page_len, non_blocking=non_blocking)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedKvCache,
        *args: Any,
        q_scale: Tensor | float | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = 1,
        skip_softmax_threshold_scale_factor: float | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        row_seeds: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one layer.

        Args:
            q: [batch * q_len_per_req, num_qo_heads, head_dim], as planned.
            paged_kv_cache: (k_cache, v_cache) as in `santa.decode_paged`, or one tensor of both, [num_pages, 2,
                page_size, num_kv_heads, head_dim] (NHD) or [num_pages, 2, num_kv_heads, page_size, head_dim] (HND). The
                dimension of page_size can be left out if it is 1.
            args: none; they are for the kernels of jit_args.
            q_scale, k_scale: what logits are multiplied with beside sm_scale, for caches of any dtype: a float, or a
                float32 tensor of one number on the CPU. Beside a float8 cache also a tensor on its device, of one
                number or, k_scale, [num_kv_heads].
            v_scale: what out is multiplied with: the same, or [num_kv_heads], for caches of any dtype. Beside a 16-bit
                cache it multiplies an out that is rounded to 16 bits already, as FlashInfer does.
            out, lse: tensors to write the results into, either, both or none; contiguous. lse is written, to base 2,
                whether it is returned or not.
            return_lse: return lse as well.
            enable_pdl: a hint.
            window_left: None: as planned.
            sinks: float32 [num_qo_heads], as in `santa.decode`, on every device. lse includes them.
            q_len_per_req: new tokens of each row, 1 to 8, causal among each other: the last keys of the row are theirs.
            skip_softmax_threshold_scale_factor: None.
            num_samples: of this layer; None: as planned.
            seed: as in `santa.decode`: give each layer its own, or all layers draw with the same random numbers. The
                steps of a row are told apart by its length.
            row_seeds, positions: int64 [batch] and int32 [batch], as in `santa.decode`.

        Returns:
            out: [batch * q_len_per_req, num_qo_heads, head_dim], q's dtype.
            lse (with return_lse): [batch * q_len_per_req, num_qo_heads], float32: logarithm to base 2 of the sum of
                exp(logit).

        Raises:
            RuntimeError: `plan` was not called.
            ValueError, TypeError: as in `santa.decode_paged`, and where a tensor is not as planned.
        """
        if args:
            raise ValueError(
                f"santa: args is {len(args)} arguments behind paged_kv_cache; it needs to be none: they are for the "
                "kernels of jit_args"
            )
        _refuse("skip_softmax_threshold_scale_factor", skip_softmax_threshold_scale_factor, "None")
        plan = self._planned()
        if window_left is not None:
            plan = replace(plan, window_left=int64("window_left", window_left))
        if num_samples is not None:
            plan = replace(plan, options=plan.options | {"num_samples": int64("num_samples", num_samples)})
        q_len = 1 if q_len_per_req is None else int64("q_len_per_req", q_len_per_req)
        k_cache, v_cache = _unpack(paged_kv_cache, self._kv_layout)
        self._check_as_planned(plan, q, k_cache, q_len)
        if out is None and lse is not None:
            out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
        wants_lse = return_lse or lse is not None
        if lse is None and out is not None:
            lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        sm_scale, key_scale = plan.sm_scale, None
        if q_scale is not None or k_scale is not None:
            sm_scale, key_scale = _logit_scale(sm_scale, q_scale, k_scale, q, k_cache)
        value_scale = _number_or_tensor("v_scale", v_scale)
        # Of a float8 cache the operator multiplies before it rounds.
        scaled_by_operator = v_cache.dtype == _FLOAT8
        made, made_lse = decode_paged(
            _by_row("q", q, plan.batch, q_len),
            k_cache,
            v_cache,
            kv_indptr=plan.kv_indptr,
            kv_indices=plan.kv_indices,
            kv_last_page_len=plan.kv_last_page_len,
            max_kv_len=plan.max_kv_len,
            kv_layout=self._kv_layout,
            sm_scale=sm_scale,
            seed=seed,
            row_seeds=row_seeds,
            positions=positions,
            k_scale=key_scale,
            v_scale=value_scale if scaled_by_operator else None,
            window_left=plan.window_left,
            logits_soft_cap=plan.logits_soft_cap,
            sinks=sinks,
            out=None if out is None else _by_row("out", out, plan.batch, q_len),
            lse=None if lse is None else _by_row("lse", lse, plan.batch, q_len),
            **plan.options,
        )
        if value_scale is not None and not scaled_by_operator:
            _scale_output(made, value_scale, plan.num_kv_heads)
        if wants_lse:
            made_lse.mul_(_LOG2_E)
        if out is None:
            out, lse = (made, made_lse) if q_len == 1 else (made.flatten(0, 1), made_lse.flatten(0, 1))
        return (out, lse) if return_lse else out

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedKvCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Tensor | float | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` with window_left, logits_soft_cap and sm_scale that take the place of those planned, in this call and
        those after it, defaults included. FlashInfer calls it deprecated. options: further ones of `run`."""
        _refuse_positions(pos_encoding_mode, rope_scale, rope_theta)
        self._plan = replace(
            self._planned(),
            window_left=int64("window_left", window_left),
            logits_soft_cap=real("logits_soft_cap", logits_soft_cap, optional=True),
            sm_scale=real("sm_scale", sm_scale, optional=True),
        )
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, **options)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Nothing; FlashInfer calls it deprecated."""

    def _planned(self) -> _Plan:
        if self._plan is None:
            raise RuntimeError("santa: run is called before plan, which it needs to know the pages and shapes from")
        return self._plan

    def _check_as_planned(self, plan: _Plan, q: Tensor, k_cache: Tensor, q_len: int) -> None:
        check_tensor("q", q)
        if q.device != self.device:
            raise ValueError(f"santa: q is on {q.device}; it needs to be on the wrapper's device, {self.device}")
        needed = (plan.batch * q_len, plan.num_qo_heads, plan.head_dim)
        if q.shape != needed:
            tokens = "batch" if q_len == 1 else "batch * q_len_per_req"
            raise ValueError(
                f"santa: q has shape {list(q.shape)}; it needs [{tokens}, num_qo_heads, head_dim] as planned, "
                f"{list(needed)}"
            )
        for name, tensor, dtype in (("q", q, plan.q_dtype), ("k_cache", k_cache, plan.kv_dtype)):
            if tensor.dtype != dtype:
                raise ValueError(
                    f"santa: {name} is {_name_of(tensor.dtype)}; it needs to be {_name_of(dtype)}, as planned"
                )
        head_axis, token_axis = (1, 2) if self._kv_layout == KvLayout.HND else (2, 1)
        for what, axis, size in (
            ("page_size", token_axis, plan.page_size),
            ("num_kv_heads", head_axis, plan.num_kv_heads),
        ):
            if k_cache.shape[axis] != size:
                raise ValueError(
                    f"santa: k_cache has shape {list(k_cache.shape)}; dimension {axis} ({what} of kv_layout "
                    f"'{self._kv_layout.name}') is {k_cache.shape[axis]} and needs to be {size}, as planned"
                )


def _refuse(name: str, value: Any, needed: str) -> None:
    if value is not None:
        shown = f"a {type(value).__name__}" if isinstance(value, (Tensor, list, tuple)) else repr(value)
        raise ValueError(f"santa: {name} is {shown}; it needs to be {needed}")


def _refuse_positions(pos_encoding_mode: str, rope_scale: float | None, rope_theta: float | None) -> None:
    if pos_encoding_mode != "NONE":
        raise ValueError(
            f"santa: pos_encoding_mode is {pos_encoding_mode!r}; it needs to be 'NONE': encode positions in q, and in "
            "keys before they go into the cache"
        )
    _refuse("rope_scale", rope_scale, "None: no positions are encoded here")
    _refuse("rope_theta", rope_theta, "None: no positions are encoded here")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str, value: Any) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(value, str):
        raise ValueError(f"santa: {name} is {value!r}; it needs to be the name of a torch.dtype")
    raise TypeError(f"santa: {name} is a {type(value).__name__}; it needs to be a torch.dtype or its name")


def _planned_dtypes(q_data_type: Any, kv_data_type: Any, o_data_type: Any, data_type: Any) -> tuple[torch.dtype, ...]:
    if data_type is not None:
        q_data_type = data_type if q_data_type is None else q_data_type
        kv_data_type = data_type if kv_data_type is None else kv_data_type
    q_dtype = _dtype("q_data_type", q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else _dtype("kv_data_type", kv_data_type)
    o_dtype = q_dtype if o_data_type is None else _dtype("o_data_type", o_data_type)
    if q_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"santa: q_data_type is {_name_of(q_dtype)}; it needs to be float16, bfloat16 or, on the CPU, float32"
        )
    if kv_dtype not in (q_dtype, _FLOAT8):
        raise ValueError(
            f"santa: kv_data_type is {_name_of(kv_dtype)}; it needs to be q_data_type, {_name_of(q_dtype)}, or "
            "float8_e4m3fn"
        )
    if o_dtype != q_dtype:
        raise ValueError(
            f"santa: o_data_type is {_name_of(o_dtype)}; it needs to be None or q_data_type, {_name_of(q_dtype)}"
        )
    return q_dtype, kv_dtype


def _check_list(name: str, tensor: Any) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.int32:
        raise ValueError(
            f"santa: {name} is {_name_of(tensor.dtype)}; it needs to be int32: pass {name}.to(torch.int32)"
        )
    if tensor.dim() != 1:
        raise ValueError(f"santa: {name} has shape {list(tensor.shape)}; it needs 1 dimension")


def _check_length(name: str, tensor: Tensor, length: int, meaning: str) -> None:
    if len(tensor) != length:
        raise ValueError(f"santa: {name} has length {len(tensor)}; it needs to be {length}, {meaning}")


def _row_lens(indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """Keys of each row, int64 on the host."""
    for name, tensor in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
        _check_list(name, tensor)
    _check_length("indptr", indptr, len(last_page_len) + 1, "batch + 1")
    ends, last = indptr.cpu().long(), last_page_len.cpu().long()
    pages = ends.diff()
    for b in (pages < 0).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"santa: indptr goes from {int(ends[b])} to {int(ends[b + 1])} in row {b}; it needs to be ascending"
        )
    if int(ends[0]) < 0 or int(ends[-1]) > len(indices):
        raise ValueError(
            f"santa: indptr goes from {int(ends[0])} to {int(ends[-1])}; it needs to stay within indices, of length "
            f"{len(indices)}"
        )
    for b in ((pages > 0) & ((last < 1) | (last > page_size))).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"santa: last_page_len is {int(last[b])} in row {b}; it needs to be from 1 to page_size, {page_size}"
        )
    return torch.where(pages > 0, (pages - 1) * page_size + last, 0)


def _unpack(cache: Any, kv_layout: KvLayout) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache, with the dimension of page_size."""
    if isinstance(cache, Tensor):
        if cache.dim() not in (4, 5) or cache.shape[1] != 2:
            raise ValueError(
                f"santa: paged_kv_cache has shape {list(cache.shape)}; one tensor needs 5 dimensions, [num_pages, "
                "2, ...], or 4 for pages of one key"
            )
        both = cache.unbind(1)
    elif isinstance(cache, (tuple, list)) and len(cache) == 2:
        both = cache
    else:
        got = f"{len(cache)} tensors" if isinstance(cache, (tuple, list)) else f"a {type(cache).__name__}"
        raise TypeError(f"santa: paged_kv_cache is {got}; it needs to be (k_cache, v_cache) or one tensor of both")
    page_axis = -2 if kv_layout == KvLayout.HND else -3
    for name, tensor in zip(("k_cache", "v_cache"), both, strict=True):
        check_tensor(name, tensor)
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"santa: {name} has shape {list(tensor.shape)}; it needs 4 dimensions, or 3 for pages of one key"
            )
    k_cache, v_cache = (x.unsqueeze(page_axis) if x.dim() == 3 else x for x in both)
    return k_cache, v_cache


def _by_row(name: str, tensor: Tensor, batch: int, q_len: int) -> Tensor:
    """[batch * q_len, ...] as [batch, q_len, ...], where there are several tokens."""
    if q_len == 1:
        return tensor
    check_tensor(name, tensor)
    if tensor.dim() == 0 or tensor.shape[0] != batch * q_len:
        raise ValueError(
            f"santa: {name} has shape {list(tensor.shape)}; dimension 0 needs to be batch * q_len_per_req, "
            f"{batch * q_len}"
        )
    return tensor.unflatten(0, (batch, q_len))


def _number_or_tensor(name: str, value: Any) -> Tensor | float | None:
    """A scale: a float wherever the host can know it without waiting for a device; None: 1."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.device.type != "cpu"):
        if value.dtype != torch.float32:
            raise ValueError(f"santa: {name} is {_name_of(value.dtype)}; it needs to be float32")
        return value
    number = real(name, value.item() if isinstance(value, Tensor) else value, optional=True)
    return None if number == 1.0 else number


def _logit_scale(
    sm_scale: float | None, q_scale: Any, k_scale: Any, q: Tensor, k_cache: Tensor
) -> tuple[float | None, Tensor | None]:
    """sm_scale with what the host knows of the two scales, and the rest of them, for the keys of a float8 cache."""
    tensors = {}
    for name, value in (("q_scale", q_scale), ("k_scale", k_scale)):
        scale = _number_or_tensor(name, value)
        if isinstance(scale, Tensor):
            tensors[name] = scale
        elif scale is not None:
            sm_scale = (1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale) * scale
    for name, scale in tensors.items():
        if k_cache.dtype != _FLOAT8:
            raise ValueError(
                f"santa: {name} is a tensor of shape {list(scale.shape)} on {scale.device} beside a cache of "
                f"{_name_of(k_cache.dtype)}; it needs to be a float, or one number on the CPU, that sm_scale can be "
                "multiplied with"
            )
        if scale.device != q.device:
            raise ValueError(f"santa: {name} is on {scale.device}; it needs to be on q's device, {q.device}")
    if "q_scale" in tensors and tensors["q_scale"].numel() != 1:
        raise ValueError(f"santa: q_scale has shape {list(tensors['q_scale'].shape)}; it needs to be one number")
    return sm_scale, functools.reduce(operator.mul, tensors.values()) if tensors else None


def _scale_output(out: Tensor, scale: Tensor | float, num_kv_heads: int) -> None:
    if not isinstance(scale, Tensor):
        out.mul_(scale)
        return
    if scale.device != out.device:
        raise ValueError(f"santa: v_scale is on {scale.device}; it needs to be on q's device, {out.device}")
    if scale.numel() == 1:
        out.mul_(scale.reshape(()))
        return
    if scale.shape != (num_kv_heads,):
        raise ValueError(
            f"santa: v_scale has shape {list(scale.shape)}; it needs to be [] or [1] (one for the tensor) or "
            f"[{num_kv_heads}] (one per KV head)"
        )
    out.unflatten(-2, (num_kv_heads, -1)).mul_(scale.view(-1, 1, 1))
