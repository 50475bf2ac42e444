"""Decode attention: santa, dense kernels and the memory limit, in one run.

    python bench/bench_decode.py --fa3 DIR --targets       # the README's table
    python bench/bench_decode.py --quick                   # two shapes, one setting
    python bench/bench_decode.py --variants --mixed --fp8  # other head counts and dtypes, mixed lengths, 8-bit caches
    python bench/bench_decode.py --proposal --targets --fa3 DIR  # proposal keys: 4 bits of each key are read
    python bench/bench_decode.py --table --variants --mixed --fp8 --targets --fa3 DIR --budgets streaming proportional \
        --samplers grouped systematic stratified multinomial   # every target
    python bench/bench_decode.py --device cpu --shapes 1x16384 --samples 128

Every result is checked against float64 before it is timed: the first and the last row of the batch. Times are medians;
on CUDA of CUDA-graph replays over buffers that rotate past the L2. Columns: microseconds per call; bytes of K per
second; share of the limit, which is the time of a kernel that only reads K (K stream) over this time; speed-up over the
fastest 16-bit dense kernel (x best: of torch SDPA, FlashInfer, FlashInfer XQA and FlashAttention-3) and over each dense
kernel, those of FlashInfer with 8-bit caches too; distinct V rows read per KV head; relative error.

--proposal has beside proposal keys `grouped` with keys in 8 and in 16 bits; its errors are means of ERROR_SEEDS seeds.
Then what it takes to fill proposal keys, beside a copy of the bytes.

Without a mode (--table, --variants, --mixed, --fp8, --proposal) it is --table.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import santa

sys.path.insert(0, str(Path(__file__).resolve().parent))
import competitors
import report
import targets
from competitors import Competitor, Unsupported
from harness import (
    Oracle,
    Problem,
    Stopwatch,
    environment,
    geometric_lens,
    make_problem,
    save_run,
    time_cpu_us,
    time_us,
)
from k_stream import KStream

SHAPES = (*targets.SAMPLED, *targets.SHORT)
CPU_SHAPES = ("1x8192", "1x32768", "4x32768")
QUICK_SHAPES = ("1x32768", "4x32768")
# 8-bit caches hold k / K_SCALE and v / V_SCALE.
K_SCALE, V_SCALE = 2.0**-5, 2.0**-4
FP8 = torch.float8_e4m3fn
FOUR_BITS = "4-bit K"
ERROR_SEEDS = 32
ONE_PASS_SAMPLERS = ("grouped", "systematic")


@dataclass(frozen=True)
class Setting:
    """One way to call santa.decode. `storage` is "", "K fp8", "KV fp8" or "4-bit K", which is proposal keys."""

    num_samples: int
    sampler: str = "grouped"
    budget: str = "streaming"
    storage: str = ""

    @property
    def name(self) -> str:
        how = "exact"
        if self.num_samples:
            how = f"{self.sampler} S={self.num_samples}" + ("" if self.budget == "streaming" else f" {self.budget}")
        return f"santa {how}" + (f", {self.storage}" if self.storage else "")

    @property
    def in_8_bits(self) -> bool:
        return self.storage in ("K fp8", "KV fp8")

    def options(self, problem: Problem) -> dict[str, Any]:
        options: dict[str, Any] = {"num_samples": self.num_samples, "kv_layout": problem.layout}
        if self.num_samples:
            options |= {"sampler": self.sampler, "budget": self.budget}
        if problem.kv_lens is not None:
            options["kv_lens"] = problem.kv_lens
        scales = {"k_scale": K_SCALE, "v_scale": V_SCALE} if self.storage == "KV fp8" else {"k_scale": K_SCALE}
        if self.in_8_bits:
            options |= {
                name: torch.full((problem.num_kv_heads,), scale, device=problem.sets[0][0].device)
                for name, scale in scales.items()
            }
        return options

    def own_options(self, problem: Problem) -> list[dict[str, Any]]:
        """Those of each set."""
        if self.storage != FOUR_BITS:
            return [{} for _ in problem.sets]
        return [{"proposal": make_proposal_keys(problem, k)} for _, k, _ in problem.sets]

    def sets(self, problem: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
        if not self.in_8_bits:
            return problem.sets
        return [
            (q, (k / K_SCALE).to(FP8), (v / V_SCALE).to(FP8) if self.storage == "KV fp8" else v)
            for q, k, v in problem.sets
        ]


def make_proposal_keys(problem: Problem, k: Tensor) -> santa.ProposalKeys:
    return santa.make_proposal_keys(k, problem.kv_lens, kv_layout=problem.layout)


def settings_of(arguments: argparse.Namespace, group_size: int, kv_len: int) -> list[Setting]:
    """The exact path, the budgets asked for, and the uniform one (SANTA's Flash) where so many samples are taken."""
    in_one_pass = [sampler for sampler in arguments.samplers if sampler in ONE_PASS_SAMPLERS]
    sampled = [
        Setting(s, sampler, budget)
        for sampler in arguments.samplers
        for budget in (arguments.budgets if sampler in in_one_pass else ["proportional"])
        for s in arguments.samples
    ]
    uniform = [Setting(s, sampler, "uniform") for sampler in in_one_pass for s in arguments.uniform_samples]
    return [
        Setting(0),
        *sampled,
        *(s for s in uniform if kv_len >= santa.default_min_sampled_len(s.num_samples, group_size)),
    ]


class Benchmark:
    """Runs cases, prints each as it is done, and keeps the rows."""

    def __init__(self, arguments: argparse.Namespace, dense: list[Competitor], missing: dict[str, str]):
        self.arguments, self.dense, self.missing = arguments, dense, missing
        self.rows: list[dict[str, Any]] = []
        self.failed = False
        self.total = Stopwatch()
        self.cuda = arguments.device == "cuda"
        self.stream: KStream | None = None
        if self.cuda:
            try:
                with self.total.part("K stream's compilation"):
                    self.stream = KStream()
            except Exception as error:
                self.missing["K stream"] = f"{type(error).__name__}: {error}"
                print(f"K stream is left out: {error}", file=sys.stderr)

    def measure(self, calls: list[Callable[[], object]]) -> float:
        return time_us(calls) if self.cuda else time_cpu_us(calls)

    def attempt(self, row: dict[str, Any], fill: Callable[[dict[str, Any]], None]) -> None:
        """Keeps the row, whatever happens: with its figures or with a note of why it has none."""
        try:
            fill(row)
        except Unsupported as error:
            row["note"] = f"not run: {error}"
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
            self.failed = True
        self.case_rows.append(row)
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises if the device is lost, and ends the run

    def run_stream(self, row: dict[str, Any], problem: Problem, ks: list[Tensor]) -> None:
        lens = None if problem.kv_lens is None else problem.row_lens
        with self.watch.part("K stream"):
            row["us"] = self.measure(self.stream.calls(ks, problem.layout, lens))

    def run_dense(self, row: dict[str, Any], problem: Problem, competitor: Competitor, oracle: Oracle) -> None:
        if competitor.storage is not None:
            q, k, v = problem.sets[0]
            oracle = Oracle(problem, q, k.to(competitor.storage), v.to(competitor.storage))
        with self.watch.part(f"{competitor.name} set-up"):
            calls = competitor.calls(problem)
            out = calls[0]()
            if self.cuda:
                torch.cuda.synchronize()
        self.check(row, oracle.error(out), competitor.tolerance)
        with self.watch.part(competitor.name):
            row["us"] = self.measure(calls)

    def run_santa(
        self,
        row: dict[str, Any],
        problem: Problem,
        setting: Setting,
        sets: list[tuple[Tensor, Tensor, Tensor]],
        oracle: Oracle,
        own_options: list[dict[str, Any]],
    ) -> None:
        options = setting.options(problem)
        calls = [
            lambda s=s, own=own: santa.decode(*s, **options, **own)[0] for s, own in zip(sets, own_options, strict=True)
        ]
        first = options | own_options[0]
        with self.watch.part("santa's checks"):
            out = calls[0]()
            counted, _, v_rows = santa.decode(*sets[0], return_rows_read=True, **first)
            shortest = santa.default_min_sampled_len(setting.num_samples, problem.group_size)
            self.check(row, oracle.error(out), oracle.bound(setting.num_samples, shortest))
            if not torch.equal(out, counted):
                raise RuntimeError("wrong result: the outputs with and without return_rows_read differ")
            row["v_rows"] = float(v_rows.double().mean())
            if row["suite"] == "proposal" and setting.num_samples:
                errors = [oracle.error(santa.decode(*sets[0], seed=s, **first)[0]) for s in range(ERROR_SEEDS)]
                row["error"] = sum(errors) / len(errors)
        with self.watch.part("santa"):
            row["us"] = self.measure(calls)

    def check(self, row: dict[str, Any], error: float, bound: float) -> None:
        row["error"] = error
        if not error < bound:
            raise RuntimeError(f"wrong result: relative error {error:.3g}, expected below {bound:.3g}")

    def run_case(
        self,
        suite: str,
        shape: str,
        case: str,
        settings: list[Setting],
        dense: list[Competitor] | None = None,
        **options: Any,
    ) -> None:
        """All rows of one problem: the K streams, the dense competitors, santa."""
        a = self.arguments
        batch, kv_len = report.parse_shape(shape)
        defaults = {
            "num_qo_heads": a.num_qo_heads,
            "num_kv_heads": a.num_kv_heads,
            "head_dim": a.head_dim,
            "dtype": getattr(torch, a.dtype),
            "layout": a.layout,
        }
        self.watch = Stopwatch()
        self.case_rows: list[dict[str, Any]] = []
        gc.collect()  # what an exception of the case before may still hold
        try:
            with self.watch.part("inputs"):
                problem = make_problem(batch, kv_len, device=a.device, **(defaults | options))
            with self.watch.part("float64"):
                oracle = Oracle(problem, *problem.sets[0])
            element = problem.sets[0][1].element_size()

            def row(what: str, kind: str, k_bytes: int, **more: Any) -> dict[str, Any]:
                place = {"suite": suite, "shape": shape, "case": case}
                return place | {"what": what, "kind": kind, "k_bytes": k_bytes} | more

            for competitor in self.dense if dense is None else dense:
                kind = "dense" if competitor.storage is None else "dense fp8"
                k_bytes = problem.k_bytes // (1 if competitor.storage is None else element)
                self.attempt(
                    row(competitor.name, kind, k_bytes),
                    lambda r, c=competitor: self.run_dense(r, problem, c, oracle),
                )
            for storage in dict.fromkeys(s.storage for s in settings):
                self.run_storage(problem, oracle, [s for s in settings if s.storage == storage], row)
        finally:
            # Also after an error of the device: what was measured stands.
            report.derive(self.case_rows)
            self.rows += self.case_rows
            print("\n".join(report.case_lines(self.case_rows)), flush=True)
            print(f"    took {self.watch}\n", flush=True)
            for name, seconds in self.watch.seconds.items():
                self.total.seconds[name] = self.total.seconds.get(name, 0.0) + seconds
            self.save()

    def run_storage(
        self, problem: Problem, oracle: Oracle, settings: list[Setting], row: Callable[..., dict[str, Any]]
    ) -> None:
        """K stream and settings of one storage of the cache; the timed copies in 8 bits live no longer than this."""
        storage = settings[0].storage
        sets, k_bytes = problem.sets, problem.k_bytes
        if settings[0].in_8_bits:
            with self.watch.part("inputs"):
                sets = settings[0].sets(problem)
                k_bytes //= problem.sets[0][1].element_size()
            with self.watch.part("float64"):
                oracle = Oracle(problem, *sets[0], k_scale=K_SCALE, v_scale=V_SCALE if storage == "KV fp8" else 1.0)
        with self.watch.part("inputs"):
            own_options = settings[0].own_options(problem)
        streamed = [k for _, k, _ in sets]
        if storage == FOUR_BITS:
            keys = [own["proposal"] for own in own_options]
            streamed = [torch.cat([x.codes.flatten(), x.scales.view(torch.uint8).flatten()]) for x in keys]
            k_bytes = streamed[0].nbytes
        measured = {r["k_bytes"] for r in self.case_rows if r["kind"] == "stream"}
        if self.stream is not None and k_bytes not in measured:
            self.attempt(
                row("K stream" + (f", {storage}" if storage else ""), "stream", k_bytes),
                lambda r: self.run_stream(r, problem, streamed),
            )
        for setting in settings:
            self.attempt(
                row(setting.name, "santa", k_bytes, **vars(setting)),
                lambda r, s=setting: self.run_santa(r, problem, s, sets, oracle, own_options),
            )

    def save(self) -> None:
        save_run(self.arguments, self.rows, missing=self.missing, seconds=self.total.seconds)

    def table(self) -> None:
        a = self.arguments
        for shape in a.shapes:
            kv_len = report.parse_shape(shape)[1]
            self.run_case("table", shape, "", settings_of(a, a.num_qo_heads // a.num_kv_heads, kv_len))

    def variants(self) -> None:
        """Each variant against the same shape with 32 / 8 heads of 128, bfloat16, HND."""
        # FlashInfer compiles a module for each dtype and head_dim; SDPA and FlashAttention have them.
        dense = [c for c in self.dense if not c.compiles or self.arguments.competitors_given]
        settings = [s for s in settings_of(self.arguments, 1, 0) if s.num_samples in (0, *self.arguments.samples[:1])]
        base = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "layout": "HND"}
        for case, changed in {targets.VARIANT_BASE: {}, **targets.VARIANTS}.items():
            options = base | changed
            options["dtype"] = getattr(torch, options["dtype"])
            self.run_case("variants", targets.VARIANT_SHAPE, case, settings, dense, **options)

    def mixed(self) -> None:
        batch, longest = report.parse_shape(targets.MIXED_SHAPE)
        lens = geometric_lens(batch, targets.MIXED_SHORTEST, longest)
        case = f"lengths {lens[-1]:,} to {lens[0]:,}, geometric"
        settings = settings_of(self.arguments, self.arguments.num_qo_heads // self.arguments.num_kv_heads, 0)
        self.run_case("mixed", targets.MIXED_SHAPE, case, settings, kv_lens=lens)

    def fp8(self) -> None:
        a = self.arguments
        for shape in a.shapes if a.shapes_given else targets.FP8_SHAPES:
            sixteen = settings_of(a, a.num_qo_heads // a.num_kv_heads, 0)
            one_pass = [s for s in sixteen if s.sampler in ONE_PASS_SAMPLERS]
            eight = [Setting(s.num_samples, s.sampler, storage=x) for x in ("K fp8", "KV fp8") for s in one_pass]
            self.run_case("fp8", shape, "", list(dict.fromkeys(eight)))

    def proposal(self) -> None:
        a = self.arguments
        for shape in a.shapes if a.shapes_given else targets.PROPOSAL:
            settings = [Setting(s, storage=x) for s in a.samples for x in ("", "K fp8", FOUR_BITS)]
            self.run_case("proposal", shape, "", settings)
        for shape in targets.APPEND:
            self.append(shape)

    def append(self, shape: str) -> None:
        """Filling the codes of the last keys of rows, beside a copy of as many bytes as are read and written."""
        a = self.arguments
        batch, keys = report.parse_shape(shape)
        k_bytes = batch * keys * a.num_kv_heads * (a.head_dim * 5 // 2 + 2)
        row = {"suite": "proposal", "shape": shape, "case": "append", "what": "append", "kind": "append"}
        self.watch, self.case_rows = Stopwatch(), []

        def fill(row: dict[str, Any]) -> None:
            copies = max(2, min(64, (256 << 20) // k_bytes))
            k = torch.randn(batch, keys, a.num_kv_heads, a.head_dim, dtype=torch.bfloat16, device=a.device)
            proposal = santa.make_proposal_keys(k.transpose(1, 2).contiguous(), kv_layout="HND")
            positions = torch.arange(keys, device=a.device).expand(batch, keys).contiguous()
            news = [k.clone() for _ in range(copies)]
            row["us"] = self.measure(
                [lambda new=new: santa.append_proposal_keys(proposal, new, positions) for new in news]
            )
            halves = [torch.empty(2, k_bytes // 2, dtype=torch.uint8, device=a.device) for _ in range(copies)]
            row["copy_us"] = self.measure([lambda x=x: x[0].copy_(x[1]) for x in halves])
            print(f"append {shape}: {row['us']:.1f} us, a copy of the bytes {row['copy_us']:.1f} us", flush=True)

        self.attempt(row | {"k_bytes": k_bytes}, fill)
        self.rows += self.case_rows
        self.save()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", action="store_true", help="the shapes of --shapes (the mode if none is given)")
    add("--variants", action="store_true", help=f"group sizes, head_dim, dtype and layout at {targets.VARIANT_SHAPE}")
    add("--mixed", action="store_true", help=f"rows of {targets.MIXED_SHORTEST} to 131072 keys in one batch")
    add("--fp8", action="store_true", help="K, and K and V, in float8_e4m3fn")
    add("--proposal", action="store_true", help="proposal keys, 4 bits of each, beside K in 8 and in 16 bits")
    add("--quick", action="store_true", help="1x32768 and 4x32768 with grouped sampling, S = 128")
    add("--targets", action="store_true", help="say of each target whether it is met")
    add("--shapes", nargs="+", metavar="BATCHxKV_LEN")
    add("--samples", nargs="+", type=int, help="draws per query head; default 128")
    add("--samplers", nargs="+", help="default grouped systematic")
    add("--budgets", nargs="+", default=["streaming"], choices=["streaming", "proportional"], help="of --samples")
    add("--uniform-samples", nargs="*", type=int, help="draws per query head, uniform budget; default 2048")
    add("--layout", default="HND", choices=["HND", "NHD"])
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--num-qo-heads", type=int, default=32)
    add("--num-kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--competitors", nargs="*", choices=list(competitors.FACTORIES), help="default: all on CUDA, sdpa on the CPU")
    add("--fa3", type=Path, metavar="DIR", help="folder with _vllm_fa3_C.abi3.so; default: that of an installed vLLM")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path)
    add("--plot", type=Path, metavar="PNG", help="speed-up over the best dense kernel")
    a = parser.parse_args(argv)

    cpu = a.device == "cpu"
    a.shapes_given, a.competitors_given = a.shapes is not None, a.competitors is not None
    if a.shapes is None:
        a.shapes = list(QUICK_SHAPES if a.quick else CPU_SHAPES if cpu else SHAPES)
    for shape in a.shapes:
        try:
            report.parse_shape(shape)
        except ValueError as error:
            parser.error(str(error))
    if a.samples is None:
        a.samples = list(targets.SAMPLES)
    if a.samplers is None:
        a.samplers = ["grouped"] if a.quick else ["grouped", "systematic"]
    if a.uniform_samples is None:
        a.uniform_samples = [] if a.quick or cpu else [2048]
    if a.competitors is None:
        a.competitors = ["sdpa"] if cpu else list(competitors.FACTORIES)
    if cpu and set(a.competitors) - {"sdpa"}:
        parser.error("on the CPU the one competitor is sdpa")
    if not (a.variants or a.mixed or a.fp8 or a.proposal):
        a.table = True
    if a.plot and not a.table:
        parser.error("--plot shows the rows of --table, which is not run")
    return a


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_decode.py needs a CUDA device; --device cpu times the CPU backend")
    start = Stopwatch()
    with start.part("loading of competitors"):
        dense, missing = competitors.load(arguments.competitors, arguments.fa3)
    print(environment(arguments.device) | {"santa": santa.__version__})
    print("; ".join(f"{name} {value}" for name, value in report.describe(arguments).items()) + "\n", flush=True)

    benchmark = Benchmark(arguments, dense, missing)
    benchmark.total.seconds |= start.seconds
    try:
        for mode in ("table", "variants", "mixed", "fp8", "proposal"):
            if getattr(arguments, mode):
                getattr(benchmark, mode)()
    finally:
        for name, reason in missing.items():
            print(f"{name}: not measured: {reason}")
        print("\n".join(report.variant_lines(benchmark.rows)))
        if arguments.targets:
            device = environment(arguments.device)["device"]
            print(f"Targets of an {targets.card_of(device)}, on {device}")
            print("\n".join(report.target_lines(targets.evaluate(benchmark.rows, device))))
        print(f"whole run: {benchmark.total}")
        benchmark.save()
    if arguments.plot:
        report.plot(benchmark.rows, arguments.plot, environment(arguments.device)["device"])
    if benchmark.failed:
        sys.exit("some rows failed; the table says which and why")


if __name__ == "__main__":
    main()
