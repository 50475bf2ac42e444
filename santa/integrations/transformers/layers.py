"""Which layers of a model are `santa`'s, and why the others are not: looked up here, reported by `report`."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

import santa
from santa.config import SantaConfig
from santa.shapes import DECODE_HEAD_DIMS

NAME = "santa"
# From 5.19 on, continuous batching takes names with "flash" in them alone (beside Transformers' own) and cuts "paged|"
# off. A 2 or 3 in it would be taken for the version of a package.
PAGED_NAME = "paged|santa" if Version(transformers.__version__) < Version("5.19") else "santa_paged_flash"

# A plain attribute of an attention module: it is in no state_dict, and torch.compile guards on it.
_SETTINGS_ATTRIBUTE = "_santa_settings"


@dataclass(frozen=True)
class LayerSettings:
    """What `attach` leaves on an attention module.

    It is pickled with the model. Unpickling imports this package, which registers `santa` with Transformers: the model
    runs in a process that has never heard of it.

    Attributes:
        config: the settings of the model.
        reason: why the layer is left to Transformers' SDPA; None: it is santa's.
    """

    config: SantaConfig
    reason: str | None = None


_DEFAULT_SETTINGS = LayerSettings(SantaConfig())


def settings_of(module: torch.nn.Module) -> LayerSettings:
    """Those of `attach`, or the defaults for a module that was switched by name alone."""
    return getattr(module, _SETTINGS_ATTRIBUTE, _DEFAULT_SETTINGS)


def set_settings(module: torch.nn.Module, settings: LayerSettings) -> None:
    setattr(module, _SETTINGS_ATTRIBUTE, settings)


def keeps_codes(module: torch.nn.Module) -> bool:
    """Whether a layer of `santa`'s has proposal keys beside its cache: if it is to sample by them, and its cache keeps
    all keys."""
    settings = settings_of(module)
    return settings.reason is None and settings.config.proposes(module.layer_idx) and not _forgets_keys(module)


def _forgets_keys(module: torch.nn.Module) -> bool:
    kinds = getattr(module.config, "layer_types", None)
    return _window(module) is not None or (kinds is not None and kinds[module.layer_idx] == "chunked_attention")


def supports_head_dims(head_dim: int, value_dim: int) -> bool:
    """Whether `santa.decode` takes keys of head_dim and values of value_dim as they lie in the cache.

    Others it pads: a copy of the cache in every step, which costs more than attention itself (docs/shapes.md).
    """
    return head_dim in DECODE_HEAD_DIMS and value_dim == head_dim


def head_dim_error(module_class: str, head_dim: int, value_dim: int) -> str:
    return (
        f"santa: {module_class} has {_describe_head_dims(head_dim, value_dim)}. For others santa.decode would copy "
        'the cache in every step, at more cost than attention: use attn_implementation="sdpa" for this model'
    )


def _describe_head_dims(head_dim: int, value_dim: int) -> str:
    got = f"head_dim {head_dim}" if value_dim == head_dim else f"head_dim {head_dim} with values of {value_dim}"
    return f"{got}; it needs one of {DECODE_HEAD_DIMS}, for queries, keys and values alike"


def head_dims_of(module: torch.nn.Module) -> tuple[int, int] | None:
    """(head_dim of queries and keys, of values) as an attention module states them; None if it does not."""
    names = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")
    stated = [dim for name in names if isinstance(dim := getattr(module, name, None), int)]
    if not stated:
        return None
    value_dim = getattr(module, "v_head_dim", None)
    return stated[0], value_dim if isinstance(value_dim, int) else stated[0]


def unwrap(model: object) -> PreTrainedModel:
    """The one Transformers model that a wrapper holds (DataParallel, torch.compile, PEFT), or the model itself."""
    if isinstance(model, PreTrainedModel):
        return model
    needed = "it needs to be a Transformers model"
    if isinstance(model, str):
        raise TypeError(
            f"santa: model is the string {model!r}; {needed}: load it with "
            f"AutoModelForCausalLM.from_pretrained({model!r})"
        )
    if not isinstance(model, torch.nn.Module):
        hint = ": pass its .model" if isinstance(getattr(model, "model", None), PreTrainedModel) else ""
        raise TypeError(f"santa: model is a {type(model).__name__}; {needed}{hint}")
    inside = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    if len(outermost) != 1:
        raise TypeError(
            f"santa: model is a {type(model).__name__} that holds {len(outermost)} Transformers models {outermost}; "
            f"{needed}, or to hold one"
        )
    return inside[outermost[0]]


def attention_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """By name, the modules that compute attention: through AttentionInterface, or by the look of their class's name.

    Of the latter, those that hold another attention module are wrappers.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            continue
        looks_like_it = "attention" in type(module).__name__.lower() and next(module.parameters(), None) is not None
        if _code_facts(type(module)).uses_interface or looks_like_it:
            found[name] = module
    return {
        name: module
        for name, module in found.items()
        if _code_facts(type(module)).uses_interface or not any(other.startswith(f"{name}.") for other in found)
    }


def santa_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that `santa` runs, or would once the model is attached."""
    reasons = reasons_of(model)
    modules = [module for name, module in attention_modules(model).items() if reasons[name] is None]
    if not modules:
        raise ValueError(no_layer_error(model, reasons))
    return modules


def owners_of(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """By name of attention module, the innermost Transformers model that holds it, whose configuration it follows."""
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}

    def holds(outer: str, name: str) -> bool:
        return outer == "" or name.startswith(f"{outer}.")

    return {
        name: models[max((outer for outer in models if holds(outer, name)), key=len)]
        for name in attention_modules(model)
    }


def reasons_of(model: PreTrainedModel) -> dict[str, str | None]:
    """By name of attention module, why `santa` cannot run it; None where it can."""
    modules, owners = attention_modules(model), owners_of(model)
    # A class that computes something else under the name "sdpa", without handing it over, is wrong under any other
    # name. It shares a name with all layers that share its configuration.
    facts = {name: _code_facts(type(module)) for name, module in modules.items()}
    fixed = {
        id(modules[name].config): type(modules[name]).__name__ for name, fact in facts.items() if fact.chooses_by_name
    }
    return {
        name: _reason(module, facts[name], owners[name], fixed, model.can_generate())
        for name, module in modules.items()
    }


def _reason(
    module: torch.nn.Module, facts: _CodeFacts, owner: PreTrainedModel, fixed: dict[int, str], can_generate: bool
) -> str | None:
    config = getattr(module, "config", None)
    if not facts.uses_interface or not hasattr(config, "_attn_implementation"):
        return "computes its attention itself, not through AttentionInterface"
    if id(config) in fixed:
        return f"{fixed[id(config)]} computes something else unless the implementation is called 'sdpa'"
    if not owner._can_set_attn_implementation():
        return f"{type(owner).__name__} cannot change its attention implementation"
    # The layers of a prefix-LM say that they are not causal, for the sake of its prefill.
    is_prefix_lm = can_generate and bool(getattr(config, "use_bidirectional_attention", False))
    if getattr(module, "is_causal", None) is not True and not is_prefix_lm:
        return "does not say that it is causal self-attention (is_causal)"
    if not isinstance(getattr(module, "layer_idx", None), int):
        return "has no layer_idx, without which all layers would draw the same random numbers"
    if "position_bias" in facts.handed_over:
        return "adds a position bias to its attention logits"
    head_dims = head_dims_of(module)
    if head_dims is not None and not supports_head_dims(*head_dims):
        return f"has {_describe_head_dims(*head_dims)}"
    return None


@dataclass(frozen=True)
class _CodeFacts:
    """What the code of an attention class says, which no attribute of it does.

    Attributes:
        uses_interface: it looks its attention function up in AttentionInterface.
        handed_over: every string that its code has, among them the names of the arguments that it hands over.
        chooses_by_name: it compares the implementation's name with "sdpa", and does not hand over what it would
            then have put into the mask (`indices`, `block_indices`: see `attention`).
    """

    uses_interface: bool
    handed_over: frozenset[str]
    chooses_by_name: bool


@functools.cache
def _code_facts(module_class: type) -> _CodeFacts:
    names: set[str] = set()
    strings: set[str] = set()
    compares = False
    for code in _codes(module_class):
        names.update(code.co_names)
        for constant in code.co_consts:
            strings.update(x for x in _as_tuple(constant) if isinstance(x, str))
        compares = compares or _compares_with_sdpa(code)
    return _CodeFacts(
        uses_interface=not {"get_interface", "ALL_ATTENTION_FUNCTIONS"}.isdisjoint(names),
        handed_over=frozenset(strings),
        chooses_by_name=compares and strings.isdisjoint({"indices", "block_indices"}),
    )


def _codes(module_class: type) -> Iterator[types.CodeType]:
    """The code of a module class's methods, and of the functions in them."""
    for base in module_class.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            continue
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
            if code is not None:
                yield from _nested(code)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _compares_with_sdpa(code: types.CodeType) -> bool:
    instructions = [instruction for instruction in dis.get_instructions(code) if instruction.opname != "CACHE"]
    return any(
        name.argval == "_attn_implementation" and "sdpa" in _as_tuple(other.argval)
        for name, other in itertools.pairwise(instructions)
    )


def _as_tuple(constant: object) -> tuple[object, ...]:
    return tuple(constant) if isinstance(constant, (tuple, frozenset)) else (constant,)


# The report ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """One attention module of a model.

    Attributes:
        name: as in `model.named_modules()`.
        module_class: name of its class.
        layer_idx: its layer index, if it has one.
        status: "sampled"; "exact": `santa.decode` with all values; "other": not santa's, but Transformers' own.
        reason: why it is not sampled, or not in every step; "" if there is nothing to say.
    """

    name: str
    module_class: str
    layer_idx: int | None
    status: str
    reason: str


@dataclass(frozen=True)
class AttachReport:
    """What runs in the attention layers of a model; `repr` is a table of it.

    Attributes:
        model_class: name of the model's class.
        layers: one `LayerReport` per attention module.
    """

    model_class: str
    layers: tuple[LayerReport, ...]

    def with_status(self, status: str) -> tuple[LayerReport, ...]:
        """The layers of one status: "sampled", "exact" or "other"."""
        return tuple(layer for layer in self.layers if layer.status == status)

    def __repr__(self) -> str:
        names = {"sampled": "sampled", "exact": "exact", "other": "not santa's"}
        counts = ", ".join(f"{len(self.with_status(status))} {name}" for status, name in names.items())
        lines = [f"santa in {self.model_class}: {counts}"]
        groups: dict[tuple[str, str, str], list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault((layer.status, layer.module_class, layer.reason), []).append(layer)
        for status, name in names.items():
            for (group_status, module_class, reason), layers in groups.items():
                if group_status == status:
                    because = f": {reason}" if reason else ""
                    lines.append(f"  {name:11}  {module_class}, {_describe_layers(layers)}{because}")
        return "\n".join(lines)


def report(model: torch.nn.Module) -> AttachReport:
    """Which attention layers of a model sample, which are exact, which are not santa's, and why.

    Args:
        model: a Transformers model, or a wrapper of one; attached, switched by name, or neither.

    Raises:
        TypeError: model is no Transformers model, and holds none.
    """
    model = unwrap(model)
    reasons = reasons_of(model)
    layers = []
    for name, module in attention_modules(model).items():
        settings = settings_of(module)
        reason = settings.reason or reasons[name]
        if reason is None and (current := module.config._attn_implementation) not in (NAME, PAGED_NAME):
            reason = f"its configuration says attn_implementation={current!r}"
        status, why = ("other", reason) if reason is not None else _status(module, settings.config)
        layer_idx = getattr(module, "layer_idx", None)
        layers.append(LayerReport(name, type(module).__name__, layer_idx, status, why))
    return AttachReport(type(model).__name__, tuple(layers))


def no_layer_error(model: PreTrainedModel, reasons: dict[str, str | None]) -> str:
    """The message for a model that has no layer for `santa`."""
    groups: dict[tuple[str, str | None], int] = {}
    for name, module in attention_modules(model).items():
        key = (type(module).__name__, reasons[name])
        groups[key] = groups.get(key, 0) + 1
    listed = "; ".join(f"{module_class} ({count}) {reason}" for (module_class, reason), count in groups.items())
    return (
        f"santa: model is a {type(model).__name__}; it needs to have causal attention layers that santa can run, and "
        f"has none: {listed or 'no attention layers'}"
    )


def _status(module: torch.nn.Module, config: SantaConfig) -> tuple[str, str]:
    """Status and reason of a layer that is santa's."""
    if config.samples_in_layer(module.layer_idx) == 0 and not config.draws_scores(module.layer_idx):
        return "exact", "num_samples is 0" if config.num_samples == 0 else "layers leaves it out"
    if not config.draws_scores(module.layer_idx) and (reason := _never_samples(module, config)):
        return "exact", reason
    remarks = []
    if not _code_facts(type(module)).handed_over.isdisjoint({"indices", "block_indices"}):
        remarks.append("exact where its indexer leaves keys out")
    if config.proposes(module.layer_idx) and _forgets_keys(module):
        remarks.append("reads all keys of its window, without proposal keys")
    return "sampled", "; ".join(remarks)


def _never_samples(module: torch.nn.Module, config: SantaConfig) -> str | None:
    """Why no row of a layer is ever long enough to sample, if so."""
    minimum = config.min_sampled_len
    if minimum is None:
        groups = getattr(module, "num_key_value_groups", 1)
        minimum = santa.default_min_sampled_len(config.num_samples, groups if isinstance(groups, int) else 1)
    window, context = _window(module), getattr(module.config, "max_position_embeddings", None)
    if isinstance(window, int) and window < minimum:
        return f"never samples: its window of {window} keys is shorter than min_sampled_len, {minimum}"
    if isinstance(context, int) and context <= minimum:
        return f"never samples: its context ends at {context} tokens, and min_sampled_len is {minimum}"
    return None


def _window(module: torch.nn.Module) -> int | None:
    """The sliding window of a layer, which not every module keeps."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)


def _describe_layers(layers: list[LayerReport]) -> str:
    """Such as "layers 0-5, 7"; without layer indices the number of modules."""
    indices = sorted({layer.layer_idx for layer in layers if isinstance(layer.layer_idx, int)})
    if len(indices) != len(layers):
        return f"{len(layers)} module{'s' if len(layers) > 1 else ''}"
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    listed = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    return f"layer{'s' if len(indices) > 1 else ''} {listed}"
