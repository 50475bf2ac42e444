"""What santa.BatchDecodeWithPagedKVCacheWrapper refuses, by name; what decode_paged refuses has its own tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.wrapper import FLOAT8, HEAD_DIM, HEADS, KV_HEADS, PAGE_SIZE, Problem, graph_buffers
from torch import Tensor

import santa

BUFFERS = graph_buffers(Problem("cpu"))
INDPTR, INDICES, LAST_PAGE_LEN = Problem("cpu").pages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"float_workspace_buffer": 1 << 27}, TypeError, "float_workspace_buffer is a int; it needs to be a torch.Ten"),
        ({"kv_layout": "DNH"}, ValueError, "kv_layout is 'DNH'; it needs to be one of 'NHD', 'HND'"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'; it needs to be one of 'auto', 'fa2', 'fa3', 'trtllm"),
        ({"jit_args": ["name"]}, ValueError, "jit_args is a list; it needs to be None: santa compiles nothing"),
        ({"max_kv_len": 1.5}, TypeError, "max_kv_len is a float; it needs to be an int"),
        (
            {"paged_kv_indices_buffer": INDICES},
            ValueError,
            "paged_kv_indices_buffer is given with use_cuda_graph=False; it needs use_cuda_graph=True",
        ),
        *(
            (BUFFERS | {name: None}, ValueError, f"{name} is None; use_cuda_graph=True needs it")
            for name in list(BUFFERS)[1:]
        ),
        (
            BUFFERS | {"paged_kv_indices_buffer": INDICES.long()},
            ValueError,
            r"paged_kv_indices_buffer is int64; it needs to be int32: pass paged_kv_indices_buffer.to\(torch.int32\)",
        ),
        (
            BUFFERS | {"paged_kv_indices_buffer": INDICES.view(1, -1)},
            ValueError,
            r"paged_kv_indices_buffer has shape \[1, \d+\]; it needs 1 dimension",
        ),
        (
            BUFFERS | {"paged_kv_indptr_buffer": INDPTR[1:]},
            ValueError,
            r"paged_kv_indptr_buffer has length 4; it needs to be 5, batch \+ 1",
        ),
        (
            BUFFERS | {"paged_kv_indices_buffer": INDICES.to("meta")},
            ValueError,
            "paged_kv_indices_buffer is on meta; it needs to be on float_workspace_buffer's device, cpu",
        ),
        (
            BUFFERS | {"paged_kv_indices_buffer": INDICES[::2]},
            ValueError,
            "paged_kv_indices_buffer has stride 2; it needs to be contiguous",
        ),
    ],
)
def test_errors_of_init(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"float_workspace_buffer": torch.empty(0)} | change
    with pytest.raises(error, match=f"^santa: {message}"):
        santa.BatchDecodeWithPagedKVCacheWrapper(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indptr": INDPTR.long()}, ValueError, r"indptr is int64; it needs to be int32: pass indptr.to\(torch.int32"),
        ({"indices": None}, TypeError, "indices is a NoneType; it needs to be a torch.Tensor"),
        ({"last_page_len": LAST_PAGE_LEN.float()}, ValueError, "last_page_len is float32; it needs to be int32"),
        ({"indptr": INDPTR[1:]}, ValueError, r"indptr has length 4; it needs to be 5, batch \+ 1"),
        ({"indptr": INDPTR.flip(0)}, ValueError, r"indptr goes from 122 to 78 in row 0; it needs to be ascending"),
        ({"indptr": INDPTR - 1}, ValueError, "indptr goes from -1 to 121; it needs to stay within indices, of leng"),
        ({"indices": INDICES[:100]}, ValueError, "indptr goes from 0 to 122; it needs to stay within indices, of leng"),
        (
            {"last_page_len": LAST_PAGE_LEN + 5},
            ValueError,
            "last_page_len is 17 in row 0; it needs to be from 1 to page_size, 16",
        ),
        (
            {"last_page_len": LAST_PAGE_LEN * 0},
            ValueError,
            "last_page_len is 0 in row 0; it needs to be from 1 to page_size, 16",
        ),
        ({"num_qo_heads": 9}, ValueError, "num_qo_heads is 9; it needs to be a multiple of num_kv_heads, 2"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; it needs to be at least 1"),
        ({"head_dim": 64.0}, TypeError, "head_dim is a float; it needs to be an int"),
        ({"page_size": 24}, ValueError, "page_size is 24; it needs to be a power of two from 1 to 256"),
        ({"page_size": 512}, ValueError, "page_size is 512; it needs to be a power of two from 1 to 256"),
        ({"pos_encoding_mode": "ROPE_LLAMA"}, ValueError, "pos_encoding_mode is 'ROPE_LLAMA'; it needs to be 'NONE'"),
        ({"pos_encoding_mode": "ALIBI"}, ValueError, "pos_encoding_mode is 'ALIBI'; it needs to be 'NONE'"),
        ({"rope_scale": 1.0}, ValueError, "rope_scale is 1.0; it needs to be None"),
        ({"rope_theta": 1e4}, ValueError, "rope_theta is 10000.0; it needs to be None"),
        ({"block_tables": INDICES}, ValueError, "block_tables is a Tensor; it needs to be None"),
        (
            {"seq_lens": torch.tensor([1100, 0, 129, 701])},
            ValueError,
            r"seq_lens is \[1100, 0, 129, 701\]; it needs to be what indptr and last_page_len say, \[1100, 0, 129, 700",
        ),
        ({"fixed_split_size": 4}, ValueError, "fixed_split_size is 4; it needs to be None"),
        ({"q_data_type": FLOAT8}, ValueError, "q_data_type is float8_e4m3fn; it needs to be float16, bfloat16 or, on"),
        ({"q_data_type": "half16"}, ValueError, "q_data_type is 'half16'; it needs to be the name of a torch.dtype"),
        ({"q_data_type": None}, TypeError, "q_data_type is a NoneType; it needs to be a torch.dtype or its name"),
        (
            {"kv_data_type": torch.float8_e5m2},
            ValueError,
            "kv_data_type is float8_e5m2; it needs to be q_data_type, float16, or float8_e4m3fn",
        ),
        ({"data_type": "bfloat16"}, ValueError, "kv_data_type is bfloat16; it needs to be q_data_type, float16, or"),
        ({"o_data_type": "bfloat16"}, ValueError, "o_data_type is bfloat16; it needs to be None or q_data_type, float"),
        ({"window_left": None}, TypeError, "window_left is a NoneType; it needs to be an int"),
        ({"logits_soft_cap": "30"}, TypeError, "logits_soft_cap is a str; it needs to be a float or None"),
        ({"sm_scale": torch.ones(1)}, TypeError, "sm_scale is a Tensor; it needs to be a float or None"),
        ({"num_samples": None}, TypeError, "num_samples is a NoneType; it needs to be an int"),
        ({"sampler": "median"}, ValueError, "sampler is 'median'; it needs to be one of 'multinomial'"),
        ({"budget": 7}, ValueError, "budget is 7; it needs to be one of 'proportional'"),
        ({"min_sampled_len": 0.5}, TypeError, "min_sampled_len is a float; it needs to be an int"),
    ],
)
def test_errors_of_plan(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """With and without buffers, which a plan that raises leaves alone."""
    problem = Problem("cpu")
    for arguments in ({}, graph_buffers(problem)):
        made = problem.wrapper(**arguments)
        names = ("indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size")
        with pytest.raises(error, match=f"^santa: {message}"):
            made.plan(**dict(zip(names, (*problem.pages, *problem.sizes), strict=True)) | change)
        with pytest.raises(RuntimeError, match="run is called before plan"):
            made.run(problem.q, problem.kv)
        assert all((x == 2147480000).all() for x in arguments.values() if isinstance(x, Tensor))


def test_errors_of_plans_that_do_not_fit_the_buffers(device: str) -> None:
    problem = Problem(device)
    made = problem.wrapper(**graph_buffers(problem, room=100))
    with pytest.raises(ValueError, match=r"^santa: indices has length 124; it needs to fit paged_kv_indices_buffer, o"):
        problem.plan(made)
    fewer = Problem(device, lens=[64, 30])
    with pytest.raises(ValueError, match=r"^santa: last_page_len has length 2; it needs to be 4, the batch of the buf"):
        fewer.plan(made)
    for arguments in ({}, graph_buffers(problem)):
        made = problem.wrapper(**arguments, max_kv_len=1099)
        with pytest.raises(ValueError, match=r"^santa: indptr and last_page_len have a row of 1100 keys; it nee"):
            problem.plan(made)
    with pytest.raises(ValueError, match=r"int_workspace_buffer is on meta; it needs to be on"):
        made.reset_workspace_buffer(problem.workspace(), torch.empty(0, device="meta"))


CACHE = torch.zeros(4, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
Q = torch.zeros(4, HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q is a NoneType; it needs to be a torch.Tensor"),
        (
            {"q": Q[:3]},
            ValueError,
            r"q has shape \[3, 8, 64\]; it needs \[batch, num_qo_heads, head_dim\] as planned, \[4, 8, 64\]",
        ),
        ({"q": Q[:, :4]}, ValueError, r"q has shape \[4, 4, 64\]; it needs .* as planned, \[4, 8, 64\]"),
        ({"q": Q.half()}, ValueError, "q is float16; it needs to be float32, as planned"),
        ({"q": Q.to("meta")}, ValueError, "q is on meta; it needs to be on the wrapper's device, cpu"),
        (
            {"q_len_per_req": 2},
            ValueError,
            r"q has shape \[4, 8, 64\]; it needs \[batch \* q_len_per_req, .* as planned, \[8, 8, 64\]",
        ),
        ({"paged_kv_cache": None}, TypeError, r"paged_kv_cache is a NoneType; it needs to be \(k_cache, v_cache\) or"),
        ({"paged_kv_cache": (CACHE[:, 0],)}, TypeError, r"paged_kv_cache is 1 tensors; it needs to be \(k_cache, v_c"),
        ({"paged_kv_cache": (None, CACHE[:, 0])}, TypeError, "k_cache is a NoneType; it needs to be a torch.Tensor"),
        (
            {"paged_kv_cache": CACHE.transpose(0, 1).repeat(2, 1, 1, 1, 1)},
            ValueError,
            r"paged_kv_cache has shape \[4, 4, 16, 2, 64\]; one tensor needs 5 dimensions, \[num_pages, 2, ...\]",
        ),
        ({"paged_kv_cache": (CACHE, CACHE)}, ValueError, r"k_cache has shape \[4, 2, 16, 2, 64\]; it needs 4 dimens"),
        ({"paged_kv_cache": CACHE.half()}, ValueError, "k_cache is float16; it needs to be float32, as planned"),
        (
            {"paged_kv_cache": CACHE.transpose(2, 3)},
            ValueError,
            r"k_cache has shape \[4, 2, 16, 64\]; dimension 1 \(page_size of kv_layout 'NHD'\) is 2 and needs to be ",
        ),
        (
            {"paged_kv_cache": CACHE.repeat(1, 1, 1, 2, 1)},
            ValueError,
            r"k_cache has shape \[4, 16, 4, 64\]; dimension 2 \(num_kv_heads of kv_layout 'NHD'\) is 4 and needs to",
        ),
        (
            {"paged_kv_cache": (CACHE[:, 0], CACHE[:, 1].half())},
            ValueError,
            "v_cache is float16; it needs to be float32, q's dtype",
        ),
        ({"skip_softmax_threshold_scale_factor": 1.0}, ValueError, "skip_softmax_threshold_scale_factor is 1.0; it ne"),
        ({"q_scale": "1"}, TypeError, "q_scale is a str; it needs to be a float"),
        (
            {"k_scale": torch.ones(2)},
            ValueError,
            r"k_scale is a tensor of shape \[2\] on cpu beside a cache of float32; it needs to be a float, or one num",
        ),
        ({"v_scale": torch.ones(3)}, ValueError, r"v_scale has shape \[3\]; it needs to be \[\] or \[1\] .* or \[2\]"),
        ({"v_scale": torch.ones(2).half()}, ValueError, "v_scale is float16; it needs to be float32"),
        ({"v_scale": torch.ones(2).to("meta")}, ValueError, "v_scale is on meta; it needs to be on q's device, cpu"),
        ({"out": Q[:3]}, ValueError, r"out has shape \[3, 8, 64\]"),
        ({"lse": torch.zeros(4, HEADS).half()}, ValueError, "lse is float16; it needs to be float32"),
        ({"window_left": 1.0}, TypeError, "window_left is a float; it needs to be an int"),
        (
            {"sinks": torch.zeros(4)},
            ValueError,
            r"sinks has shape \[4\]; dimension 0 \(num_qo_heads\) is 4",
        ),
        ({"num_samples": -1}, ValueError, r"num_samples is -1; it needs to be in \[0, "),
        ({"seed": 0.5}, TypeError, "seed is a float; it needs to be an int"),
        ({"row_seeds": torch.zeros(4)}, ValueError, "row_seeds is float32; it needs to be int64"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, ValueError, r"positions has shape \[3\]"),
    ],
)
def test_errors_of_run(change: dict[str, Any], error: type[Exception], message: str) -> None:
    made = santa.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    indptr, ones = torch.arange(5, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    made.plan(indptr, indptr[:4], ones, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=torch.float32)
    arguments = {"q": Q, "paged_kv_cache": CACHE} | change
    with pytest.raises(error, match=f"^santa: {message}"):
        made.run(**arguments)


def test_errors_of_float8_scales() -> None:
    problem = Problem("cpu", float8=True)
    made = problem.planned()
    for change, message in (
        ({"q_scale": torch.ones(2)}, r"q_scale has shape \[2\]; it needs to be one number"),
        ({"k_scale": torch.ones(3)}, r"k_scale has shape \[3\]; it needs to be \[\] or \[1\]"),
        ({"k_scale": torch.ones(2).half()}, "k_scale is float16; it needs to be float32"),
        ({"k_scale": torch.ones(2).to("meta")}, "k_scale is on meta; it needs to be on q's device, cpu"),
        ({"v_scale": torch.ones(3)}, r"v_scale has shape \[3\]; it needs to be \[\] or \[1\]"),
    ):
        with pytest.raises(ValueError, match=f"^santa: {message}"):
            made.run(problem.q, problem.kv, **change)


def test_errors_of_calls() -> None:
    problem = Problem("cpu")
    made = problem.wrapper()
    for call in (made.run, made.run_return_lse, made.forward, made.forward_return_lse):
        with pytest.raises(RuntimeError, match=r"^santa: run is called before plan, which it needs"):
            call(problem.q, problem.kv)
    problem.plan(made)
    with pytest.raises(ValueError, match=r"^santa: args is 2 arguments behind paged_kv_cache; it needs to be none"):
        made.run(problem.q, problem.kv, 1.0, 2.0)
    for change in ({"pos_encoding_mode": "ALIBI"}, {"rope_scale": 1.0}, {"rope_theta": 1e4}):
        with pytest.raises(ValueError, match=f"^santa: {next(iter(change))} is "):
            made.forward(problem.q, problem.kv, **change)
