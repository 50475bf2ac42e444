"""The CUDA kernels of decode on the host (emulator.h says how, and what that can't show), beside the CPU backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import emulator
from helpers.draws import assert_same_draws, other_draws
from helpers.statistics import relative_rms

import santa

FP8 = torch.float8_e4m3fn
LIBRARY = emulator.build()
if isinstance(LIBRARY, str):
    pytest.skip(LIBRARY, allow_module_level=True)

# Outputs are rounded to 16 bits; exact rows round probabilities as well.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
# Rows of several parts, which end in the middle of a tile.
LENS = [1437, 700]


class Case:
    """Arguments of a call, the same for the kernels and for the CPU backend."""

    def __init__(
        self,
        *,
        group: int = 4,
        head_dim: int = 64,
        num_kv_heads: int = 2,
        lens: list[int] | None = None,
        known: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        storage: str = "",
        layout: str = "NHD",
        page_size: int = 0,
        q_len: int = 1,
        seed: int = 3,
        proposes: bool = False,
        **options: Any,
    ) -> None:
        self.proposes = proposes
        lens = LENS if lens is None else lens
        batch, width = len(lens), max(lens)
        generator = torch.Generator().manual_seed(seed)
        self.q = (torch.randn(batch, q_len, num_kv_heads * group, head_dim, generator=generator) * 1.5).to(dtype)
        if q_len == 1:
            self.q = self.q[:, 0].contiguous()
        k, v = (torch.randn(batch, width, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in "kv")
        k, v = (k.to(FP8) if storage else k), (v.to(FP8) if storage == "KV" else v)
        self.options: dict[str, Any] = {
            "num_samples": 64,
            "min_sampled_len": 0,
            "seed": 5,
            "row_seeds": torch.arange(batch) * 7 + 1,
            "kv_layout": layout,
        } | options
        if not known:
            self.options["kv_lens"] = torch.tensor(lens, dtype=torch.int32)
        if page_size:
            pages = -(-width // page_size)
            table = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages].view(batch, pages)
            k, v = (self._paged(x, table, page_size) for x in (k, v))
            self.options["page_table"] = table.int()
        if layout == "HND":
            k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
        self.k, self.v = k, v
        if self.proposes:
            lens = self.options.get("kv_lens")
            starts, table = self.options.get("kv_starts"), self.options.get("page_table")
            if starts is not None:
                lens = lens - starts
            self.options["proposal"] = santa.make_proposal_keys(
                k, lens, kv_starts=starts, page_table=table, kv_layout=layout
            )

    @staticmethod
    def _paged(x: torch.Tensor, table: torch.Tensor, page_size: int) -> torch.Tensor:
        """Rows in pages of a cache that is NaN elsewhere."""
        batch, pages = table.shape
        junk = 0x7F if x.element_size() == 1 else 0x7FFF
        integers = torch.uint8 if x.element_size() == 1 else torch.int16
        rows = torch.full((batch, pages * page_size, *x.shape[2:]), junk, dtype=integers)
        rows[:, : x.shape[1]] = x.view(integers)
        cache = torch.full((batch * pages + 3, page_size, *x.shape[2:]), junk, dtype=integers)
        cache[table] = rows.view(batch, pages, page_size, *x.shape[2:])
        return cache.view(x.dtype)

    def emulated(self, *, seed: int | None = None, **device: int) -> tuple[torch.Tensor, ...]:
        assert not isinstance(LIBRARY, str)
        with emulator.device(LIBRARY, **device):
            return self._call(**{} if seed is None else {"seed": seed})

    def on_cpu(self) -> tuple[torch.Tensor, ...]:
        return self._call()

    def _call(self, **changes: Any) -> tuple[torch.Tensor, ...]:
        function = santa.decode_paged if "page_table" in self.options else santa.decode
        return function(self.q, self.k, self.v, return_rows_read=True, **self.options | changes)

    def check(self) -> None:
        """The same draws, and the same outputs up to rounding."""
        by_seed = ((self.emulated(seed=seed), self._call(seed=seed)) for seed in (5, 6))
        assert_same_draws(by_seed, num_samples=self.options["num_samples"], tolerance=TOLERANCE[self.q.dtype])


HOW = {
    "exact": {"num_samples": 0},
    "grouped": {},
    "systematic": {"sampler": "systematic"},
    "uniform": {"budget": "uniform", "num_samples": 200},
    "proportional": {"budget": "proportional"},
    "proposal keys": {"proposes": True},
}
CUTS: dict[str, dict[str, Any]] = {
    "group 1": {"group": 1},
    "group 7, float16": {"group": 7, "dtype": torch.float16},
    "group 12": {"group": 12, "num_kv_heads": 1},
    "head_dim 96": {"head_dim": 96},
    "head_dim 128, HND": {"head_dim": 128, "layout": "HND"},
    "head_dim 256": {"head_dim": 256},
    "float8 K": {"storage": "K"},
    "float8 K, head_dim 96": {"storage": "K", "head_dim": 96},
    "float8 K and V, head_dim 128": {"storage": "KV", "head_dim": 128},
    "float8 K and V, head_dim 192": {"storage": "KV", "head_dim": 192},
    "lengths known": {"lens": [1100, 1100], "known": True},
    "a row without keys": {"lens": [1100, 0, 1]},
    "starts": {"kv_starts": torch.tensor([3, 77], dtype=torch.int32), "lens": [1437, 1514]},
    "pages of 16": {"page_size": 16},
    "pages of 16, head_dim 192": {"page_size": 16, "head_dim": 192},
    "pages of 16, float8 K and V": {"page_size": 16, "storage": "KV"},
    "pages of 16, starts": {
        "page_size": 16,
        "kv_starts": torch.tensor([3, 77], dtype=torch.int32),
        "lens": [1437, 1514],
    },
    "pages of 1, HND": {"page_size": 1, "layout": "HND"},
    "three tokens": {"q_len": 3, "group": 2},
    "window": {"window_left": 600},
    "soft cap": {"logits_soft_cap": 3.0},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("how", HOW)
def test_kernels_give_what_the_cpu_gives(how: str, cut: str) -> None:
    case = Case(**HOW[how] | CUTS[cut])
    if "starts" in cut:
        case.options["kv_lens"] -= case.options["kv_starts"]
    case.check()


@pytest.mark.parametrize("sampler", ["stratified", "multinomial"])
def test_other_proportional_samplers(sampler: str) -> None:
    Case(sampler=sampler, budget="proportional").check()


@pytest.mark.parametrize("budget", ["streaming", "proportional"])
def test_exact_rows_beside_sampled_ones(budget: str) -> None:
    """Of a batch of more rows than a warp has lanes."""
    lens = [(37 * i) % 1100 for i in range(70)]
    Case(lens=lens, min_sampled_len=600, num_kv_heads=1, group=2, budget=budget).check()


def test_more_draws_than_a_chunk_holds() -> None:
    Case(num_samples=2000).check()


@pytest.mark.parametrize("head_dim, storage", [(128, ""), (192, "KV"), (256, "K")])
@pytest.mark.parametrize("how", HOW)
def test_bits_depend_on_neither_threads_nor_the_device(how: str, head_dim: int, storage: str) -> None:
    """Threads in other orders, one multiprocessor and many, little shared memory: the same bits."""
    case = Case(lens=[2900, 700, 90], head_dim=head_dim, storage=storage, **HOW[how])
    expected = case.emulated()
    for changes in ({"order": 7}, {"order": 101}, {"num_sms": 1, "sm_kb": 100}, {"num_sms": 132, "order": 31}):
        found = case.emulated(**changes)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", ["exact", "grouped", "proposal keys"])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_ragged_batches_are_cut_whole(how: str, count: int) -> None:
    """Lengths on the device, rows of one part and of several, fewer and more rows than CTAs: nothing of a row is lost,
    on whatever device."""
    lens = [(733 * i + 290) % 1500 for i in range(count)]
    case = Case(lens=lens, num_kv_heads=1, group=2, **HOW[how] | {"min_sampled_len": 300})
    expected = case.emulated(num_sms=132)
    assert relative_rms(expected[0], case.on_cpu()[0].double()) < TOLERANCE[torch.bfloat16]
    for num_sms in (1, 3, 11) if count < 40 else (3,):
        assert all(torch.equal(x, y) for x, y in zip(case.emulated(num_sms=num_sms), expected, strict=True))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_rows_that_one_cta_has_are_combined_alike(head_dim: int) -> None:
    """Exact rows of known length, of several tiles: on a small device each is one CTA's, which combines it itself."""
    case = Case(lens=[1700, 1700], known=True, head_dim=head_dim, group=3, num_samples=0)
    expected = case.emulated(num_sms=132)
    assert relative_rms(expected[0], case.on_cpu()[0].double()) < TOLERANCE[torch.bfloat16]
    assert all(torch.equal(x, y) for x, y in zip(case.emulated(num_sms=1), expected, strict=True))


def test_parts_that_warps_share() -> None:
    """With proposal keys, on a device with too few parts for all warps; on a small one each warp takes whole ones."""
    case = Case(lens=[1000], group=1, num_kv_heads=70, proposes=True, num_samples=20)
    case.check()
    expected = case.emulated(num_sms=132)
    for num_sms in (1, 2):
        assert all(torch.equal(x, y) for x, y in zip(case.emulated(num_sms=num_sms), expected, strict=True))


@pytest.mark.parametrize("how", HOW)
def test_bits_do_not_depend_on_the_batch(how: str) -> None:
    case = Case(lens=[1437, 2100, 90], **HOW[how])
    together = case.emulated()
    for row in range(3):
        alone = Case(lens=[1437, 2100, 90], **HOW[how])
        alone.q, alone.k, alone.v = (x[row : row + 1] for x in (case.q, case.k, case.v))
        if case.proposes:
            tensors = {name: x[row : row + 1] for name, x in case.options["proposal"].tensors().items()}
            alone.options["proposal"] = replace(case.options["proposal"], **tensors)
        for name in ("kv_lens", "row_seeds"):
            alone.options[name] = case.options[name][row : row + 1]
        for x, y in zip(alone.emulated(), together, strict=True):
            assert torch.equal(x[0], y[row])


def test_another_seed_gives_other_draws() -> None:
    """What the comparisons above would see."""
    case = Case()
    assert other_draws(case.emulated(), case.emulated(seed=6), TOLERANCE[case.q.dtype]).all()
