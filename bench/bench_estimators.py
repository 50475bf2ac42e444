"""Error of the grouped sampler against systematic sampling at the same number of V rows read, on synthetic attention.

    python bench/bench_estimators.py

Gaussian queries, keys and values; the query heads of a group are correlated, V has a mean. Each figure is the geometric
mean over S = 16 .. 64 of RMSE(systematic) / RMSE(grouped), the latter interpolated to the same number of distinct rows:
above 1, grouped is better. Runs on the CPU in under a minute, through the operator.
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


def advantage(correlation: float, logit_std: float, v_mean: float, kv_len: int, budget: str, draws: int) -> float:
    """RMSE(systematic) / RMSE(grouped) at equal rows."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    common, own = randn(1, 1, HEAD_DIM), randn(1, GROUP_SIZE, HEAD_DIM)
    q = (correlation**0.5 * common + (1 - correlation) ** 0.5 * own) * logit_std
    k, v = randn(1, kv_len, 1, HEAD_DIM), randn(1, kv_len, 1, HEAD_DIM) + v_mean
    p, values, _ = reference.probabilities(q[0], k[0], v[0])
    expected = p[0] @ values[0]
    rows, systematic = error_curve(q, k, v, expected, "systematic", budget, draws)
    grouped_rows, grouped = error_curve(q, k, v, expected, "grouped", budget, draws)
    middle = slice(1, -1)  # inside the other curve's range
    return float(np.exp((systematic - np.interp(rows, grouped_rows, grouped))[middle].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-len", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--budget", default="streaming", choices=["streaming", "proportional", "uniform"])
    arguments = parser.parse_args()
    means, correlations, stds = (0.0, 0.5, 1.0), (0.0, 0.5, 0.9), (1.0, 2.0, 4.0)
    cases = list(itertools.product(means, correlations, stds))
    ratios = {
        case: advantage(case[1], case[2], case[0], arguments.kv_len, arguments.budget, arguments.draws)
        for case in tqdm(cases, desc="cases", leave=False)
    }
    shape = f"{arguments.kv_len} keys, {arguments.budget}, group of {GROUP_SIZE}"
    print(f"RMSE(systematic) / RMSE(grouped) at equal rows, {shape}")
    print(f"{'mean of V':>9} {'correlation':>11} " + " ".join(f"{'logit std ' + format(s, 'g'):>12}" for s in stds))
    for mean, correlation in itertools.product(means, correlations):
        figures = " ".join(f"{ratios[mean, correlation, s]:12.2f}" for s in stds)
        print(f"{mean:9g} {correlation:11g} {figures}")


if __name__ == "__main__":
    main()
