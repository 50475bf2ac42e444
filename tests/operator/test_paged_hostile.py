"""Paged caches that break careless kernels, and CUDA graphs whose pages change between replays.

Everything that is not a row's key is NaN and every entry that is not a row's page is no page, in all tests here.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from helpers.inputs import SAMPLED, make_qkv, working_dtype
from helpers.paged import FORMS, JUNK_PAGES, PagedCache, assert_same_bits

import santa

ALL = [("grouped", "streaming", 0)] + [(*combination, 32) for combination in SAMPLED]
# Every kernel that looks pages up, once.
SANITIZED = {("grouped", "streaming", 0), ("grouped", "streaming", 32), ("systematic", "uniform", 32)}
SANITIZED |= {("grouped", "proportional", 32), ("stratified", "proportional", 32)}
OUTPUTS = ("out", "lse", "rows_read")


@pytest.fixture(
    params=[pytest.param(o, marks=pytest.mark.sanitize) if o in SANITIZED else o for o in ALL],
    ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}",
)
def options(request):
    """Those of the tests that are small enough for compute-sanitizer."""
    sampler, budget, num_samples = request.param
    return {
        "sampler": sampler,
        "budget": budget,
        "num_samples": num_samples,
        "min_sampled_len": 0,
        "return_rows_read": True,
    }


def problem(device, lens, *, q_len=None):
    q, k, v = make_qkv(len(lens), 4, 2, max(max(lens), 1), 64, dtype=working_dtype(device), device=device)
    if q_len is not None:
        generator = torch.Generator().manual_seed(7)
        q = torch.randn(len(lens), q_len, 4, 64, generator=generator).to(device, q.dtype)
    return q, k, v


def contiguous(cache: PagedCache, q, k, v, **options):
    return santa.decode(q, k, v, kv_lens=cache.int32(cache.lens), **options)


@pytest.mark.parametrize("page_size", [1, 2, 64])
@pytest.mark.parametrize("form", FORMS)
def test_rows_without_keys(device, options, page_size, form):
    """As a batch that is padded for a CUDA graph has them: zeros, -inf and no row read. Their entries are no pages."""
    lens = [0, 300, 0, 0, 65, 0]
    q, k, v = problem(device, lens)
    cache = PagedCache(k, v, page_size, lens=lens)
    actual = cache.decode(q, form=form, **options)
    empty = [0, 2, 3, 5]
    assert (actual[0][empty] == 0).all() and (actual[1][empty] == -math.inf).all() and (actual[2][empty] == 0).all()
    assert actual[0].isfinite().all()
    assert_same_bits(actual, contiguous(cache, q, k, v, **options))


def test_no_keys_no_pages_no_rows(device, options):
    q, k, v = problem(device, [0, 0])
    cache = PagedCache(k, v, 16, lens=[0, 0])
    arguments = cache.arguments()
    narrow = arguments | {"page_table": cache.table[:, :0]}
    for a in (arguments, narrow, narrow | {name: arguments[name][:0] for name in ("k_cache", "v_cache")}):
        out, lse, rows = santa.decode_paged(q, **a, **options)
        assert (out == 0).all() and (lse == -math.inf).all() and (rows == 0).all()
    lists = cache.arguments("csr") | {"kv_indices": cache.int32([])}
    assert (santa.decode_paged(q, **lists, **options)[0] == 0).all()
    out, lse, rows = santa.decode_paged(
        q[:0], **arguments | {name: arguments[name][:0] for name in ("page_table", "kv_lens")}, **options
    )
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4) and rows.shape == (0, 2)


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("form", FORMS)
def test_lengths_at_page_edges(device, options, page_size, form):
    """One key before, at and behind the edge of the first and of a later page; last pages of one key and full ones."""
    edges = (page_size, 128 - 128 % page_size + page_size)
    lens = sorted({edge + d for edge in edges for d in (-1, 0, 1)})
    q, k, v = problem(device, lens)
    cache = PagedCache(k, v, page_size, lens=lens)
    last = cache.arguments("csr")["kv_last_page_len"].tolist()
    assert 1 in last and page_size in last
    actual = cache.decode(q, form=form, **options)
    assert actual[0].isfinite().all()
    assert_same_bits(actual, contiguous(cache, q, k, v, **options))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("q_len", [1, 4])
def test_tables_wider_than_needed(device, options, page_size, q_len):
    """A hundred times as wide as the rows are long, all of it no pages."""
    lens = [257, 1, 64]
    q, k, v = problem(device, lens, q_len=q_len)
    cache = PagedCache(k, v, page_size, lens=lens, spare=25600 // page_size)
    assert cache.table.shape[1] > 25000 // page_size and all(page in cache.table for page in JUNK_PAGES)
    assert_same_bits(cache.decode(q, **options), contiguous(cache, q, k, v, **options))


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_shared_between_rows(device, options, page_size):
    """A common prefix is in the cache once; a row may even have a page twice."""
    lens = [400, 320, 160, 320]
    q, k, v = problem(device, lens)
    shared = 160
    k[1:, :shared], v[1:, :shared] = k[:1, :shared], v[:1, :shared]
    for x in (k, v):
        x[3, :320] = torch.cat([x[0, :shared], x[0, :shared]])
    cache = PagedCache(k, v, page_size, lens=lens)
    pages = shared // page_size
    cache.table[1:, :pages] = cache.table[0, :pages]
    cache.table[3, pages : 2 * pages] = cache.table[0, :pages]
    row_seeds = torch.arange(4, device=device)
    for form in FORMS:
        actual = cache.decode(q, form=form, row_seeds=row_seeds, **options)
        assert_same_bits(actual, contiguous(cache, q, k, v, row_seeds=row_seeds, **options))


@pytest.mark.parametrize("storage", ["separate", "[num_pages, 2, ...]"])
def test_what_other_pages_hold_does_not_matter(device, options, storage):
    """Beside NaN, which every test has there: infinities, and large numbers that a sum would show."""
    lens = [129, 300]
    q, k, v = problem(device, lens)
    cache = PagedCache(k, v, 64, lens=lens, storage=storage)
    expected = cache.decode(q, **options)
    for bad in (math.inf, -math.inf, 6e4):
        for x in (cache.k_cache, cache.v_cache):
            x.nan_to_num_(nan=bad)
        assert_same_bits(cache.decode(q, **options), expected)
        for x in (cache.k_cache, cache.v_cache):
            x.masked_fill_(x == bad, math.nan)


@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_first_page_before_the_window(device, options, form, q_len):
    """A window that begins at the first and at the last key of a page."""
    lens = [200, 193, 129]
    q, k, v = problem(device, lens, q_len=q_len)
    for window_left in (64 - q_len, 65 - q_len, 63 - q_len):
        unseen = [max(0, length - q_len - window_left) for length in lens]
        cache = PagedCache(k, v, 64, lens=lens, unseen=unseen)
        actual = cache.decode(q, form=form, window_left=window_left, **options)
        assert actual[0].isfinite().all()
        assert_same_bits(actual, contiguous(cache, q, k, v, window_left=window_left, **options))


# Rows that are not there --------------------------------------------------------------------------------


# What is wrong with row 1 of three rows of 100, 90 and 80 keys in pages of 16; what the CPU then says.
BAD_ROWS = {
    "kv_lens above max_kv_len": ("table", {"max_kv_len": 100, "kv_lens": [100, 101, 80]}, "kv_lens 101"),
    "kv_lens above the table": ("table", {"kv_lens": [100, 161, 80]}, "kv_lens 161"),
    "kv_lens negative": ("table", {"kv_lens": [100, -1, 80]}, "kv_lens -1"),
    "kv_lens far above": ("table", {"kv_lens": [100, 2**31 - 1, 80]}, "kv_lens 2147483647"),
    "kv_starts negative": ("table", {"kv_starts": [0, -1, 0]}, "kv_lens 90 and kv_starts -1"),
    "kv_starts too late": ("table", {"kv_starts": [0, 71, 0]}, "kv_lens 90 and kv_starts 71"),
    "list above max_kv_len": (
        "csr",
        {"max_kv_len": 100, "kv_indptr": [0, 7, 14, 18]},
        "kv_indptr 7 and kv_indptr behind it 14 and kv_last_page_len 10",
    ),
    "list descends": (
        "csr",
        {"kv_indptr": [0, 7, 6, 11]},
        "kv_indptr 7 and kv_indptr behind it 6 and kv_last_page_len 10",
    ),
    "last page empty": (
        "csr",
        {"kv_last_page_len": [4, 0, 16]},
        "kv_indptr 7 and kv_indptr behind it 13 and kv_last_page_len 0",
    ),
    "last page too full": (
        "csr",
        {"kv_last_page_len": [4, 17, 16]},
        "kv_indptr 7 and kv_indptr behind it 13 and kv_last_page_len 17",
    ),
}


def bad_rows(device, name):
    form, changes, got = BAD_ROWS[name]
    q, k, v = problem(device, [100, 90, 80])
    cache = PagedCache(k, v, 16, lens=[100, 90, 80])
    arguments = cache.arguments(form)
    return q, arguments, {n: cache.int32(x) if isinstance(x, list) else x for n, x in changes.items()}, got


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("num_samples", [0, 16])
def test_row_outside_the_cache_raises_on_the_cpu(name, num_samples):
    q, arguments, changes, got = bad_rows("cpu", name)
    options = {"num_samples": num_samples, "min_sampled_len": 0}
    bound = changes.get("max_kv_len", 160 if "page_table" in arguments else 16 * len(arguments["kv_indices"]))
    with pytest.raises(ValueError, match=rf"^santa: row 1 has {got}; .*max_kv_len (keys )?\({bound}\)"):
        santa.decode_paged(q, **arguments | changes, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD_ROWS)
def test_row_outside_the_cache_is_nan_on_cuda(name, options):
    """Looking would stop the stream, so the row reads nothing and says so: NaN, NaN and -1. Its neighbours come out as
    they do without it."""
    q, arguments, changes, _ = bad_rows("cuda", name)
    actual = santa.decode_paged(q, **arguments | changes, **options)
    torch.cuda.synchronize()
    assert actual[0][1].isnan().all() and actual[1][1].isnan().all() and (actual[2][1] == -1).all()
    expected = santa.decode_paged(q, **arguments, **options)
    # Where the list of row 1 ends elsewhere, that of row 2 begins elsewhere.
    others = [0] if "kv_indptr" in changes else [0, 2]
    assert_same_bits([x[others] for x in actual], [x[others] for x in expected])
    assert actual[0][others].isfinite().all()


@pytest.mark.parametrize("num_samples", [0, 16])
def test_page_outside_the_cache_raises_on_the_cpu(num_samples):
    """The first and the last page of a row; the entry behind the last one is not looked at."""
    lens = [100, 90, 80]
    q, k, v = problem("cpu", lens)
    cache = PagedCache(k, v, 16, lens=lens)
    num_pages = len(cache.k_cache)
    options = {"num_samples": num_samples, "min_sampled_len": 0}
    for entry, position in ((0, 0), (5, 80)):
        for page in (num_pages, 2147480000, -1):
            table = cache.table.clone()
            table[1, entry] = page
            with pytest.raises(
                ValueError,
                match=rf"^santa: row 1 has page {page} for the key at position {position}; "
                rf"pages need to be in \[0, {num_pages}\)$",
            ):
                cache.decode(q, page_table=table, **options)
            lists = cache.arguments("csr")
            lists["kv_indices"][7 + entry] = page
            with pytest.raises(ValueError, match=f"^santa: row 1 has page {page} for the key at position {position};"):
                santa.decode_paged(q, **lists, **options)
    table = cache.table.clone()
    table[1, 6] = num_pages
    assert_same_bits(cache.decode(q, page_table=table, **options), cache.decode(q, **options))


@pytest.mark.parametrize("indptr", [[0, 7, 13, 99], [-3, 7, 13, 18], [2**30, 2**30 + 7, 2**30 + 13, 2**30 + 18]])
def test_list_outside_kv_indices(device, indptr):
    q, k, v = problem(device, [100, 90, 80])
    cache = PagedCache(k, v, 16, lens=[100, 90, 80])
    arguments = cache.arguments("csr") | {"kv_indptr": cache.int32(indptr), "max_kv_len": 2**20}
    if device == "cuda":
        assert santa.decode_paged(q, **arguments)[0].isnan().all(dim=-1).all(dim=-1).any()
        return
    with pytest.raises(ValueError, match=r"^santa: row \d has kv_indptr .*kv_indices"):
        santa.decode_paged(q, **arguments)


# CUDA graphs --------------------------------------------------------------------------------------------


class GraphStep:
    """A captured call whose lengths, pages and keys are changed in place."""

    def __init__(self, form, options):
        self.lens = [[300, 65, 0], [301, 66, 1], [301, 66, 1], [302, 0, 2], [700, 640, 641], [16, 15, 17]]
        self.form, self.options = form, {"row_seeds": torch.arange(3, device="cuda"), **options}
        self.q, self.k, self.v = problem("cuda", [700, 700, 700])
        caches = [self.cache(i, self.lens[i]) for i in range(len(self.lens))]
        self.pages = max(len(cache.k_cache) for cache in caches)
        self.entries = max(cache.arguments(form)[self.list_name].numel() for cache in caches)
        self.arguments = self.padded(caches[0])

    def cache(self, seed, lens):
        """The same keys in other pages."""
        return PagedCache(self.k, self.v, 16, lens=lens, seed=seed, spare=44 - -(-max(lens) // 16))

    @property
    def list_name(self):
        return "page_table" if self.form == "table" else "kv_indices"

    def padded(self, cache):
        """Tensors of a size that fits all steps; what is added is NaN and no pages."""
        a = cache.arguments(self.form)
        for name in ("k_cache", "v_cache"):
            more = self.pages - len(a[name])
            a[name] = torch.cat([a[name], torch.full_like(a[name][:1], math.nan).expand(more, -1, -1, -1)])
        if self.form == "csr":
            more = self.entries - a["kv_indices"].numel()
            a["kv_indices"] = torch.cat([a["kv_indices"], cache.int32([JUNK_PAGES[0]] * more)])
        return a

    def move_to(self, i):
        for name, x in self.padded(self.cache(i, self.lens[i])).items():
            if isinstance(x, torch.Tensor):
                self.arguments[name].copy_(x)

    def run(self):
        return santa.decode_paged(self.q, max_kv_len=700, **self.arguments, **self.options)


@pytest.mark.gpu
@pytest.mark.skipif(
    os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1", reason="a capture needs the caching allocator"
)
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_follows_lengths_and_pages(form, options):
    """Results of a replay are those of an eager call on what the tensors hold by then; a longer row draws fresh
    numbers, and the same keys in other pages, at the same length, the same ones."""
    step = GraphStep(form, options)
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    results = []
    for i, lens in enumerate(step.lens):
        step.move_to(i)
        for x in captured:
            x.fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        results.append([x.clone() for x in captured])
        assert_same_bits(captured, step.run())
        kv_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        assert_same_bits(captured, santa.decode(step.q, step.k, step.v, kv_lens=kv_lens, **step.options))
    assert_same_bits(results[1], results[2])
    assert not torch.equal(results[0][0][0], results[1][0][0])


@pytest.mark.gpu
@pytest.mark.parametrize(("sampler", "budget"), SAMPLED)
def test_random_numbers_differ_between_replays(sampler, budget):
    """Keys are all alike and values a ramp, so that a draw shows; every step draws other rows, and the first length the
    first ones again."""
    kv_len, page_size = 512, 16
    q, k, _ = problem("cuda", [kv_len])
    k[:] = 0
    v = torch.arange(kv_len, device="cuda").to(k.dtype).view(1, -1, 1, 1).expand_as(k) / kv_len
    cache = PagedCache(k, v, page_size, lens=[kv_len])
    arguments = cache.arguments()

    def run():
        options = {"num_samples": 8, "sampler": sampler, "budget": budget, "min_sampled_len": 0}
        return santa.decode_paged(q, **arguments, **options)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    steps = []
    for length in [*range(480, 500), 480]:
        arguments["kv_lens"].fill_(length)
        graph.replay()
        steps.append(out[0, 0, 0].item())
    assert steps[0] == steps[-1]
    assert len(set(steps)) >= 15  # of 20; two may be equal by chance
