"""Exact prefill, teacher-forced decode steps, and what is measured of each."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, StaticCache

import santa

from .methods import EXACT, GROUPED, Run
from .texts import Prompts


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
        with run.attached(self.model):
            for place in range(self.context, self.tokens.shape[1] - 1):
                run.position = place + 1
                fed = self.tokens[:, place : place + 1]
                yield place, self.model(fed, past_key_values=cache).logits[:, -1].float()


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: Tensor, context: int, label: str) -> Prefilled:
    """Read tokens [batch, context], of tokens, with dense attention."""
    tokens = tokens.to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    layers = model.get_decoder().layers
    with tqdm(total=len(layers), desc=f"read {label}", unit="layer", leave=False) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        hooks = [layer.register_forward_hook(advance) for layer in layers]
        with Run(EXACT).attached(model):
            model(tokens[:, :context], past_key_values=cache, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
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
class LayerFacts:
    """A layer's attention, means over heads, rows and steps.

    effective_keys: exp of the entropy of attention.
    sink: mass of the row's first key.
    error: ||sampled - exact|| / ||exact|| of the output of `grouped`.
    """

    layer: int
    has_window: bool
    effective_keys: float
    sink: float
    error: float


class LayerProbe:
    """Observes some steps of an exact run: attention's entropy in each layer, and the error of `grouped` there."""

    def __init__(self, num_samples: int, every: int = 16) -> None:
        self.num_samples, self.every = num_samples, every
        self.seen: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
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
        p = scores.softmax(-1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean()
        error = ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
        self.seen[layer].append((float(entropy), float(p[..., 0].mean()), float(error)))
        self.lengths[layer] = stop - start

    def facts(self) -> list[LayerFacts]:
        longest = max(self.lengths.values())
        found = []
        for layer, rows in sorted(self.seen.items()):
            entropy, sink, error = (sum(column) / len(rows) for column in zip(*rows, strict=True))
            found.append(LayerFacts(layer, self.lengths[layer] < longest, math.exp(entropy), sink, error))
        return found
