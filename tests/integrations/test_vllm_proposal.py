"""Proposal keys in the vLLM backend, on the CPU: codes in the padding of pages that are laid out as vLLM does."""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.vllm_layer import (
    BLOCK,
    BLOCKS,
    CODES,
    DIM,
    HEADS,
    KV_HEADS,
    check,
    load,
    make_impl,
    make_layer,
    make_step,
    padded_cache,
    run,
)
from helpers.vllm_stub import Common, FullAttentionSpec, make_config
from torch import Tensor

import santa
from santa.integrations.vllm.cache import LayerCodes, Pages, bytes_of_codes, layer_cache
from santa.integrations.vllm.decode import DecodeLayer, DecodeRows
from santa.integrations.vllm.settings import check_engine, least_prompt
from santa.proposal import key_statistics

PROPOSAL = {"num_samples": 4, "min_context": 0, "keys": "proposal"}
LAYOUTS = ["0.25", "0.25 HND", "0.33", "0.33 HND"]
# max_num_batched_tokens of the stand-in is 256.
LONG = 128


def keys_of(count: int, seed: int = 0) -> Tensor:
    """Keys as they are: channels of their own mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = torch.randn(KV_HEADS, DIM, generator=torch.Generator().manual_seed(77)), torch.linspace(0.1, 3, DIM)
    return (torch.randn(count, KV_HEADS, DIM, generator=generator) * spread + 2 * mean).bfloat16()


def slots_of(step: Common) -> Tensor:
    """Where vLLM has a step's new tokens written."""
    slots = []
    new = step.query_start_loc_cpu.diff().tolist()
    for row, (length, count) in enumerate(zip(step.seq_lens.tolist(), new, strict=True)):
        positions = torch.arange(length - count, length)
        slots.append(step.block_table_tensor[row][positions // BLOCK].long() * BLOCK + positions % BLOCK)
    return torch.cat(slots)


def fill(impl: Any, layer: Any, cache: Tensor, step: Common, seed: int = 0) -> None:
    """Write all keys and values of a step's rows."""
    starts = torch.tensor([0, *step.seq_lens.tolist()]).cumsum(0)
    slots = slots_of(step.replace(query_start_loc_cpu=starts))
    impl.do_kv_cache_update(layer, keys_of(len(slots), seed), keys_of(len(slots), seed + 1), cache, slots)


def prefill(
    package: Any, impl: Any, layer: Any, cache: Tensor, count: int, *, seed: int = 0, real: bool = True
) -> Tensor:
    """A prompt's step, or the same in a warm-up, whose slots are -1. Returns its keys."""
    step = make_step([count], [count])
    slots = slots_of(step) if real else torch.full((count,), -1)
    key, value = keys_of(count, seed), keys_of(count, seed + 1)
    impl.do_kv_cache_update(layer, key, value, cache, slots)
    query = torch.randn(count, HEADS, DIM).bfloat16()
    metadata = make_builder_with(package, impl, layer).build(0, step.replace(slot_mapping=slots))
    impl.forward(layer, query, key, value, cache, metadata, torch.empty_like(query))
    return key


def make_builder_with(package: Any, impl: Any, layer: Any) -> Any:
    package.config.compilation_config.static_forward_context[layer.layer_name] = SimpleNamespace(
        impl=impl, kv_cache=torch.empty(0)
    )
    return package.metadata.SantaMetadataBuilder(SPEC, [layer.layer_name], package.config, torch.device("cpu"))


SPEC = FullAttentionSpec(BLOCK, KV_HEADS, DIM, torch.bfloat16, None)


def plain(key: Tensor, center: Tensor | None = None, channel_scale: Tensor | None = None) -> santa.ProposalKeys:
    """Codes of keys in a row, [n, num_kv_heads, head_dim]."""
    if center is None:
        center = torch.zeros(1, KV_HEADS, DIM)
        channel_scale = torch.ones(1, KV_HEADS, DIM)
    return santa.make_proposal_keys(key[None], center=center, channel_scale=channel_scale)


def at(proposal: santa.ProposalKeys, slots: Tensor) -> tuple[Tensor, Tensor]:
    return proposal.codes[slots // BLOCK, slots % BLOCK], proposal.scales[slots // BLOCK, slots % BLOCK]


def numbers(proposal: santa.ProposalKeys) -> Tensor:
    """The keys that codes stand for."""
    codes = torch.cat([proposal.codes & 15, proposal.codes >> 4], dim=-1).float() - 8
    return codes * proposal.scales.float()[..., None] * proposal.channel_scale + proposal.center


# Writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_follow_writes(monkeypatch: pytest.MonkeyPatch, layout: str, kind: str) -> None:
    """Shuffled slots, slots of nothing, padded tokens, slots written again; K and V are as without codes."""
    dtype = torch.bfloat16 if kind == "auto" else torch.uint8
    impl, layer = make_impl(load(monkeypatch, PROPOSAL), kv_cache_dtype=kind), make_layer(scale=0.5)
    bare = make_impl(load(monkeypatch, {"num_samples": 4}), kv_cache_dtype=kind)
    cache, without = padded_cache(layout, dtype), padded_cache(layout, dtype, padding=0)
    places = torch.randperm(BLOCKS * BLOCK, generator=torch.Generator().manual_seed(1))
    written: dict[int, Tensor] = {}
    for seed, first in enumerate([0, 40, 20]):  # the last 20 of the second are written again, and 20 of the first
        slots, key = places[first : first + 40].clone(), keys_of(45, seed)
        slots[::7] = -1
        for each, c in ((impl, cache), (bare, without)):
            each.do_kv_cache_update(layer, key, -key, c, slots)
        written |= {slot: key[i] for i, slot in enumerate(slots.tolist()) if slot >= 0}
    at_slots = torch.tensor(list(written))
    proposal = impl._codes.proposal(cache)
    codes, scales = at(proposal, at_slots)
    expected = plain(torch.stack(list(written.values())))
    assert torch.equal(codes, expected.codes[0]) and torch.equal(scales, expected.scales[0])
    untouched = torch.ones(BLOCKS * BLOCK, dtype=torch.bool)
    untouched[at_slots] = False
    assert not any(x.any() for x in at(proposal, untouched.nonzero()[:, 0]))
    assert torch.equal(cache, without) and cache.any()


@pytest.mark.parametrize("kind", ["auto", "fp8"])
def test_codes_stand_for_the_keys_of_the_cache(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A float8 cache has keys divided by k_scale, before and after statistics are frozen."""
    package = load(monkeypatch, PROPOSAL)
    dtype, stored = (torch.bfloat16,) * 2 if kind == "auto" else (torch.uint8, torch.float8_e4m3fn)
    impl, layer, cache = make_impl(package, kv_cache_dtype=kind), make_layer(scale=0.25), padded_cache(dtype=dtype)
    step = make_step([40, LONG + 10], [1, 1])
    fill(impl, layer, cache, step)
    errors = []
    for frozen in (False, True):
        if frozen:
            prefill(package, impl, layer, cache, LONG)
        assert impl._codes.is_frozen == frozen
        k, proposal = layer_cache(cache, DIM, stored).k.float(), impl._codes.proposal(cache)
        room = 0.51 * proposal.scales.float()[..., None] * proposal.channel_scale + 0.07 * k.abs()
        slots = slots_of(step.replace(query_start_loc_cpu=torch.tensor([0, 40, LONG + 50])))
        error, room = ((x[slots // BLOCK, slots % BLOCK]) for x in ((numbers(proposal) - k).abs(), room))
        assert (error <= room).all()
        errors.append(error.mean().item())
    assert errors[1] < 0.7 * errors[0]


# Statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_long_prompt_codes_all_again(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    package = load(monkeypatch, PROPOSAL)
    impl, layer, cache = make_impl(package), make_layer(), padded_cache(layout)
    monkeypatch.setattr(sys.modules["santa.integrations.vllm.cache"], "_BLOCKS_AT_ONCE", 7)
    fill(impl, layer, cache, make_step([90, 30, 60], [1, 1, 1]), seed=8)
    prefill(package, impl, layer, cache, LONG - 1)
    before = impl._codes.proposal(cache)
    assert not impl._codes.is_frozen and not before.center.any() and (before.channel_scale == 1).all()

    key = prefill(package, impl, layer, cache, LONG, seed=2)
    after = impl._codes.proposal(cache)
    for name in ("center", "channel_scale"):  # captured graphs have the addresses
        assert getattr(after, name).data_ptr() == getattr(before, name).data_ptr()
    center, channel_scale = key_statistics(key[None], torch.ones(1, LONG, dtype=torch.bool), shared=True)
    assert torch.equal(after.center, center) and torch.equal(after.channel_scale, channel_scale)
    k = layer_cache(cache, DIM, torch.bfloat16).k
    expected = plain(k.flatten(0, 1), center, channel_scale)
    assert torch.equal(after.codes.flatten(0, 1), expected.codes[0])
    assert torch.equal(after.scales.flatten(0, 1), expected.scales[0])

    later = keys_of(3, seed=5) + 4
    impl.do_kv_cache_update(layer, later, later, cache, torch.tensor([3, -1, 700]))
    prefill(package, impl, layer, cache, LONG + 20, seed=6)
    assert torch.equal(impl._codes.proposal(cache).center, center)
    codes, _ = at(impl._codes.proposal(cache), torch.tensor([700]))
    assert torch.equal(codes, plain(later[2:], center, channel_scale).codes[0])


def test_statistics_are_of_the_row_with_the_most_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, PROPOSAL)
    impl, layer = make_impl(package), make_layer()
    builder = make_builder_with(package, impl, layer)
    assert builder.build(0, make_step([50, 60, 170, 150], [1, 30, 130, 140])).prompt == (161, 301)
    assert builder.build(0, make_step([50, 60, 127], [1, 30, 127])).prompt is None
    assert builder.build(0, make_step([50, 127], [1, 127]).replace(max_query_len=200)).prompt is None  # a bound
    assert builder.build(0, make_step([300, 200], [1, 1])).prompt is None
    assert builder.build_for_cudagraph_capture(make_step([300, 200], [1, 1])).prompt is None


def test_warm_ups_do_not_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, PROPOSAL)
    impl, layer, cache = make_impl(package), make_layer(), padded_cache()
    run(impl, layer, torch.empty(0), None, 200)  # the measurement of memory
    prefill(package, impl, layer, cache, 180, real=False)
    assert not impl._codes.is_frozen and not cache.any() and not impl._codes.proposal(cache).codes.any()
    prefill(package, impl, layer, cache, 180)
    assert impl._codes.is_frozen


def test_a_prompt_that_is_not_finite_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, cache = LayerCodes(KV_HEADS, DIM, torch.device("cpu")), padded_cache()
    key = keys_of(LONG)
    key[3, 0, 5] = torch.inf
    codes.freeze(cache, layer_cache(cache, DIM, torch.bfloat16), key)
    assert codes.proposal(cache).center.isfinite().all()
    codes.write(cache, keys_of(1, seed=4), torch.tensor([9]))
    assert codes.proposal(cache).scales[0, 9].isfinite().all()


def test_how_long_a_prompt_has_to_be() -> None:
    assert least_prompt(SimpleNamespace(max_num_batched_tokens=8192)) == 1024
    assert least_prompt(SimpleNamespace(max_num_batched_tokens=1024, long_prefill_token_threshold=0)) == 512
    assert least_prompt(SimpleNamespace(max_num_batched_tokens=8192, long_prefill_token_threshold=300)) == 300


# Reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frozen", [False, True])
def test_decode_is_that_of_santa(monkeypatch: pytest.MonkeyPatch, layout: str, kind: str, frozen: bool) -> None:
    """Two rows share a prefix, one is short of min_context, one pads a graph."""
    package = load(monkeypatch, PROPOSAL | {"min_context": 60, "seed": 3})
    dtype, stored = (torch.bfloat16,) * 2 if kind == "auto" else (torch.uint8, torch.float8_e4m3fn)
    impl, layer, cache = make_impl(package, kv_cache_dtype=kind), make_layer(scale=0.5), padded_cache(layout, dtype)
    step = make_step([150, 140, 30, 0], [1, 1, 1, 1])
    step.block_table_tensor[1, :4] = step.block_table_tensor[0, :4]
    fill(impl, layer, cache, step)
    if frozen:
        prefill(package, impl, layer, cache, LONG)
    metadata = make_builder_with(package, impl, layer).build(0, step)
    query, output = run(impl, layer, cache, metadata, 4)

    k, v = layer_cache(cache, DIM, stored)
    options: dict[str, Any] = dict(
        page_table=step.block_table_tensor,
        kv_lens=step.seq_lens,
        num_samples=4,
        sm_scale=0.2,
        seed=4,
        row_seeds=metadata.decode.row_seeds,
    )
    if kind == "fp8":
        options |= {"k_scale": 0.5, "v_scale": 0.5}
    ours = impl._codes.proposal(cache)
    assert (ours.center.abs().sum() > 0) == frozen
    copy = santa.ProposalKeys(*(x.clone() for x in ours.tensors().values()))
    expected, _ = santa.decode_paged(query, k, v, proposal=copy, min_sampled_len=60, **options)
    assert torch.equal(output, expected)
    exact_keys, _ = santa.decode_paged(query, k, v, min_sampled_len=60, **options)
    assert torch.equal(output[2:], exact_keys[2:]) and not torch.equal(output[:2], exact_keys[:2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 5.0}, {"sinks": torch.linspace(-2, 3, HEADS).bfloat16()}])
def test_many_draws_are_exact(monkeypatch: pytest.MonkeyPatch, layout: str, options: dict[str, Any]) -> None:
    """A draw of every row leaves rounding: the codes then only say what was drawn."""
    package = load(monkeypatch, PROPOSAL | {"num_samples": 1 << 16})
    impl, layer, cache, step = (
        make_impl(package, **options),
        make_layer(),
        padded_cache(layout),
        make_step([150, 90], [1, 1]),
    )
    fill(impl, layer, cache, step)
    query, output = run(impl, layer, cache, make_builder_with(package, impl, layer).build(0, step), 2)
    check(impl, step, query, output, cache)


def test_estimates_are_of_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over row seeds; its distance from exact attention falls as draws of those many seeds let it."""
    package = load(monkeypatch, PROPOSAL | {"num_samples": 16})
    impl, layer, cache, step = make_impl(package), make_layer(), padded_cache(), make_step([190], [1])
    prefill(package, impl, layer, cache, 190)
    seeds = 400
    rows = DecodeRows(step.block_table_tensor.expand(seeds, -1), step.seq_lens.repeat(seeds), torch.arange(seeds), 190)
    query = torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(5)).bfloat16().expand(seeds, -1, -1)
    outputs = []
    for num_samples in (16, 0):
        config = santa.SantaConfig(**PROPOSAL | {"num_samples": num_samples})
        decode = DecodeLayer.of(config, 1, sm_scale=0.05)
        out, lse = torch.empty(seeds, HEADS, DIM, dtype=torch.bfloat16), torch.empty(seeds, HEADS)
        proposal = impl._codes.proposal(cache) if decode.proposes else None
        decode.run(out, lse, query, layer_cache(cache, DIM, torch.bfloat16), rows, proposal=proposal)
        outputs.append(out.double())
    error = (outputs[0].mean(0) - outputs[1][0]).norm()
    deviation = (outputs[0] - outputs[0].mean(0)).square().sum((1, 2)).mean().sqrt()
    assert deviation > 0.05 * outputs[1][0].norm()
    assert error < 4 * deviation / math.sqrt(seeds)


def test_a_captured_step_sees_what_was_frozen_since(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, PROPOSAL)
    impl, layer, cache, step = make_impl(package), make_layer(), padded_cache(), make_step([150, 140], [1, 1])
    fill(impl, layer, cache, step)
    builder = make_builder_with(package, impl, layer)
    captured = builder.build_for_cudagraph_capture(step)
    views = impl._codes.proposal(cache)
    _, before = run(impl, layer, cache, captured, 2)
    prefill(package, impl, layer, cache, LONG)
    fill(impl, layer, cache, step)
    _, after = run(impl, layer, cache, captured, 2)
    assert not torch.equal(before, after)
    for name, x in impl._codes.proposal(cache).tensors().items():
        assert x.data_ptr() == getattr(views, name).data_ptr()


@pytest.mark.parametrize("kind", ["auto", "fp8"])
def test_the_measurement_of_memory_has_codes(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    impl = make_impl(load(monkeypatch, PROPOSAL), kv_cache_dtype=kind)
    seen: list[Any] = []
    original = DecodeLayer.run
    monkeypatch.setattr(DecodeLayer, "run", lambda *a, **k: (seen.append(k["proposal"]), original(*a, **k))[1])
    run(impl, make_layer(), torch.empty(0), None, 20)
    assert [type(x) for x in seen] == [santa.ProposalKeys]


# Which layers, and pages ----------------------------------------------------------------------------


def get_spec(package: Any, impl: Any, spec: Any = SPEC, index: int = 1) -> Any:
    """As vLLM asks a layer for it."""
    attention = sys.modules["vllm.model_executor.layers.attention.attention"].Attention
    return attention(f"model.layers.{index}.self_attn.attn", impl, spec).get_kv_cache_spec(package.config)


def test_pages_have_room_for_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, PROPOSAL | {"layers": [1]})
    impl = make_impl(package)
    make_impl(package)  # vLLM's class is changed once
    spec = get_spec(package, impl)
    assert spec.page_size_padded == SPEC.page_size_bytes + CODES == 2 * BLOCK * KV_HEADS * DIM * 2 + CODES
    assert bytes_of_codes(16, 8, 128) == 16 * 8 * 66
    assert get_spec(package, impl, index=2) is SPEC  # a layer that the settings leave out
    assert get_spec(package, SimpleNamespace()) is SPEC  # another backend's
    assert get_spec(package, impl, spec=None) is None


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_codes_and_scales_are_aligned(heads: int, head_dim: int, block_size: int, size: int) -> None:
    """As csrc/api/proposal.h asks for its fast copies: 16 bytes of codes, and eight scales, at a time."""
    dtype = torch.uint8 if size == 1 else torch.bfloat16
    page = 2 * block_size * heads * head_dim + bytes_of_codes(block_size, heads, head_dim) // size
    values = block_size * heads * head_dim
    cache = torch.zeros(5 * page, dtype=dtype).as_strided(
        (5, 2, block_size, heads, head_dim), (page, values, heads * head_dim, head_dim, 1)
    )
    proposal = LayerCodes(heads, head_dim, torch.device("cpu")).proposal(cache)
    codes, scales = proposal.codes, proposal.scales
    assert not any(x % 16 for x in (codes.storage_offset(), *codes.stride()[:3]))
    assert scales.stride(1) == 1
    assert not any(x % 8 for x in (scales.storage_offset(), scales.stride(0), scales.stride(2)))
    assert codes[4].storage_offset() + block_size * heads * head_dim // 2 == 2 * scales[4].storage_offset()
    assert 2 * (scales[-1, -1, -1].storage_offset() + 1) == cache.untyped_storage().nbytes()


def test_exact_keys_leave_pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, {"num_samples": 4})
    impl, layer = make_impl(package), make_layer()
    assert get_spec(package, impl) is SPEC
    step, cache = make_step([LONG], [LONG]), padded_cache(padding=0)
    fill(impl, layer, cache, step)
    assert impl._codes is None and make_builder_with(package, impl, layer).build(0, step).prompt is None
    # One engine of a process may have codes, and the next none.
    package = load(monkeypatch, PROPOSAL)
    make_impl(package)
    package.config.additional_config = {"santa": {"num_samples": 4}}
    assert get_spec(package, make_impl(package)) is SPEC


@pytest.mark.parametrize(
    "options", [{"sliding_window": 20}, {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}]
)
def test_layers_without_codes(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """They read exact keys, of pages without room."""
    package = load(monkeypatch, PROPOSAL | {"num_samples": 1 << 16})
    impl, layer, step = make_impl(package, **options), make_layer(), make_step([150, 90], [1, 1])
    cache = padded_cache(padding=0)
    fill(impl, layer, cache, step)
    assert get_spec(package, impl) is SPEC and impl._codes is None
    query, output = run(impl, layer, cache, make_builder_with(package, impl, layer).build(0, step), 2)
    check(impl, step, query, output, cache)


def test_layers_of_a_draft_model_have_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, PROPOSAL)
    package.config.speculative_config = SimpleNamespace(draft_model_config=package.config.model_config)
    assert get_spec(package, make_impl(package)) is SPEC


def test_pages_of_windows_are_as_large_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives windows the smallest blocks that there are, and cannot make padded pages of them larger."""
    package = load(monkeypatch, PROPOSAL)
    package.config.cache_config.block_size = 64
    assert get_spec(package, make_impl(package, sliding_window=20)).block_size == 64
    assert get_spec(package, make_impl(package), FullAttentionSpec(64, KV_HEADS, DIM, torch.bfloat16)).block_size == 64


def test_blocks_that_vllm_would_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, PROPOSAL)
    package.config.cache_config.block_size = 48
    with pytest.raises(ValueError, match=r"block_size is 48 while keys is 'proposal', which needs one of \[16, 32, "):
        get_spec(package, make_impl(package))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_without_room_are_refused(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    impl, cache = make_impl(load(monkeypatch, PROPOSAL)), padded_cache(layout, padding=CODES - 32)
    page = 2 * BLOCK * KV_HEADS * DIM * 2
    with pytest.raises(ValueError, match=f"pages of {page + CODES - 32} bytes; keys='proposal' needs {page + CODES}, "):
        fill(impl, make_layer(), cache, make_step([20], [1]))


def test_layers_that_share_pages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers of several groups do where others have windows: each has blocks of its own in the same memory."""
    package = load(monkeypatch, PROPOSAL)
    cache, layers = padded_cache(), package.config.compilation_config.static_forward_context
    impls = [make_impl(package), make_impl(package), make_impl(package, sliding_window=20)]
    for index, impl in enumerate(impls):
        layers[f"model.layers.{index}.self_attn.attn"] = SimpleNamespace(impl=impl, kv_cache=cache)
    step = make_step([20], [1])
    layers["model.layers.1.self_attn.attn"].kv_cache = padded_cache()
    fill(impls[0], make_layer(0), cache, step)  # only the window is there as well
    layers["model.layers.1.self_attn.attn"].kv_cache = cache
    with pytest.raises(ValueError, match=r"layers.1.self_attn.attn and model.layers.0.* share the memory"):
        fill(impls[1], make_layer(1), cache, step)


def test_layers_whose_keys_lie_where_codes_do_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window with larger heads in the same pages; a layer that is not santa's."""
    package = load(monkeypatch, PROPOSAL)
    impl, cache = make_impl(package), padded_cache()
    layers = package.config.compilation_config.static_forward_context
    layers["model.layers.0.attn"] = SimpleNamespace(kv_cache=[cache])  # states of another kind
    page = cache.stride(0)
    layers["model.layers.3.attn"] = SimpleNamespace(kv_cache=cache.as_strided((BLOCKS, page), (page, 1)))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.attn and model.layers.3.attn share the memory"):
        fill(impl, make_layer(), cache, make_step([20], [1]))


def test_overlap_of_pages() -> None:
    ours = Pages(1000, 100, 60, 10)
    assert ours.overlap(ours) and ours.overlap(ours._replace(start=1100)) and ours.overlap(ours._replace(start=900))
    for start, used, expected in [(2000, 60, False), (1960, 60, False), (1959, 60, True), (1060, 40, False)]:
        other = ours._replace(start=start, used=used)
        assert ours.overlap(other) == other.overlap(ours) == expected, start
    assert ours.overlap(Pages(1060, 100, 41, 10)) and ours.overlap(Pages(1059, 100, 1, 10))  # layers in turn
    assert not ours.overlap(Pages(1160, 100, 40, 3))
    assert ours.overlap(Pages(1060, 50, 10, 2)) and not ours.overlap(Pages(1960, 50, 10, 2))


def test_engines_that_are_refused() -> None:
    config = make_config(PROPOSAL)
    assert check_engine(config).keys == "proposal"
    config.kv_transfer_config = SimpleNamespace(kv_connector_extra_config={})
    with pytest.raises(
        ValueError, match="kv_transfer_config is given while keys is 'proposal'; it needs to be left out"
    ):
        check_engine(config)
    config.kv_transfer_config.kv_connector_extra_config = {"santa_proposal_codes": True}
    check_engine(config)
    config.model_config.is_hybrid = True
    with pytest.raises(ValueError, match="is_hybrid is True while keys is 'proposal'"):
        check_engine(config)
    exact = make_config({"num_samples": 4})
    exact.kv_transfer_config = SimpleNamespace(kv_connector_extra_config={})
    exact.model_config.is_hybrid = True
    check_engine(exact)


def test_the_log_says_what_codes_take(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    package = load(monkeypatch, PROPOSAL)
    impl = make_impl(package)
    with caplog.at_level(logging.INFO, "vllm.santa"):
        package.config.compilation_config.static_forward_context["model.layers.1.self_attn.attn"] = SimpleNamespace(
            impl=impl
        )
        package.metadata.SantaMetadataBuilder(
            get_spec(package, impl), ["model.layers.1.self_attn.attn"], package.config, torch.device("cpu")
        )
    page = SPEC.page_size_bytes + CODES
    assert f"santa: 1 of them keep proposal keys, {CODES} of the {page} bytes of each block" in caplog.text
    assert "keys proposal" in caplog.text
