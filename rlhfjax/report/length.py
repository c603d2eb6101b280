"""Reward against length: the figures of the last comparison."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhfjax.evals.length import correlation
from rlhfjax.report import figures
from rlhfjax.report.downloads import Drawing, drawing

COMPARED = ("baseline", "policy")


def scatters(
    samples: Sequence[Mapping], models: Mapping[str, str]
) -> list[tuple[str, Drawing]]:
    """Returns (caption, figure) for each reward; none for samples without lengths."""
    found = []
    for key in ("gold", "proxy"):
        columns = {
            f"{what}_{role}": _column(samples, what, role, key)
            for role in COMPARED
            for what in ("length", key)
        }
        points = [
            (columns[f"length_{role}"], columns[f"{key}_{role}"]) for role in COMPARED
        ]
        if min(len(lengths) for lengths, _ in points) < 4:
            continue
        of_baseline, of_policy = points
        svg = figures.scatter(of_baseline, of_policy, f"{key} reward")
        texts = [
            f"{models[role]} {_correlation(*both)}"
            for role, both in zip(COMPARED, points, strict=True)
        ]
        caption = f"correlation of length and {key} reward: {', '.join(texts)}"
        found.append((caption, drawing(f"{key}_and_length", svg, columns)))
    return found


def _column(samples: Sequence[Mapping], what: str, role: str, key: str) -> list[float]:
    """Returns lengths or rewards of the samples that have both."""
    return [
        float(row[f"{what}_{role}"])
        for row in samples
        if _is_number(row.get(f"length_{role}"))
        and _is_number(row.get(f"{key}_{role}"))
    ]


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _correlation(lengths: Sequence[float], rewards: Sequence[float]) -> str:
    measured = correlation(np.array(lengths), np.array(rewards))
    if measured is None:
        return "n/a"
    r, low, high, _ = measured
    return f"{r:.2f} (95 %: {low:.2f} to {high:.2f})"
