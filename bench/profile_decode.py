"""Hardware counters of the decode kernels, from Nsight Compute on the native benchmark.

    cmake -S . -B build/native && cmake --build build/native --parallel
    python bench/profile_decode.py --batch 4 --kv-len 32768

One line for each kernel of one call, and one for the kernel that only reads K: microseconds; percent of the DRAM's peak
and GB/s read; megabytes read and written, and bytes read over those of K, the least that a call has to read; percent of
the warps that a multiprocessor holds; registers, shared memory, grid and block; the three reasons for which warps
waited most, in warps waiting per issued instruction. Clocks are left as they are.

Caches are flushed before every kernel (--cache-control all), as ncu has to run a kernel several times: a kernel reads
from the DRAM what in a real call it finds in the L2, where the kernel before left it.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BINARY = Path(__file__).resolve().parent.parent / "build" / "native" / "decode_bench"
# As in native/decode_bench.cu.
NUM_KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 8, 128, 2
SAMPLERS = ("multinomial", "stratified", "systematic", "grouped")
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
SECTIONS = ("LaunchStats", "Occupancy", "WarpStateStats")
STALL = re.compile(r"issue_stalled_(\w+?)_per_issue_active\.ratio$")
Kernel = dict[str, str]


def parse(text: str) -> list[Kernel]:
    """ncu's `--csv --page raw --print-units base`: for each kernel, column name to value. Other lines are skipped."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if header is None:
        return []
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines[header:] if line.startswith('"'))))
    return [row for row in table if row["ID"]]  # the row of units has no ID


def number(kernel: Kernel, metric: str) -> float:
    """The value of a metric, nan if ncu has none."""
    try:
        return float(kernel.get(metric, "").replace(",", ""))
    except ValueError:
        return float("nan")


def short_name(kernel: Kernel) -> str:
    """The function alone, without namespaces, types and arguments."""
    name = re.sub(r"^void |<unnamed>::|\(anonymous namespace\)::", "", kernel["Kernel Name"])
    return re.split(r"[<(]", name)[0].split("::")[-1]


def stalls(kernel: Kernel, count: int = 3) -> str:
    """The reasons that most warps waited for. `selected` is no wait: it is the warp that issues."""
    reasons = {match[1]: number(kernel, metric) for metric in kernel if (match := STALL.search(metric))}
    reasons.pop("selected", None)
    worst = sorted((value, name) for name, value in reasons.items() if value > 0)[::-1][:count]
    return ", ".join(f"{name} {value:.1f}" for value, name in worst) or "-"


def summary(kernels: list[Kernel], k_bytes: int) -> list[str]:
    lines = [
        f"{'kernel':26}{'us':>8}{'DRAM %':>8}{'GB/s':>7}{'MB in':>8}{'MB out':>8}{'in / K':>8}{'warps %':>9}{'regs':>6}"
        f"{'smem KB':>9}{'grid':>7}{'block':>7}  warps wait for"
    ]
    for kernel in kernels:
        duration_ns = number(kernel, "gpu__time_duration.sum")
        read, written = number(kernel, "dram__bytes_read.sum"), number(kernel, "dram__bytes_write.sum")
        shared = sum(number(kernel, f"launch__shared_mem_per_block_{kind}") for kind in ("static", "dynamic"))
        lines.append(
            f"{short_name(kernel)[:25]:26}{duration_ns / 1e3:8.1f}"
            f"{number(kernel, 'dram__throughput.avg.pct_of_peak_sustained_elapsed'):8.1f}{read / duration_ns:7.0f}"
            f"{read / 1e6:8.1f}{written / 1e6:8.1f}{read / k_bytes:8.3f}"
            f"{number(kernel, 'sm__warps_active.avg.pct_of_peak_sustained_active'):9.1f}"
            f"{number(kernel, 'launch__registers_per_thread'):6.0f}{shared / 1024:9.1f}"
            f"{number(kernel, 'launch__grid_size'):7.0f}{number(kernel, 'launch__block_size'):7.0f}  {stalls(kernel)}"
        )
    decode = [kernel for kernel in kernels if short_name(kernel) != "read_only"]
    read = sum(number(kernel, "dram__bytes_read.sum") for kernel in decode)
    written = sum(number(kernel, "dram__bytes_write.sum") for kernel in decode)
    duration = sum(number(kernel, "gpu__time_duration.sum") for kernel in decode) / 1e3
    lines.append(
        f"{len(decode)} kernels of one call: {duration:.1f} us one after the other, {read / 1e6:.1f} MB read "
        f"({read / k_bytes:.3f} of K's {k_bytes / 1e6:.1f} MB), {written / 1e6:.1f} MB written"
    )
    return lines


def explain(output: str) -> str:
    """What to do about a run of ncu that gave no figures."""
    if "ERR_NVGPUCTRPERM" in output:
        return (
            "ncu may not read the hardware counters: run as root, or let the driver allow it (NVreg_RestrictProfiling)"
        )
    if "No kernels were profiled" in output:
        return "ncu saw no kernel between cudaProfilerStart and cudaProfilerStop: is the binary up to date?"
    return f"ncu gave no figures. The end of its output:\n{output.strip()[-2000:]}"


def find_ncu(given: str | None) -> str:
    """The path of ncu; exits if there is none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = shutil.which(given) if given else shutil.which("ncu") or shutil.which("ncu", path=str(home / "bin"))
    if found is None:
        sys.exit(f"{given or 'ncu'} was not found; install Nsight Compute or name its ncu with --ncu")
    return found


def run(ncu: str, application: list[str], cache_control: str) -> str:
    """ncu's table; exits with what it said if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += ["--clock-control", "none", "--cache-control", cache_control, "--profile-from-start", "off"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--metrics", ",".join(METRICS), *application]
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540)
        except subprocess.TimeoutExpired:
            sys.exit("ncu did not finish in 9 minutes; take a smaller problem")
        table = log.read_text() if log.exists() else ""
    if not parse(table):
        sys.exit(explain(f"{result.stdout}\n{table}"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=BINARY)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kv-len", type=int, default=32768)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sampler", default="grouped", choices=SAMPLERS)
    parser.add_argument("--cache-control", default="all", choices=["all", "none"])
    parser.add_argument("--ncu", help="ncu to run; default: the one on PATH or in CUDA_HOME")
    parser.add_argument("--csv", type=Path, help="also keep ncu's whole table here")
    arguments = parser.parse_args()
    ncu = find_ncu(arguments.ncu)
    if not arguments.binary.is_file():
        sys.exit(f"{arguments.binary} does not exist: build it with cmake (docs/building.md) or name it with --binary")
    problem = [arguments.batch, arguments.kv_len, arguments.samples, SAMPLERS.index(arguments.sampler), 0]
    table = run(ncu, [str(arguments.binary), *map(str, problem)], arguments.cache_control)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        arguments.csv.write_text(table)
    k_bytes = arguments.batch * arguments.kv_len * NUM_KV_HEADS * HEAD_DIM * ELEMENT_BYTES
    print(f"{arguments.batch} x {arguments.kv_len:,}, {arguments.sampler}, S = {arguments.samples}")
    print("\n".join(summary(parse(table), k_bytes)))


if __name__ == "__main__":
    main()
