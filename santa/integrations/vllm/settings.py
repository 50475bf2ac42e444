"""The settings of the vLLM backend, and the engines that it refuses. Needs no vLLM: its configuration is known by the
attributes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from santa.config import SantaConfig

KEY = "santa"
# Of `SantaConfig`; the others are about prefill, scores and verification, which are vLLM's own here.
NAMES = ("budget", "keys", "layers", "min_context", "min_sampled_len", "num_samples", "sampler", "seed")

# Of a page, as `santa.decode_paged` takes them and FlashAttention too.
PAGE_SIZES = (16, 32, 64, 128, 256)
# In the extra configuration of a KV connector, which then writes codes where it writes keys.
SEES_TO_CODES = "santa_proposal_codes"
_LEAST_PROMPT = 1024


def settings_of(additional_config: Any) -> SantaConfig:
    """The settings in vLLM's additional_config: those of `SantaConfig` that NAMES has.

    Args:
        additional_config: a mapping whose entry "santa" is a mapping of settings, as JSON has them. Without that entry,
            or with None for all of it, the settings are those of `SantaConfig()`.

    Raises:
        TypeError, ValueError: an entry is of the wrong type, has a value that it cannot have, or a name that is none of
            NAMES; the message has the name. So has a key of additional_config itself that looks like a misspelt
            "santa".
    """
    if additional_config is None:
        return SantaConfig()
    if not isinstance(additional_config, Mapping):
        raise TypeError(
            f"santa: additional_config is a {type(additional_config).__name__}; it needs to be a dict with an entry "
            f"{KEY!r}, or without one for the default settings"
        )
    if KEY not in additional_config:
        for name in additional_config:
            if _closest(str(name).lower(), [KEY]):
                raise ValueError(f"santa: additional_config has {name!r}; it needs to be {KEY!r}")
        return SantaConfig()
    fields = additional_config[KEY]
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"santa: additional_config[{KEY!r}] is a {type(fields).__name__}; it needs to be a dict with names among "
            f"{list(NAMES)}"
        )
    for name in fields:
        if name not in NAMES:
            meant = _closest(str(name), NAMES)
            hint = f": {meant!r} is one" if meant else ""
            raise ValueError(
                f"santa: additional_config[{KEY!r}] has {name!r}; it needs names among {list(NAMES)}{hint}"
            )
    return SantaConfig(**fields)


def check_engine(config: Any) -> SantaConfig:
    """The settings of an engine, given its VllmConfig.

    Raises:
        TypeError, ValueError: as in `settings_of`; `layers` names a layer that the model does not have; the engine has
            a feature that the backend does not work with, which the message names.
    """
    settings = settings_of(config.additional_config)
    parallel, model = config.parallel_config, config.model_config
    for name, wanted in (
        ("decode_context_parallel_size", 1),
        ("prefill_context_parallel_size", 1),
        ("use_ubatching", False),
    ):
        got = getattr(parallel, name, wanted)
        if got != wanted:
            raise ValueError(f"santa: {name} is {got}; the backend needs it to be {wanted}")
    if getattr(model, "rswa_window", None) is not None:
        raise ValueError(f"santa: rswa_window is {model.rswa_window}; the backend needs a model without one")
    if settings.keys == "proposal":
        _check_pages(config)
    if is_draft(config):
        return settings  # `layers` is about the model that it drafts for
    num_layers = model.get_total_num_hidden_layers()
    if unknown := [i for i in settings.layers or () if i >= num_layers]:
        raise ValueError(f"santa: layers has {unknown}; it needs to name layers of the model, 0 to {num_layers - 1}")
    return settings


def _check_pages(config: Any) -> None:
    """Refuse an engine that moves K and V of a block without the codes beside them."""
    transfer = getattr(config, "kv_transfer_config", None)
    if transfer is not None and not (transfer.kv_connector_extra_config or {}).get(SEES_TO_CODES):
        raise ValueError(
            f"santa: kv_transfer_config is given while keys is 'proposal'; it needs to be left out: connectors move "
            f"keys without their codes (one that sees to these has {SEES_TO_CODES!r} in kv_connector_extra_config)"
        )
    if getattr(config.model_config, "is_hybrid", False):
        raise ValueError(
            "santa: is_hybrid is True while keys is 'proposal', which needs a model of attention layers alone: vLLM "
            "pads and copies the pages of hybrid models by rules of their own"
        )


def is_draft(config: Any) -> bool:
    """Whether a VllmConfig is that of a draft model."""
    speculative = getattr(config, "speculative_config", None)
    return speculative is not None and config.model_config is getattr(speculative, "draft_model_config", None)


def least_prompt(scheduler_config: Any) -> int:
    """New tokens of a row whose keys tell center and channel_scale: 1,024, or half of the most that a step has."""
    limits = (
        scheduler_config.max_num_batched_tokens // 2,
        getattr(scheduler_config, "long_prefill_token_threshold", 0),
    )
    return min(_LEAST_PROMPT, *(limit for limit in limits if limit > 0))


def describe(settings: SantaConfig) -> str:
    """The settings that the backend has, as its log says them."""
    values = {name: getattr(settings, name) for name in NAMES if name != "min_context"}
    return ", ".join(f"{name} {getattr(value, 'name', str(value)).lower()}" for name, value in values.items())


def layer_index(layer_name: str) -> int:
    """The number of a layer, whose stream is `seed` plus it, from vLLM's name of the layer.

    Names have one number, "model.layers.3.self_attn.attn", the same on every pipeline stage. Where layers have several
    attention modules there are two, and the modules are numbered as if each layer had two.

    Raises:
        ValueError: the name has no number, or more than two, or a second one above 1: all of a layer's modules would
            draw the same numbers as another's.
    """
    numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2 and numbers[1] < 2:
        return 2 * numbers[0] + numbers[1]
    raise ValueError(
        f"santa: layer_name is {layer_name!r}; it needs one number among its parts, the layer's, or also 0 or 1 "
        "for one of two attention modules"
    )


def first_kv_head(num_kv_heads: int, total_num_kv_heads: int, rank: int, size: int) -> int:
    """The number, among the KV heads of the whole model, of the first that a tensor-parallel rank has.

    Ranks have consecutive heads. Where there are more ranks than heads, each has a copy of one.
    """
    if total_num_kv_heads < size:
        return rank * total_num_kv_heads // size
    return rank * num_kv_heads


def _closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)
