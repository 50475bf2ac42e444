"""What the two extensions of the selection save or cost: density at the same mean mass kept, and the price of a floor.

    python bench/bench_selection.py                   # heads of the bundled model, 8,192 and 16,384 bytes; CPU or CUDA
    python bench/bench_selection.py --lengths 2048

The paper's rule covers columns and slashes independently, each to alpha; `selection="joint"` covers both together. For
a grid of alphas each rule gives, per head, a density (kept blocks over causal blocks) and the mean mass that its
sampled rows keep. A head's density at a given mean mass is read off between the two nearest grid points; the table has
the mean over the heads whose grids enclose that mass under both rules. The second table adds `min_mass` to the paper's
rule at alpha 0.9: the least mass that a sampled row keeps, and what that costs. Everything here is deterministic.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import santa

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prefill_data import Planted, captured

ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
MASSES = (0.9, 0.95, 0.98, 0.99)
FLOORS = (0.0, 0.5, 0.8, 0.9)
FLOOR_ALPHA = 0.9
DENSITY, MEAN_MASS, LEAST_MASS = 0, 1, 2  # columns of santa.sample_select's stats


def stats_of(data: Planted, alpha: float, selection: str, min_mass: float = 0.0) -> np.ndarray:
    """[heads, 6]"""
    *_, stats = santa.sample_select(
        data.q, data.k, alpha_c=alpha, alpha_s=alpha, selection=selection, min_mass=min_mass
    )
    return stats[0].double().cpu().numpy()


def density_at(mass: float, curve: np.ndarray) -> float:
    """Of one head's curve [alphas, (density, mean mass)], alphas ascending; NaN where the grid does not reach."""
    density, kept = curve.T
    if not kept[0] <= mass <= kept[-1]:
        return float("nan")
    return float(np.interp(mass, np.maximum.accumulate(kept), density))


def compare(data: Planted, progress: tqdm) -> dict[str, object]:
    curves = {}
    for selection in ("paper", "joint"):
        points = []
        for alpha in ALPHAS:
            points.append(stats_of(data, alpha, selection)[:, [DENSITY, MEAN_MASS]])
            progress.update()
        curves[selection] = np.stack(points, axis=1)  # [heads, alphas, 2]
    equal_mass = []
    for mass in MASSES:
        found = {name: np.array([density_at(mass, head) for head in curve]) for name, curve in curves.items()}
        both = ~np.isnan(found["paper"]) & ~np.isnan(found["joint"])
        equal_mass.append(
            {"mass": mass, "heads": int(both.sum())}
            | {name: float(values[both].mean()) if both.any() else float("nan") for name, values in found.items()}
        )
    floors = []
    for floor in FLOORS:
        stats = stats_of(data, FLOOR_ALPHA, "paper", floor)
        floors.append(
            {"min_mass": floor, "density": float(stats[:, DENSITY].mean()), "least": float(stats[:, LEAST_MASS].min())}
        )
        progress.update()
    return {"equal_mass": equal_mass, "floors": floors}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args(argv)

    results = {}
    with tqdm(total=len(a.lengths) * (2 * len(ALPHAS) + len(FLOORS)), desc="selections", disable=None) as progress:
        for length in a.lengths:
            dtype = torch.float32 if a.device == "cpu" else torch.bfloat16
            results[length] = compare(captured(length, layers=6, device=a.device, dtype=dtype), progress)
    for length, result in results.items():
        print(f"\nheads of the bundled model, {length:,} bytes; density, mean over heads\n")
        print("| mean mass kept | heads | paper | joint | joint / paper |\n|---|---|---|---|---|")
        for row in result["equal_mass"]:
            ratio = row["joint"] / row["paper"]
            print(f"| {row['mass']} | {row['heads']} | {row['paper']:.3f} | {row['joint']:.3f} | {ratio:.2f} |")
        print(f"\n| min_mass, alpha {FLOOR_ALPHA} | density | least mass of a sampled row |\n|---|---|---|")
        for row in result["floors"]:
            print(f"| {row['min_mass']} | {row['density']:.3f} | {row['least']:.3f} |")
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
