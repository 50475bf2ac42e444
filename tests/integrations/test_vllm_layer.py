"""The vLLM backend's layer and metadata builder on the CPU, over stand-ins for the classes that they extend."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import vllm_stub
from helpers.vllm_layer import (
    DIM,
    EXACT,
    HEADS,
    check,
    load,
    make_builder,
    make_cache,
    make_impl,
    make_layer,
    make_step,
    run,
)
from torch import Tensor

from santa.integrations.vllm.decode import DecodeLayer
from santa.integrations.vllm.requests import StepRows

MIXED = ([50, 131, 7, 90, 33], [1, 1, 1, 40, 33])


@pytest.mark.parametrize("layout", ["0.25", "0.33"])
@pytest.mark.parametrize(
    ("lens", "new_tokens"),
    [MIXED, ([50, 131], [1, 1]), ([90, 33], [40, 33]), ([60, 60], [4, 4]), ([5], [1])],
    ids=["mixed", "decode", "prefill", "verification", "one row"],
)
def test_exact_steps(monkeypatch: pytest.MonkeyPatch, layout: str, lens: list[int], new_tokens: list[int]) -> None:
    package = load(monkeypatch, EXACT)
    impl, cache, step = make_impl(package), make_cache(layout), make_step(lens, new_tokens)
    builder = make_builder(package)
    assert builder._cudagraph_support is vllm_stub.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.reorder_batch_threshold == 1 and not builder.supports_update_block_table
    metadata = builder.build(0, step)
    assert metadata.num_decodes == sum(n == 1 for n in new_tokens)
    assert (metadata.decode is None) == (1 not in new_tokens)
    assert (metadata.prefill is None) == (max(new_tokens) == 1)
    query, output = run(impl, make_layer(), cache, metadata, sum(new_tokens), padding=3)
    check(impl, step, query, output, cache)
    assert output[sum(new_tokens) :].isnan().all()


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 20}, {"logits_soft_cap": 5.0}, {"sinks": torch.linspace(-2, 3, HEADS).bfloat16()}],
    ids=["window", "soft cap", "sinks"],
)
def test_what_models_have(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    package = load(monkeypatch, EXACT)
    impl, cache, step = make_impl(package, **options), make_cache(), make_step(*MIXED)
    query, output = run(impl, make_layer(), cache, make_builder(package).build(0, step), step.num_actual_tokens)
    check(impl, step, query, output, cache)


def test_float8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode takes queries as they are; for the parent they are quantized, but not where vLLM would."""
    package = load(monkeypatch, EXACT)
    impl, step = make_impl(package, kv_cache_dtype="fp8"), make_step(*MIXED)
    assert not impl.supports_quant_query_input
    cache = make_cache(dtype=torch.float8_e4m3fn).view(torch.uint8)
    layer = make_layer(scale=0.5)
    query, output = run(impl, layer, cache, make_builder(package).build(0, step), step.num_actual_tokens)
    seen = query.clone()
    seen[3:] = ((query[3:] / 0.5).to(torch.float8_e4m3fn).float() * 0.5).bfloat16()
    check(impl, step, seen, output, cache, scale=0.5)


def test_the_measurement_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = make_impl(load(monkeypatch, {"num_samples": 8}))
    rows: list[int] = []
    original = DecodeLayer.run

    def spy(self: DecodeLayer, out: Tensor, *rest: Any, **options: Any) -> None:
        rows.append(len(out))
        original(self, out, *rest, **options)

    monkeypatch.setattr(DecodeLayer, "run", spy)
    for tokens in (5, 20):
        _, output = run(impl, make_layer(), torch.empty(0), None, tokens)
        assert torch.equal(output, torch.zeros_like(output))
    assert rows == [8]  # max_num_seqs is 6, and graphs are padded to 8


def test_a_captured_step_holds_for_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps addresses and max_kv_len: padded rows give zeros, and row seeds are where they were."""
    package = load(monkeypatch, {"num_samples": 8, "min_context": 0})
    builder, impl, cache = make_builder(package), make_impl(package), make_cache()
    step = make_step([1, 1, 1, 1], [1, 1, 1, 1])
    captured = builder.build_for_cudagraph_capture(step)
    assert captured.decode.max_kv_len == 512
    # What a replay finds: the same tensors with other contents.
    monkeypatch.setattr(StepRows, "row_seeds", (11, -5))
    step.seq_lens.copy_(torch.tensor([150, 150, 0, 0]))
    step.block_table_tensor[1].copy_(step.block_table_tensor[0])
    step.block_table_tensor[2:] = 0
    now = builder.build(0, step.replace(max_seq_len=150))
    assert captured.decode.row_seeds.data_ptr() == now.decode.row_seeds.data_ptr()
    assert captured.decode.row_seeds.tolist() == [11, -5, 0, 0]
    query = torch.randn(1, HEADS, DIM).bfloat16().expand(4, -1, -1)
    outputs = []
    for metadata in (captured, now):
        outputs.append(torch.full((4, HEADS, DIM), torch.nan, dtype=torch.bfloat16))
        impl.forward(make_layer(), query, None, None, cache, metadata, outputs[-1])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0][0], outputs[0][1])
    assert torch.equal(outputs[0][2:], torch.zeros_like(outputs[0][2:]))


def test_row_seeds_follow_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepRows, "row_seeds", ())
    package = load(monkeypatch, {"num_samples": 8})
    builder = make_builder(package)
    runner = sys.modules["vllm.v1.worker.gpu_model_runner"].GPUModelRunner()

    def seeds(new: dict[str, list[int]], rows: list[str]) -> list[int]:
        arrived = [
            SimpleNamespace(req_id=name, prompt_token_ids=prompt, sampling_params=SimpleNamespace(seed=None))
            for name, prompt in new.items()
        ]
        runner._update_states(
            SimpleNamespace(
                finished_req_ids=set(), scheduled_new_reqs=arrived, num_scheduled_tokens=dict.fromkeys(rows, 1)
            )
        )
        return builder.build(0, make_step([20] * len(rows), [1] * len(rows))).decode.row_seeds.tolist()

    a, b = seeds({"a": [1, 2], "b": [1, 2]}, ["a", "b"])
    assert a != b and a and b
    assert seeds({"c": [7]}, ["b", "c", "a"])[::2] == [b, a]


def test_layers_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, {"num_samples": 4, "min_context": 0, "seed": 5, "layers": [0, 1]})
    cache, step = make_cache(), make_step([150], [1])
    metadata = make_builder(package).build(0, step)
    outputs = []
    for index in (0, 1, 2, 0):
        impl = make_impl(package)
        query, output = run(impl, make_layer(index), cache, metadata, 1)
        outputs.append(output)
    assert torch.equal(outputs[0], outputs[3]) and not torch.equal(outputs[0], outputs[1])
    check(impl, step, query, outputs[2], cache)


def test_a_rank_has_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = {"num_samples": 4, "min_context": 0}
    package = load(monkeypatch, sampled)
    cache, step = make_cache(), make_step([150, 140], [1, 1])
    query, whole = run(make_impl(package), make_layer(), cache, make_builder(package).build(0, step), 2)
    half = HEADS // 2
    for rank in range(2):
        package = load(monkeypatch, sampled, rank=rank, size=2)
        impl = make_impl(package, num_heads=half, num_kv_heads=1)
        heads = slice(rank * half, (rank + 1) * half)
        output = torch.empty(2, half, DIM, dtype=torch.bfloat16)
        metadata = make_builder(package).build(0, step)
        impl.forward(make_layer(), query[:, heads], None, None, cache[:, :, :, rank : rank + 1], metadata, output)
        torch.testing.assert_close(output, whole[:, heads])


def test_short_rows_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, {"num_samples": 2, "min_context": 100})
    impl, cache, step = make_impl(package), make_cache(), make_step([99, 160], [1, 1])
    query, output = run(impl, make_layer(), cache, make_builder(package).build(0, step), 2)
    step.num_reqs, step.seq_lens = 1, step.seq_lens[:1]
    check(impl, step, query, output, cache)
    with pytest.raises(AssertionError):
        step.seq_lens, step.block_table_tensor = torch.tensor([160]), step.block_table_tensor[1:]
        step.query_start_loc_cpu = torch.tensor([1, 2])
        check(impl, step, query, output, cache)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, EXACT)
    with pytest.raises(NotImplementedError, match="alibi_slopes is given; the backend has no position biases"):
        make_impl(package, alibi_slopes=[0.5] * HEADS)
    with pytest.raises(NotImplementedError, match="attn_type is"):
        make_impl(package, attn_type=vllm_stub.AttentionType.ENCODER)
    builder, step = make_builder(package), make_step([5], [1])
    with pytest.raises(NotImplementedError, match="causal is not True"):
        builder.build(0, step.replace(causal=False))
    with pytest.raises(NotImplementedError, match="output_scale is given"):
        make_impl(package).forward(make_layer(), None, None, None, None, None, None, output_scale=torch.ones(1))
    package.config.additional_config = {"santa": {"samples": 3}}
    for build in (make_builder, make_impl):
        with pytest.raises(ValueError, match="has 'samples'; it needs names among"):
            build(package)


def test_what_the_backend_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(monkeypatch, EXACT).backend.SantaBackend
    assert backend.get_name() == "CUSTOM"
    assert backend.get_supported_kernel_block_sizes() == [16, 32, 64, 128, 256]
    monkeypatch.setattr(vllm_stub.FlashAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(lambda: [64]))
    assert backend.get_supported_kernel_block_sizes() == [64]
    assert [backend.supports_head_size(n) for n in (64, 80, 128, 256, 512)] == [True, False, True, True, False]
    assert backend.supports_combination(80) == "santa: head_size is 80; it needs to be one of [64, 96, 128, 192, 256]"
    assert backend.supports_combination(128) is None
    assert not backend.supports_attn_type("encoder") and backend.supports_attn_type("decoder")
    for name in ("non_causal", "mm_prefix", "rswa", "per_head_quant_scales"):
        assert getattr(backend, f"supports_{name}")() is False


def test_a_vllm_without_its_runners_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, EXACT)
    monkeypatch.delitem(sys.modules, "vllm.v1.worker.gpu_model_runner")
    with pytest.raises(RuntimeError, match="none of vLLM's model runners is imported"):
        make_builder(package)


def test_an_old_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load(monkeypatch, EXACT)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.24.1")
    with pytest.raises(RuntimeError, match=r"vllm is 0.24.1; it needs to be at least 0.25.0"):
        sys.modules["santa.integrations.vllm.compat"].check_version()
    assert package
