"""What a study reads of its runs: one outcome per finished run, and values computed from it."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax.errors import DataError, cut

Series = tuple[list[float], list[float]]
"""Steps and values of a metric."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of a study measured."""

    condition: str
    seeds: Mapping[str, Any]
    """The seeds of the run: {option: value}."""
    metrics: Mapping[str, float]
    """The last value of every metric, in a recipe `STAGE/NAME`."""
    curves: Mapping[str, Series] = dataclasses.field(default_factory=dict)
    """The metrics that the study keeps whole."""

    @property
    def seed(self) -> str:
        """A text that is the same in runs that share all seeds: `arg.seed=3`."""
        return ", ".join(f"{option}={value}" for option, value in self.seeds.items())

    @property
    def name(self) -> str:
        """The run in an error or a table: its condition and seeds."""
        return f"{self.condition}, {self.seed}"

    def metric(self, name: str) -> float:
        """Returns a metric. Raises DataError if the run has none of this name."""
        if name not in self.metrics:
            raise DataError(f"{self.name}: it has no metric {name!r}")
        return self.metrics[name]

    def curve(self, name: str) -> list[float]:
        """Returns the values of a kept metric, by rising step.

        Raises:
          DataError: the study keeps no such curve, or the run has none.
        """
        if name not in self.curves:
            known = ", ".join(self.curves) or "none"
            raise DataError(f"{self.name}: no curve {name!r} is kept; kept: {known}")
        return self.curves[name][1]


@dataclasses.dataclass(frozen=True)
class Across:
    """A value that needs the other seeds of its condition, too.

    Whatever is chosen by looking at outcomes, such as the place of a maximum, must be chosen on
    others than the one that is measured: a run's own maximum is above its other points in noise,
    too.
    """

    function: Callable[[Outcome, Sequence[Outcome]], float]
    """(a run, the runs of the same condition with other seeds) -> its value."""
    text: str
    """What it is, for the page."""


Value = str | Callable[[Outcome], float] | Across
"""A metric's name, a function of an outcome, or a function of an outcome and its siblings."""


def fall_from(curve: str, step: float | int) -> Across:
    """Returns the value: last point of a kept curve, minus its point at a step.

    With a step that pilots of other seeds chose it is the plain test of a hump: the values of the
    study's seeds are independent, and in noise their mean is 0.

    Raises (when it is computed):
      DataError: the curve has no such step.
    """

    def value(outcome: Outcome, _others: Sequence[Outcome]) -> float:
        values = outcome.curve(curve)
        steps = outcome.curves[curve][0]
        if step not in steps:
            raise DataError(f"{outcome.name}: {curve!r} has no step {step:g}")
        return values[-1] - values[steps.index(step)]

    return Across(value, f"fall_from({curve!r}, {step:g})")


def fall_from_peak(curve: str) -> Across:
    """Returns the value: last point of a kept curve, minus its point at the other seeds' peak.

    With y_s the curve of seed s and m_s the mean curve of the other seeds, it is
    y_s[-1] - y_s[argmax m_s]. A hump gives values below 0 ("less" than 0 in a comparison). In noise
    around a flat curve their mean is 0, because a seed has no part in choosing its peak; for a
    curve that rises to its end they are 0. The choices of several seeds are not independent: of
    40,000 simulated studies of flat curves, 5 seeds and 8 points, the t test found a fall in 3.4 %
    where points follow each other as a random walk, as those of best-of-n do, and in 4.7 % where
    they are independent, against 2.5 % nominally; with each seed's own maximum it would be 33 % and
    60 %. `fall_from` keeps the nominal rate.

    Raises (when it is computed):
      DataError: there is no other seed, or the curves differ in length.
    """

    def value(outcome: Outcome, others: Sequence[Outcome]) -> float:
        own = outcome.curve(curve)
        rows = [other.curve(curve) for other in others]
        if not rows or not own or any(len(row) != len(own) for row in rows):
            raise DataError(
                f"{outcome.name}: the peak of {curve!r} needs another seed, and curves of"
                " one length"
            )
        peak = int(np.argmax(np.mean(rows, axis=0)))
        return float(own[-1] - own[peak])

    return Across(value, f"fall_from_peak({curve!r})")


def value_of(value: Value, outcome: Outcome, others: Sequence[Outcome]) -> float:
    """Returns a value of an outcome, NaN where it is not finite.

    Args:
      others: the outcomes of the same condition with other seeds.
    Raises:
      DataError: the run lacks a metric or a curve.
      TypeError: the function returns no number.
    """
    if isinstance(value, str):
        return outcome.metric(value)
    if isinstance(value, Across):
        result = value.function(outcome, others)
    else:
        result = value(outcome)
    number = float(result)
    return number if math.isfinite(number) else math.nan


def describe(value: Value) -> str:
    """Returns what a value is, for the page: of a function its first line, or its source."""
    if isinstance(value, str):
        return value
    if isinstance(value, Across):
        return value.text
    lines = (value.__doc__ or "").strip().splitlines()
    return lines[0] if lines else cut(" ".join(source(value).split()), 200)


def source(value: Value) -> str:
    """Returns a value as text: a function with its source, so that a change of it is noticed."""
    if isinstance(value, str):
        return value
    if isinstance(value, Across):
        return value.text
    try:
        return inspect.getsource(value).strip()
    except (OSError, TypeError, SyntaxError):  # it was not read from a file
        return value.__qualname__
