"""Merging attention over parts of the keys: what sharded, cascaded or chunked caches leave, into attention over all."""

from __future__ import annotations

import torch
from torch import Tensor

from santa.arguments import check_tensor


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both of two disjoint sets, from attention over each: `merge_states` of two.

    Args:
        out_a: [batch, num_qo_heads, head_dim], as `santa.decode` returns it.
        lse_a: float32 [batch, num_qo_heads], the natural logarithm of the sum of exp(logit), as it returns it. (Those
            of FlashInfer are to base 2: times ln(2).)
        out_b: shape, dtype and device of out_a.
        lse_b: shape, dtype and device of lse_a.

    Returns:
        out: shape and dtype of out_a.
        lse: float32 [batch, num_qo_heads], of all keys.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.
        TypeError: an argument is no tensor.
    """
    for name, tensor in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_tensor(name, tensor)
    _check_pair("out_a", out_a, "lse_a", lse_a, rank=3)
    _check_same("out_b", out_b, "out_a", out_a)
    _check_same("lse_b", lse_b, "lse_a", lse_a)
    return _merge(torch.stack([out_a, out_b], 1), torch.stack([lse_a, lse_b], 1))


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all of several disjoint sets, from attention over each.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    A set without keys (lse of -inf) changes nothing, whatever its out holds; without any keys, out is 0 and lse -inf,
    as `santa.decode` has it. NaN in a set that has keys makes the result NaN. Sums are in float32 (float64 for such),
    and rounded once: one call for all sets rounds less often than a chain of `merge_state`.

    Estimates stay unbiased: lse is exact in `santa.decode`, sampled or not (but for Bernoulli scores), so the merged
    out is a fixed weighted mean of unbiased ones. Give each set its own ``seed``, or those of equal length share random
    numbers and their errors do not average out.

    Args:
        outs: [batch, num_states, num_qo_heads, head_dim], bfloat16, float16, float32 or float64.
        lses: [batch, num_states, num_qo_heads], float32 (float64 beside such outs), natural logarithm.

    Returns:
        out: [batch, num_qo_heads, head_dim], dtype of outs.
        lse: [batch, num_qo_heads], dtype of lses.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.
        TypeError: an argument is no tensor.
    """
    check_tensor("outs", outs)
    check_tensor("lses", lses)
    _check_pair("outs", outs, "lses", lses, rank=4)
    if outs.shape[1] == 0:
        raise ValueError(f"santa: outs has shape {list(outs.shape)}; it needs one state at least")
    return _merge(outs, lses)


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    largest = lses.amax(1, keepdim=True)
    # Without keys there is nothing to measure against.
    weights = torch.exp(lses - torch.where(torch.isneginf(largest), 0.0, largest))
    total = weights.sum(1)
    lse = largest.squeeze(1) + torch.log(torch.where(total == 0, 1.0, total))
    parts = torch.where(weights.unsqueeze(-1) == 0, 0.0, outs.to(lses.dtype)) * weights.unsqueeze(-1)
    out = parts.sum(1) / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return out.to(outs.dtype), lse


def _check_pair(out_name: str, out: Tensor, lse_name: str, lse: Tensor, rank: int) -> None:
    needs = "[batch, num_qo_heads, head_dim]" if rank == 3 else "[batch, num_states, num_qo_heads, head_dim]"
    if out.dim() != rank:
        raise ValueError(f"santa: {out_name} has shape {list(out.shape)}; it needs {rank} dimensions, {needs}")
    if not out.is_floating_point():
        raise ValueError(f"santa: {out_name} is {_dtype_name(out)}; it needs to be of floating point")
    if lse.shape != out.shape[:-1]:
        raise ValueError(
            f"santa: {lse_name} has shape {list(lse.shape)}; it needs that of {out_name} without head_dim, "
            f"{list(out.shape[:-1])}"
        )
    wanted = torch.float64 if out.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise ValueError(
            f"santa: {lse_name} is {_dtype_name(lse)}; it needs to be {str(wanted).removeprefix('torch.')} beside "
            f"{out_name} of {_dtype_name(out)}"
        )
    if lse.device != out.device:
        raise ValueError(f"santa: {lse_name} is on {lse.device}; it needs to be on {out.device}, where {out_name} is")


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        got, needed = getattr(tensor, what), getattr(other, what)
        if got != needed:
            words = [list(x) if what == "shape" else str(x).removeprefix("torch.") for x in (got, needed)]
            raise ValueError(f"santa: {name} has {what} {words[0]}; it needs that of {other_name}, {words[1]}")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
