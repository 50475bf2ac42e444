"""Error of the grouped sampler at the same number of V rows read, on synthetic attention: against systematic sampling,
and of one budget against another.

    python bench/bench_estimators.py

Gaussian queries, keys and values; the query heads of a group are correlated, V has a mean. Each figure is the geometric
mean over S = 16 .. 64 of RMSE(other) / RMSE(grouped), the latter interpolated to the same number of distinct rows:
above 1, grouped with --budget is better than the other, which is systematic with --budget, or grouped with
--other-budget. In brackets beside the second: rows that grouped reads at S = 64, over those of the other. Runs on the
CPU.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch
from tqdm import tqdm

import santa
from santa import reference

GROUP_SIZE, HEAD_DIM = 4, 64
SAMPLES = (8, 16, 32, 64, 128)


def error_curve(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, expected: torch.Tensor, sampler: str, budget: str, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """log distinct V rows read and log RMSE for every S, over `draws` independent estimates."""
    rows_read, rmse = [], []
    for num_samples in SAMPLES:
        out, _, rows = santa.decode(
            *(x.expand(draws, *x.shape[1:]) for x in (q, k, v)),
            row_seeds=torch.arange(draws),
            num_samples=num_samples,
            sampler=sampler,
            budget=budget,
            min_sampled_len=0,
            return_rows_read=True,
        )
        rows_read.append(rows.double().mean())
        rmse.append((out.double() - expected).pow(2).mean().sqrt())
    return np.log(rows_read), np.log(rmse)


def problem(correlation: float, logit_std: float, v_mean: float, kv_len: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and the exact output."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    common, own = randn(1, 1, HEAD_DIM), randn(1, GROUP_SIZE, HEAD_DIM)
    q = (correlation**0.5 * common + (1 - correlation) ** 0.5 * own) * logit_std
    k, v = randn(1, kv_len, 1, HEAD_DIM), randn(1, kv_len, 1, HEAD_DIM) + v_mean
    p, values, _ = reference.probabilities(q[0], k[0], v[0])
    return q, k, v, p[0] @ values[0]


def advantage(other: tuple[np.ndarray, np.ndarray], grouped: tuple[np.ndarray, np.ndarray]) -> float:
    """RMSE(other) / RMSE(grouped) at equal rows, from their error curves."""
    (rows, rmse), middle = other, slice(1, -1)  # inside the other curve's range
    return float(np.exp((rmse - np.interp(rows, *grouped))[middle].mean()))


def main() -> None:
    budgets = ["streaming", "proportional", "uniform"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-len", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--budget", default="streaming", choices=budgets)
    parser.add_argument("--other-budget", default="proportional", choices=budgets)
    arguments = parser.parse_args()
    means, correlations, stds = (0.0, 0.5, 1.0), (0.0, 0.5, 0.9), (1.0, 2.0, 4.0)
    cells: dict[str, dict[tuple[float, float, float], str]] = {"sampler": {}, "budget": {}}
    for case in tqdm(list(itertools.product(means, correlations, stds)), desc="cases", leave=False):
        v_mean, correlation, logit_std = case
        inputs = problem(correlation, logit_std, v_mean, arguments.kv_len)
        grouped = error_curve(*inputs, "grouped", arguments.budget, arguments.draws)
        systematic = error_curve(*inputs, "systematic", arguments.budget, arguments.draws)
        other = error_curve(*inputs, "grouped", arguments.other_budget, arguments.draws)
        rows = np.exp(grouped[0] - other[0])[SAMPLES.index(64)]
        cells["sampler"][case] = f"{advantage(systematic, grouped):.2f}"
        cells["budget"][case] = f"{advantage(other, grouped):.2f} ({rows:.2f})"

    titles = {
        "sampler": f"RMSE(systematic) / RMSE(grouped), {arguments.budget}",
        "budget": f"RMSE({arguments.other_budget}) / RMSE({arguments.budget}), grouped (rows at S = 64)",
    }
    for table, title in titles.items():
        print(f"{title}, at equal rows: {arguments.kv_len} keys, group of {GROUP_SIZE}")
        print(f"{'mean of V':>9} {'correlation':>11} " + " ".join(f"{'logit std ' + format(s, 'g'):>12}" for s in stds))
        for mean, correlation in itertools.product(means, correlations):
            figures = " ".join(f"{cells[table][mean, correlation, s]:>12}" for s in stds)
            print(f"{mean:9g} {correlation:11g} {figures}")


if __name__ == "__main__":
    main()
