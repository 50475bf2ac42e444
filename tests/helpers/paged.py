"""Paged caches with the keys of a contiguous one, in which whatever is not a row's key is NaN and whatever is not a
row's page is no page."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import santa

PAGE_SIZES = [1, 2, 16, 64, 256]
# How k_cache and v_cache lie in memory: apart, or halves of one tensor.
STORAGES = ["separate", "[num_pages, 2, ...]", "[2, num_pages, ...]"]
FORMS = ["table", "csr"]
# No page of any cache: an address would lie far outside it.
JUNK_PAGES = [2147480000, -1]


class PagedCache:
    """The rows of k and v, NHD: keys [starts[b], starts[b] + lens[b]) of row b, in pages shuffled over the cache.

    `unseen`: further keys at the front of each row that are never to be read, as behind a window: they lie nowhere.
    `spare`: entries of the table that are not needed. Rows that are to share pages are moved by hand, in `table`.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        page_size: int,
        *,
        lens: list[int],
        starts: list[int] | None = None,
        unseen: list[int] | None = None,
        layout: str = "NHD",
        storage: str = "separate",
        spare: int = 3,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        device, batch = k.device, len(lens)
        starts = [0] * batch if starts is None else starts
        unseen = [0] * batch if unseen is None else unseen
        self.page_size, self.layout, self.lens, self.starts = page_size, layout, lens, starts
        self.pages = [-(-(starts[b] + lens[b]) // page_size) for b in range(batch)]
        num_pages = sum(self.pages) + 5
        self.k_cache, self.v_cache = _nan_pages(k, v, num_pages, page_size, layout, storage)
        free = torch.randperm(num_pages, generator=generator)
        width = max(self.pages, default=0) + spare
        table = torch.tensor(JUNK_PAGES)[torch.arange(batch * width).reshape(batch, width) % 2]
        for b in range(batch):
            first, stop = starts[b] + unseen[b], starts[b] + lens[b]
            used = torch.arange(first // page_size, self.pages[b] if first < stop else first // page_size)
            own, free = free[: len(used)], free[len(used) :]
            table[b, used] = own
            positions = torch.arange(first, stop)
            pages = table[b, positions // page_size].to(device)
            offsets = (positions % page_size).to(device)
            for cache, x in ((self.k_cache, k), (self.v_cache, v)):
                nhd = cache if layout == "NHD" else cache.transpose(1, 2)
                _bytes(nhd)[pages, offsets] = _bytes(x)[b, first:stop]
        self.table = table.to(device, torch.int32)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def arguments(self, form: str = "table") -> dict[str, Any]:
        """Of santa.decode_paged, but for q and options. CSR has no starts: its rows begin with their first page."""
        cache = {"k_cache": self.k_cache, "v_cache": self.v_cache, "kv_layout": self.layout}
        if form == "table":
            starts = {"kv_starts": self.int32(self.starts)} if any(self.starts) else {}
            return cache | {"page_table": self.table, "kv_lens": self.int32(self.lens)} | starts
        assert not any(self.starts)
        rows = [self.table[b, :pages] for b, pages in enumerate(self.pages)]
        return cache | {
            "kv_indptr": self.int32([sum(self.pages[:b]) for b in range(len(rows) + 1)]),
            "kv_indices": torch.cat([*rows, self.int32(JUNK_PAGES)]),
            "kv_last_page_len": self.int32([(n - 1) % self.page_size + 1 if n else 0 for n in self.lens]),
        }

    def decode(self, q: Tensor, *, form: str = "table", **options: Any) -> tuple[Tensor, ...]:
        return santa.decode_paged(q, **self.arguments(form) | options)


def _bytes(x: Tensor) -> Tensor:
    """Indexing by tensors is not there for float8 in every torch."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _nan_pages(k: Tensor, v: Tensor, num_pages: int, page_size: int, layout: str, storage: str) -> list[Tensor]:
    heads, head_dim = k.shape[2:]
    page = (page_size, heads, head_dim) if layout == "NHD" else (heads, page_size, head_dim)
    nan = [torch.full((), float("nan"), device=x.device).to(x.dtype) for x in (k, v)]
    if storage == "separate":
        return [x.expand(num_pages, *page).contiguous() for x in nan]
    if storage == "[num_pages, 2, ...]":
        whole = nan[0].expand(num_pages, 2, *page).contiguous()
        return [whole[:, 0], whole[:, 1]]
    whole = nan[0].expand(2, num_pages, *page).contiguous()
    return [whole[0], whole[1]]


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
