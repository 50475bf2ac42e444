"""Sampled decoding in vLLM: an attention backend that vLLM finds by itself once `santa` is installed beside it.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"santa": {"num_samples": 128}}'
    LLM(MODEL, attention_backend="CUSTOM", additional_config={"santa": {"num_samples": 128}})

What runs:

    prefill (chunked too) and steps that verify speculated tokens    vLLM's own FlashAttention
    one new token of a request                                       `santa.decode_paged`, on vLLM's cache and output

`register` is the entry point; docs/vllm.md has settings, seeds and limits. Tried with vLLM 0.25.0, read against 0.33.0.

    settings.py   additional_config["santa"], and what of an engine is refused
    requests.py   which requests a step holds, and a stream of random numbers for each
    cache.py      K and V of a layer as vLLM keeps them, and its proposal keys
    decode.py     what one layer does in a decode step, without vLLM
    backend.py    what the backend can do
    metadata.py   what a step's layers have in common
    attention.py  one layer
    compat.py     where versions of vLLM differ

Importing this package imports nothing of vLLM.
"""

from __future__ import annotations

__all__ = ["BACKEND_PATH", "register"]

BACKEND_PATH = "santa.integrations.vllm.backend.SantaBackend"


def register() -> None:
    """Make `--attention-backend CUSTOM` name this backend. vLLM calls it in each of its processes.

    If another package has taken the name it stays with that one, and vLLM's log says so.
    """
    import logging

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND_PATH:
        logging.getLogger("vllm.santa").warning(
            "santa: the attention backend CUSTOM is already %s; set VLLM_PLUGINS=santa to have santa's",
            custom.get_path(),
        )
        return
    register_backend(custom, BACKEND_PATH)
