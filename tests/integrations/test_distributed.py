"""Context parallelism: rows whose keys lie on 1, 2 and 3 ranks, against the operator that has them all."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.draws import assert_same_draws
from helpers.inputs import dtypes_of, make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z
from torch import Tensor

import santa
from santa import distributed, reference
from santa.distributed import decode_context_parallel, shard_rows

WORLD_SIZES = [1, 2, 3]
# Rows of the tests: empty, shorter than a tile, than a pilot, than a slice; one that fills the cache.
MAX_KV_LEN = 5000
LENS = [MAX_KV_LEN, 0, 1, 100, 255, 300, 1024, 4097]
PAGE_SIZE = 16

OTHER_SEED = {"seed": 17}

# What is run: options of the operator, and how inputs are made and cut. `whole`: every rank has the same slice of the
# cache, whatever a row's length. `by row`: each row is cut by itself, ranks have the slices in reverse, NaN before and
# behind them. `pages`: as `whole`, in shuffled pages.
SAMPLED = {"num_samples": 24, "min_sampled_len": 0}
CASES: dict[str, dict[str, Any]] = {
    "exact": {"options": {"num_samples": 0}},
    "exact, by row": {"options": {"num_samples": 0, "sampler": "multinomial"}, "cut": "by row"},
    "grouped": {"options": SAMPLED},
    "systematic": {"options": SAMPLED | {"sampler": "systematic", "seed": 3}},
    "grouped uniform": {"options": SAMPLED | {"budget": "uniform"}},
    "systematic uniform": {"options": SAMPLED | {"sampler": "systematic", "budget": "uniform"}, "cut": "by row"},
    "grouped, by row": {"options": SAMPLED, "cut": "by row"},
    "grouped, pages": {"options": SAMPLED | {"budget": "streaming"}, "cut": "pages"},
    "uniform, pages, HND": {"options": SAMPLED | {"budget": "uniform"}, "cut": "pages", "layout": "HND"},
    "tokens": {"options": SAMPLED | {"logits_soft_cap": 2.0}, "q_len": 3, "cut": "by row"},
    "exact tokens": {"options": {"num_samples": 0}, "q_len": 3},
    "features": {
        "options": SAMPLED | {"logits_soft_cap": 3.0, "first_kv_head": 6, "sm_scale": 0.2, "row_seeds": "yes"},
        "sinks": True,
        "layout": "HND",
    },
    "exact sinks": {"options": {"num_samples": 0}, "sinks": True, "cut": "by row"},
    "short rows exact": {"options": {"num_samples": 24, "min_sampled_len": 1000}},
    "bfloat16, keys in float8": {"options": SAMPLED, "dtype": torch.bfloat16, "float8": True, "cut": "by row"},
    "a head_dim of 80": {"options": SAMPLED, "head_dim": 80, "width": 96},
    "ranks without a cache": {"options": SAMPLED, "lens": [100, 7], "float8": True, "dtype": torch.float16},
    "pages, ranks without any": {"options": SAMPLED, "lens": [100, 7], "cut": "pages"},
    "no rows": {"options": SAMPLED, "lens": []},
    "a key is NaN": {"options": SAMPLED, "nan": (7, 4080)},
}


class Rows:
    """The inputs of a case: the same in every process."""

    def __init__(self, case: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.cut, self.layout = case.get("cut", "whole"), case.get("layout", "NHD")
        dtype, head_dim = case.get("dtype", dtype), case.get("head_dim", 64)
        lens, q_len = case.get("lens", LENS), case.get("q_len", 1)
        self.batch, self.max_kv_len = len(lens), max(lens, default=MAX_KV_LEN)
        self.q, self.k, self.v = make_qkv(
            self.batch, 4 * q_len, 2, self.max_kv_len, head_dim, dtype=dtype, device=device, logit_std=1.5
        )
        if q_len > 1:
            self.q = self.q.view(self.batch, q_len, 4, head_dim)
        if "width" in case:  # a cache that is kept padded
            self.k, self.v = (torch.nn.functional.pad(x, (0, case["width"] - head_dim)) for x in (self.k, self.v))
        self.options = dict(case["options"])
        if "row_seeds" in self.options:
            self.options["row_seeds"] = torch.arange(self.batch, device=device) - 3
        if case.get("float8"):
            self.k, self.options["k_scale"] = santa.quantize_kv(self.k)
        if case.get("sinks"):
            self.options["sinks"] = torch.tensor([-1.0, 8.0, 0.5, -math.inf], device=device)
        if "nan" in case:
            row, key = case["nan"]
            self.k[row, key, 0] = math.nan
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device)

    def as_laid_out(self, *tensors: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2).contiguous() if self.layout == "HND" else x for x in tensors]

    def on_one(self, **more: Any) -> tuple[Tensor, ...]:
        """By the operator."""
        k, v = self.as_laid_out(self.k, self.v)
        options = {**self.options, "kv_layout": self.layout, "return_rows_read": True, **more}
        return santa.decode(self.q, k, v, kv_lens=self.lens, **options)

    def on_rank(
        self,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None = None,
        whole_lens: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, ...]:
        k, v, where = getattr(self, "_" + self.cut.replace(" ", "_"))(rank, world_size)
        k, v = self.as_laid_out(k, v)
        options = {**self.options, "kv_layout": self.layout, "return_rows_read": True, **more}
        whole_lens = self.lens if whole_lens is None else whole_lens
        return decode_context_parallel(self.q, k, v, whole_lens=whole_lens, group=group, **where, **options)

    def _whole(self, rank: int, world_size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        start, end = shard_rows(self.max_kv_len, world_size)[rank]
        kv_lens = (self.lens - start).clamp(0, end - start)
        where = {"kv_lens": kv_lens, "shard_starts": torch.full_like(self.lens, start)}
        return self.k[:, start:end], self.v[:, start:end], where

    def _by_row(self, rank: int, world_size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        starts, ends = shard_rows(self.lens, world_size)[world_size - 1 - rank]
        kv_starts = (torch.arange(self.batch, device=self.lens.device) * 3).int()
        places = torch.arange(self.max_kv_len // world_size + 300, device=self.lens.device) - kv_starts[:, None]
        rows = torch.arange(self.batch, device=self.lens.device)[:, None]
        here = (places >= 0) & (places < (ends - starts)[:, None])
        k, v = (x[rows, (starts[:, None] + places).clamp(0, self.max_kv_len - 1)] for x in (self.k.float(), self.v))
        k, v = (torch.where(here[..., None, None], x, math.nan) for x in (k, v))
        return k.to(self.k.dtype), v, {"kv_lens": ends - starts, "shard_starts": starts, "kv_starts": kv_starts}

    def _pages(self, rank: int, world_size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        k, v, where = self._whole(rank, world_size)
        pages_per_row = -(-k.shape[1] // PAGE_SIZE)
        order = torch.randperm(self.batch * pages_per_row, generator=torch.Generator().manual_seed(rank))
        order = order.to(self.lens.device)
        caches = []
        for x in (k, v):
            padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages_per_row * PAGE_SIZE - x.shape[1]), value=math.nan)
            pages = padded.reshape(self.batch * pages_per_row, PAGE_SIZE, *x.shape[2:])
            caches.append(torch.empty_like(pages).index_copy_(0, order, pages))
        used = torch.arange(pages_per_row, device=order.device) < -(-where["kv_lens"][:, None] // PAGE_SIZE)
        table = torch.where(used, order.view(self.batch, pages_per_row), 2147480000).int()
        return *caches, {**where, "page_table": table}


def watch_levels() -> dict[str, Any]:
    """Where the levels of this process's last call will be found."""
    seen: dict[str, Any] = {}
    operators = distributed.decode, distributed.decode_paged

    def spy(operator: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            seen.update(levels=options["levels"])
            return operator(*args, **options)

        return run

    distributed.decode, distributed.decode_paged = (spy(operator) for operator in operators)
    return seen


def run_on_ranks(rank: int, world_size: int, directory: str) -> None:
    """All cases on the first 1, 2 and 3 of three processes, into a file for each of them."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    seen = watch_levels()
    found: dict[Any, Any] = {}
    for size in WORLD_SIZES:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            with pytest.raises(ValueError) as refused:
                Rows(CASES["exact"]).on_rank(0, size, group)
            found["no member", size] = str(refused.value)
            continue
        for name, case in CASES.items():
            out, lse, rows_read = Rows(case).on_rank(rank, size, group)
            found[name, size] = {"out": out, "lse": lse, "rows_read": rows_read, "levels": seen["levels"]}
            if size == max(WORLD_SIZES):
                out, lse, rows_read = Rows(case).on_rank(rank, size, group, **OTHER_SEED)
                found[name, "other seed"] = {"out": out, "lse": lse, "rows_read": rows_read}
        rows = Rows(CASES["grouped"])
        with pytest.raises(ValueError) as refused:
            rows.on_rank(rank, size, group, whole_lens=rows.lens + (rows.lens == 300))
        found["wrong sum", size] = str(refused.value)
    torch.save(found, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of three processes found."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_on_ranks, (max(WORLD_SIZES), str(directory)), nprocs=max(WORLD_SIZES))
    return [torch.load(directory / f"{rank}.pt") for rank in range(max(WORLD_SIZES))]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """out and lse; the former to what its dtype can hold where that is less."""
    eps = torch.finfo(expected[0].dtype).eps
    near = {"rtol": max(tolerance, 2 * eps), "atol": max(tolerance, eps), "equal_nan": True}
    torch.testing.assert_close(actual[0], expected[0], **near)
    torch.testing.assert_close(actual[1], expected[1], rtol=2e-6, atol=2e-6, equal_nan=True)


def tolerance_of(rows: Rows) -> dict[str, Any]:
    """Of draws by levels that agree to rounding."""
    return {"num_samples": rows.options["num_samples"], "tolerance": max(1e-5, torch.finfo(rows.q.dtype).eps)}


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_gives_what_one_gives(found: list[dict[Any, Any]], name: str) -> None:
    rows = Rows(CASES[name])
    levels = found[0][name, 1]["levels"]
    assert (levels is None) == (rows.options["num_samples"] == 0 or rows.options.get("budget") == "uniform")
    out, lse, rows_read = rows.on_one(levels=levels)
    long_rows = rows.max_kv_len == MAX_KV_LEN and rows.batch > 0
    assert rows.options["num_samples"] == 0 or not long_rows or not torch.equal(out, rows.on_one(num_samples=0)[0])
    for size in WORLD_SIZES:
        results = [found[rank][name, size] for rank in range(size)]
        assert all(same_bits(result[x], results[0][x]) for result in results for x in ("out", "lse"))
        assert all(levels is None or same_bits(result["levels"], levels) for result in results)
        assert_close((results[0]["out"], results[0]["lse"]), (out, lse), 2e-6)
        assert torch.equal(sum(result["rows_read"] for result in results), rows_read)
        if size > 1 and long_rows:  # the work is shared
            assert all(result["rows_read"][0].sum() < rows_read[0].sum() for result in results)


@pytest.mark.parametrize("name", [name for name in CASES if name != "a key is NaN"])
def test_the_pilot_is_that_of_the_operator(found: list[dict[Any, Any]], name: str) -> None:
    """Levels agree to rounding, so draws do."""
    rows = Rows(CASES[name])

    def by_seed() -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        for key, changes in (((name, 3), {}), ((name, "other seed"), OTHER_SEED)):
            results = [found[rank][key] for rank in range(3)]
            rows_read = torch.stack([result["rows_read"] for result in results]).sum(0)
            yield (results[0]["out"], results[0]["lse"], rows_read), rows.on_one(**changes)

    assert_same_draws(by_seed(), **tolerance_of(rows))


def test_nan_stays_in_its_heads(found: list[dict[Any, Any]]) -> None:
    for size in WORLD_SIZES:
        bad = found[0]["a key is NaN", size]["out"].isnan().all(-1)
        assert bad[7, :2].all() and bad.sum() == 2


def test_lengths_that_do_not_add_up_are_refused(found: list[dict[Any, Any]]) -> None:
    for size in WORLD_SIZES:
        counts = " + ".join(["300", "0", "0"][:size])
        text = f"santa: row 5 has kv_lens {counts} on the ranks of group and whole_lens 301; they need to add up to it"
        assert [found[rank]["wrong sum", size] for rank in range(size)] == [text] * size


def test_a_process_outside_the_group_is_refused(found: list[dict[Any, Any]]) -> None:
    text = "santa: group is one without this process, rank 2; it needs to be in it"
    assert found[2]["no member", 1] == found[2]["no member", 2] == text


@pytest.fixture
def alone() -> Any:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["exact", "grouped", "systematic uniform", "tokens", "uniform, pages, HND", "features"]
)
def test_one_rank(alone: None, device: str, name: str) -> None:
    rows = Rows(CASES[name], device, working_dtype(device))
    out, lse, rows_read = rows.on_rank(0, 1)
    assert out.dtype == rows.q.dtype and lse.dtype == torch.float32

    def by_seed() -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        yield (out, lse, rows_read), rows.on_one()
        yield rows.on_rank(0, 1, **OTHER_SEED), rows.on_one(**OTHER_SEED)

    assert_same_draws(by_seed(), **tolerance_of(rows))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_of_a_row(world_size: int) -> None:
    lens = [0, 1, 127, 128, 129, 1000, 128 * world_size, 1 << 20, 2**31 - 1]
    batched = shard_rows(torch.tensor(lens, dtype=torch.int32), world_size)
    for b, kv_len in enumerate(lens):
        pairs = shard_rows(kv_len, world_size)
        assert pairs == [(int(starts[b]), int(ends[b])) for starts, ends in batched]
        assert pairs[0][0] == 0 and pairs[-1][1] == kv_len and len(pairs) == world_size
        assert all(one[1] == other[0] for one, other in pairwise(pairs))
        assert all(start % 128 == 0 for start, _ in pairs)
        lengths = [end - start for start, end in pairs]
        assert min(lengths) >= 0 and max(lengths) - min(lengths) <= 256
    assert all(x.dtype == torch.int32 for pair in batched for x in pair)


def test_pilot_positions() -> None:
    lens = [0, 1, 255, 256, 257, 258, 300, 448, 449, 1000, 8192, 100_003, 1 << 20, 2**31 - 1]
    lens += torch.randint(257, 2**31 - 1, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    positions = distributed._pilot_positions(torch.tensor(lens, dtype=torch.int32))
    for kv_len, found in zip(lens, positions, strict=True):
        expected = reference.pilot(kv_len)[0]
        assert torch.equal(found[: len(expected)], expected)
        assert (found[len(expected) :] >= kv_len).all()  # no key


def levels_over(
    q: Tensor, k: Tensor, lens: Tensor, cuts: list[int], sm_scale: float | None = None, cap: float | None = None
) -> Tensor:
    """Levels of rows of which neighbouring cuts make slices, one rank for each."""
    pilot, total = distributed._pilot_positions(lens), torch.zeros((), dtype=torch.int32, device=q.device)
    for a, b in pairwise(cuts):
        places = pilot - a
        keys = distributed._keys_at(k[:, a:b], places, None, None, "NHD")
        here = (places >= 0) & (places < (lens - a).clamp(0, b - a)[:, None])
        bits = distributed._pilot_bits(q, keys, here, sm_scale=sm_scale, k_scale=None, logits_soft_cap=cap)
        total = total + bits
    return distributed._levels(total, pilot, lens)


CUTS = [[0, 5000], [0, 2560, 5000], [0, 128, 256, 4992, 5000], [0, 0, 5000, 5000]]


@pytest.mark.parametrize("q_len", [1, 3])
def test_levels(device: str, q_len: int) -> None:
    """Against float64, and the same bits wherever a row is cut and whatever else is in the batch."""
    for dtype in dtypes_of(device):
        rows = Rows({"options": {}, "q_len": q_len}, device, dtype)
        q, k, lens = rows.q.view(len(LENS), q_len, 4, 64), rows.k, rows.lens
        levels = levels_over(q, k, lens, CUTS[0], 0.2, 3.0)
        for cuts in CUTS[1:]:
            assert same_bits(levels_over(q, k, lens, cuts, 0.2, 3.0), levels)
        for b, kv_len in enumerate(LENS):
            one = slice(b, b + 1)
            assert same_bits(levels_over(q[one], k[one], lens[one], CUTS[0], 0.2, 3.0), levels[one])
            positions, weights = reference.pilot(kv_len)
            keys = k[b].cpu().double()[positions].repeat_interleave(2, 1)
            logits = 3.0 * torch.tanh(0.2 / 3.0 * torch.einsum("thd,nhd->thn", q[b].cpu().double(), keys))
            for t in range(q_len):
                seen = positions < kv_len - (q_len - 1 - t)
                expected = (logits[t] + weights.log())[:, seen].logsumexp(-1)
                torch.testing.assert_close(levels[b, t].cpu().double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("sampler", "budget"), [("grouped", "streaming"), ("systematic", "streaming")])
def test_estimates_over_slices_are_unbiased(sampler: str, budget: str, device: str) -> None:
    """4,000 estimates, with the draws of slices as ranks make them."""
    draws, cuts = 4000, [0, 256, 640, 700]
    q, k, v = make_qkv(1, 4, 1, cuts[-1], 64, dtype=working_dtype(device), device=device, logit_std=1.5)
    p, values, _ = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu())
    whole = torch.full((1,), cuts[-1], dtype=torch.int32, device=device)
    levels = levels_over(q, k, whole, cuts).view(1, 4).repeat(draws, 1)
    options = {"num_samples": 4, "sampler": sampler, "budget": budget, "min_sampled_len": 0, "levels": levels}
    options |= {"row_seeds": torch.arange(draws, device=device), "whole_lens": whole.repeat(draws)}
    states = [
        santa.decode(
            repeat_rows(q, draws),
            *(repeat_rows(x[:, a:b], draws) for x in (k, v)),
            shard_starts=torch.full((draws,), a, dtype=torch.int32, device=device),
            **options,
        )
        for a, b in pairwise(cuts)
    ]
    outs, lses = (torch.stack(tensors, 1) for tensors in zip(*states, strict=True))
    out, _ = santa.merge_states(outs, lses)
    rounding = 2.0**-11 if out.dtype == torch.float16 else 0.0
    projected, largest = mean_z(out, (p @ values).flatten(0, 1), rounding=rounding)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST


def arguments() -> dict[str, Any]:
    ints = torch.tensor([300, 7], dtype=torch.int32)
    q, k, v = torch.zeros(2, 4, 64), torch.zeros(2, 300, 2, 64), torch.zeros(2, 300, 2, 64)
    return {"q": q, "k": k, "v": v, "kv_lens": ints, "whole_lens": ints, "shard_starts": torch.zeros_like(ints)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"budget": "proportional"},
            ValueError,
            "budget is 'proportional', which .* need 'streaming', .* or 'uniform'",
        ),
        ({"sampler": "multinomial"}, ValueError, "sampler is 'multinomial', which .* need 'grouped' or 'systematic'"),
        ({"sampler": "stratified", "budget": "uniform"}, ValueError, "sampler is 'stratified', which .*"),
        ({"sampler": "best"}, ValueError, "sampler is 'best'; it needs to be one of .*"),
        ({"window_left": 128}, ValueError, "window_left is 128; rows in slices need -1"),
        ({"window_left": 128, "num_samples": 0}, ValueError, "window_left is 128; .*"),
        ({"num_samples": -1}, ValueError, "num_samples is -1; .*"),
        ({"kv_lens": None}, TypeError, "kv_lens is a NoneType; it needs to be a torch.Tensor"),
        (
            {"whole_lens": torch.zeros(2)},
            ValueError,
            r"whole_lens is float32 of shape \[2\]; .* int32 \[batch\], \[2\]",
        ),
        ({"shard_starts": torch.zeros(3).int()}, ValueError, r"shard_starts is int32 of shape \[3\]; .*"),
        ({"shard_starts": torch.zeros(2).int().to("meta")}, ValueError, "shard_starts is on meta; .* device, cpu"),
        (
            {"shard_starts": torch.tensor([64, 0]).int()},
            ValueError,
            "row 0 has .* shard_starts 64; .* multiple of 128.*",
        ),
        ({"whole_lens": torch.tensor([400, 7]).int()}, ValueError, "row 0 has kv_lens 300 on .* whole_lens 400; .*"),
        ({"whole_lens": torch.tensor([300, 3]).int()}, ValueError, "row 1 has kv_lens 7 .*"),
        ({"kv_starts": torch.zeros(2)}, ValueError, "kv_starts is float32 .*"),
        ({"q": torch.zeros(4, 64)}, ValueError, r"q has shape \[4, 64\]; it needs to be \[batch, num_qo_heads, .*"),
        (
            {"q": torch.zeros(2, 5, 64)},
            ValueError,
            r"k has 2 KV heads .*; num_qo_heads \(5\) needs to be a multiple .*",
        ),
        ({"q": [1]}, TypeError, "q is a list; it needs to be a torch.Tensor"),
        ({"k": torch.zeros(300, 2, 64)}, ValueError, r"k has shape \[300, 2, 64\]; it needs 4 dimensions"),
        ({"k": torch.zeros(1, 300, 2, 64)}, ValueError, r"k has shape .*; dimension 0 \(batch\) needs to be 2"),
        ({"k": torch.zeros(2, 300, 2, 32)}, ValueError, r"k has shape .*; dimension 3 \(head_dim\) needs to be 64"),
        ({"k_scale": torch.ones(3)}, ValueError, r"k_scale has shape \[3\]; .* 2 KV heads"),
        ({"max_kv_len": 5}, ValueError, "max_kv_len is 5 without page_table; it goes with pages alone"),
        ({"page_table": torch.zeros(2, 3)}, ValueError, r"page_table is float32 of shape \[2, 3\]; .* int32 .*"),
        ({"q": torch.zeros(2, 4, 64, requires_grad=True)}, RuntimeError, "decode_context_parallel has no backward .*"),
    ],
)
def test_errors(alone: None, change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments() | {"min_sampled_len": 0} | change
    with pytest.raises(error) as caught:
        decode_context_parallel(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert re.fullmatch(f"santa: {message}", str(caught.value)), caught.value


def test_a_group_is_needed() -> None:
    with pytest.raises(ValueError, match=r"^santa: group is None; it needs .*\.init_process_group was not called$"):
        decode_context_parallel(**arguments())


def test_errors_of_shard_rows() -> None:
    with pytest.raises(ValueError, match="world_size is 0; it needs to be at least 1"):
        shard_rows(100, 0)
    with pytest.raises(ValueError, match="whole_lens is -1; it needs to be at least 0"):
        shard_rows(-1, 2)
    with pytest.raises(ValueError, match="whole_lens is int64; it needs to be int32"):
        shard_rows(torch.tensor([3]), 2)
    with pytest.raises(TypeError, match="whole_lens is a float; it needs to be an int"):
        shard_rows(1.5, 2)


# On GPUs ------------------------------------------------------------------------------------------------


def replays(rows: Rows, rank: int, world_size: int) -> list[tuple[Tensor, ...]]:
    """What a CUDA graph of the call gives as rows grow by a key in each step, and what the call itself gives then."""
    where = rows._whole(rank, world_size)[2]
    start, end = shard_rows(MAX_KV_LEN, world_size)[rank]
    k, v, kv_lens = rows.k[:, start:end], rows.v[:, start:end], where.pop("kv_lens")
    whole_lens = rows.lens.clone()

    def call() -> tuple[Tensor, ...]:
        return decode_context_parallel(
            rows.q, k, v, kv_lens=kv_lens, whole_lens=whole_lens, **where, **rows.options, return_rows_read=True
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    results = []
    for step in range(3):
        whole_lens.copy_((rows.lens + step).clamp(max=MAX_KV_LEN))
        kv_lens.copy_((whole_lens - start).clamp(0, end - start))
        graph.replay()
        replayed = tuple(x.clone() for x in captured)
        assert all(same_bits(a, b) for a, b in zip(replayed, call(), strict=True))
        results.append(replayed)
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exact", "grouped", "systematic uniform"])
def test_a_cuda_graph_follows_the_lengths(alone: None, name: str) -> None:
    results = replays(Rows(CASES[name], "cuda", torch.float16), 0, 1)
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.gpu
def test_lengths_that_do_not_add_up_are_nan_on_cuda(alone: None) -> None:
    rows = Rows(CASES["grouped"], "cuda", torch.float16)
    right = rows.on_rank(0, 1)
    out, lse, _ = rows.on_rank(0, 1, whole_lens=rows.lens + (rows.lens == 300))
    bad = rows.lens == 300
    assert out[bad].isnan().all() and lse[bad].isnan().all()
    assert torch.equal(out[~bad], right[0][~bad]) and torch.equal(lse[~bad], right[1][~bad])


def run_on_gpus(rank: int, world_size: int, directory: str) -> None:
    torch.cuda.set_device(rank)
    rendezvous = f"file://{directory}/rendezvous"
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    seen = watch_levels()
    found = {}
    for name, case in CASES.items():
        result = Rows(case, f"cuda:{rank}", torch.float16).on_rank(rank, world_size)
        found[name] = [x.cpu() for x in result]
        found[name, "levels"] = None if seen["levels"] is None else seen["levels"].cpu()
    for name in ("exact", "grouped"):
        steps = replays(Rows(CASES[name], f"cuda:{rank}", torch.float16), rank, world_size)
        found[name, "steps"] = [[x.cpu() for x in step] for step in steps]
    torch.save(found, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    """Through NCCL, every case, eager and in CUDA graphs."""
    mp.spawn(run_on_gpus, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, case in CASES.items():
        assert all(same_bits(found[0][name][x], found[1][name][x]) for x in (0, 1))
        if name == "a key is NaN":
            continue
        # With the same levels, so the same draws: levels of another pass agree to rounding alone, and a threshold may
        # lie within that of a boundary.
        levels = found[0][name, "levels"]
        on_one = Rows(case, "cuda", torch.float16).on_one(levels=None if levels is None else levels.cuda())
        expected = [x.cpu() for x in on_one]
        assert torch.equal(found[0][name][2] + found[1][name][2], expected[2])
        assert_close(tuple(found[0][name][:2]), tuple(expected[:2]), 2e-3)
    for name in ("exact", "grouped"):
        steps = found[0][name, "steps"]
        assert all(
            same_bits(a[x], b[x]) for a, b in zip(*(f[name, "steps"] for f in found), strict=True) for x in (0, 1)
        )
        assert not torch.equal(steps[0][0], steps[1][0])


def test_sinks_beside_a_slice_without_weight() -> None:
    """A slice whose scores lie far below the row's level has sums too small to be numbers: out is NaN, lse -inf. Its
    merge with the others and the sinks is what the others and the sinks are."""
    q, k, v = make_qkv(1, 4, 2, 256, 64, seed=5)
    sinks, lens = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([256], dtype=torch.int32)
    expected, expected_lse = santa.decode(q, k, v, num_samples=0, sinks=sinks)
    out, lse = santa.decode(q, k, v, num_samples=0)
    states = [(torch.full_like(out, math.nan), torch.full_like(lse, -math.inf), lens), (out, lse, lens)]
    gathered = torch.stack([distributed._pack(*state) for state in states])
    merged, merged_lse = distributed._merge_gathered(gathered, out, lse, 2 * lens, sinks)
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(merged_lse, expected_lse, rtol=0, atol=2e-6)
