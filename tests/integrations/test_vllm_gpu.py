"""Engines of vLLM with santa's backend, beside FlashAttention's: tiny random models, on a GPU.

vLLM has to be installed; tests/integrations/test_vllm.py and test_vllm_interface.py need neither it nor a GPU.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

# In this process, where a test can see it fail. Read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch sees none", allow_module_level=True)
pytest.importorskip("vllm", minversion="0.25", reason="needs vLLM >= 0.25: pip install 'santa[vllm]'")
pytest.importorskip("transformers", minversion="5.4.0")

from helpers.vllm_engine import (
    NEAR_TIE,
    best_logprobs,
    check_same_tokens,
    engine,
    generate,
    make_prompts,
    metric,
    save_model,
)

import santa
from santa.integrations.vllm.attention import SantaImpl
from santa.integrations.vllm.cache import layer_cache
from santa.integrations.vllm.metadata import SantaMetadataBuilder
from santa.integrations.vllm.requests import StepRows

pytestmark = pytest.mark.gpu

EXACT = {"num_samples": 0}
SAMPLED = {"num_samples": 4, "min_context": 64}
# Longer and shorter than a step of 256 tokens, and than a block.
PROMPTS = make_prompts([3, 17, 64, 129, 250, 333, 500, 700])
NEW_TOKENS = [40, 8, 24, 31, 16, 40, 12, 28]
CROWD = make_prompts([200, 201, 202, 203], seed=1)
REPETITIVE = [[5, 6, 7, 8] * 30, *make_prompts([90], seed=2), ([9] * 7 + [11]) * 12]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def dense(model: str) -> dict[str, list[Any]]:
    """What FlashAttention generates."""
    with engine(model) as llm:
        return {
            "prompts": generate(llm, PROMPTS, NEW_TOKENS),
            "crowd": generate(llm, CROWD, 60),
            "repetitive": generate(llm, REPETITIVE, 32),
        }


def test_as_it_is_installed(model: str, dense: dict[str, list[Any]]) -> None:
    """Compiled, with full and piecewise graphs: mixed batches in chunks, then the same from the prefix cache."""
    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    with engine(model, santa=EXACT, enforce_eager=False, compilation_config=sizes) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), dense["prompts"])
        again = generate(llm, PROMPTS, NEW_TOKENS)
        check_same_tokens(again, dense["prompts"])
        assert again[-1].num_cached_tokens >= 640


def test_decode_graphs(model: str, dense: dict[str, list[Any]]) -> None:
    with engine(model, santa=EXACT, graphs=True) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), dense["prompts"])
        check_same_tokens(generate(llm, PROMPTS[:3], NEW_TOKENS[:3]), dense["prompts"][:3])  # padded to 4 rows


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_eager_with_blocks_of(block_size: int, model: str, dense: dict[str, list[Any]]) -> None:
    with engine(model, santa=EXACT, block_size=block_size) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), dense["prompts"])


def test_preempted_requests(model: str, dense: dict[str, list[Any]]) -> None:
    """Blocks for 992 tokens; four requests come to 1,046."""
    stats = {"disable_log_stats": False}
    with engine(model, santa=EXACT, max_model_len=512, num_gpu_blocks_override=63, **stats) as llm:
        check_same_tokens(generate(llm, CROWD, 60), dense["crowd"])
        assert metric(llm, "num_preemptions") > 0


def test_speculated_tokens_are_verified(model: str, dense: dict[str, list[Any]]) -> None:
    pytest.importorskip("numba", reason="vLLM's prompt lookup needs numba")
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    with engine(model, santa=EXACT, speculative_config=lookup, disable_log_stats=False) as llm:
        check_same_tokens(generate(llm, REPETITIVE, 32), dense["repetitive"])
        assert metric(llm, "spec_decode_num_draft_tokens") > 0


def test_proposal_keys_of_rows_that_are_exact(model: str, dense: dict[str, list[Any]]) -> None:
    """Codes are written, in graphs too, and nothing reads them: pages with room for them change no token."""
    settings = {"num_samples": 4, "min_context": 1024, "keys": "proposal"}
    with engine(model, santa=settings, graphs=True) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), dense["prompts"])
        again = generate(llm, PROMPTS, NEW_TOKENS)
        check_same_tokens(again, dense["prompts"])
        assert again[-1].num_cached_tokens >= 640


def layers_of(llm: Any) -> list[Any]:
    """vLLM's attention layers."""
    (layers,) = llm.apply_model(
        lambda model: [layer for layer in model.modules() if isinstance(getattr(layer, "impl", None), SantaImpl)]
    )
    assert layers
    return layers


def test_proposal_keys(model: str, dense: dict[str, list[Any]]) -> None:
    """With graphs, chunks, the prefix cache and preemption: codes are those of the cache, and requests replay.

    Half of a step's 256 tokens tell the statistics. Blocks for 1,504 tokens; four requests come to 2,046.
    """
    settings, prompt = SAMPLED | {"keys": "proposal"}, PROMPTS[6]
    crowd = make_prompts([450, 451, 452, 453], seed=1)
    with engine(model, santa=settings, graphs=True, num_gpu_blocks_override=95, disable_log_stats=False) as llm:
        generate(llm, [PROMPTS[2]], 4)
        assert not any(layer.impl._codes.is_frozen for layer in layers_of(llm))
        (first,) = generate(llm, [prompt], 12)
        assert all(layer.impl._codes.is_frozen for layer in layers_of(llm))
        assert first.token_ids[0] == dense["prompts"][6].token_ids[0]  # prefill's
        assert first.logprobs[1] != dense["prompts"][6].logprobs[1]
        for _ in range(2):
            assert llm.reset_prefix_cache()
            (again,) = generate(llm, [prompt], 12)
            assert again.token_ids == first.token_ids and best_logprobs(again) == best_logprobs(first)
        (cached,) = generate(llm, [prompt], 12)
        assert cached.num_cached_tokens >= 480 and len(cached.token_ids) == 12

        generate(llm, crowd, 60)
        assert metric(llm, "num_preemptions") > 0
        for layer in layers_of(llm):
            ours = layer.impl._codes.proposal(layer.kv_cache)
            k = layer_cache(layer.kv_cache, layer.impl.head_size, torch.float16).k
            assert k.flatten(1).any(1).sum() >= 60
            made = santa.make_proposal_keys(k, center=ours.center, channel_scale=ours.channel_scale)
            assert torch.equal(ours.codes, made.codes) and torch.equal(ours.scales, made.scales)


def test_proposal_keys_of_a_float8_cache(model: str) -> None:
    """With so many draws the floor has every row drawn: tokens are those of exact attention."""
    prompts = make_prompts(range(140, 500, 15), seed=3)
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "graphs": True}
    with engine(model, santa=EXACT, **options) as llm:
        exact = generate(llm, prompts, 2)
    with engine(model, santa={"num_samples": 1 << 14, "min_context": 64, "keys": "proposal"}, **options) as llm:
        check_same_tokens(generate(llm, prompts, 2), exact, least_share=0.7, near_tie=8 * NEAR_TIE)


def test_windows(tmp_path: Path) -> None:
    path = save_model(tmp_path, "mistral", sliding_window=48)
    with engine(path) as llm:
        expected = generate(llm, PROMPTS, NEW_TOKENS)
    with engine(path, santa=EXACT, graphs=True) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), expected)


def test_windows_in_some_layers_and_soft_caps(tmp_path: Path) -> None:
    path = save_model(tmp_path, "gemma2", sliding_window=48)
    options = {"dtype": "bfloat16"}  # vLLM refuses float16 for Gemma 2
    with engine(path, **options) as llm:
        expected = generate(llm, PROMPTS, NEW_TOKENS)
    # The second with proposal keys in the layers without windows, of rows that are exact.
    for settings in (EXACT, {"num_samples": 4, "min_context": 1024, "layers": [1], "keys": "proposal"}):
        with engine(path, santa=settings, graphs=True, **options) as llm:
            check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), expected, least_share=0.4, near_tie=8 * NEAR_TIE)


def test_float8_cache(model: str) -> None:
    """Dense float8 rounds queries and probabilities to 8 bits as well, so tokens need not be equal. After the first
    token, which is prefill's, logits are no further from those of a 16-bit cache than dense float8's are."""
    prompts = make_prompts(range(20, 500, 10), seed=3)
    options = {"dtype": "bfloat16"}  # FlashAttention-3's float8 has no float16 outputs
    with engine(model, **options) as llm:
        exact = generate(llm, prompts, 2)
    with engine(model, kv_cache_dtype="fp8", **options) as llm:
        dense = generate(llm, prompts, 2)
    with engine(model, santa=EXACT, graphs=True, kv_cache_dtype="fp8", **options) as llm:
        ours = generate(llm, prompts, 2)
    ours_off, dense_off = [], []
    for right, a, b in zip(exact, ours, dense, strict=True):
        if right.token_ids[0] == a.token_ids[0] == b.token_ids[0]:
            token, logprob = right.token_ids[1], best_logprobs(right)[1]
            if token in a.logprobs[1] and token in b.logprobs[1]:
                ours_off.append(abs(a.logprobs[1][token].logprob - logprob))
                dense_off.append(abs(b.logprobs[1][token].logprob - logprob))
    assert len(ours_off) >= len(prompts) // 3, f"{len(ours_off)} of {len(prompts)} prompts can be compared"
    assert 0 < statistics.mean(ours_off) < 1.25 * statistics.mean(dense_off)


@pytest.mark.parametrize("runner", ["0", "1"], ids=["first runner, eager", "second runner, graphs"])
def test_sampled_requests_replay(runner: str, model: str, dense: dict[str, list[Any]], monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    prompt, exact = PROMPTS[6], dense["prompts"][6]
    with engine(model, santa=SAMPLED, graphs=runner == "1", enable_prefix_caching=False) as llm:
        (first,) = generate(llm, [prompt], 12)
        (again,) = generate(llm, [prompt], 12)
        assert again.token_ids == first.token_ids and best_logprobs(again) == best_logprobs(first)
        # The first token is prefill's, which is exact; the second comes of the first sampled step.
        assert first.token_ids[0] == exact.token_ids[0]
        assert first.logprobs[1] != exact.logprobs[1]

        pair = generate(llm, [prompt, prompt], 12)
        assert pair[0].logprobs[1] != pair[1].logprobs[1]
        assert [x.token_ids for x in generate(llm, [prompt, prompt], 12)] == [x.token_ids for x in pair]

        # In another batch the matrix products may round otherwise, and the row seed is the same. (The last steps have
        # this request alone; the first runner then takes one without requests.)
        def last_seeds(prompts: list[list[int]], new_tokens: list[int]) -> tuple[int, ...]:
            seen: list[tuple[int, ...]] = []
            build = SantaMetadataBuilder.build
            with monkeypatch.context() as patch:
                patch.setattr(
                    SantaMetadataBuilder, "build", lambda *a, **k: (seen.append(StepRows.row_seeds), build(*a, **k))[1]
                )
                generate(llm, prompts, new_tokens)
            return next(seeds for seeds in reversed(seen) if seeds)

        alone = last_seeds([prompt], [12])
        assert last_seeds([*PROMPTS[:3], prompt], [4, 4, 4, 12]) == alone and len(alone) == 1 and alone[0] != 0

        seeded = generate(llm, [prompt, prompt], 12, seeds=[1, 2])
        swapped = generate(llm, [prompt, prompt], 12, seeds=[2, 1])
        assert [x.token_ids for x in swapped] == [x.token_ids for x in seeded[::-1]]


def test_short_rows_are_exact(model: str, dense: dict[str, list[Any]]) -> None:
    with engine(model, santa={"num_samples": 4, "min_context": 1024}, graphs=True) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), dense["prompts"])


@pytest.mark.parametrize(
    ("santa", "message"),
    [({"num_sample": 4}, "has 'num_sample'; it needs names among"), ({"layers": [3]}, r"layers has \[3\]")],
)
def test_settings_are_checked_at_start(santa: dict[str, Any], message: str, model: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message), engine(model, santa=santa):
        pass


def test_heads_of_80_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, head_dim=80)
    with (
        pytest.raises((ValueError, RuntimeError), match="head_size is 80; it needs to be one of"),
        engine(path, santa={}),
    ):
        pass


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_draw_as_one(model: str, dense: dict[str, list[Any]]) -> None:
    with engine(model, santa=EXACT, tensor_parallel_size=2, graphs=True) as llm:
        check_same_tokens(generate(llm, PROMPTS, NEW_TOKENS), dense["prompts"])
    seconds = []
    for settings, gpus in (({}, 1), ({}, 2), ({"seed": 1000}, 1)):
        with engine(model, santa=SAMPLED | settings, tensor_parallel_size=gpus) as llm:
            seconds.append([best_logprobs(output)[1] for output in generate(llm, PROMPTS[3:], 2)])
    one, two, other = seconds
    # Rounding moves the first sampled step by less than other draws do.
    near = statistics.median(abs(a - b) for a, b in zip(one, two, strict=True))
    far = statistics.median(abs(a - b) for a, b in zip(one, other, strict=True))
    assert near < far / 4
