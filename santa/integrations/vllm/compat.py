"""Where versions of vLLM differ: tried with 0.25.0 (torch 2.11), read against 0.33.0 (torch 2.14).

The rest of the package uses what both have. The layout of a layer's cache differs, too: cache.py tells it by its shape.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import vllm
from packaging.version import Version

from .requests import watch_runner

MIN_VERSION = "0.25.0"


def check_version() -> None:
    """Refuse a vLLM that is too old. Not an ImportError: vLLM keeps the text of those to itself."""
    if Version(vllm.__version__) < Version(MIN_VERSION):
        raise RuntimeError(f"santa: vllm is {vllm.__version__}; it needs to be at least {MIN_VERSION}")


def _rows_of_batch(runner: Any, _: Any) -> Any:
    return runner.input_batch.req_ids


def _rows_of_result(_: Any, batch: Any) -> Any:
    return batch.req_ids


# vLLM has two model runners, and takes the second for most models. Module, methods as in `watch_runner`.
RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "_update_states", "_update_states", _rows_of_batch),
    ("vllm.v1.worker.gpu.model_runner", "add_requests", "prepare_inputs", _rows_of_result),
)


def watch_runners() -> None:
    """Have the model runners of this process say which requests a step holds.

    Called where metadata builders are made, which a model runner does: its module is imported by then.

    Raises:
        RuntimeError: there is none, or it lacks a method.
    """
    found = [(sys.modules[module], *methods) for module, *methods in RUNNERS if module in sys.modules]
    if not found:
        raise RuntimeError(
            f"santa: none of vLLM's model runners is imported; row seeds need one of {[m for m, *_ in RUNNERS]}"
        )
    for module, note, rows, request_ids in found:
        watch_runner(module.GPUModelRunner, note, rows, request_ids)


def let_layers_pad_pages() -> None:
    """Have vLLM's layers ask their backend, by `adapt_spec`, what the pages of their cache are to be.

    0.33 asks a backend's class, which does not know of which layer, and 0.25 nobody.
    """
    # Not where this module is imported, which the layers' module may be about to do.
    from vllm.model_executor.layers.attention.attention import Attention

    if "_santa_asks" in vars(Attention):
        return
    method = Attention.get_kv_cache_spec

    @functools.wraps(method)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = method(self, vllm_config)
        adapt = getattr(self.impl, "adapt_spec", None)
        return spec if spec is None or adapt is None else adapt(self.layer_name, spec, vllm_config)

    Attention.get_kv_cache_spec = get_kv_cache_spec
    Attention._santa_asks = True
