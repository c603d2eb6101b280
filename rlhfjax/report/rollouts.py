"""Samples of a stage while it trained, with tokens colored by a number that the reader picks.

The page has no script: a rule of its style sheet takes the picked number from the token's style.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhfjax.report import tables
from rlhfjax.report.workdir import Stage

MOST_STEPS = 6  # steps that are shown
MOST_TOKENS = 200  # colored tokens of a response
# Numbers per token, with the CSS variables that hold them and what they are.
COLORS = {
    "log_ratio": ("--l", "log-ratio to the reference", "nats"),
    "value": ("--v", "value", "reward"),
    "advantage": ("--a", "advantage", "reward"),
    "reward": ("--r", "share of the reward", "reward"),
}


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a response."""

    text: str
    style: str  # the CSS variables of its numbers, percent of the strongest color
    hint: str  # the numbers


@dataclasses.dataclass(frozen=True)
class Response:
    """A response with its score."""

    prompt: str
    tokens: list[Token]
    rest: str  # text after the colored tokens
    score: str


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """The samples of one stage."""

    stage: str
    steps: dict[int, list[Response]]
    colors: dict[str, str]  # labels of the numbers that tokens have


def rollouts(stage: Stage) -> Rollouts | None:
    """Returns the samples of some steps, with the first and the last; None if there are none."""
    steps = sorted({int(row["step"]) for row in stage.rollouts})
    if not steps:
        return None
    shown = _spaced(steps, MOST_STEPS)
    rows = [row for row in stage.rollouts if row["step"] in shown]
    known = [name for name in COLORS if any(name in row for row in rows)]
    scales = {name: _scale(rows, name) for name in known}
    return Rollouts(
        stage=stage.name,
        steps={
            step: [_response(row, scales) for row in rows if row["step"] == step]
            for step in shown
        },
        colors={name: f"{COLORS[name][1]}, {COLORS[name][2]}" for name in known},
    )


def _spaced(steps: Sequence[int], most: int) -> list[int]:
    """Returns at most `most` steps, evenly spaced, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in places]


def _scale(rows: Sequence[dict], name: str) -> float:
    """Returns the size of a number that has the strongest color, nearly the largest."""
    sizes = [abs(x) for row in rows for x in row.get(name, ()) if x is not None]
    return float(np.percentile(sizes, 98)) if sizes else 0.0


def _response(row: dict, scales: dict[str, float]) -> Response:
    pieces = row.get("pieces", ())[:MOST_TOKENS]
    score = row.get("score")
    return Response(
        prompt=str(row.get("prompt", "")),
        tokens=[_token(row, i, scales) for i in range(len(pieces))],
        rest=str(row.get("response", ""))[len("".join(pieces)) :],
        score="n/a" if score is None else tables.number(score),
    )


def _token(row: dict, i: int, scales: dict[str, float]) -> Token:
    styles, hints = [], []
    for name, scale in scales.items():
        values = row.get(name, ())
        x = values[i] if i < len(values) else None
        if x is None:
            continue
        variable, label, _ = COLORS[name]
        share = max(-1.0, min(1.0, x / scale)) if scale else 0.0
        styles.append(f"{variable}:{100 * share:.0f}")
        hints.append(f"{label} {tables.number(x)}")
    text = row["pieces"][i]
    if not text and i + 1 == len(row["pieces"]):
        text = "\u2205"  # an end of sequence has no text, but it has a reward
    return Token(text, ";".join(styles), ", ".join(hints))
