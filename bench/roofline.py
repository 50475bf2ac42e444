"""A prediction, not a measurement: the speed-up over dense attention on an RTX 6000 Ada, from figures of another GPU.

    python bench/bench_decode.py --json out/decode.json      # on the GPU at hand
    python bench/roofline.py out/decode.json

The model has two terms, for dense attention and for santa alike:

    time = (bytes read and written) / (bandwidth x efficiency) + overhead

efficiency: the share of the peak bandwidth at which the K stream of the largest measured shape runs. overhead: by how
many microseconds the measured time at 1 x 32,768 exceeds the first term on the measured GPU; it holds launches,
dependent steps and everything that does not overlap the stream. Assumed of the other GPU: the same efficiency, the same
overhead (a second line doubles it), nothing left in its L2 from the call before, compute and shared memory no limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import report

# The paper's setting and what it reports there.
PAPER_SHAPE, NUM_KV_HEADS, HEAD_DIM, ELEMENT_BYTES = "1x32768", 8, 128, 2
PAPER_SPEEDUP = 1.50
PAPER_SAMPLES = 128


@dataclass(frozen=True)
class Gpu:
    name: str
    gbps: float
    multiprocessors: int
    l2_bytes: int


ADA = Gpu("RTX 6000 Ada", 960.0, 142, 96 << 20)
# Peak bandwidth by what torch calls the device.
PEAK_GBPS = {"H200": 4800.0, "H100 80GB HBM3": 3350.0, "RTX 6000 Ada": 960.0}


def kv_bytes(shape: str) -> int:
    """Bytes of K (and of V) of the table's problems: 8 KV heads of 128, 16 bits."""
    batch, kv_len = report.parse_shape(shape)
    return batch * kv_len * NUM_KV_HEADS * HEAD_DIM * ELEMENT_BYTES


def sampled_bytes(shape: str, v_rows: float, workspace_bytes: float) -> float:
    """All of K, the V rows read for each KV head, and what the stages hand to each other through the DRAM."""
    batch, _ = report.parse_shape(shape)
    return kv_bytes(shape) + batch * NUM_KV_HEADS * v_rows * HEAD_DIM * ELEMENT_BYTES + workspace_bytes


def predicted_us(moved_bytes: float, gbps: float, overhead_us: float) -> float:
    return moved_bytes / gbps / 1e3 + overhead_us


def peak_gbps(device: str) -> float | None:
    return next((gbps for name, gbps in PEAK_GBPS.items() if name in device), None)


@dataclass(frozen=True)
class Prediction:
    what: str
    dense_us: float
    santa_us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.santa_us


def predict(
    rows: list[dict[str, Any]], measured_peak: float, target: Gpu, workspace_bytes: float = 0.0, overheads: float = 1.0
) -> list[Prediction]:
    """One for each sampler at the paper's setting. Raises ValueError if a row that it needs is missing."""
    timed = [row for row in rows if row["suite"] == "table" and "us" in row]
    streams = [row for row in timed if row["kind"] == "stream"]
    at_paper = [row for row in timed if row["shape"] == PAPER_SHAPE]
    dense = report.best_dense(at_paper)
    if not streams or dense is None:
        raise ValueError(f"the rows have no K stream, or no dense kernel at {PAPER_SHAPE}")
    largest = max(streams, key=lambda r: r["k_bytes"])
    sustained = largest["k_bytes"] / largest["us"] / 1e3
    efficiency = sustained / measured_peak

    def transfer(us: float, moved: float) -> float:
        overhead = max(0.0, us - predicted_us(moved, sustained, 0.0)) * overheads
        return predicted_us(moved, target.gbps * efficiency, overhead)

    dense_us = transfer(dense["us"], 2 * kv_bytes(PAPER_SHAPE))
    found = []
    for row in at_paper:
        if row["kind"] == "santa" and row["num_samples"] == PAPER_SAMPLES and row["budget"] == "streaming":
            moved = sampled_bytes(PAPER_SHAPE, row["v_rows"], workspace_bytes)
            found.append(Prediction(row["what"], dense_us, transfer(row["us"], moved)))
    if not found:
        raise ValueError(f"the rows have no santa at {PAPER_SHAPE} with S = {PAPER_SAMPLES}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="of bench_decode.py --json")
    parser.add_argument("--peak-gbps", type=float, help="bandwidth of the measured GPU by its data sheet")
    parser.add_argument(
        "--workspace-bytes",
        type=float,
        default=0.0,
        help="scratch bytes that one call moves through the DRAM (profile_decode.py); 0 if they stay in the L2",
    )
    arguments = parser.parse_args()
    content = json.loads(arguments.json.read_text())
    device = content["environment"]["device"]
    peak = arguments.peak_gbps or peak_gbps(device)
    if peak is None:
        sys.exit(f"the peak bandwidth of {device} is not known here; give it with --peak-gbps")
    print(
        f"Predicted, not measured: {ADA.name} ({ADA.gbps:.0f} GB/s, {ADA.multiprocessors} SMs), {PAPER_SHAPE}, 32 / 8 "
        f"heads, head_dim {HEAD_DIM}, 16 bits,\nfrom times on {device} ({peak:.0f} GB/s). The paper measured "
        f"{PAPER_SPEEDUP:.2f}x."
    )
    try:
        for factor in (1.0, 2.0):
            for p in predict(content["rows"], peak, ADA, arguments.workspace_bytes, factor):
                print(
                    f"    {p.what:26} {p.speedup:.2f}x ({p.santa_us:.0f} us against {p.dense_us:.0f}), "
                    f"overheads {'as measured' if factor == 1.0 else f'{factor:.0f} times as long'}"
                )
    except ValueError as error:
        sys.exit(str(error))
    k_bytes = kv_bytes(PAPER_SHAPE)
    if k_bytes < ADA.l2_bytes:
        print(
            f"    K is {k_bytes / 1e6:.0f} MB and the L2 {ADA.l2_bytes / 1e6:.0f} MB: a benchmark that decodes the "
            "same buffer again and again\n    finds K in the L2 and measures something else."
        )


if __name__ == "__main__":
    main()
