"""Computes a study's verdict by its rule: reproduced, contradicted or inconclusive."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rlhfjax.errors import ConfigError, DataError, first_line
from rlhfjax.lab import outcomes, statistics
from rlhfjax.lab.card import Comparison, Study
from rlhfjax.lab.outcomes import Outcome
from rlhfjax.lab.statistics import ALPHA, Estimate

State = Literal["holds", "against", "undecided", "missing"]
Name = Literal["reproduced", "contradicted", "inconclusive"]
BySeed = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What the runs say about one comparison."""

    comparison: Comparison
    state: State
    reason: str = ""
    """Why it is undecided or missing."""
    estimate: Estimate | None = None  # None: too few values
    p: float = 1.0
    adjusted: float = 1.0
    """p by Holm's method over the primary comparisons; that of a requirement is p."""
    level: float = 1 - ALPHA
    """Of the interval, see `statistics.holm_alphas`."""
    differences: BySeed = dataclasses.field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.estimate is None or self.estimate.error == 0:
            return None
        return statistics.interval(self.estimate, self.level)

    @property
    def detectable(self) -> float | None:
        """The smallest mean difference that these seeds distinguish from 0, given their sd."""
        if self.estimate is None or self.estimate.error == 0:
            return None
        half = statistics.interval(self.estimate, 1 - ALPHA)[1] - self.estimate.mean
        return half


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a study found, and why."""

    name: Name
    reason: str
    primary: tuple[Result, ...]
    requires: tuple[Result, ...]


def judge(study: Study, found: Sequence[Outcome]) -> Verdict:
    """Returns the verdict of a study on its finished runs.

    Args:
      found: at most one outcome per condition and seed.
    Raises:
      ConfigError: a function of the card fails.
    """
    measured = _Measured(study, found)
    requires = [_tested(x, measured) for x in study.requires]
    primary = _corrected([_tested(x, measured) for x in study.primary])
    name, reason = _rule(requires, primary, _missing_runs(study, found))
    return Verdict(name, reason, tuple(primary), tuple(requires))


def _rule(
    requires: Sequence[Result], primary: Sequence[Result], missing: str
) -> tuple[Name, str]:
    """Returns the verdict and the sentence that gives its reason."""
    if missing:
        return "inconclusive", f"Runs are missing: {missing}."
    if failed := [x for x in requires if x.state != "holds"]:
        names = _listed(failed)
        return "inconclusive", f"Without these the claim cannot be tested: {names}."
    if against := [x for x in primary if x.state == "against"]:
        return "contradicted", f"Significantly against the claim: {_listed(against)}."
    if open_ones := [x for x in primary if x.state != "holds"]:
        return "inconclusive", f"Not decided: {_listed(open_ones)}."
    count = len(primary)
    which = "The primary comparison holds"
    if count > 1:
        which = f"All {count} primary comparisons hold"
    also = " and so do the requirements" if requires else ""
    return "reproduced", f"{which}{also}."


def _listed(results: Sequence[Result]) -> str:
    return "; ".join(_with_reason(result) for result in results)


def _with_reason(result: Result) -> str:
    name = result.comparison.name
    return f"{name} ({result.reason})" if result.reason else name


def _missing_runs(study: Study, found: Sequence[Outcome]) -> str:
    """Returns which conditions have fewer runs than the card says; "" if none has."""
    counts = dict.fromkeys(study.conditions, 0)
    for outcome in found:
        counts[outcome.condition] += 1
    few = {name: count for name, count in counts.items() if count < study.seeds}
    texts = [
        f"{name} has {count} of {study.seeds} seeds" for name, count in few.items()
    ]
    return "; ".join(texts)


# ------------------------------------------------------------------ one comparison


class _Measured:
    """The values of a study's outcomes, each computed once."""

    def __init__(self, study: Study, found: Sequence[Outcome]):
        self._study = study
        self._outcomes: dict[str, list[Outcome]] = {}
        for outcome in found:
            self._outcomes.setdefault(outcome.condition, []).append(outcome)

    def values(self, name: str, condition: str) -> BySeed:
        """Returns {seeds: value}.

        Raises:
          DataError: a run lacks what the value needs, or the value is not finite.
        """
        outcomes_here = self._outcomes.get(condition, [])
        found: dict[str, float] = {}
        for outcome in outcomes_here:
            others = [other for other in outcomes_here if other is not outcome]
            number = self._value(name, outcome, others)
            if math.isnan(number):
                raise DataError(f"{outcome.name}: {name} is not finite")
            found[outcome.seed] = number
        return found

    def _value(self, name: str, outcome: Outcome, others: Sequence[Outcome]) -> float:
        value = self._study.values[name]
        return guarded(name, lambda: outcomes.value_of(value, outcome, others))


def guarded(name: str, call: Callable[[], float]) -> float:
    """Returns the call's result; an error of a card's function becomes one line.

    Raises:
      DataError: as the call. ConfigError: any other error of it.
    """
    try:
        return call()
    except DataError:
        raise
    except Exception as error:
        text = first_line(error, kind=True)
        raise ConfigError(f"study: value {name!r}: {text}") from error


def _tested(comparison: Comparison, measured: _Measured) -> Result:
    """Returns the result of a comparison that is tested alone."""
    try:
        ours = measured.values(comparison.value, comparison.condition)
        estimate, differences = _estimate(comparison, ours, measured)
    except DataError as error:
        return Result(comparison, "missing", reason=str(error))
    decision = statistics.decide(estimate, comparison.expected, comparison.margin)
    level = statistics.interval_level(comparison.expected, ALPHA)
    tested = Result(
        comparison,
        state="undecided",
        estimate=estimate,
        p=decision.p,
        adjusted=decision.p,
        level=level,
        differences=differences,
    )
    return _decided(tested)


def _estimate(
    comparison: Comparison, ours: BySeed, measured: _Measured
) -> tuple[Estimate, BySeed]:
    """Returns the difference, and that of each seed where seeds are paired.

    Raises:
      DataError: too few values.
    """
    baseline = comparison.baseline
    _validate_enough(comparison.condition, ours)
    if not isinstance(baseline, str):
        differences = {seed: value - baseline for seed, value in ours.items()}
        return statistics.against_number([*ours.values()], baseline), differences
    theirs = measured.values(comparison.value, baseline)
    _validate_enough(baseline, theirs)
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return statistics.welch([*ours.values()], [*theirs.values()]), {}
    _validate_enough(f"{comparison.condition} and {baseline}", shared)
    differences = {seed: ours[seed] - theirs[seed] for seed in shared}
    pairs = [(ours[seed], theirs[seed]) for seed in shared]
    return statistics.paired(*zip(*pairs, strict=True)), differences


def _validate_enough(condition: str, values: Sequence | Mapping) -> None:
    if len(values) < 2:
        count = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
        raise DataError(f"{condition}: {count}, at least 2 are needed")


def _corrected(results: Sequence[Result]) -> list[Result]:
    """Returns the results with p-values and levels by Holm's method."""
    p = [result.p for result in results]
    adjusted, alphas = statistics.holm(p), statistics.holm_alphas(p)
    found = []
    for result, own, alpha in zip(results, adjusted, alphas, strict=True):
        if result.state != "missing":
            level = statistics.interval_level(result.comparison.expected, alpha)
            result = dataclasses.replace(result, adjusted=own, level=level)
            result = _decided(result)
        found.append(result)
    return found


def _decided(result: Result) -> Result:
    """Returns the result with the state that its adjusted p-value gives."""
    comparison, estimate = result.comparison, result.estimate
    assert estimate is not None
    if estimate.error == 0:
        reason = f"the seeds do not vary it: every difference is {estimate.mean:.4g}"
        return dataclasses.replace(result, state="undecided", reason=reason)
    if result.adjusted > ALPHA:
        return dataclasses.replace(result, state="undecided", reason=_open(result))
    decision = statistics.decide(estimate, comparison.expected, comparison.margin)
    state = "holds" if decision.holds else "against"
    return dataclasses.replace(result, state=state, reason="")


def _open(result: Result) -> str:
    """Returns why a comparison is not decided."""
    assert result.interval is not None
    low, high = result.interval
    comparison = result.comparison
    ends = f"the interval {low:.3g} to {high:.3g}"
    if comparison.expected == "equal":
        return f"{ends} is neither within nor beyond ±{comparison.margin:g}"
    if low <= 0 <= high:
        return f"{ends} contains 0"
    return f"{ends} is not beyond the margin of {comparison.margin:g}"
