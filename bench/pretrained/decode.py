"""Exact prefill, teacher-forced decode steps, and what is measured of each."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

import santa

from .methods import EXACT, GROUPED, Run
from .texts import Prompts

# Tokens of a context that are read at once where layers have windows.
CHUNK = 2048


@dataclass
class Prefilled:
    """Contexts that were read once, exactly: the cache of their first tokens, from which every run decodes the rest.

    tokens: ids [batch, context and decoded ones]; context: how many of them the cache holds.
    copies: see `Run`.
    """

    model: PreTrainedModel
    tokens: Tensor
    context: int
    cache: Cache
    copies: dict[tuple[str, int], Any] = field(default_factory=dict)

    @torch.inference_mode()
    def steps(self, run: Run) -> Iterator[tuple[int, Tensor]]:
        """Decode the tokens but the last, which is only predicted: (position of the token fed, logits [batch, vocab]
        of the next one). `run` does the attention."""
        run.copies = self.copies
        cache = copy.deepcopy(self.cache)

        def step(fed: Tensor, positions: Tensor) -> Tensor:
            return self.model(fed, position_ids=positions, past_key_values=cache).logits[:, -1].float()

        captures = self.can_capture(run)
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        with run.attached(self.model):
            for place in range(self.context, self.tokens.shape[1] - 1):
                run.position = place + 1
                inputs = self.tokens[:, place : place + 1], places[:, place : place + 1]
                if captures and place == self.context + 1:  # the first step allocates what later ones add to
                    step = CapturedStep(step, *inputs)
                logits = step(*inputs)
                run.advance()
                yield place, logits

    def can_capture(self, run: Run) -> bool:
        return self.tokens.is_cuda and run.observe is None and self.steps_are_alike(run)

    def steps_are_alike(self, run: Run) -> bool:
        """Whether steps do the same on the host: a window's cache counts its tokens there, but takes every token alike
        once it is full. What samples a window draws by that count."""
        windows = [layer for layer in self.cache.layers if layer.is_sliding]
        are_full = all(isinstance(layer, WindowLayer) and layer.is_full for layer in windows)
        return are_full and not (windows and run.windows)


class WindowLayer(StaticSlidingWindowLayer):
    """A window's keys and values in a static cache; Transformers' own way to add a token to a full one copies from the
    host, which no graph can."""

    @property
    def is_full(self) -> bool:
        return self.cumulative_length_int >= self.max_cache_len

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_full or key_states.shape[2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length_int += 1
        for rows, new in ((self.keys, key_states), (self.values, value_states)):
            rows.copy_(torch.cat([rows[:, :, 1:], new], dim=2))
        return self.keys, self.values


def static_cache(config: PreTrainedConfig, length: int) -> StaticCache:
    cache = StaticCache(config=config, max_cache_len=length)
    cache.layers = [
        WindowLayer(length, layer.max_cache_len) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


def has_windows(cache: Cache) -> bool:
    return any(layer.is_sliding for layer in cache.layers)


class CapturedStep:
    """A decode step as a CUDA graph: launched one by one its kernels take several times as long as they run."""

    def __init__(self, step: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x)
        self.graph.replay()
        return self.logits.clone()


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: Tensor, context: int, label: str) -> Prefilled:
    """Read tokens [batch, context], of tokens, with dense attention: at once, or in chunks where layers have windows,
    which for a whole context are a mask that hides most of what is computed."""
    tokens = tokens.to(model.device)
    cache = static_cache(model.config, tokens.shape[1])
    layers = model.get_decoder().layers
    chunks = tokens[:, :context].split(CHUNK if has_windows(cache) else context, dim=1)
    with tqdm(total=len(layers) * len(chunks), desc=f"read {label}", unit="layer", leave=False) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        hooks = [layer.register_forward_hook(advance) for layer in layers]
        with Run(EXACT).attached(model):
            for chunk in chunks:
                model(chunk, past_key_values=cache, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
    if tokens.is_cuda:
        torch.cuda.empty_cache()  # of what reading takes, steps need little
    return Prefilled(model, tokens, context, cache)


@dataclass
class Steps:
    """Of each token predicted, [batch, steps] on the CPU: code length in nats, total variation distance from the exact
    next-token distribution, and whether the likeliest token is the exact one's."""

    nll: Tensor
    total_variation: Tensor
    agrees: Tensor


def exact_steps(prefilled: Prefilled, observe: Callable[..., None] | None = None) -> tuple[Steps, list[Tensor]]:
    """Exact attention, and its next-token distributions [batch, vocab] of each step."""
    run, distributions = Run(EXACT, observe=observe), []
    for _, logits in prefilled.steps(run):
        distributions.append(logits.softmax(-1))
    return compare(prefilled, distributions, distributions), distributions


def sampled_steps(prefilled: Prefilled, run: Run, exact: list[Tensor]) -> Steps:
    return compare(prefilled, (logits.softmax(-1) for _, logits in prefilled.steps(run)), exact)


def compare(prefilled: Prefilled, distributions: Any, exact: list[Tensor]) -> Steps:
    nll, variation, agrees = [], [], []
    targets = prefilled.tokens[:, prefilled.context + 1 :].unbind(1)
    for p, q, target in zip(distributions, exact, targets, strict=True):
        nll.append(-p.gather(1, target[:, None])[:, 0].clamp(min=torch.finfo(p.dtype).tiny).log())
        variation.append((p - q).abs().sum(-1) / 2)
        agrees.append(p.argmax(-1) == q.argmax(-1))
    return Steps(*(torch.stack(columns, dim=1).cpu() for columns in (nll, variation, agrees)))


def answers_right(prefilled: Prefilled, run: Run, prompts: Prompts) -> list[bool]:
    """Whether greedy decoding gives each prompt's answer: every token of it is the likeliest after those before."""
    hits = [logits.argmax(-1) == prefilled.tokens[:, place + 1] for place, logits in prefilled.steps(run)]
    right = torch.stack(hits, dim=1).cpu()  # of the tokens from context + 1 on
    return [bool(row[-answer:].all()) for row, answer in zip(right, prompts.answer_lens, strict=True)]


@dataclass
class HeadFacts:
    """A query head's attention, means over rows and steps.

    effective_keys: exp of the entropy of attention.
    sink: mass of the row's first key.
    error: ||sampled - exact|| / ||exact|| of the output of `grouped`.
    copied: mass of the key whose token comes next, in steps that copy an answer from the text; None if none was seen.
    """

    layer: int
    head: int
    has_window: bool
    effective_keys: float
    sink: float
    error: float
    copied: float | None


@dataclass
class LayerFacts:
    """The same of a layer, means over its heads."""

    layer: int
    has_window: bool
    effective_keys: float
    sink: float
    error: float

    @classmethod
    def of(cls, heads: Sequence[HeadFacts]) -> LayerFacts:
        entropy, sink, error = (
            fmean(values)
            for values in zip(*((math.log(h.effective_keys), h.sink, h.error) for h in heads), strict=True)
        )
        return cls(heads[0].layer, heads[0].has_window, math.exp(entropy), sink, error)


class HeadProbe:
    """Observes some steps of an exact run: attention's entropy in each head, and the error of `grouped` there.

    With prompts, of the steps that copy an answer from the text, what they attend to it: what makes a retrieval head.
    """

    def __init__(self, num_samples: int, every: int = 16, prompts: Prompts | None = None) -> None:
        self.num_samples, self.every, self.prompts = num_samples, every, prompts
        self.seen: dict[int, list[Tensor]] = defaultdict(list)  # by layer, of each step [4, num_qo_heads]
        self.calls: dict[int, int] = defaultdict(int)
        self.lengths: dict[int, int] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        self.calls[layer] += 1
        if (self.calls[layer] - 1) % self.every:
            return
        exact = santa.decode(q, k, v, **options)[0].float()
        sampled = options | GROUPED.options | {"num_samples": self.num_samples}
        out = santa.decode(q, k, v, **sampled)[0].float()
        start, stop = int(options["kv_starts"][0]), int(options["kv_starts"][0] + options["kv_lens"][0])
        scale = options["sm_scale"] or q.shape[-1] ** -0.5
        scores = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, start:stop].transpose(-1, -2)).float() * scale
        p = scores.softmax(-1).flatten(1, 2)  # [batch, num_qo_heads, keys]
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean(0)
        error = ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(0)
        copied = torch.full_like(error, math.nan)
        if self.prompts is not None:
            tokens = int(options["positions"][0])  # a window holds the last of them
            copied = self.mass_of_sources(p, tokens, tokens - (stop - start))
        self.seen[layer].append(torch.stack([entropy, p[..., 0].mean(0), error, copied]).cpu())
        self.lengths[layer] = stop - start

    def mass_of_sources(self, p: Tensor, tokens: int, first: int) -> Tensor:
        """Of each head, the mean of p [batch, num_qo_heads, keys] at the keys whose tokens are those that follow after
        so many tokens; NaN if no row is within its answer. first: the token of p's first key."""
        total = self.prompts.tokens.shape[1]
        seen = []
        for row, (source, answer) in enumerate(zip(self.prompts.sources, self.prompts.answer_lens, strict=True)):
            nth = tokens - (total - answer)
            if source is not None and nth >= 0:
                place = source + nth - first
                seen.append(p[row, :, place] if place >= 0 else torch.zeros_like(p[row, :, 0]))
        return torch.stack(seen).mean(0) if seen else torch.full_like(p[0, :, 0], math.nan)

    def heads(self) -> list[HeadFacts]:
        longest = max(self.lengths.values())
        found = []
        for layer, steps in sorted(self.seen.items()):
            means = torch.stack(steps).double().nanmean(0)
            for head, (entropy, sink, error, copied) in enumerate(means.T.tolist()):
                has_window = self.lengths[layer] < longest
                mass = None if math.isnan(copied) else copied
                found.append(HeadFacts(layer, head, has_window, math.exp(entropy), sink, error, mass))
        return found

    def facts(self) -> list[LayerFacts]:
        by_layer: dict[int, list[HeadFacts]] = defaultdict(list)
        for head in self.heads():
            by_layer[head.layer].append(head)
        return [LayerFacts.of(heads) for heads in by_layer.values()]
