"""Prints the gold score of every round: `python experiments/iterated/curve.py WORKDIR`.

Round 0 is the policy of SFT, which every round is compared with on the same prompts and draws.
"""

import sys
from pathlib import Path

from rlhfjax import process
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.metrics import METRICS_FILE, Values, read_rows

# column: the metric of `evaluate` that it holds
METRICS = {
    "gold": "gold_policy",
    "gold_win_rate": "gold_win_rate",
    "wilson_95_low": "gold_win_rate_wilson_low",
    "wilson_95_high": "gold_win_rate_wilson_high",
    "proxy": "proxy_policy",
    "kl": "kl",  # not of greedy responses
}
COLUMNS = (*METRICS, "reward_val_accuracy")


def rounds(workdir: Path) -> list[dict[str, float]]:
    """Returns a dict per round: gold score, win rate against SFT with its interval, proxy score,
    KL, the reward's accuracy; metrics that are missing or not finite are left out.
    """
    last: dict[str, dict[str, float]] = {}
    for values in read_rows(workdir / METRICS_FILE, Values):
        last.setdefault(values.pop("stage", ""), {}).update(values)
    rows = []
    while (now := last.get(f"evaluate_{len(rows) + 1}")) is not None:
        k = len(rows) + 1
        row = {
            column: now.get(f"evaluate/{metric}") for column, metric in METRICS.items()
        }
        reward = last.get(f"reward_{k}", {})
        row["reward_val_accuracy"] = reward.get("reward/val_accuracy")
        rows.append(
            {column: value for column, value in row.items() if value is not None}
        )
    if rows:
        start = {"gold_win_rate": 0.5, "kl": 0.0}
        gold = last["evaluate_1"].get("evaluate/gold_baseline")
        if gold is not None:
            start["gold"] = gold
        rows.insert(0, start)
    return rows


def main() -> None:
    if len(sys.argv) != 2:
        raise ConfigError("curve.py: expected one argument, the workdir")
    rows = rounds(Path(sys.argv[1]))
    if not rows:
        raise DataError(f"{sys.argv[1]}: no round is evaluated here")
    print("round  " + "  ".join(COLUMNS))
    for k, row in enumerate(rows):
        cells = [f"{row[name]:.3f}" if name in row else "" for name in COLUMNS]
        print(
            f"{k:5d}  "
            + "  ".join(
                f"{cell:>{len(name)}}"
                for cell, name in zip(cells, COLUMNS, strict=True)
            )
        )


if __name__ == "__main__":
    process.run(main)
