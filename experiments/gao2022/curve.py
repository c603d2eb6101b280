"""Prints gold and proxy score over d = sqrt(KL): `python experiments/gao2022/curve.py WORKDIR`.

One row per point of PPO and of best-of-n, and for each the coefficients that fit the gain of the
gold score:
  best-of-n  R(d) = d (alpha - beta d)        peak at alpha / (2 beta)
  RL         R(d) = d (alpha - beta log d)    peak at exp(alpha / beta - 1)

Source: Gao et al. 2022, section 3. PPO's KL is measured on held-out responses; that of best-of-n is
  log n - (n - 1) / n.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlhfjax import process
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.metrics import METRICS_FILE, Values, read_rows

Point = dict[str, float]  # d, proxy, gold
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "best_of_n": lambda d: d,
    "ppo": np.log,
}


def points(workdir: Path, stage: str) -> list[Point]:
    """Returns the points of a stage in order; in best-of-n the first, n = 1, is the start.

    A line in which one of the three is null (it was not finite) gives no point.
    """
    prefix = "val_" if stage == "ppo" else ""
    names = {name: f"{stage}/{prefix}{name}" for name in ("kl", "proxy", "gold")}
    rows = read_rows(workdir / METRICS_FILE, Values)
    found = [{name: row.get(key) for name, key in names.items()} for row in rows]
    found = [row for row in found if None not in row.values()]
    return [
        {
            "d": math.sqrt(max(row["kl"], 0.0)),
            "proxy": row["proxy"],
            "gold": row["gold"],
        }
        for row in found
    ]


def start(workdir: Path) -> Point | None:
    """Returns the point of the policy before PPO, as the evaluation measured it."""
    for row in read_rows(workdir / METRICS_FILE, Values):
        gold = row.get("evaluate/gold_baseline")
        proxy = row.get("evaluate/proxy_baseline")
        if gold is not None and proxy is not None:
            return {"d": 0.0, "proxy": proxy, "gold": gold}
    return None


def fit(d: np.ndarray, gain: np.ndarray, stage: str) -> tuple[float, float, float]:
    """Returns alpha, beta and R^2 of the fit gain = d (alpha - beta f(d)).

    f is the identity for best-of-n and the logarithm for RL.
    """
    columns = np.stack([d, -d * FORMS[stage](d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    left = gain - columns @ np.array([alpha, beta])
    return (
        float(alpha),
        float(beta),
        float(1 - left @ left / np.sum((gain - gain.mean()) ** 2)),
    )


def peak(alpha: float, beta: float, stage: str) -> float:
    """Returns the d at which the fitted curve is highest; infinity if it only rises."""
    if beta <= 0:
        return math.inf
    if stage == "best_of_n":
        return alpha / (2 * beta)
    exponent = alpha / beta - 1
    return math.exp(exponent) if exponent < 700 else math.inf  # float64 ends there


def main() -> None:
    if len(sys.argv) != 2:
        raise ConfigError("curve.py: expected one argument, the workdir")
    workdir = Path(sys.argv[1])
    curves = {stage: points(workdir, stage) for stage in FORMS}
    if not any(curves.values()):
        raise DataError(f"{workdir}: no line of metrics.jsonl has KL, proxy and gold")
    for stage in FORMS:
        curve = curves[stage]
        first = curve[0] if stage == "best_of_n" else start(workdir)
        if not curve or first is None:
            continue
        later = [point for point in curve if point["d"] > 0]
        if not later:
            continue
        print(f"{stage}\n  sqrt(KL)     KL   proxy    gold")
        for point in [first, *later]:
            print(
                f"  {point['d']:8.3f} {point['d'] ** 2:6.2f}"
                f" {point['proxy']:7.3f} {point['gold']:7.3f}"
            )
        d, gold = (np.array([point[name] for point in later]) for name in ("d", "gold"))
        print(
            f"  highest gold score: {gold.max():.3f}, at sqrt(KL) {d[gold.argmax()]:.2f}"
        )
        if len(later) > 2:
            alpha, beta, r2 = fit(d, gold - first["gold"], stage)
            print(
                f"  alpha {alpha:.3f}, beta {beta:.3f}, R^2 {r2:.3f},"
                f" peak at sqrt(KL) {peak(alpha, beta, stage):.2f}"
            )


if __name__ == "__main__":
    process.run(main)
