"""The vLLM backend beside the sources of the versions that it is for, read and not run: no GPU, and no torch of theirs.

What is looked at is what the integration rests on: abstract methods, signatures, names. The wheels' Python files come
from the package index; without a network these tests skip, and say so.
"""

from __future__ import annotations

import ast
import enum
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.vllm_layer import BLOCK, BLOCKS, CODES, DIM, KV_HEADS, padded_cache
from helpers.vllm_sources import Source, Unreachable, decorators, fetch, parameters, takes_any

from santa.integrations.vllm.cache import LayerCodes

VERSIONS = ["0.25.0", "0.33.0"]
BACKEND = "vllm/v1/attention/backend.py"
FLASH = "vllm/v1/attention/backends/flash_attn.py"
UTILS = "vllm/v1/attention/backends/utils.py"
REGISTRY = "vllm/v1/attention/backends/registry.py"
LAYER = "vllm/model_executor/layers/attention/attention.py"
FIRST_RUNNER = "vllm/v1/worker/gpu_model_runner.py"
SECOND_RUNNER = "vllm/v1/worker/gpu/model_runner.py"
BATCH = "vllm/v1/worker/gpu_input_batch.py"
SECOND_BATCH = "vllm/v1/worker/gpu/input_batch.py"
SCHEDULER = "vllm/v1/core/sched/output.py"
PARALLEL = "vllm/distributed/parallel_state.py"
CUSTOM_OPS = "vllm/_custom_ops.py"
CONFIG, MODEL_CONFIG = "vllm/config/vllm.py", "vllm/config/model.py"
PARALLEL_CONFIG = "vllm/config/parallel.py"
CACHE_CONFIG, SCHEDULER_CONFIG = "vllm/config/cache.py", "vllm/config/scheduler.py"
TRANSFER_CONFIG, COMPILATION_CONFIG = "vllm/config/kv_transfer.py", "vllm/config/compilation.py"
SPECS, LAYOUTS = "vllm/v1/kv_cache_interface.py", "vllm/v1/kv_cache_layout.py"
SECOND_ATTENTION, SECOND_BLOCKS = "vllm/v1/worker/gpu/attn_utils.py", "vllm/v1/worker/gpu/block_table.py"
PLUGINS = "vllm/plugins/__init__.py"
CONNECTOR = "vllm/distributed/kv_transfer/kv_connector/v1/decode_bench_connector.py"
FILES = (
    *(BACKEND, FLASH, UTILS, REGISTRY, LAYER, FIRST_RUNNER, SECOND_RUNNER, BATCH, SECOND_BATCH, SCHEDULER, PARALLEL),
    *(CUSTOM_OPS, CONFIG, MODEL_CONFIG, PARALLEL_CONFIG, PLUGINS, CONNECTOR, CACHE_CONFIG, SCHEDULER_CONFIG),
    *(TRANSFER_CONFIG, COMPILATION_CONFIG, SPECS, LAYOUTS, SECOND_ATTENTION, SECOND_BLOCKS),
)
OURS = Path(__file__).resolve().parents[2] / "santa" / "integrations" / "vllm"


class Sources:
    """Modules of one version of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[str, Source] = {}

    def __getitem__(self, name: str) -> Source:
        if name not in self.read:
            self.read[name] = Source(self.folder / name)
        return self.read[name]


@pytest.fixture(scope="module", params=VERSIONS)
def vllm(request: pytest.FixtureRequest) -> Sources:
    try:
        return Sources(fetch(request.param, FILES))
    except Unreachable as error:
        pytest.skip(f"the wheel of vLLM {request.param} is out of reach: {error}")


def ours(module: str, name: str) -> dict[str, ast.FunctionDef]:
    return Source(OURS / f"{module}.py").methods(name)


CLASSES = [
    ("backend", "SantaBackend", "FlashAttentionBackend", "AttentionBackend"),
    ("metadata", "SantaMetadataBuilder", "FlashAttentionMetadataBuilder", "AttentionMetadataBuilder"),
    ("attention", "SantaImpl", "FlashAttentionImpl", "AttentionImpl"),
]


@pytest.mark.parametrize(("module", "name", "parent", "base"), CLASSES)
def test_abstract_methods_are_implemented(vllm: Sources, module: str, name: str, parent: str, base: str) -> None:
    bases = [base, "AttentionImplBase"] if base == "AttentionImpl" else [base]
    abstract = {
        method
        for each in bases
        for method, node in vllm[BACKEND].methods(each).items()
        if "abstractmethod" in decorators(node)
    }
    assert abstract
    assert abstract <= set(ours(module, name)) | set(vllm[FLASH].methods(parent))


@pytest.mark.parametrize(("module", "name", "parent", "base"), CLASSES)
def test_signatures_take_what_vllm_passes(vllm: Sources, module: str, name: str, parent: str, base: str) -> None:
    """A method of ours that theirs has too takes the same parameters in the same order, of the same kind."""
    theirs = vllm[BACKEND].methods(base) | vllm[FLASH].methods(parent)
    common = [method for method in ours(module, name) if method in theirs]
    assert common
    for method in common:
        mine, their = ours(module, name)[method], theirs[method]
        if not takes_any(mine):
            assert parameters(mine) == parameters(their), method
        else:
            assert parameters(mine) == parameters(their)[: len(parameters(mine))], method
        on_class = {"staticmethod", "classmethod"}  # both are called on the class
        assert bool(on_class & decorators(mine)) == bool(on_class & decorators(their)), method


def test_refusals_are_asked_for(vllm: Sources) -> None:
    """Every supports_... of ours is one that vLLM asks, in one of the versions."""
    asked = {m for m in vllm[BACKEND].methods("AttentionBackend") if m.startswith("supports_")}
    mine = {m for m in ours("backend", "SantaBackend") if m.startswith("supports_")}
    assert mine - asked <= {"supports_rswa"}  # 0.25 has the feature, but does not ask


def test_what_is_imported_is_there(vllm: Sources) -> None:
    for path in OURS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("vllm."):
                continue
            name = node.module.replace(".", "/")
            file = f"{name}.py" if f"{name}.py" in FILES else f"{name}/__init__.py"
            if file not in FILES:
                assert node.module == "vllm.config", f"{path.name} imports {node.module}, which no test reads"
                continue
            source = vllm[file]
            for alias in node.names:
                assert alias.name in source.classes or alias.name in source.functions, f"{node.module}.{alias.name}"


def test_the_name_can_be_taken(vllm: Sources) -> None:
    registry = vllm[REGISTRY]
    assert "CUSTOM" in registry.attributes("AttentionBackendEnum")
    assert {"is_overridden", "get_path"} <= set(registry.methods("AttentionBackendEnum"))
    assert parameters(registry.functions["register_backend"])[:2] == ["backend", "class_path"]
    text = ast.unparse(vllm[PLUGINS].tree)
    assert "'vllm.general_plugins'" in text


def test_graph_support_and_defaults(vllm: Sources) -> None:
    assert "UNIFORM_SINGLE_TOKEN_DECODE" in vllm[BACKEND].attributes("AttentionCGSupport")
    base, flash = vllm[BACKEND].methods("AttentionMetadataBuilder"), vllm[FLASH]
    assert parameters(base["_init_reorder_batch_threshold"])[0] == "reorder_batch_threshold"
    assert parameters(base["build_for_cudagraph_capture"]) == ["common_attn_metadata"]
    assert "cls._cudagraph_support" in ast.unparse(
        flash.methods("FlashAttentionMetadataBuilder")["get_cudagraph_support"]
    )
    split = parameters(vllm[UTILS].functions["split_decodes_and_prefills"])
    assert split[:2] == ["common_attn_metadata", "decode_threshold"]


def test_fields_of_a_step(vllm: Sources) -> None:
    common = vllm[BACKEND].attributes("CommonAttentionMetadata")
    assert {
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len"),
        *("max_seq_len", "block_table_tensor", "slot_mapping", "causal", "is_prefilling", "seq_lens_cpu_upper_bound"),
    } <= common
    assert "replace" in vllm[BACKEND].methods("CommonAttentionMetadata")
    flash = vllm[FLASH].attributes("FlashAttentionMetadata")
    assert {"num_actual_tokens", "query_start_loc", "seq_lens", "block_table", "slot_mapping"} <= flash


def test_shape_of_the_cache(vllm: Sources) -> None:
    """As cache.py takes it apart: what FlashAttention's layer does."""
    text = ast.unparse(vllm[FLASH].methods("FlashAttentionImpl")["forward"])
    old = "kv_cache.unbind(1)" in text
    new = "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in text
    assert old != new
    assert old == ("get_kv_cache_shape" in vllm[FLASH].methods("FlashAttentionBackend"))


def test_queries_are_quantized_where_the_layer_is_built(vllm: Sources) -> None:
    """attention.py takes queries as they are while vLLM's layer is built, and tells the parent otherwise later."""
    layer = vllm[LAYER].methods("Attention")
    assert "self.impl.supports_quant_query_input" in ast.unparse(layer["__init__"])
    forward = ast.unparse(layer["forward"])
    assert forward.index("self.query_quant is not None") < forward.index("self.impl.supports_quant_query_input")
    assert parameters(vllm[CUSTOM_OPS].functions["scaled_fp8_quant"])[:2] == ["input", "scale"]
    assert "self.layer_name" in ast.unparse(layer["__init__"])


def test_requests_can_be_watched(vllm: Sources) -> None:
    first = vllm[FIRST_RUNNER].methods("GPUModelRunner")
    assert parameters(first["_update_states"]) == ["scheduler_output"]
    assert "req_ids" in vllm[BATCH].methods("InputBatch")
    execute = ast.unparse(first["execute_model"])
    assert execute.index("self._update_states(scheduler_output)") < execute.index("self._build_attention_metadata(")

    second = vllm[SECOND_RUNNER].methods("GPUModelRunner")
    assert parameters(second["add_requests"]) == ["scheduler_output"]
    assert parameters(second["prepare_inputs"])[0] == "scheduler_output"
    assert "req_ids" in vllm[SECOND_BATCH].attributes("InputBatch")
    execute = ast.unparse(second["execute_model"])
    order = ["self.add_requests(scheduler_output)", "self.prepare_inputs(", "self.model_state.prepare_attn("]
    assert sorted(order, key=execute.index) == order

    assert {"req_id", "prompt_token_ids", "sampling_params"} <= vllm[SCHEDULER].attributes("NewRequestData")
    assert {"scheduled_new_reqs", "finished_req_ids"} <= vllm[SCHEDULER].attributes("SchedulerOutput")


def test_settings_of_an_engine(vllm: Sources) -> None:
    assert "additional_config" in vllm[CONFIG].attributes("VllmConfig")
    sizes = {"decode_context_parallel_size", "prefill_context_parallel_size"}
    assert sizes <= vllm[PARALLEL_CONFIG].attributes("ParallelConfig")
    assert "use_ubatching" in vllm[PARALLEL_CONFIG].methods("ParallelConfig")
    model = vllm[MODEL_CONFIG].methods("ModelConfig")
    assert {"get_total_num_kv_heads", "get_total_num_hidden_layers", "rswa_window"} <= set(model)


def test_pages_can_be_padded(vllm: Sources) -> None:
    """attention.py pads them in the layer's specification, which both runners ask the layer for."""
    assert parameters(vllm[LAYER].methods("Attention")["get_kv_cache_spec"]) == ["vllm_config"]
    made = ast.unparse(vllm[LAYER].methods("Attention")["__init__"])
    assert "self.impl = " in made and "static_forward_context[prefix] = self" in made
    for text in (vllm[FIRST_RUNNER].methods("GPUModelRunner")["get_kv_cache_spec"], vllm[SECOND_ATTENTION].tree):
        assert "attn_module.get_kv_cache_spec(" in ast.unparse(text)
    fields = vllm[SPECS].attributes("AttentionSpec") | vllm[SPECS].attributes("KVCacheSpec")
    assert {"block_size", "num_kv_heads", "head_size", "page_size_padded"} <= fields
    assert "return self.page_size_padded" in ast.unparse(vllm[SPECS].methods("AttentionSpec")["page_size_bytes"])
    assert "block_size" in vllm[CACHE_CONFIG].attributes("CacheConfig")
    assert "static_forward_context" in vllm[COMPILATION_CONFIG].attributes("CompilationConfig")


@pytest.mark.parametrize("heads_first", [False, True])
def test_padded_pages_are_laid_out_as_in_our_tests(vllm: Sources, heads_first: bool) -> None:
    """vLLM's own code that makes views of padded pages, run."""
    page = 2 * BLOCK * KV_HEADS * DIM * 2 + CODES
    raw = torch.zeros(BLOCKS * page, dtype=torch.int8)
    spec = SimpleNamespace(
        **{"block_size": BLOCK, "num_heads": KV_HEADS, "page_size_padded": page, "page_size_bytes": page},
        **{"dtype": torch.bfloat16, "state_content_size_bytes": 4 * DIM, "get_num_kernel_states": lambda size: size},
    )
    names = {"torch": torch, "prod": math.prod, "get_dtype_size": lambda dtype: dtype.itemsize}
    if "_reshape_attention_kv_cache" in vllm[SECOND_ATTENTION].functions:
        run(vllm[SECOND_ATTENTION], names, "_reshape_attention_kv_cache")
        order = (0, 1, 3, 2, 4) if heads_first else (0, 1, 2, 3, 4)
        shape = (BLOCKS, 2, BLOCK, KV_HEADS, DIM)
        view = names["_reshape_attention_kv_cache"](raw, spec, shape, order, BLOCKS, None)
        ours = padded_cache("0.25 HND" if heads_first else "0.25")
    else:
        names["Enum"] = enum.Enum
        run(vllm[LAYOUTS], names, "KVCacheLayout")
        run(vllm[SPECS], names, "compute_layer_kv_cache_shape_bytes", "compute_layout_strides", "create_kv_cache_views")
        layout = names["KVCacheLayout"].LBHNC if heads_first else names["KVCacheLayout"].LBNHC
        tensor = SimpleNamespace(layers=["a"], layer_stride=page * BLOCKS, block_stride=page, offset=0)
        (view,) = names["create_kv_cache_views"](raw, spec, BLOCKS, layout, tensor, kernel_block_size=BLOCK)
        ours = padded_cache("0.33 HND" if heads_first else "0.33")
    assert view.shape == ours.shape and view.stride() == ours.stride() and view.storage_offset() == 0
    assert LayerCodes(KV_HEADS, DIM, torch.device("cpu")).proposal(view).scales.shape == (BLOCKS, BLOCK, KV_HEADS)


def run(source: Source, names: dict[str, Any], *wanted: str) -> None:
    """Execute some definitions of a module, and its constants, into `names`."""
    body: list[ast.stmt] = [ast.ImportFrom("__future__", [ast.alias("annotations")], 0)]
    for node in source.tree.body:
        constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith(("_DIM", "(_DIM"))
        if constant or getattr(node, "name", None) in wanted:
            body.append(node)
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), "vllm", "exec"), names)


def test_keys_that_warm_ups_write_go_nowhere(vllm: Sources) -> None:
    """attention.py tells them by their slots."""
    dummy = ast.unparse(vllm[FIRST_RUNNER].methods("GPUModelRunner")["_dummy_run"])
    assert dummy.index("sm.fill_(-1)") < dummy.index("self._build_attention_metadata(")
    assert "get_dummy_slot_mappings(" in ast.unparse(
        vllm[SECOND_RUNNER].methods("GPUModelRunner")["prepare_dummy_attn"]
    )
    slots = ast.unparse(vllm[SECOND_BLOCKS].methods("BlockTables")["get_dummy_slot_mappings"])
    assert "self.slot_mappings.fill_(PAD_SLOT_ID)" in slots
    assert "PAD_SLOT_ID = -1" in ast.unparse(vllm[UTILS].tree)


def test_keys_are_written_by_one_method(vllm: Sources) -> None:
    """Codes are written there, too. Nothing of FlashAttention's fuses it with rotations."""
    update = vllm[FLASH].methods("FlashAttentionImpl")["do_kv_cache_update"]
    assert parameters(update) == ["layer", "key", "value", "kv_cache", "slot_mapping"]
    assert "forward_includes_kv_cache_update" in vllm[FLASH].attributes("FlashAttentionBackend")
    assert "fused_rope_kvcache_supported" not in vllm[FLASH].methods("FlashAttentionImpl")
    text = ast.unparse(vllm[LAYER].functions["unified_kv_cache_update"])
    assert "attn_layer.impl.do_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping)" in text


def test_settings_that_proposal_keys_look_at(vllm: Sources) -> None:
    assert "kv_transfer_config" in vllm[CONFIG].attributes("VllmConfig")
    assert "kv_connector_extra_config" in vllm[TRANSFER_CONFIG].attributes("KVTransferConfig")
    assert "is_hybrid" in vllm[MODEL_CONFIG].methods("ModelConfig")
    limits = {"max_num_batched_tokens", "long_prefill_token_threshold"}
    assert limits <= vllm[SCHEDULER_CONFIG].attributes("SchedulerConfig")


def test_the_benchmarks_connector(vllm: Sources) -> None:
    methods = vllm[CONNECTOR].methods("DecodeBenchConnector")
    bench = Source(OURS.parents[2] / "bench" / "vllm_random_cache.py").methods("RandomCacheConnector")
    for name, mine in bench.items():
        assert parameters(mine) == parameters(methods[name])
