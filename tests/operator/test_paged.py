"""decode_paged gives the bits of decode on the same keys, whatever its pages look like.

All memory that is not a row's key is NaN and all entries of tables that are not a row's page are no pages, so every
test here is one of what is read as well.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.float8 import quantised
from helpers.inputs import HEAD_DIMS, SAMPLED, dtypes_of, make_qkv, working_dtype
from helpers.paged import FORMS, PAGE_SIZES, STORAGES, PagedCache, assert_same_bits

import santa

OPTIONS = [("grouped", "streaming", 0)] + [(*combination, 32) for combination in SAMPLED]
SANITIZED = [pytest.param(size, marks=pytest.mark.sanitize) if size == 16 else size for size in PAGE_SIZES]
LENS = [1100, 700, 129]  # several parts and tiles of every kind, the last ones ragged


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}")
def options(request):
    sampler, budget, num_samples = request.param
    return {
        "sampler": sampler,
        "budget": budget,
        "num_samples": num_samples,
        "min_sampled_len": 0,
        "return_rows_read": True,
    }


def problem(device, *, q_len=None, num_qo_heads=8, head_dim=64, dtype=None, lens=None, room=0):
    """(q, k, v), NHD, with `room` for more keys than a row has, and what tells rows apart."""
    lens = LENS if lens is None else lens
    dtype = working_dtype(device) if dtype is None else dtype
    q, k, v = make_qkv(
        len(lens), num_qo_heads, 2, max(lens) + room, head_dim, dtype=dtype, device=device, logit_std=2.0
    )
    if q_len is not None:
        generator = torch.Generator().manual_seed(7)
        q = 2 * torch.randn(len(lens), q_len, num_qo_heads, head_dim, generator=generator)
        q = q.to(device, dtype)
    return (q, k, v), torch.arange(5, 5 + len(lens), device=device)


def lens_of(cache: PagedCache) -> dict[str, torch.Tensor]:
    return {"kv_lens": cache.int32(cache.lens), "kv_starts": cache.int32(cache.starts)}


@pytest.mark.parametrize("page_size", SANITIZED)
def test_every_layout_and_form(device, options, page_size):
    (q, k, v), row_seeds = problem(device)
    options |= {"row_seeds": row_seeds}
    kv_lens = torch.tensor(LENS, dtype=torch.int32, device=device)
    expected = santa.decode(q, k, v, kv_lens=kv_lens, **options)
    for layout, storage in itertools.product(("NHD", "HND"), STORAGES):
        cache = PagedCache(k, v, page_size, lens=LENS, layout=layout, storage=storage)
        for form in FORMS:
            assert_same_bits(cache.decode(q, form=form, **options), expected)


@pytest.mark.parametrize("page_size", [1, 16])
def test_every_dtype_head_dim_and_group(device, options, page_size):
    """Other kernels, the same addresses."""
    for dtype, head_dim in itertools.product(dtypes_of(device), HEAD_DIMS if device == "cuda" else [64, 192]):
        for group_size in (1, 9):
            (q, k, v), _ = problem(device, num_qo_heads=2 * group_size, head_dim=head_dim, dtype=dtype, lens=[700, 65])
            cache = PagedCache(k, v, page_size, lens=[700, 65])
            expected = santa.decode(q, k, v, kv_lens=cache.int32(cache.lens), **options)
            assert_same_bits(cache.decode(q, **options), expected)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_float8(device, kind, options, page_size):
    """K, or K and V, with a scale of each head or of the tensor, as a tensor or as a number."""
    (q, k, v), row_seeds = problem(device)
    options |= {"row_seeds": row_seeds}
    for per_head in (True, False):
        k8, v8, scales = quantised(kind, k, v, per_head=per_head)
        storages = STORAGES if kind == "fp8" else STORAGES[:1]  # halves of a tensor have one dtype
        for layout, storage in itertools.product(("NHD", "HND"), storages):
            cache = PagedCache(k8, v8, page_size, lens=LENS, layout=layout, storage=storage)
            expected = santa.decode(q, k8, v8, kv_lens=cache.int32(LENS), **scales, **options)
            assert_same_bits(cache.decode(q, **scales, **options), expected)
            if not per_head:
                numbers = {name: float(scale) for name, scale in scales.items()}
                assert_same_bits(cache.decode(q, form="csr", **numbers, **options), expected)


@pytest.mark.parametrize("page_size", SANITIZED)
@pytest.mark.parametrize("q_len", [1, 3])
def test_new_tokens(device, options, page_size, q_len):
    (q, k, v), row_seeds = problem(device, q_len=q_len)
    options |= {"row_seeds": row_seeds}
    cache = PagedCache(k, v, page_size, lens=LENS)
    expected = santa.decode(q, k, v, kv_lens=cache.int32(LENS), **options)
    assert expected[0].shape == q.shape and expected[1].shape == q.shape[:3]
    for form in FORMS:
        assert_same_bits(cache.decode(q, form=form, **options), expected)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("window_left", [0, 63, 400, 5000])
def test_window(device, options, page_size, q_len, window_left):
    """Keys that no token sees have no page any more, as in a cache that frees them."""
    (q, k, v), row_seeds = problem(device, q_len=q_len)
    options |= {"row_seeds": row_seeds, "window_left": window_left}
    unseen = [max(0, length - q_len - window_left) for length in LENS]
    cache = PagedCache(k, v, page_size, lens=LENS, unseen=unseen)
    expected = santa.decode(q, k, v, kv_lens=cache.int32(LENS), **options)
    for form in FORMS:
        assert_same_bits(cache.decode(q, form=form, **options), expected)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_left_padding(device, options, page_size, q_len):
    """Rows that begin anywhere in a page: the pages in front of that one are not looked at."""
    (q, k, v), row_seeds = problem(device, q_len=q_len, room=400)
    options |= {"row_seeds": row_seeds}
    for starts, window_left in (([3, 300, 64], -1), ([255, 256, 257], 70)):
        unseen = [0 if window_left < 0 else max(0, length - q_len - window_left) for length in LENS]
        cache = PagedCache(k, v, page_size, lens=LENS, starts=starts, unseen=unseen)
        expected = santa.decode(q, k, v, window_left=window_left, **lens_of(cache), **options)
        assert_same_bits(cache.decode(q, window_left=window_left, **options), expected)


@pytest.mark.parametrize("page_size", SANITIZED)
def test_all_features_together(device, options, page_size):
    (q, k, v), row_seeds = problem(device, q_len=3, room=40)
    k, v, scales = quantised("fp8", k, v)
    options |= {"row_seeds": row_seeds, "window_left": 500, "logits_soft_cap": 5.0, "sm_scale": 0.2, "first_kv_head": 3}
    options |= {"sinks": torch.linspace(-2, 4, 8, device=device), "positions": row_seeds.int(), **scales}
    unseen = [max(0, length - 3 - 500) for length in LENS]
    cache = PagedCache(k, v, page_size, lens=LENS, starts=[40, 7, 0], unseen=unseen, layout="HND", storage=STORAGES[1])
    assert_same_bits(cache.decode(q, **options), santa.decode(q, k, v, **lens_of(cache), **options))


@pytest.mark.parametrize("q_len", [None, 2])
def test_exact_and_sampled_rows_together(device, options, q_len):
    """min_sampled_len within the lengths, and rows that are all of one kind: what the host expects to come, from either
    form, does not change what does."""
    (q, k, v), row_seeds = problem(device, q_len=q_len)
    cache = PagedCache(k, v, 16, lens=LENS)
    kinds = set()
    for min_sampled_len in (100, 500, 1100, 1101, 5000):
        options |= {"row_seeds": row_seeds, "min_sampled_len": min_sampled_len}
        expected = santa.decode(q, k, v, kv_lens=cache.int32(LENS), **options)
        kinds |= {tuple((expected[2][:, 0].cpu() < torch.tensor(LENS)).tolist())}
        for form in FORMS:
            assert_same_bits(cache.decode(q, form=form, **options), expected)
    few = options["num_samples"] > 0
    assert ((True, True, False) in kinds) == few and (False, False, False) in kinds


def test_max_kv_len_changes_no_bit(device, options):
    """It is a bound, from the longest row's length on; without it, the table's width is."""
    (q, k, v), row_seeds = problem(device)
    options |= {"row_seeds": row_seeds}
    cache = PagedCache(k, v, 16, lens=LENS, spare=300)
    expected = santa.decode(q, k, v, kv_lens=cache.int32(LENS), **options)
    for max_kv_len in (None, 1100, 1101, 4096, 2**31 - 1):
        for form in FORMS:
            assert_same_bits(cache.decode(q, form=form, max_kv_len=max_kv_len, **options), expected)


def test_strides(device, options):
    """Pages of several layers in one tensor, K and V in unlike ones, rows aligned to 16 bytes or not; a table that is
    part of a wider one."""
    (q, k, v), row_seeds = problem(device)
    options |= {"row_seeds": row_seeds}
    cache = PagedCache(k, v, 16, lens=LENS)
    expected = santa.decode(q, k, v, kv_lens=cache.int32(LENS), **options)
    arguments = cache.arguments()
    for gap in (8, 1):
        layers = torch.full((cache.k_cache.shape[0], 3, 16, 2, 64 + gap), float("nan"), dtype=k.dtype, device=device)
        layers[:, 1, ..., gap:] = cache.k_cache
        v_cache = torch.full((2, 20, cache.v_cache.shape[0], 64 + gap), float("nan"), dtype=v.dtype, device=device)
        v_cache[:, 3:19, :, gap:] = cache.v_cache.permute(2, 1, 0, 3)
        wide = torch.full((3, cache.table.shape[1] + 5), -1, dtype=torch.int32, device=device)
        wide[:, 2:-3] = cache.table
        strided = {
            "k_cache": layers[:, 1, ..., gap:],
            "v_cache": v_cache[:, 3:19, :, gap:].permute(2, 1, 0, 3),
            "page_table": wide[:, 2:-3],
        }
        assert_same_bits(santa.decode_paged(q, **arguments | strided, **options), expected)


def test_contiguous_cache_as_pages(device, options):
    """Without a copy: the pages of a contiguous cache, row by row."""
    (q, k, v), row_seeds = problem(device, lens=[1024, 1024, 1024])
    options |= {"row_seeds": row_seeds}
    kv_lens = torch.tensor(LENS, dtype=torch.int32, device=device).clamp(max=1024)
    for page_size in PAGE_SIZES:
        pages = 1024 // page_size
        table = torch.arange(3 * pages, dtype=torch.int32, device=device).reshape(3, pages)
        caches = [x.reshape(3 * pages, page_size, 2, 64) for x in (k, v)]
        actual = santa.decode_paged(q, *caches, page_table=table, kv_lens=kv_lens, **options)
        assert_same_bits(actual, santa.decode(q, k, v, kv_lens=kv_lens, **options))


def test_singleton_dimensions_have_any_stride(device, options):
    """One KV head, pages of one key, one page: strides that are never used say nothing."""
    (q, k, v), _ = problem(device, lens=[256, 129])
    kv_lens = torch.tensor([256, 129], dtype=torch.int32, device=device)
    k, v = (x[:, :, :1].contiguous() for x in (k, v))
    expected = santa.decode(q, k, v, kv_lens=kv_lens, **options)
    rows = torch.arange(512, dtype=torch.int32, device=device).reshape(2, 256)
    for page, head in ((1, 3), (0, 0), (2**40, 2**40)):
        pages = [x.as_strided((512, 1, 1, 64), (64, page, head, 1)) for x in (k, v)]
        assert_same_bits(santa.decode_paged(q, *pages, page_table=rows, kv_lens=kv_lens, **options), expected)
        one = [x.as_strided((1, 256, 1, 64), (page, 64, head, 1), 256 * 64) for x in (k, v)]
        table, length = rows[:1, :1] * 0, kv_lens[1:]
        actual = santa.decode_paged(q[1:], *one, page_table=table, kv_lens=length, **options)
        assert_same_bits(actual, [x[1:] for x in expected])


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_long_rows(device, options, page_size):
    """Where every kind of tile and part has grown."""
    lens = [40000, 9000]
    (q, k, v), row_seeds = problem(device, num_qo_heads=2, lens=lens)
    options |= {"row_seeds": row_seeds}
    expected = santa.decode(q, k, v, kv_lens=torch.tensor(lens, dtype=torch.int32, device=device), **options)
    cache = PagedCache(k, v, page_size, lens=lens)
    for form in FORMS:
        assert_same_bits(cache.decode(q, form=form, **options), expected)


def test_list_of_keys(device, options):
    """Pages of one key: the keys that a method of KV selection or eviction has left, in any order, some twice."""
    (q, k, v), _ = problem(device)
    generator = torch.Generator().manual_seed(3)
    kept = [torch.randint(1100, (count,), generator=generator) for count in (900, 0, 77)]
    gathered = [torch.zeros(3, 900, 2, 64, dtype=k.dtype, device=device) for _ in "kv"]
    for b, keys in enumerate(kept):
        for x, target in zip((k, v), gathered, strict=True):
            target[b, : len(keys)] = x[b, keys.to(device)]
    kv_lens = torch.tensor([900, 0, 77], dtype=torch.int32, device=device)
    expected = santa.decode(q, *gathered, kv_lens=kv_lens, **options)
    indices = torch.cat([keys + 1100 * b for b, keys in enumerate(kept)])
    actual = santa.decode_paged(
        q,
        k.reshape(-1, 1, 2, 64),
        v.reshape(-1, 1, 2, 64),
        kv_indptr=torch.tensor([0, 900, 900, 977], dtype=torch.int32, device=device),
        kv_indices=indices.to(device, torch.int32),
        kv_last_page_len=torch.ones(3, dtype=torch.int32, device=device),
        **options,
    )
    assert_same_bits(actual, expected)


def test_cache_that_is_kept_padded(device, options):
    """q of a head_dim without kernels, beside a cache of the next one, with zeros behind."""
    (q, k, v), _ = problem(device, head_dim=80, lens=[700, 65])
    padded = [torch.nn.functional.pad(x, (0, 16)) for x in (k, v)]
    cache = PagedCache(*padded, 16, lens=[700, 65])
    expected = santa.decode(q, *padded, kv_lens=cache.int32(cache.lens), **options)
    assert expected[0].shape == (2, 8, 96)
    assert_same_bits(cache.decode(q, **options), expected)


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_alone_or_in_a_batch(device, options, page_size):
    (q, k, v), row_seeds = problem(device)
    cache = PagedCache(k, v, page_size, lens=LENS)
    together = cache.decode(q, row_seeds=row_seeds, **options)
    arguments = cache.arguments()
    for rows in ([2, 0, 1], [1], [0], [2]):
        own = {name: arguments[name][rows] for name in ("page_table", "kv_lens")}
        actual = santa.decode_paged(q[rows], **arguments | own, row_seeds=row_seeds[rows], **options)
        assert_same_bits(actual, [x[rows] for x in together])


def test_parts_of_longer_rows(device):
    """whole_lens, shard_starts and levels mean what they mean beside a contiguous cache."""
    (q, k, v), row_seeds = problem(device)
    cache = PagedCache(k, v, 16, lens=LENS)
    shards = {"whole_lens": cache.int32([3000, 700, 400]), "shard_starts": cache.int32([1280, 0, 128])}
    levels = torch.full((3, 8), 7.0, device=device)
    for sampler, budget in SAMPLED:
        if budget == "proportional":
            continue
        options = {"sampler": sampler, "budget": budget, "num_samples": 32, "min_sampled_len": 0}
        options |= {"row_seeds": row_seeds, "levels": levels if budget == "streaming" else None, **shards}
        expected = santa.decode(q, k, v, kv_lens=cache.int32(LENS), **options)
        assert expected[0].isfinite().all()
        for form in FORMS:
            assert_same_bits(cache.decode(q, form=form, **options), expected)
