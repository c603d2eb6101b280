"""The gold curve over rounds: `python experiments/iterated/curve.py WORKDIR` prints a row a round, from metrics.jsonl.

Round 0 is the policy of SFT, which every round is compared with on the same prompts and draws.
"""

import json
import sys
from pathlib import Path

COLUMNS = ("gold", "gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "proxy", "kl", "reward_val_accuracy")


def rounds(workdir: Path) -> list[dict[str, float]]:
    """A dict a round: gold score, win rate against SFT with its interval, proxy score, KL, the reward's accuracy."""
    last: dict[str, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        last.setdefault(values.pop("stage"), {}).update(values)
    rows = []
    while (now := last.get(f"evaluate_{len(rows) + 1}")) is not None:
        k = len(rows) + 1
        row = {name: now[f"evaluate/{name}"] for name in COLUMNS[1:4]}
        row |= {name: now[f"evaluate/{name}_policy"] for name in ("gold", "proxy")}
        row |= {"kl": now["evaluate/kl"], "reward_val_accuracy": last[f"reward_{k}"]["reward/val_accuracy"]}
        rows.append(row)
    if rows:
        first = last["evaluate_1"]
        start = {"gold": first["evaluate/gold_baseline"], "gold_win_rate": 0.5, "kl": 0.0}
        rows.insert(0, start)
    return rows


def main() -> None:
    print("round  " + "  ".join(COLUMNS))
    for k, row in enumerate(rounds(Path(sys.argv[1]))):
        cells = [f"{row[name]:.3f}" if name in row else "" for name in COLUMNS]
        print(f"{k:5d}  " + "  ".join(f"{cell:>{len(name)}}" for cell, name in zip(cells, COLUMNS, strict=True)))


if __name__ == "__main__":
    main()
