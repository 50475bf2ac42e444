"""Sampled decoding, and sparse prefill, for Hugging Face Transformers.

    import santa
    from santa.integrations.transformers import attach, report

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to("cuda")
    attach(model, santa.SantaConfig(num_samples=128))
    print(report(model))
    model.generate(...)

Importing this package makes `attn_implementation="santa"` known to Transformers, which does the same with the default
settings. What runs:

    more than one query: prefill (chunked too),   Transformers' own SDPA attention; with a logit soft cap
        speculative verification                  (Gemma 2) or sinks (gpt-oss) exact, in plain PyTorch
    the same with SantaConfig(prefill="sample"),  `santa.prefill`
        where the mask is causal and no more
    one query per row in causal self-attention    `santa.decode`, with soft cap and sinks
    2 to 8 with SantaConfig(max_sampled_q_len),   `santa.decode`
        where the mask is causal and no more
    attention that does not say that it is        Transformers' own SDPA attention
        causal: encoders, cross-attention
    continuous batching, attach(..., paged=True)  `santa.decode_paged` for requests of one token, exact for others

The mask function runs once per step and mask type, and notes beside the mask the one range of valid keys of each row
(left padding, a static cache's unused tail, a sliding window), so that no layer reads it. A mask that is no contiguous
range takes the exact path. Settings live on the model's attention modules, where a compiled graph sees them as
constants. Inference only.

    attention.py   what one layer does in one step
    paged.py       the same in continuous batching
    masks.py       the mask function, and what is noted on a mask
    layers.py      which layers are santa's, why the others are not, and the report of it
    proposals.py   proposal keys beside the caches
    parallel.py    which heads are here, under tensor parallelism
    recording.py   how much the decode steps read
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from santa.config import SantaConfig
from santa.prefill import HEAD_DIMS as PREFILL_HEAD_DIMS

from .attention import attention
from .layers import (
    NAME,
    PAGED_NAME,
    AttachReport,
    LayerReport,
    LayerSettings,
    attention_modules,
    head_dims_of,
    no_layer_error,
    owners_of,
    reasons_of,
    report,
    set_settings,
    unwrap,
)
from .masks import step_mask
from .paged import leave_cache_unread, paged_attention
from .parallel import note_place
from .proposals import follow_cache
from .recording import RowsRead, record_rows_read

__all__ = [
    "NAME",
    "PAGED_NAME",
    "AttachReport",
    "LayerReport",
    "RowsRead",
    "attach",
    "attention",
    "paged_attention",
    "record_rows_read",
    "register",
    "report",
    "step_mask",
]

# The first release whose mask functions are told the query's length and offset instead of its positions.
_MIN_TRANSFORMERS = "5.4.0"
if Version(transformers.__version__) < Version(_MIN_TRANSFORMERS):
    raise ImportError(f"santa: transformers is {transformers.__version__}; it needs to be at least {_MIN_TRANSFORMERS}")

# The first release whose continuous batching was tried: what it hands over has changed since.
_MIN_TRANSFORMERS_PAGED = "5.17.0"

_Model = TypeVar("_Model", bound=torch.nn.Module)


def register() -> None:
    """Make `attn_implementation="santa"` known to Transformers, and the name for continuous batching: the import of
    this package has done so already."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, step_mask)
    # No mask: Transformers makes none either for continuous batching.
    AttentionInterface.register(PAGED_NAME, paged_attention)


def attach(model: _Model, config: SantaConfig | None = None, *, paged: bool = False) -> _Model:
    """Switch a model to `santa` and set how it samples; may be called again to change the settings.

    Every attention module is looked at; `report(model)` says which sample, which are exact, and which are left to
    Transformers and why. Warns, with that report, if no layer can ever sample with these settings, or if some causal
    layers are left to Transformers.

    Args:
        model: a Transformers model whose attention goes through AttentionInterface, or a wrapper of one (DataParallel,
            torch.compile, PEFT).
        config: the settings; None is `SantaConfig()`. A compiled model recompiles when they change.
        paged: for continuous batching, `model.generate_batch`, and nothing else; False: for `generate` and the like.

    Returns:
        The same model.

    Raises:
        TypeError: model is no Transformers model, and holds none; config is no SantaConfig.
        ValueError: the model has no layer that `santa` can run; config.layers names a layer that it has not or that is
            not santa's; sparse prefill has no kernels for the head_dim; the model returns attention weights; Bernoulli
            scores of capped logits. With paged: some causal layers are not santa's; the model has several parts;
            Bernoulli scores; proposal keys.
        ImportError: with paged, Transformers is older than 5.17.
    """
    config = SantaConfig() if config is None else config
    if not isinstance(config, SantaConfig):
        raise TypeError(f"santa: config is a {type(config).__name__}; it needs to be a santa.SantaConfig")
    inner = unwrap(model)
    modules, owners, reasons = attention_modules(inner), owners_of(inner), reasons_of(inner)
    ours = {name: module for name, module in modules.items() if reasons[name] is None}
    if not ours:
        raise ValueError(no_layer_error(inner, reasons))
    layer_indices = {module.layer_idx for module in ours.values()}
    if unknown := sorted(set(config.layers or ()) - layer_indices):
        raise ValueError(
            f"santa: layers has {unknown}; it needs to name attention layers of {type(inner).__name__} that santa can "
            f"run, which are {sorted(layer_indices)}"
        )
    for module in ours.values():
        if getattr(module.config, "output_attentions", False):
            raise ValueError(
                f"santa: {type(module).__name__} has output_attentions=True in its configuration; it needs to be "
                "False, since santa computes no attention weights"
            )
        if config.score == "bernoulli" and getattr(module, "attn_logit_softcapping", None) is not None:
            raise ValueError(
                f"santa: {type(module).__name__} caps its attention logits; score needs to be 'exact' for this model"
            )
        head_dims = head_dims_of(module)
        if config.prefill == "sample" and head_dims is not None and head_dims[0] not in PREFILL_HEAD_DIMS:
            raise ValueError(
                f"santa: {type(module).__name__} has head_dim {head_dims[0]}; prefill 'sample' needs one of "
                f"{PREFILL_HEAD_DIMS}: use prefill='dense' for this model"
            )
    left = [
        name
        for name, module in modules.items()
        if reasons[name] is not None and getattr(module, "is_causal", None) is True and hasattr(module, "layer_idx")
    ]
    register()
    if paged:
        _check_paged(inner, config, ours, {name: reasons[name] for name in left})
        # Transformers would look for a package of that name.
        inner.config._attn_implementation = PAGED_NAME
    else:
        for owner in {id(owners[name]): owners[name] for name in ours}.values():
            owner.set_attn_implementation(NAME)
    kept = {module.config._attn_implementation for module in ours.values()}
    if (PAGED_NAME if paged else NAME) not in kept:
        raise ValueError(
            f"santa: model is a {type(inner).__name__} whose attention layers keep attn_implementation={sorted(kept)}; "
            "they need to follow the configuration of the model that holds them"
        )
    for name, module in modules.items():
        set_settings(module, LayerSettings(config, reasons[name]))
        note_place(module)
        if config.keys == "proposal" and reasons[name] is None:
            follow_cache(module)
        if paged:
            leave_cache_unread(module)
    result = report(inner)
    if config.num_samples > 0 and config.layers != () and not result.with_status("sampled"):
        message = "no layer samples with these settings: lower min_sampled_len, or use another model"
    elif left:
        message = f"causal attention layers that are left to Transformers: {len(left)}"
    else:
        return model
    warnings.warn(f"{message}\n{result!r}", stacklevel=2)
    return model


def _check_paged(
    model: PreTrainedModel, config: SantaConfig, ours: dict[str, torch.nn.Module], left: dict[str, str]
) -> None:
    """What continuous batching with santa does not do."""
    if Version(transformers.__version__) < Version(_MIN_TRANSFORMERS_PAGED):
        raise ImportError(
            f"santa: transformers is {transformers.__version__}; continuous batching needs at least "
            f"{_MIN_TRANSFORMERS_PAGED}"
        )
    if config.score == "bernoulli":
        raise ValueError("santa: score is 'bernoulli' with paged=True; it needs to be 'exact'")
    if config.keys == "proposal":
        raise ValueError("santa: keys is 'proposal' with paged=True; it needs to be 'exact'")
    if left:
        name, reason = next(iter(left.items()))
        raise ValueError(
            f"santa: paged is True while {len(left)} of the causal layers of {type(model).__name__} cannot be santa's "
            f"({name}: {reason}); all need to be"
        )
    if any(module.config is not model.config for module in ours.values()):
        raise ValueError(
            f"santa: paged is True for a {type(model).__name__}, a model of several parts; it needs to be a language "
            "model alone"
        )


register()
