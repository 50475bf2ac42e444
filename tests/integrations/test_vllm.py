"""The parts of the vLLM integration that need no vLLM: settings, streams of requests, views of its cache, one layer."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import santa
from santa.integrations import vllm as vllm_package
from santa.integrations.vllm.cache import LayerCache, layer_cache
from santa.integrations.vllm.decode import DecodeLayer, DecodeRows
from santa.integrations.vllm.requests import RequestStreams, StepRows, watch_runner
from santa.integrations.vllm.settings import check_engine, describe, first_kv_head, layer_index, settings_of

# Settings -------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_vllm() -> None:
    code = "import sys, santa.integrations.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_are_those_of_santa_config() -> None:
    fields = {"num_samples": 64, "sampler": "systematic", "budget": "uniform", "seed": 7, "layers": [1, 0]}
    assert settings_of({"santa": fields, "gdn_prefill_backend": "auto"}) == santa.SantaConfig(**fields)
    assert settings_of({"santa": {"min_context": 100}}).min_sampled_len == 100


def test_settings_are_described() -> None:
    text = describe(settings_of({"santa": {"num_samples": 64, "budget": "uniform", "layers": [1]}}))
    assert (
        text == "budget uniform, keys exact, layers (1,), min_sampled_len none, num_samples 64, sampler grouped, seed 0"
    )


@pytest.mark.parametrize("nothing", [None, {}, {"santa": {}}, {"gdn_prefill_backend": "auto"}])
def test_default_settings(nothing: Any) -> None:
    assert settings_of(nothing) == santa.SantaConfig()


@pytest.mark.parametrize(
    ("additional", "error", "message"),
    [
        (
            {"santa": {"num_sample": 8}},
            ValueError,
            r"has 'num_sample'; it needs names among \['budget', .*'num_samples'",
        ),
        ({"santa": {"num_sample": 8}}, ValueError, "'num_samples' is one"),
        ({"santa": {"prefill": "sample"}}, ValueError, "has 'prefill'; it needs names among"),
        ({"santa": {"keys": "4 bits"}}, ValueError, r"keys is '4 bits'; it needs to be one of \['exact', 'proposal'\]"),
        (
            {"santa": {"keys": "proposal", "budget": "uniform"}},
            ValueError,
            "budget is 'uniform' while keys is 'proposal', which needs budget='streaming'",
        ),
        (
            {"santa": {"keys": "proposal", "sampler": "systematic"}},
            ValueError,
            "sampler is 'systematic' while keys is 'proposal', which needs sampler='grouped'",
        ),
        ({"santa": {"zzz": 8}}, ValueError, "has 'zzz'; it needs names among .*'seed']$"),
        ({"santa": {"num_samples": -1}}, ValueError, "num_samples is -1; it needs to be from 0"),
        ({"santa": {"num_samples": "128"}}, TypeError, "num_samples is '128'; it needs to be an int"),
        ({"santa": {"sampler": "best"}}, ValueError, "sampler is 'best'; it needs to be one of"),
        ({"santa": {"min_context": 1, "min_sampled_len": 1}}, TypeError, "min_context is 1 beside min_sampled_len"),
        ({"santa": 128}, TypeError, r"additional_config\['santa'\] is a int; it needs to be a dict"),
        ({"Santa": {}}, ValueError, "additional_config has 'Santa'; it needs to be 'santa'"),
        ({"snata": {}}, ValueError, "additional_config has 'snata'; it needs to be 'santa'"),
        ("santa", TypeError, "additional_config is a str; it needs to be a dict"),
    ],
)
def test_settings_errors(additional: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        settings_of(additional)


def make_engine(santa_fields: dict[str, Any] | None = None, **parallel: Any) -> SimpleNamespace:
    """As much of a VllmConfig as is looked at."""
    return SimpleNamespace(
        additional_config={"santa": santa_fields or {}},
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, use_ubatching=False, **parallel),
        model_config=SimpleNamespace(rswa_window=None, get_total_num_hidden_layers=lambda: 4),
    )


def test_engine() -> None:
    assert check_engine(make_engine({"layers": [0, 3]})).layers == (0, 3)
    with pytest.raises(ValueError, match=r"layers has \[4, 9\]; it needs to name layers of the model, 0 to 3"):
        check_engine(make_engine({"layers": [0, 4, 9]}))


def test_layers_are_not_about_a_draft_model() -> None:
    config = make_engine({"layers": [9]})
    config.speculative_config = SimpleNamespace(draft_model_config=config.model_config)
    assert check_engine(config).layers == (9,)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decode_context_parallel_size", 2), ("prefill_context_parallel_size", 2), ("use_ubatching", True)],
)
def test_engines_that_are_refused(name: str, value: Any) -> None:
    config = make_engine()
    setattr(config.parallel_config, name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}; the backend needs it to be"):
        check_engine(config)


def test_models_that_are_refused() -> None:
    config = make_engine()
    config.model_config.rswa_window = 128
    with pytest.raises(ValueError, match="rswa_window is 128"):
        check_engine(config)


def test_layer_index() -> None:
    assert layer_index("model.layers.17.self_attn.attn") == 17
    assert [layer_index(f"model.layers.3.attn.{i}") for i in range(2)] == [6, 7]
    for name in ("model.attn", "a.1.b.2.c.0", "model.layers.3.attn.2"):
        with pytest.raises(ValueError, match=f"layer_name is '{name}'"):
            layer_index(name)


def test_first_kv_head() -> None:
    assert [first_kv_head(2, 8, rank, 4) for rank in range(4)] == [0, 2, 4, 6]
    assert [first_kv_head(1, 2, rank, 4) for rank in range(4)] == [0, 0, 1, 1]  # two ranks have a copy of each
    assert first_kv_head(8, 8, 0, 1) == 0


# Streams of requests --------------------------------------------------------------------------------


def test_a_replayed_request_has_its_row_seed() -> None:
    streams = RequestStreams()
    streams.add("a", [1, 2, 3], None)
    streams.add("b", [1, 2], None)
    first, other = streams.row_seeds(["a", "b"])
    streams.remove("a")
    streams.add("again", [1, 2, 3], None)
    assert streams.row_seeds(["b", "again"]) == (other, first)
    assert first != other


def test_equal_requests_at_the_same_time_have_different_row_seeds() -> None:
    streams = RequestStreams()
    for name in "abc":
        streams.add(name, [5] * 40, None)
    seeds = streams.row_seeds("abc")
    assert len(set(seeds)) == 3
    streams.remove("b")
    streams.add("d", [5] * 40, None)  # takes the place that is free
    assert streams.row_seeds("adc") == seeds


def test_the_sampling_seed_tells_requests_apart() -> None:
    streams = RequestStreams()
    streams.add("a", [1], 10)
    streams.add("b", [1], 11)
    both = streams.row_seeds("ab")
    again = RequestStreams()
    again.add("b", [1], 11)
    again.add("a", [1], 10)
    assert again.row_seeds("ab") == both and both[0] != both[1]


def test_a_preempted_request_keeps_its_row_seed() -> None:
    streams = RequestStreams()
    streams.add("a", [1], None)
    streams.add("b", [1], None)
    before = streams.row_seeds("ab")
    streams.add("b", [1], None)
    assert streams.row_seeds("ab") == before
    streams.add("b", [2], None)  # the same name, but another prompt
    assert streams.row_seeds("ab")[1] != before[1]


def test_row_seeds_are_int64_and_unknown_requests_have_0() -> None:
    streams = RequestStreams()
    for i in range(200):
        streams.add(str(i), [i], None)
    seeds = streams.row_seeds(map(str, range(200)))
    assert len(set(seeds)) == 200
    assert torch.tensor(seeds, dtype=torch.int64).tolist() == list(seeds)
    assert streams.row_seeds(["warm-up"]) == (0,)


def request(name: str, prompt: list[int] | None, seed: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(req_id=name, prompt_token_ids=prompt, sampling_params=SimpleNamespace(seed=seed))


def step(new: list[SimpleNamespace], finished: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set(finished))


@pytest.mark.parametrize("one_method", [True, False])
def test_runners_are_watched(one_method: bool) -> None:
    class Runner:
        rows: Sequence[str] = ()

        def add(self, scheduler_output: Any) -> str:
            return "added"

        def prepare(self, scheduler_output: Any, more: int) -> SimpleNamespace:
            return SimpleNamespace(req_ids=self.rows, more=more)

    if one_method:
        Runner.add = Runner.prepare
    note = "prepare" if one_method else "add"
    for _ in range(2):  # the second time nothing happens
        watch_runner(Runner, note, "prepare", lambda _, result: result.req_ids)
    runner = Runner()

    def run(output: SimpleNamespace, rows: list[str]) -> tuple[int, ...]:
        runner.rows = rows
        if not one_method:
            assert runner.add(output) == "added"
        assert runner.prepare(output, more=3).more == 3
        return StepRows.row_seeds

    a, b = run(step([request("a", [1]), request("b", [1])]), ["a", "b"])
    assert a != b
    assert run(step([]), ["b", "a"]) == (b, a)
    assert run(step([request("a", [1])], finished=("a",)), ["a"]) == (a,)  # aborted and sent again under its name
    assert len(run(step([request("c", None), request("d", None)]), ["c", "d"])) == 2


def test_a_runner_without_the_methods_is_refused() -> None:
    class Runner:
        pass

    with pytest.raises(RuntimeError, match="Runner has no method prepare; row seeds need it"):
        watch_runner(Runner, "prepare", "prepare", lambda _, result: result)


# The cache ------------------------------------------------------------------------------------------

BLOCKS, BLOCK, HEADS, GROUP, DIM = 80, 16, 2, 4, 64


def vllm_cache(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A cache in one of the shapes and orders that vLLM has, filled at random."""
    numbers = torch.randn(BLOCKS * 2 * BLOCK * HEADS * DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    if layout == "0.25 NHD":
        return numbers.view(BLOCKS, 2, BLOCK, HEADS, DIM)
    if layout == "0.25 HND":
        return numbers.view(BLOCKS, 2, HEADS, BLOCK, DIM).transpose(2, 3)
    if layout == "0.33 BHN":
        return numbers.view(BLOCKS, HEADS, BLOCK, 2 * DIM)
    assert layout == "0.33 BNH, other layers between"
    return numbers.view(BLOCKS // 2, 2, BLOCK, HEADS, 2 * DIM)[:, 1].transpose(1, 2)


LAYOUTS = ["0.25 NHD", "0.25 HND", "0.33 BHN", "0.33 BNH, other layers between"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_of_vllms_memory(layout: str) -> None:
    cache = vllm_cache(layout)
    k, v = layer_cache(cache, DIM, torch.float32)
    assert k.shape == v.shape == (cache.shape[0], BLOCK, HEADS, DIM)
    token, head = 3, 1
    theirs = cache[2, :, token, head] if cache.dim() == 5 else cache[2, head, token].view(2, DIM)
    assert torch.equal(torch.stack([k[2, token, head], v[2, token, head]]), theirs)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_bytes_are_seen_as_float8() -> None:
    cache = vllm_cache("0.25 NHD").to(torch.float8_e4m3fn)
    k, v = layer_cache(cache.view(torch.uint8), DIM, torch.float8_e4m3fn)
    assert torch.equal(k.float(), cache[:, 0].float()) and torch.equal(v.float(), cache[:, 1].float())


@pytest.mark.parametrize("shape", [(8, 3, 16, 2, DIM), (8, 2, 16, 2, 96), (8, 2, 16, DIM), (8, 2, 16)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"kv_cache has shape \[8, .*it needs to be \[num_blocks, 2, "):
        layer_cache(torch.empty(shape), DIM, torch.float32)


# One layer ------------------------------------------------------------------------------------------


def rows_of(kv_lens: list[int], num_blocks: int, row_seeds: list[int] | None = None) -> DecodeRows:
    pages = max(-(-n // BLOCK) for n in kv_lens)
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2))[: len(kv_lens) * pages]
    return DecodeRows(
        page_table=table.view(len(kv_lens), pages).int(),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        row_seeds=torch.tensor(row_seeds or [0] * len(kv_lens), dtype=torch.int64),
        max_kv_len=max(kv_lens),
    )


def run(layer: DecodeLayer, q: Tensor, cache: LayerCache, rows: DecodeRows, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.full_like(q, torch.nan), torch.empty(q.shape[:2])
    layer.run(out, lse, q, cache, rows, **options)
    return out, lse


def contiguous(pages: Tensor, rows: DecodeRows) -> Tensor:
    return pages[rows.page_table.long()].flatten(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_samples", [0, 8])
def test_a_layer_decodes_as_contiguous_rows_do(layout: str, num_samples: int) -> None:
    cache = layer_cache(vllm_cache(layout), DIM, torch.float32)
    rows = rows_of([130, 0, 7, 96], cache.k.shape[0], [5, 6, 7, 8])
    q = torch.randn(4, HEADS * GROUP, DIM)
    config = santa.SantaConfig(num_samples=num_samples, min_sampled_len=50, seed=11)
    sinks = torch.randn(HEADS * GROUP)
    layer = DecodeLayer.of(config, 3, sm_scale=0.2, window_left=90, logits_soft_cap=20.0, first_kv_head=4)
    out, lse = run(layer, q, cache, rows, sinks=sinks)
    expected = santa.decode(
        q,
        contiguous(cache.k, rows),
        contiguous(cache.v, rows),
        kv_lens=rows.kv_lens,
        num_samples=num_samples,
        min_sampled_len=50,
        seed=14,
        row_seeds=rows.row_seeds,
        sm_scale=0.2,
        window_left=90,
        logits_soft_cap=20.0,
        sinks=sinks,
        first_kv_head=4,
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_layers_and_requests_draw_different_numbers() -> None:
    cache = layer_cache(vllm_cache("0.25 NHD"), DIM, torch.float32)
    rows = rows_of([300, 300], BLOCKS, [1, 2])
    same = DecodeRows(rows.page_table[:1].expand(2, -1), rows.kv_lens, rows.row_seeds, 300)
    q = torch.randn(1, HEADS * GROUP, DIM).expand(2, -1, -1)
    config = santa.SantaConfig(num_samples=4, min_sampled_len=0)
    first, _ = run(DecodeLayer.of(config, 0, sm_scale=0.125), q, cache, same)
    second, _ = run(DecodeLayer.of(config, 1, sm_scale=0.125), q, cache, same)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    again, _ = run(DecodeLayer.of(config, 0, sm_scale=0.125), q, cache, same)
    assert torch.equal(first, again)


def test_layers_that_settings_leave_out_are_exact() -> None:
    config = santa.SantaConfig(num_samples=4, min_sampled_len=0, layers=[1])
    assert [DecodeLayer.of(config, i, sm_scale=1.0).num_samples for i in range(3)] == [0, 4, 0]


def test_heads_of_a_rank_draw_as_in_the_whole_model() -> None:
    cache = layer_cache(vllm_cache("0.33 BHN"), DIM, torch.float32)
    rows = rows_of([200], BLOCKS, [9])
    q = torch.randn(1, HEADS * GROUP, DIM)
    config = santa.SantaConfig(num_samples=4, min_sampled_len=0)
    whole, _ = run(DecodeLayer.of(config, 0, sm_scale=0.125), q, cache, rows)
    for head in range(HEADS):
        part = LayerCache(cache.k[:, :, head : head + 1], cache.v[:, :, head : head + 1])
        heads = slice(head * GROUP, (head + 1) * GROUP)
        out, _ = run(DecodeLayer.of(config, 0, sm_scale=0.125, first_kv_head=head), q[:, heads], part, rows)
        torch.testing.assert_close(out, whole[:, heads])


def test_float8_cache_with_scales() -> None:
    float8 = vllm_cache("0.25 NHD").to(torch.float8_e4m3fn)
    cache = layer_cache(float8.view(torch.uint8), DIM, torch.float8_e4m3fn)
    rows = rows_of([130, 60], BLOCKS)
    q = torch.randn(2, HEADS * GROUP, DIM).bfloat16()
    k_scale, v_scale = torch.tensor(0.5), torch.tensor(2.0)
    layer = DecodeLayer.of(santa.SantaConfig(num_samples=0), 0, sm_scale=0.125)
    out, _ = run(layer, q, cache, rows, k_scale=k_scale, v_scale=v_scale)
    plain = LayerCache((cache.k.float() * 0.5).bfloat16(), (cache.v.float() * 2).bfloat16())
    expected, _ = run(layer, q, plain, rows)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_claiming_memory_runs(dtype: torch.dtype) -> None:
    layer = DecodeLayer.of(santa.SantaConfig(num_samples=8), 0, sm_scale=0.125)
    layer.claim_memory(torch.randn(3, HEADS * GROUP, DIM).bfloat16(), HEADS, dtype, rows=5, max_kv_len=20000)


def test_the_entry_point_is_register() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    line = re.search(r'\[project.entry-points."vllm.general_plugins"\]\nsanta = "(.*):(.*)"', text)
    assert line is not None
    assert callable(getattr(importlib.import_module(line[1]), line[2]))
    name, backend = vllm_package.BACKEND_PATH.rsplit(".", 1)
    assert f"class {backend}(" in (Path(vllm_package.__file__).parent / f"{name.rsplit('.', 1)[1]}.py").read_text()


def test_register_leaves_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    taken: dict[str, str] = {}

    class Custom:
        @staticmethod
        def is_overridden() -> bool:
            return "path" in taken

        @staticmethod
        def get_path() -> str:
            return taken["path"]

    registry = types.ModuleType("registry")
    registry.AttentionBackendEnum = SimpleNamespace(CUSTOM=Custom)
    registry.register_backend = lambda _, path: taken.update(path=path)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", registry)
    vllm_package.register()
    vllm_package.register()
    assert taken == {"path": vllm_package.BACKEND_PATH} and not caplog.records
    taken["path"] = "other.Backend"
    vllm_package.register()
    assert taken == {"path": "other.Backend"}
    assert "CUSTOM is already other.Backend" in caplog.text
