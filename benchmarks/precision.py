"""Compares runs in float32 with runs in bfloat16 products, seed by seed.

    python -m benchmarks.precision --seeds=5
    python -m benchmarks.precision --seeds=5 --loss_seeds=10 --rows=FILE.jsonl
    python -m benchmarks.precision --seeds=2 --size=smoke

The quickstart runs once per seed and dtype, one after the other; the same command continues where
it stopped. With --rows=FILE.jsonl a finished run is a line of that file, and runs that are in it
are not run again: they may come from several machines. The table has the held-out losses of
pretraining and fine-tuning in nats per token, and the policy's gold reward and KL after PPO, each
with the interval of its difference over the seeds (Student's, pairs of equal seeds). The two
losses pass if their intervals lie within +- BOUND.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks import machine
from rlhfjax import json_text, jsonl, paths, recipe
from rlhfjax.evals.stats import Interval, mean_interval
from rlhfjax.experiment import load
from rlhfjax.paths import Path

RECIPE = "experiments/quickstart/recipe.py"
DTYPES = ("float32", "bfloat16_products")
BOUND = 0.02  # nats per token
FEWEST = 2  # seeds that an interval needs
LOSSES = {
    "pretrain/val_loss": "held-out loss of pretraining, nats per token",
    "sft/val_loss": "held-out loss of fine-tuning, nats per token",
}
SHOWN = {
    "evaluate/gold_policy": "gold reward of the policy",
    "evaluate/gold_difference": "gold reward of the policy minus that of the SFT model",
    "evaluate/kl": "KL to the reference, nats per response",
}


METRICS = (*LOSSES, *SHOWN)


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
    """Returns a row per metric that two pairs or more have, losses first.

    Args:
      runs: by seed, the last metrics of a run in each of DTYPES.
    """
    rows = []
    for name in METRICS:
        pairs = [pair for pair in runs if all(name in metrics for metrics in pair)]
        if len(pairs) < FEWEST:
            continue
        first, second = (tuple(float(pair[i][name]) for pair in pairs) for i in (0, 1))
        difference = mean_interval(np.array(second) - np.array(first))
        rows.append(Row(name, (first, second), difference))
    return rows


def quickstart(seed: int, dtype: str, size: str, until: str = "") -> Any:
    """Returns the recipe; with `until` its stages up to that one."""
    config = load(f"{RECIPE}:size={size},seed={seed}").config()
    config.pretrain.model.dtype = dtype
    if until:
        kept = config.stages.index(until) + 1
        for name in config.stages[kept:]:
            del config[name]
        config.stages = config.stages[:kept]
    return config


def run(
    seed: int, dtype: str, size: str, workdir: Path, until: str = ""
) -> dict[str, Any]:
    """Runs the quickstart, or continues it, and returns a row: what ran, where, and METRICS.

    Args:
      until: the last stage; empty: all of them.
    """
    config = quickstart(seed, dtype, size, until)
    folder = workdir / f"{dtype}_{seed}"
    metrics = recipe.run(config, folder, cache=workdir / "cache")
    return {
        "size": size,
        "seed": seed,
        "dtype": dtype,
        "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine.describe(),
    }


def read_rows(file: Path | None, size: str) -> dict[tuple[int, str], dict[str, Any]]:
    """Returns the file's rows of a size by seed and dtype; none without a file."""
    rows = [] if file is None else jsonl.read_jsonl(file)
    return {(row["seed"], row["dtype"]): row for row in rows if row["size"] == size}


def run_or_read(
    asked: Sequence[tuple[int, str]],
    size: str,
    workdir: Path,
    file: Path | None,
    whole: int = sys.maxsize,
) -> dict[tuple[int, str], dict[str, Any]]:
    """Returns a row of each seed and dtype that is asked for; appends new ones to the file.

    Args:
      whole: seeds below it run all stages, the others end with fine-tuning.
    """
    rows = read_rows(file, size)
    for seed, dtype in asked:
        if (seed, dtype) in rows:
            continue
        until = "" if seed < whole else "sft"
        row = rows[seed, dtype] = run(seed, dtype, size, workdir, until)
        if file is not None:
            with file.open("a") as out:
                out.write(json_text.encode(row, file) + "\n")
    return {key: rows[key] for key in asked}


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
    parser.add_argument(
        "--loss_seeds", type=int, default=0, help="number of seeds of the losses"
    )
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--workdir", default="runs/precision")
    parser.add_argument("--rows", default="", help="file of finished runs")
    options: Any = parser.parse_args(argv)
    if options.seeds < FEWEST:
        parser.error(f"--seeds={options.seeds}: expected at least {FEWEST}")
    file = paths.path(options.rows) if options.rows else None
    seeds = range(max(options.seeds, options.loss_seeds))
    asked = [(seed, dtype) for seed in seeds for dtype in DTYPES]
    folder = paths.path(options.workdir)
    done = run_or_read(asked, options.size, folder, file, whole=options.seeds)
    first, second = (
        [done[s, d]["metrics"] for s, d in asked if d == x] for x in DTYPES
    )
    rows = compare(list(zip(first, second, strict=True)))
    print(table(rows))
    where = {}  # a machine once, with the load before its first run
    for row in done.values():
        about = {k: v for k, v in row["machine"].items() if k != "loadavg_1m"}
        where.setdefault(str(about), machine.sentence(row["machine"]))
    print("\n".join(["run on:", *where.values()]))
    losses = [row for row in rows if row.name in LOSSES]
    return 0 if all(row.is_within(BOUND) for row in losses) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
