"""Compares runs in float32 with runs in bfloat16 products, seed by seed.

    python -m benchmarks.precision --seeds=5
    python -m benchmarks.precision --seeds=2 --size=smoke

The quickstart runs once per seed and dtype, one after the other; the same command continues where
it stopped. The table has the held-out losses of pretraining and fine-tuning in nats per token, and
the policy's gold reward and KL after PPO, each with the interval of its difference over the seeds
(Student's, pairs of equal seeds). The two losses pass if their intervals lie within +- BOUND.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from rlhfjax import paths, recipe
from rlhfjax.evals.stats import Interval, mean_interval
from rlhfjax.experiment import load
from rlhfjax.paths import Path

RECIPE = "experiments/quickstart/recipe.py"
DTYPES = ("float32", "bfloat16_products")
BOUND = 0.02  # nats per token
LOSSES = {
    "pretrain/val_loss": "held-out loss of pretraining, nats per token",
    "sft/val_loss": "held-out loss of fine-tuning, nats per token",
}
SHOWN = {
    "evaluate/gold_policy": "gold reward of the policy",
    "evaluate/gold_difference": "gold reward of the policy minus that of the SFT model",
    "evaluate/kl": "KL to the reference, nats per response",
}


class Row(NamedTuple):
    """A metric in both dtypes, seed by seed."""

    name: str
    values: tuple[tuple[float, ...], tuple[float, ...]]  # by DTYPES
    difference: Interval  # of the second minus the first

    def is_within(self, bound: float) -> bool:
        """Returns whether the whole interval of the difference lies within +- bound."""
        return -bound <= self.difference.low and self.difference.high <= bound


def compare(
    runs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> list[Row]:
    """Returns a row per metric that all runs have, losses first.

    Args:
      runs: by seed, the last metrics of a run in each of DTYPES.
    Raises:
      ValueError: there are fewer than two seeds.
    """
    rows = []
    for name in (*LOSSES, *SHOWN):
        if not all(name in metrics for pair in runs for metrics in pair):
            continue
        first, second = (tuple(float(pair[i][name]) for pair in runs) for i in (0, 1))
        difference = mean_interval(np.array(second) - np.array(first))
        rows.append(Row(name, (first, second), difference))
    return rows


def run(seed: int, dtype: str, size: str, workdir: Path) -> dict[str, float]:
    """Runs the quickstart, or continues it, and returns its last metrics."""
    config = load(f"{RECIPE}:size={size},seed={seed}").config()
    config.pretrain.model.dtype = dtype
    folder = workdir / f"{dtype}_{seed}"
    return recipe.run(config, folder, cache=workdir / "cache")


def table(rows: Sequence[Row]) -> str:
    """Returns the rows in Markdown, and whether the losses are within the bound."""
    lines = [
        f"| metric | {' | '.join(DTYPES)} | difference, 95 % interval |",
        "|---" * 4 + "|",
    ]
    for row in rows:
        means = [f"{np.mean(values):.4f}" for values in row.values]
        low, high = row.difference.low, row.difference.high
        ends = f"{row.difference.value:+.4f} ({low:+.4f} to {high:+.4f})"
        title = {**LOSSES, **SHOWN}[row.name]
        lines.append(f"| {title} | {' | '.join(means)} | {ends} |")
    for row in rows:
        by_seed = zip(*row.values, strict=True)
        pairs = ", ".join(f"{first:.4f} {second:.4f}" for first, second in by_seed)
        lines.append(f"{row.name} by seed: {pairs}")
    for row in rows:
        if row.name in LOSSES:
            verdict = "is" if row.is_within(BOUND) else "is NOT"
            lines.append(f"{row.name}: the interval {verdict} within +- {BOUND}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of seeds, at least 2"
    )
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--workdir", default="runs/precision")
    options: Any = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error(f"--seeds={options.seeds}: expected at least 2")
    workdir = paths.path(options.workdir)
    runs = []
    for seed in range(options.seeds):
        first, second = (run(seed, dtype, options.size, workdir) for dtype in DTYPES)
        runs.append((first, second))
    rows = compare(runs)
    print(table(rows))
    losses = [row for row in rows if row.name in LOSSES]
    return 0 if all(row.is_within(BOUND) for row in losses) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
