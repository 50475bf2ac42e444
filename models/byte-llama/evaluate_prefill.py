"""What sparse prefill costs the byte-llama model: next-byte distributions, retrieval, and what each layer kept.

    python models/byte-llama/evaluate_prefill.py --json out/prefill_model.json --plot out/prefill_heads.png
    python models/byte-llama/evaluate_prefill.py --context 2048 --prompts 4 --alpha 0.9 --device cpu

Every prompt is a retrieval prompt (tasks.py) and its answer, read in one forward pass: with dense attention, and with
`santa.prefill` in every layer for each alpha. Columns: answers right, where every answer byte has to be the likeliest
one after the right bytes before it; the total variation (TV) distance between the next-byte distributions of the sparse
and of the dense run, mean over all positions and over the answers' alone, and its 99th percentile; density (blocks
computed over causal blocks) and the smallest share of its softmax mass that a sampled row kept, both per layer.

The sparse path is forced (`--backend`): "auto" would be dense below 16,384 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import santa
from santa import SantaConfig
from santa.integrations.transformers import attach

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evaluate
import tasks

ALPHAS = (0.8, 0.9, 0.95, 0.98)


@dataclass
class Kept:
    """Statistics of `santa.prefill`, layer by layer: lists of float32 [batch, num_qo_heads, 6] as in PrefillStats."""

    layers: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    backends: set[str] = field(default_factory=set)

    def column(self, layer: int, index: int) -> Tensor:
        return torch.cat(self.layers[layer])[..., index]

    @property
    def densities(self) -> list[float]:
        return [float(self.column(layer, 0).mean()) for layer in sorted(self.layers)]

    @property
    def min_masses(self) -> list[float]:
        return [float(self.column(layer, 2).min()) for layer in sorted(self.layers)]

    @property
    def mean_masses(self) -> list[float]:
        return [float(self.column(layer, 1).mean()) for layer in sorted(self.layers)]


@dataclass(frozen=True)
class PrefillResult:
    """One setting, on the prompts that dense attention read too. `alpha` None is dense attention itself."""

    alpha: float | None
    right: int
    prompts: int
    tv_mean: float = 0.0
    tv_p99: float = 0.0
    tv_answer: float = 0.0
    kept: Kept | None = None


@contextmanager
def record_kept(num_layers: int, **options: Any) -> Iterator[Kept]:
    """Inside, `santa.prefill` gets `options` too, and what it kept is recorded. Layers are told apart by their turn."""
    kept, prefill, calls = Kept(), santa.prefill, 0

    def recording(*tensors: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        out, lse, stats = prefill(*tensors, return_stats=True, **given, **options)
        if stats.heads is None:
            raise RuntimeError("santa.prefill selected nothing: the prompt went to dense attention")
        kept.layers[calls % num_layers].append(stats.heads.cpu())
        kept.backends.add(stats.backend)
        calls += 1
        return out, lse

    with mock.patch.object(santa, "prefill", recording):
        yield kept


def total_variation(logits: Tensor, others: Tensor) -> Tensor:
    """Half the L1 distance of the softmax distributions over the last dimension."""
    return (logits.float().softmax(-1) - others.float().softmax(-1)).abs().sum(-1) / 2


@torch.inference_mode()
def prefill_results(
    model: PreTrainedModel,
    context_len: int,
    num_prompts: int,
    alphas: Sequence[float],
    seed: int = 0,
    *,
    backend: str,
    text: np.ndarray | None = None,
    num_pairs: int = 24,
    batch_size: int = 4,
    **options: Any,
) -> list[PrefillResult]:
    """Dense attention's result, then one for each alpha.

    Args:
        model: any causal language model over bytes with the attention of Transformers.
        context_len: bytes of prompt and answer.
        backend: of `santa.prefill`: "flex" on CUDA, "reference" elsewhere.
        options: others of `santa.prefill`, such as `selection` and `min_mass`.
        The rest: as in `evaluate.retrieval_accuracy`.
    """
    num_layers = model.config.num_hidden_layers
    configs = [SantaConfig(num_samples=0)]
    configs += [SantaConfig(num_samples=0, prefill="sample", alpha=x, prefill_backend=backend) for x in alphas]
    right, kept = [0] * len(configs), [Kept() for _ in configs]
    distances: list[list[Tensor]] = [[] for _ in configs]
    batches = evaluate._batches(context_len, num_prompts, seed, text, num_pairs, batch_size, None, model.device)
    for prompts, answers in batches:
        tokens = torch.cat((prompts, answers), dim=1)[:, :-1]
        dense = None
        for number, config in enumerate(configs):
            attach(model, config)
            with record_kept(num_layers, **options) as found:
                logits = model(tokens, use_cache=False).logits
            dense = logits if dense is None else dense
            right[number] += int((logits[:, -tasks.ANSWER_LEN :].argmax(-1) == answers).all(dim=1).sum())
            if number:
                distances[number].append(total_variation(logits, dense).cpu())
                for layer, stats in found.layers.items():
                    kept[number].layers[layer] += stats
                kept[number].backends |= found.backends
    results = [PrefillResult(None, right[0], num_prompts)]
    for number, alpha in enumerate(alphas, start=1):
        distance = torch.cat(distances[number])
        percentile = float(np.quantile(distance.numpy(), 0.99))
        mean, answer = float(distance.mean()), float(distance[:, -tasks.ANSWER_LEN :].mean())
        results.append(PrefillResult(alpha, right[number], num_prompts, mean, percentile, answer, kept[number]))
    return results


@torch.inference_mode()
def plot_heads(
    model: PreTrainedModel,
    context_len: int,
    path: Path,
    *,
    alpha: float,
    text: np.ndarray,
    num_pairs: int,
    heads: Sequence[int],
) -> None:
    """Attention of a few (layer, query head) pairs by block, with the selected columns and slashes over it.

    `heads` are numbers of query heads counted through the layers: layer * num_attention_heads + head.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: list[tuple[Tensor, Tensor]] = []
    prefill = santa.prefill

    def capture(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        found.append((q, k))
        return prefill(q, k, v, **options | {"backend": "dense"})

    # Sparse, so that layers call `capture`; the map is that of dense attention.
    (tokens, _), *_ = evaluate._batches(context_len, 1, 0, text, num_pairs, 1, None, model.device)
    attach(model, SantaConfig(num_samples=0, prefill="sample", alpha=alpha))
    with mock.patch.object(santa, "prefill", capture):
        model(tokens, use_cache=False, logits_to_keep=1)
    num_heads = model.config.num_attention_heads
    figure, axes = plt.subplots(1, len(heads), figsize=(4.2 * len(heads), 4.4), constrained_layout=True, squeeze=False)
    for axis, number in zip(axes[0], heads, strict=True):
        layer, head = divmod(number, num_heads)
        q, k = found[layer]
        group_size = num_heads // k.shape[1]
        kv_cnt, kv_idx, stats = santa.sample_select(q, k, alpha_c=alpha, alpha_s=alpha)
        mass = block_mass(q[0, head], k[0, head // group_size]).cpu()
        keep = torch.zeros(mass.shape, dtype=torch.int32)
        used = torch.arange(keep.shape[1]) < kv_cnt[0, head].cpu().unsqueeze(-1)
        keep.scatter_add_(-1, kv_idx[0, head].cpu().long(), used.int())
        causal = torch.ones(mass.shape, dtype=torch.bool).tril()
        shown = torch.where(causal, mass.clamp(min=1e-5).log10(), torch.nan)
        image = axis.imshow(shown.numpy(), cmap="Greys", vmin=-5, vmax=0)
        axis.imshow(torch.where(keep > 0, 1.0, torch.nan).numpy(), cmap="Reds", vmin=0, vmax=1.6, alpha=0.35)
        density, mean, least = stats[0, head, :3].tolist()
        axis.set_title(
            f"layer {layer}, head {head}: density {density:.2f}\nkept mass: mean {mean:.3f}, least {least:.3f}",
            fontsize="medium",
        )
        axis.locator_params(integer=True)
        axis.set_xlabel("key block")
        axis.set_ylabel("query block")
    figure.colorbar(image, ax=axes, label="log10 of the mean mass of a block; red: selected", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def block_mass(q: Tensor, k: Tensor, block: int = 128) -> Tensor:
    """Mean softmax mass of the rows of each query block on each key block: [nq, nk] of q, k [length, head_dim]."""
    rows = []
    positions = torch.arange(len(k), device=k.device)
    for first in range(0, len(q), block):
        part = slice(first, min(first + block, len(q)))
        scores = (q[part].float() @ k.float().T) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(positions > positions[part].unsqueeze(-1), -torch.inf)
        masses = torch.nn.functional.pad(scores.softmax(-1), (0, -len(k) % block))
        rows.append(masses.unflatten(-1, (-1, block)).sum(-1).mean(0))
    return torch.stack(rows)


def table(context: int, results: Sequence[PrefillResult]) -> list[str]:
    lines = []
    for result in results:
        alpha = "dense" if result.alpha is None else f"{result.alpha:g}"
        cells = [f"{context:,}", alpha, f"{result.right}/{result.prompts}"]
        if result.kept is None:
            cells += [""] * 7
        else:
            cells += [f"{x:.4f}" for x in (result.tv_mean, result.tv_p99, result.tv_answer)]
            densities, masses = result.kept.densities, result.kept.min_masses
            cells += [f"{sum(densities) / len(densities):.3f}", " ".join(f"{x:.2f}" for x in densities)]
            cells += [f"{min(masses):.3f}", " ".join(f"{x:.2f}" for x in masses)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


HEAD = """\
| context | alpha | answers right | TV mean | TV 99% | TV of answers | density | its layers | least kept | its layers |
|--------:|------:|--------------:|--------:|-------:|--------------:|--------:|------------|-----------:|------------|"""


def record(context: int, result: PrefillResult) -> dict[str, Any]:
    values = dict(context=context, alpha=result.alpha, right=result.right, prompts=result.prompts)
    if result.kept is not None:
        values |= dict(tv_mean=result.tv_mean, tv_p99=result.tv_p99, tv_answer=result.tv_answer)
        values |= dict(
            density=result.kept.densities, kept_mean=result.kept.mean_masses, kept_min=result.kept.min_masses
        )
        values |= dict(backends=sorted(result.kept.backends))
    return values


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=evaluate.HERE, help="folder of the checkpoint")
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 16384], help="bytes of prompt and answer")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=24, help="planted pairs per prompt, the asked one included")
    parser.add_argument("--alpha", type=float, nargs="+", default=list(ALPHAS))
    parser.add_argument("--selection", default="paper", choices=["paper", "joint"])
    parser.add_argument("--min-mass", type=float, default=0.0)
    parser.add_argument("--backend", choices=["flex", "reference"], help="default: flex on a GPU, else reference")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--json", type=Path, help="write settings and results to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="maps of some heads with what was selected of them")
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[2, 13, 27, 41], help="heads of the plot, of all layers"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.perf_counter()
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = evaluate.load_model(args.model, device=args.device, dtype=dtype)
    text = tasks.load_corpus().heldout
    name = str(model.dtype).removeprefix("torch.")
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    backend = args.backend or ("flex" if model.device.type == "cuda" else "reference")
    print(f"{device}, {name}, backend {backend}, selection {args.selection}, min_mass {args.min_mass}\n\n{HEAD}")
    records = []
    for context in args.context:
        results = prefill_results(
            model,
            context,
            args.prompts,
            args.alpha,
            args.seed,
            backend=backend,
            text=text,
            num_pairs=args.pairs,
            batch_size=args.batch,
            selection=args.selection,
            min_mass=args.min_mass,
        )
        print("\n".join(table(context, results)), flush=True)
        records += [record(context, result) for result in results]
    if args.plot:
        options = dict(alpha=args.alpha[-1], text=text, num_pairs=args.pairs, heads=args.heads)
        plot_heads(model, args.context[0], args.plot, **options)
    print(f"\n{args.prompts} prompts per context; {time.perf_counter() - start:.1f} s")
    if args.json:
        head = dict(device=device, dtype=name, torch=torch.__version__, transformers=transformers.__version__)
        head |= {option: getattr(args, option) for option in ("prompts", "pairs", "batch", "seed", "selection")}
        head |= dict(min_mass=args.min_mass, backend=backend)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "results": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
