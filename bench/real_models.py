"""What sampling costs a pretrained model: perplexity, next-token distributions, retrieval; by method and S.

    make real-models                                            # fetches two small models, converts them, runs this
    python bench/real_models.py --model PATH --context 8192     # any local Hugging Face model

Contexts are read exactly; then the next tokens are decoded, the text's own being fed, with every row sampled whatever
its length. Tables are printed; every figure of them and the plot go to out/real-models (docs/real_models.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from harness import environment
from pretrained import output
from pretrained.checkpoints import CHECKPOINTS, convert, load
from pretrained.decode import HeadFacts, HeadProbe, Prefilled, Steps, answers_right, exact_steps, prefill, sampled_steps
from pretrained.measures import Point, advise, mean_interval
from pretrained.methods import EXACT, GROUPED, METHODS, Method, Run, reason_not_to_run
from pretrained.texts import PUZZLES, prompts, texts
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "real-models"
# The layers of a run draw from streams that follow each other.
SEED_STRIDE = 1000
PROBE_SAMPLES = 64
# Heads in a table: of the largest error, or of the most that is copied.
NUM_HEADS = 8
# Of the layers that sample, how many are exact in the comparison that asks whether it pays.
NUM_EXACT_LAYERS = 2


@dataclass(frozen=True)
class Size:
    """How much is measured. contexts: the longest so many of a model's; seeds: runs of each method with each S;
    retrieval: tokens of a prompt; prompts: of each task, 0 for none."""

    contexts: tuple[int, ...]
    texts: int
    steps: int
    samples: tuple[int, ...]
    seeds: int
    retrieval: int
    prompts: int
    retrieval_samples: tuple[int, ...]


SIZES = {
    "small": Size((512,), 4, 8, (16, 64), 1, 512, 2, (64,)),
    "default": Size((4096,), 5, 64, (16, 64, 256), 1, 1024, 6, (16, 64)),
    "full": Size((4096, 8192, 16384), 32, 64, (16, 32, 64, 128, 256, 512), 4, 4096, 24, (16, 64, 256)),
}


def measure_context(title: str, prefilled: Prefilled, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All methods from one prefilled batch of texts: exact perplexity, layers, and, one after the other, points."""
    head_dim = head_dim_of(prefilled.model)
    context, batch = prefilled.context, len(prefilled.tokens)
    stride = max(1, (prefilled.tokens.shape[1] - context) // 4)
    probe = HeadProbe(PROBE_SAMPLES, every=stride)
    exact, distributions = exact_steps(prefilled, probe)
    facts = probe.facts()
    runs = runs_of(arguments, [fact.layer for fact in sorted(facts, key=lambda fact: -fact.error) if counts(fact)])
    result = {
        "model": title,
        "context": context,
        "texts": batch,
        "tokens": exact.nll.numel(),
        "seeds": arguments.seeds,
        "exact_nll": float(exact.nll.mean()),
        "points": [],
        "layers": facts,
        "heads": probe.heads(),
    }
    yield result
    rows_of_grouped = {}
    for name, replicas in tqdm(runs, desc=f"{title}, {context:,} tokens", unit="point", leave=False):
        steps = []
        for run in replicas:
            run.num_rows = rows_of_grouped.get(run.num_samples, {})
            steps.append(sampled_steps(prefilled, run, distributions))
        first = replicas[0]
        if first.method == GROUPED and not first.exact_layers:
            rows_of_grouped[first.num_samples] = first.rows_by_layer()
        result["points"].append(point_of(title, context, name, replicas, steps, exact, head_dim))
        yield result


def counts(fact: Any) -> bool:
    return not fact.has_window


def runs_of(arguments: argparse.Namespace, by_error: list[int]) -> list[tuple[str, list[Run]]]:
    """Every method with every S, grouped first (top-k takes as many rows); then, with one S, grouped with layers that
    are exact: the first ones, and those of the largest error. Of each a run for every seed; what does not draw has one.
    by_error: layers that sample, the worst first."""
    made = []
    for method in arguments.chosen:
        for num_samples in arguments.samples:
            made.append((method.name, method, num_samples, frozenset()))
    if len(by_error) > NUM_EXACT_LAYERS and PROBE_SAMPLES in arguments.samples:
        chosen = {"first": sorted(by_error)[:NUM_EXACT_LAYERS], "worst": by_error[:NUM_EXACT_LAYERS]}
        for which, layers in chosen.items():
            name = f"grouped, {NUM_EXACT_LAYERS} {which} layers exact"
            made.append((name, GROUPED, PROBE_SAMPLES, frozenset(layers)))
    return [
        (
            name,
            [
                Run(
                    method,
                    num_samples,
                    seed=(arguments.seed + replica) * SEED_STRIDE * SEED_STRIDE + number * SEED_STRIDE,
                    exact_layers=layers,
                    windows=arguments.windows,
                )
                for replica in range(1 if method.top_k else arguments.seeds)
            ],
        )
        for number, (name, method, num_samples, layers) in enumerate(made)
    ]


def point_of(
    title: str, context: int, name: str, runs: list[Run], each: list[Steps], exact: Steps, head_dim: int
) -> Point:
    """runs: of one method with one S, which differ in their seeds; each: their steps."""
    changes = [steps.nll - exact.nll for steps in each]
    variations = torch.cat([steps.total_variation for steps in each], dim=1)
    change, change_half = mean_interval(torch.cat(changes, dim=1))
    variation, variation_half = mean_interval(variations)
    return Point(
        model=title,
        context=context,
        method=name,
        num_samples=runs[0].num_samples,
        nll_change=change,
        nll_half_width=change_half,
        nll_change_by_seed=[float(x.mean()) for x in changes],
        variation=variation,
        variation_half_width=variation_half,
        variation_99=float(variations.flatten().quantile(0.99)),
        agreement=fmean(float(steps.agrees.float().mean()) for steps in each),
        rows_share=fmean(run.share() for run in runs),
        bytes_share=fmean(run.bytes_share(head_dim) for run in runs),
    )


def head_dim_of(model: transformers.PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def measure_retrieval(
    title: str, model: transformers.PreTrainedModel, tokenizer: Any, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[HeadFacts]]:
    """Of the prompts that exact attention answers, how many each method does; and the heads that find the answers. All
    tasks are one batch."""
    asked = prompts(tokenizer, list(PUZZLES), arguments.prompts, arguments.retrieval, arguments.seed)
    prefilled = prefill(model, asked.tokens, arguments.retrieval - asked.decoded - 1, f"{title}, prompts")
    probe = HeadProbe(PROBE_SAMPLES, every=1, prompts=asked)
    exact = answers_right(prefilled, Run(EXACT, observe=probe), asked)
    runs = [(method, num_samples) for method in arguments.chosen for num_samples in arguments.retrieval_samples]
    records, rows_of_grouped = [], {}
    for number, (method, num_samples) in enumerate(tqdm(runs, desc=f"{title}, retrieval", unit="run", leave=False)):
        seed = (arguments.seed * SEED_STRIDE + SEED_STRIDE // 2 + number) * SEED_STRIDE
        run = Run(method, num_samples, seed=seed, windows=arguments.windows)
        run.num_rows = rows_of_grouped.get(num_samples, {})
        right = answers_right(prefilled, run, asked)
        if method == GROUPED:
            rows_of_grouped[num_samples] = run.rows_by_layer()
        for task in PUZZLES:
            of_task = [index for index, name in enumerate(asked.tasks) if name == task]
            records.append(
                {
                    "model": title,
                    "context": arguments.retrieval,
                    "task": task,
                    "method": method.name,
                    "num_samples": num_samples,
                    "prompts": len(of_task),
                    "exact_right": sum(exact[index] for index in of_task),
                    "right": sum(exact[index] and right[index] for index in of_task),
                }
            )
    return records, probe.heads()


def show_context(result: dict[str, Any]) -> None:
    print(
        f"\n{result['model']}, {result['context']:,} tokens of context, {result['tokens']:,} tokens of "
        f"{result['texts']} texts decoded, with {result['seeds']} seeds; "
        f"exact: {result['exact_nll']:.4f} nats a token, perplexity "
        f"{torch.tensor(result['exact_nll']).exp():.3f}\n"
    )
    print(output.point_table(result["points"]))
    print(f"\n{output.layer_table(result['layers'], PROBE_SAMPLES)}")
    worst = sorted(result["heads"], key=lambda head: -head.error)[:NUM_HEADS]
    print(f"\nHeads of the largest error\n\n{output.head_table(worst, PROBE_SAMPLES)}\n")
    print(f"All heads: {output.error_summary(result['heads'])}", flush=True)


def show_retrieval(records: list[dict[str, Any]], heads: list[HeadFacts]) -> None:
    print(f"\n{records[0]['model']}, retrieval from {records[0]['context']:,} tokens\n")
    print(output.retrieval_table(records))
    copying = sorted((head for head in heads if head.copied), key=lambda head: -head.copied)[:NUM_HEADS]
    print(f"\nHeads that copy answers from the text\n\n{output.head_table(copying, PROBE_SAMPLES)}\n")
    if copying:
        print(f"Of these, {output.error_summary(copying)}")
    print(f"All heads: {output.error_summary(heads)}", flush=True)


def save(
    arguments: argparse.Namespace,
    results: list[dict[str, Any]],
    retrieval: list[dict[str, Any]],
    copying: dict[str, list[HeadFacts]],
    seconds: float,
) -> None:
    """What there is so far: a run that is cut short keeps it."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = ("size", "samples", "texts", "steps", "retrieval", "prompts", "seed", "seeds", "windows", "dtype")
    content = {
        "environment": environment(arguments.device) | {"transformers": transformers.__version__},
        "options": {name: getattr(arguments, name) for name in names},
        "seconds": round(seconds),
        "contexts": [
            result | {name: [asdict(item) for item in result[name]] for name in ("points", "layers", "heads")}
            for result in results
        ],
        "retrieval": retrieval,
        "retrieval_heads": {title: [asdict(head) for head in heads] for title, heads in copying.items()},
    }
    (arguments.out / "real_models.json").write_text(json.dumps(content, indent=1) + "\n")


def models_of(arguments: argparse.Namespace) -> Iterable[tuple[str, Path, tuple[int, ...]]]:
    """(title, folder, contexts) of each model to measure."""
    if arguments.model is not None:
        yield arguments.model.name, arguments.model, tuple(arguments.context)
        return
    for name in arguments.models:
        checkpoint = CHECKPOINTS[name]
        folder = convert(name, arguments.packages, OUT / "converted")
        yield checkpoint.title, folder, tuple(n for n in arguments.context if n <= max(checkpoint.contexts))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model, instead")
    parser.add_argument("--size", choices=list(SIZES), help="default: full on CUDA, else default")
    parser.add_argument("--context", type=int, nargs="+", help="tokens read before the first that is decoded")
    parser.add_argument("--texts", type=int, help="decoded in one batch; 0: none, retrieval alone")
    parser.add_argument("--steps", type=int, help="tokens decoded of each text")
    parser.add_argument("--samples", type=int, nargs="+", help="S")
    parser.add_argument("--seeds", type=int, help="runs of each method with each S")
    parser.add_argument("--methods", nargs="+", choices=[method.name for method in METHODS], metavar="NAME")
    parser.add_argument("--windows", action="store_true", help="layers with a sliding window sample too")
    parser.add_argument("--retrieval", type=int, help="tokens of a retrieval prompt")
    parser.add_argument("--prompts", type=int, help="of each retrieval task; 0: none")
    parser.add_argument("--retrieval-samples", type=int, nargs="+", help="S of retrieval")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA")
    parser.add_argument("--seed", type=int, default=0, help="of texts and prompts; of draws the first of --seeds")
    parser.add_argument("--packages", type=Path, default=OUT / "packages", help="where pip put the models' packages")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    on_cuda = arguments.device == "cuda"
    arguments.size = arguments.size or ("full" if on_cuda else "default")
    size = asdict(SIZES[arguments.size])
    size["context"] = size.pop("contexts")
    for name, value in size.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, list(value) if isinstance(value, tuple) else value)
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; it has to be 1 or more")
    arguments.dtype = arguments.dtype or ("bfloat16" if on_cuda else "float32")
    arguments.chosen = choose(arguments.methods, arguments.device)
    return arguments


def choose(names: list[str] | None, device: str) -> list[Method]:
    """The methods to run, grouped first: top-k reads as many rows. Says which cannot run here."""
    chosen = [method for method in METHODS if names is None or method.name in names]
    if any(method.top_k for method in chosen) and GROUPED not in chosen:
        chosen.insert(0, GROUPED)
    reasons = {method: reason_not_to_run(method, device) for method in chosen}
    for method, reason in reasons.items():
        if reason is not None:
            print(f"{method.name} is left out: {reason}", flush=True)
    return [method for method in chosen if reasons[method] is None]


def main() -> None:
    # Both names of the argument are right for some of the releases that santa takes.
    warnings.filterwarnings("ignore", message=".*past_key_values", category=FutureWarning)
    arguments = parse()
    start = time.perf_counter()
    about = environment(arguments.device)
    print(
        f"{about['device']}, {arguments.dtype}, torch {about['torch']}, transformers {transformers.__version__}, "
        f"Python {about['python']}, {about['date']}; size {arguments.size}",
        flush=True,
    )
    results, retrieval, copying = [], [], {}
    try:
        models = list(models_of(arguments))
    except FileNotFoundError as error:
        sys.exit(str(error))
    for title, folder, contexts in models:
        model, tokenizer = load(folder, arguments.device, getattr(torch, arguments.dtype))
        for context in contexts if arguments.texts else ():
            tokens = texts(tokenizer, arguments.texts, context + arguments.steps + 1, arguments.seed)
            prefilled = prefill(model, tokens, context, f"{title}, {context:,} tokens")
            for result in measure_context(title, prefilled, arguments):
                save(arguments, [*results, result], retrieval, copying, time.perf_counter() - start)
            results.append(result)
            show_context(result)
        if arguments.prompts:
            records, copying[title] = measure_retrieval(title, model, tokenizer, arguments)
            show_retrieval(records, copying[title])
            retrieval += records
            save(arguments, results, retrieval, copying, time.perf_counter() - start)
        del model
    points = [point for result in results for point in result["points"]]
    if not points:
        return
    print("\nSmallest S that holds TV 0.02 on average, and perplexity within 0.5%, and all larger ones measured too\n")
    print(output.advice_table(advise(points)))
    names = [method.name for method in arguments.chosen]
    drawn = output.plot([point for point in points if point.method in names], arguments.out / "real_models.png")
    print(f"\n{drawn}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
