"""Calls drawn at random, over all that decode and decode_paged take, against the float64 oracle and each other.

A case is one call: shapes, lengths, layout, pages, dtypes, features, sampler, budget and numbers. What holds for each:

* exact (num_samples = 0) is the oracle, within the error of the dtypes;
* sampled has the log-sum-exp of the oracle and finite outputs, and reads no more rows than there are;
* from pages in which everything else is NaN, either gives the bits of the contiguous operator;
* with so many samples that `grouped` takes every row with certainty, sampled is the oracle too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers.float8 import quantised
from helpers.inputs import BUDGETS, HEAD_DIMS, SAMPLED, dtypes_of
from helpers.paged import PAGE_SIZES, STORAGES, PagedCache, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import santa
from santa import reference

CASES = {"cpu": 500, "cuda": 2000}


@dataclass
class Call:
    """What is drawn. Tensors are made of `seed`."""

    lens: list[int]
    starts: list[int] | None
    implied: bool  # the contiguous call is told no lengths: they are those of k
    q_len: int | None
    num_kv_heads: int
    group_size: int
    head_dim: int
    dtype: torch.dtype
    float8: str | None  # "fp8-k", "fp8"
    per_head: bool
    layout: str
    page_size: int
    storage: str
    csr: bool
    spare: int
    options: dict[str, Any]  # of the operators, and numbers all
    sinks: bool
    positions: bool
    num_samples: int
    sampler: str
    budget: str
    all_rows_budget: str
    seed: int


def calls(device: str) -> st.SearchStrategy[Call]:
    lengths = st.one_of(st.integers(0, 600), st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 256, 257, 512, 513]))
    rows = st.lists(st.tuples(lengths, st.integers(0, 70)), min_size=1, max_size=3)
    options = st.fixed_dictionaries(
        {"seed": st.integers(-(2**63), 2**63 - 1)},
        optional={
            "window_left": st.one_of(st.integers(0, 600), st.sampled_from([-1, 0, 63, 64, 127])),
            "logits_soft_cap": st.sampled_from([0.5, 3.0, 30.0]),
            "sm_scale": st.sampled_from([-0.15, 0.0, 0.05, 0.15]),
            "first_kv_head": st.integers(0, 1000),
        },
    )
    return st.builds(
        _call,
        rows=rows,
        padded=st.booleans(),
        implied=st.booleans(),
        q_len=st.one_of(st.none(), st.integers(1, 8)),
        num_kv_heads=st.integers(1, 2),
        group_size=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12]),
        head_dim=st.sampled_from([64, 64, 64, *HEAD_DIMS]),
        dtype=st.sampled_from(dtypes_of(device)),
        float8=st.sampled_from([None, None, "fp8-k", "fp8"]),
        per_head=st.booleans(),
        layout=st.sampled_from(["NHD", "HND"]),
        page_size=st.sampled_from([*PAGE_SIZES, 4, 8, 32, 128]),
        storage=st.sampled_from(STORAGES),
        csr=st.booleans(),
        spare=st.integers(0, 40),
        options=options,
        sinks=st.booleans(),
        positions=st.booleans(),
        num_samples=st.one_of(st.integers(1, 64), st.sampled_from([1, 2, 300])),
        drawn=st.sampled_from(SAMPLED),
        all_rows_budget=st.sampled_from(BUDGETS),
        seed=st.integers(0, 2**31),
    )


def _call(
    rows: list[tuple[int, int]],
    padded: bool,
    implied: bool,
    csr: bool,
    float8: str | None,
    storage: str,
    drawn: tuple[str, str],
    **rest: Any,
) -> Call:
    sampler, budget = drawn
    implied = implied and not padded
    return Call(
        lens=[rows[0][0] if implied else length for length, _ in rows],
        starts=[start for _, start in rows] if padded else None,
        implied=implied,
        csr=csr and not padded,  # lists have no starts
        float8=float8,
        storage="separate" if float8 == "fp8-k" else storage,  # halves of a tensor have one dtype
        sampler=sampler,
        budget=budget,
        **rest,
    )


class Problem:
    """The tensors of a call, and what float64 says."""

    def __init__(self, call: Call, device: str):
        self.call, self.device = call, device
        generator = torch.Generator().manual_seed(call.seed)
        batch, tokens = len(call.lens), call.q_len or 1
        starts = call.starts or [0] * batch
        size = max(start + length for start, length in zip(starts, call.lens, strict=True)) + (not call.implied)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        q = normal(batch, tokens, call.num_kv_heads * call.group_size, call.head_dim)
        k, v = (normal(batch, size, call.num_kv_heads, call.head_dim) for _ in "kv")
        q, k, v = (x.to(device, call.dtype) for x in (q if call.q_len else q.squeeze(1), k, v + 1.0))
        scales: dict[str, Tensor] = {}
        if call.float8:
            k, v, scales = quantised(call.float8, k, v, per_head=call.per_head)
        self.qkv = q, k, v
        self.features = {name: x for name, x in call.options.items() if name not in ("seed", "first_kv_head")} | scales
        if call.sinks:
            self.features["sinks"] = 3 * normal(call.num_kv_heads * call.group_size).to(device)
        self.random = {name: x for name, x in call.options.items() if name in ("seed", "first_kv_head")}
        self.random["row_seeds"] = torch.arange(batch, device=device) - 1
        if call.positions:
            self.random["positions"] = torch.arange(batch, dtype=torch.int32, device=device) + 77
        window = call.options.get("window_left", -1)
        unseen = [max(0, length - tokens - window) if window >= 0 else 0 for length in call.lens]
        self.cache = PagedCache(
            k,
            v,
            call.page_size,
            lens=call.lens,
            starts=starts,
            unseen=unseen,
            layout=call.layout,
            storage=call.storage,
            spare=call.spare,
            seed=call.seed,
        )
        self.rows = {"kv_lens": self.cache.int32(call.lens), "kv_starts": self.cache.int32(starts)}
        self.seen = [length - skipped for length, skipped in zip(call.lens, unseen, strict=True)]

    def oracle(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, own_v = self.qkv
        options = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in (self.rows | self.features).items()}
        return reference.exact(q.cpu(), k.cpu(), (own_v if v is None else v).cpu(), **options)

    def both(self, **options: Any) -> tuple[Tensor, ...]:
        """From a contiguous cache, having seen that pages give the same bits."""
        q, k, v = self.qkv
        options |= self.features | self.random | {"min_sampled_len": 0, "return_rows_read": True}
        if self.call.layout == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        rows = {} if self.call.implied else self.rows
        result = santa.decode(q, k, v, kv_layout=self.call.layout, **rows, **options)
        assert_same_bits(self.cache.decode(q, form="csr" if self.call.csr else "table", **options), result)
        return result


def check(call: Call, device: str) -> None:
    problem = Problem(call, device)
    out, lse = problem.oracle()
    # What an output is a mean of: errors are relative to the sizes of the values, not to what is left of them.
    sizes, _ = problem.oracle(problem.qkv[2].float().abs())
    # Half a unit for rounding the output, half for its weights where they are multiplied in 16 bits, and slack.
    error = 3e-6 if call.dtype == torch.float32 else 1.5 * torch.finfo(call.dtype).eps

    def assert_exact(actual: tuple[Tensor, ...], missed: float = 0.0) -> None:
        off = (actual[0].double().cpu() - out).abs()
        assert (off <= (error + missed) * sizes + 1e-6).all(), float((off / (sizes + 1e-6)).max())
        assert_lse(actual)

    def assert_lse(actual: tuple[Tensor, ...]) -> None:
        torch.testing.assert_close(actual[1].double().cpu(), lse, rtol=1e-5, atol=3e-5)

    exact = problem.both(num_samples=0)
    assert_exact(exact)
    assert exact[2].tolist() == [[seen] * call.num_kv_heads for seen in problem.seen]

    sampled = problem.both(num_samples=call.num_samples, sampler=call.sampler, budget=call.budget)
    assert_lse(sampled)
    assert sampled[0].isfinite().all()
    blocks = 1 if call.budget == "proportional" else len(reference.head_blocks(call.group_size * (call.q_len or 1)))
    assert (sampled[2].cpu() <= torch.tensor(problem.seen).unsqueeze(1) * blocks).all()

    # Logits are within 15 of each other: of 600 keys, those that could be missed have next to no mass. Proportional
    # draws are made one by one.
    num_samples, missed = (2**14, 1e-3) if call.all_rows_budget == "proportional" else (2**20, 1e-4)
    every = problem.both(num_samples=num_samples, sampler="grouped", budget=call.all_rows_budget)
    assert_exact(every, missed)


def test_any_call(device: str) -> None:
    """The same cases in every run."""

    @settings(max_examples=CASES[device], deadline=None, derandomize=True, database=None)
    @given(calls(device))
    def holds(call: Call) -> None:
        check(call, device)

    holds()
