"""Settings of sampled decoding and of sparse prefill for the integrations with inference frameworks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral
from typing import Any

from santa.arguments import Budget, Sampler, ScoreSampler
from santa.prefill import BACKENDS, check_alpha

# Streams of neighbouring layers are `seed + layer_idx`; the head-room keeps that sum inside int64.
_MAX_SEED = (1 << 62) - 1
_MAX_SAMPLES = 1 << 20
_MAX_INT32 = (1 << 31) - 1
_MAX_DRAWS = 4096
_MAX_QUERY_LEN = 8
_KEYS = ("exact", "proposal")
_SCORES = ("exact", "bernoulli")
_PREFILLS = ("dense", "sample")


@dataclass(frozen=True)
class SantaConfig:
    """How a model decodes with `santa`, and how it prefills.

    Integers may be numpy's; they are stored as int.

    Attributes:
        num_samples: S, the draws per query head and step, 0 to 2^20; 0 is exact attention.
        sampler: "multinomial", "stratified", "systematic" or "grouped", or a `santa.Sampler` or its integer;
            stored as the `santa.Sampler`.
        budget: "streaming", "proportional" or "uniform", or a `santa.Budget` or its integer, stored as the
            `santa.Budget`; None is what `santa.decode` chooses for the sampler.
        seed: base of the random streams, 0 to 2^62 - 1. Layer i draws from stream `seed + i`, so runs that
            must be independent of each other need seeds further apart than the model has layers.
        min_sampled_len: rows with fewer valid keys are exact, as in `santa.decode`; None is
            `santa.default_min_sampled_len`, 0 always samples. `min_context` is another name for it.
        layers: indices of the layers that sample, the others are exact in decode and in prefill; None is all of
            them. Stored as a sorted tuple.
        score: "exact", or "bernoulli": in the layers that sample, scores are estimated from the key features that
            ternary draws of the query need, in rows of any length (docs/bernoulli.md).
        num_draws: B, the ternary draws per query head and step of Bernoulli scores, 1 to 4096.
        score_sampler: of Bernoulli scores: "independent", "systematic" or "shared", or a `santa.ScoreSampler` or its
            integer; stored as the `santa.ScoreSampler`.
        prefill: "dense", or "sample": SampleAttention, `santa.prefill`.
        alpha: share of the attention mass that a sparse prefill keeps, 0 to 1: one number, or (columns, slashes).
        prefill_backend: what executes a sparse prefill, as in `santa.prefill`; "auto" is dense below 16,384 tokens.
        max_sampled_q_len: most new tokens per row of a step that is sampled, 1 to 8. 1: decode steps alone. More:
            verification of that many speculated tokens too, and with it chunks of prefill as short behind tokens that
            the cache holds, which look the same.
        keys: "exact", or "proposal": the layers that sample keep their keys in 4 bits beside the cache, read all of
            these, and K and V where rows are drawn (docs/proposals.md). For the sampler "grouped", the streaming budget
            and exact scores. Layers whose cache forgets keys (sliding windows) read them all, as with "exact".

    Raises:
        TypeError, ValueError: naming the field, what it got and what it needs.
    """

    num_samples: int = 256
    sampler: Sampler | int | str = Sampler.GROUPED
    budget: Budget | int | str | None = None
    seed: int = 0
    min_sampled_len: int | None = None
    layers: Collection[int] | None = None
    score: str = "exact"
    num_draws: int = 4
    score_sampler: ScoreSampler | int | str = ScoreSampler.INDEPENDENT
    prefill: str = "dense"
    alpha: float | tuple[float, float] = 0.95
    prefill_backend: str = "auto"
    max_sampled_q_len: int = 1
    keys: str = "exact"

    def __post_init__(self) -> None:
        # The class is frozen for its users; its own normalisation goes around that.
        for field, maximum, minimum in (
            ("num_samples", _MAX_SAMPLES, 0),
            ("seed", _MAX_SEED, 0),
            ("min_sampled_len", _MAX_INT32, 0),
            ("num_draws", _MAX_DRAWS, 1),
            ("max_sampled_q_len", _MAX_QUERY_LEN, 1),
        ):
            if field != "min_sampled_len" or self.min_sampled_len is not None:
                object.__setattr__(self, field, _integer(field, getattr(self, field), maximum, minimum))
        object.__setattr__(self, "sampler", value_of("sampler", self.sampler, Sampler))
        if self.budget is not None:
            object.__setattr__(self, "budget", value_of("budget", self.budget, Budget))
            if self.budget != Budget.PROPORTIONAL and self.sampler in (Sampler.MULTINOMIAL, Sampler.STRATIFIED):
                raise ValueError(
                    f"santa: budget is {self.budget.name.lower()!r} while sampler is {self.sampler.name.lower()!r}, "
                    "which needs budget='proportional'"
                )
        object.__setattr__(self, "score_sampler", value_of("score_sampler", self.score_sampler, ScoreSampler))
        object.__setattr__(self, "layers", _normalise_layers(self.layers))
        for field, known in (
            ("keys", _KEYS),
            ("score", _SCORES),
            ("prefill", _PREFILLS),
            ("prefill_backend", BACKENDS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"santa: {field} is {getattr(self, field)!r}; it needs to be one of {list(known)}")
        if self.score == "bernoulli" and self.max_sampled_q_len > 1:
            raise ValueError(
                f"santa: max_sampled_q_len is {self.max_sampled_q_len} while score is 'bernoulli', which takes one new "
                "token per row; it needs to be 1"
            )
        if self.keys == "proposal":
            for field, value, needed in (
                ("sampler", self.sampler.name.lower(), "grouped"),
                ("budget", "streaming" if self.budget is None else self.budget.name.lower(), "streaming"),
                ("score", self.score, "exact"),
            ):
                if value != needed:
                    raise ValueError(
                        f"santa: {field} is {value!r} while keys is 'proposal', which needs {field}={needed!r}"
                    )
        alphas = check_alpha(self.alpha)
        if not isinstance(self.alpha, (float, int)):
            object.__setattr__(self, "alpha", alphas)  # a list would make the settings mutable

    @property
    def min_context(self) -> int | None:
        """Another name for min_sampled_len."""
        return self.min_sampled_len

    def samples_in_layer(self, layer_idx: int) -> int:
        """num_samples of one layer: 0, which is exact, for the layers that `layers` leaves out."""
        return self.num_samples if self._samples(layer_idx) else 0

    def draws_scores(self, layer_idx: int) -> bool:
        """Whether decode steps of one layer draw their scores too."""
        return self.score == "bernoulli" and self._samples(layer_idx)

    def proposes(self, layer_idx: int) -> bool:
        """Whether decode steps of one layer draw by proposal keys."""
        return self.keys == "proposal" and self.samples_in_layer(layer_idx) > 0

    def prefills_sparsely(self, layer_idx: int | None) -> bool:
        """Whether prefill of one layer goes to `santa.prefill`; None is a layer that does not know its index."""
        return self.prefill == "sample" and self._samples(layer_idx)

    def _samples(self, layer_idx: int | None) -> bool:
        return self.layers is None or layer_idx in self.layers


def _accept_min_context(init: Callable[..., None]) -> Callable[..., None]:
    """`SantaConfig.__init__` with min_context as another name for min_sampled_len.

    No field of the dataclass: `dataclasses.replace` would pass both names on.
    """

    @functools.wraps(init)
    def __init__(self: SantaConfig, *args: Any, **fields: Any) -> None:
        if "min_context" in fields:
            value = fields.pop("min_context")
            if "min_sampled_len" in fields or len(args) > _MIN_SAMPLED_LEN_POSITION:
                raise TypeError(
                    f"santa: min_context is {value!r} beside min_sampled_len; they are two names of one setting, which "
                    "needs one value"
                )
            fields["min_sampled_len"] = None if value is None else _integer("min_context", value, _MAX_INT32)
        init(self, *args, **fields)

    return __init__


def _integer(field: str, value: object, maximum: int, minimum: int = 0) -> int:
    # bool is an int to Python, but nobody means `num_samples=True`.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"santa: {field} is {value!r}; it needs to be an int")
    if not minimum <= value <= maximum:
        raise ValueError(f"santa: {field} is {value}; it needs to be from {minimum} to {maximum}")
    return int(value)


def value_of(field: str, value: object, kind: type[IntEnum]) -> IntEnum:
    names = [member.name.lower() for member in kind]
    if isinstance(value, str) and value.lower() in names:
        return kind[value.upper()]
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < len(kind):
        return kind(int(value))
    raise ValueError(f"santa: {field} is {value!r}; it needs to be one of {names} or a santa.{kind.__name__}")


def _normalise_layers(layers: object) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Collection):
        raise TypeError(f"santa: layers is {layers!r}; it needs to be None or a collection of layer indices")
    return tuple(sorted({_integer("layers", layer_idx, _MAX_INT32) for layer_idx in layers}))


_MIN_SAMPLED_LEN_POSITION = [field.name for field in dataclasses.fields(SantaConfig)].index("min_sampled_len")
SantaConfig.__init__ = _accept_min_context(SantaConfig.__init__)
