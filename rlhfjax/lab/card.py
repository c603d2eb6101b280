"""The card of a study: what is claimed, what is measured, and the rule by which it passes.

A card is written and committed before the runs. A rule must be able to fail: a card without a
primary comparison, or with a comparison that no data could decide, is an error.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rlhfjax.errors import ConfigError
from rlhfjax.experiment import Experiment
from rlhfjax.json_text import shown
from rlhfjax.lab.outcomes import Across, Value, source

NAME = "STUDY"  # of an experiment file
MOST_PRIMARY = 3
FEWEST_SEEDS = 2  # a standard deviation needs two

Expected = Literal["greater", "less", "equal"]
Scale = Literal["linear", "log", "sqrt"]
Number = float | int
Points = tuple[tuple[Number, Number], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A difference that is expected, and how large it has to be.

    The difference is `value` of `condition` minus `value` of `baseline`, seed by seed.
    """

    name: str
    value: str
    """Name of one of the study's values."""
    condition: str
    """Name of one of the study's conditions."""
    baseline: str | Number
    """Name of another condition, or a number."""
    expected: Expected
    """greater: above `margin`. less: below -`margin`. equal: within ± `margin`."""
    margin: Number = 0.0
    """The smallest difference that counts. equal: the largest that does not, above 0."""

    def __post_init__(self) -> None:
        where = f"study: comparison {shown(self.name)}"
        _validate_text(self.name, "study: comparison's name")
        if self.expected not in ("greater", "less", "equal"):
            raise ConfigError(
                f"{where}: expected={shown(self.expected)}: must be greater, less or equal"
            )
        if not _is_number(self.margin) or self.margin < 0:
            raise ConfigError(f"{where}: margin={shown(self.margin)}: must be >= 0")
        if self.expected == "equal" and self.margin == 0:
            raise ConfigError(
                f"{where}: margin=0: must be > 0, no data can show that two means are equal"
            )
        if self.condition == self.baseline:
            raise ConfigError(f"{where}: the baseline is the condition itself")

    @property
    def statement(self) -> str:
        """What is expected, as a sentence: `gold of ppo > gold of sft, by more than 0.1`."""
        if isinstance(self.baseline, str):
            against = f"{self.value} of {self.baseline}"
        else:
            against = f"{self.baseline:g}"
        sign = {"greater": ">", "less": "<", "equal": "="}[self.expected]
        text = f"{self.value} of {self.condition} {sign} {against}"
        if not self.margin:
            return text
        limit = "within ±" if self.expected == "equal" else "by more than "
        return f"{text}, {limit}{self.margin:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The paper's figure, as a few points read off it. It has its own axes: units differ."""

    lines: Mapping[str, Points]
    """Points (x, y) per label."""
    x: str = ""
    y: str = ""
    """Labels of the axes."""
    x_scale: Scale = "linear"
    source: str = ""
    """Where the points are from."""

    def __post_init__(self) -> None:
        _validate_scale(self.x_scale)
        if not self.lines:
            raise ConfigError("study: the paper's shape: expected lines of points")
        for label, points in self.lines.items():
            _validate_points(points, f"study: the paper's line {shown(label)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """The study's figure: a line per condition over kept curves, or points of a value."""

    x: str = ""
    """Name of a kept curve, or "step"; empty: `y` is a value, drawn per condition."""
    y: str
    """Name of a kept curve; without `x` the name of a value."""
    title: str
    x_label: str = ""
    y_label: str = ""
    x_scale: Scale = "linear"
    conditions: tuple[str, ...] = ()
    """The conditions to draw; empty: all."""
    lines: Mapping[str, Mapping[str, Number]] = dataclasses.field(default_factory=dict)
    """For a value: {label of a line: {condition: its x}}; empty: conditions stand side by side."""
    beside: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """{label: (x, y)} of further kept curves, per seed the mean over conditions; goes with `x`."""
    paper: Shape | str = ""
    """The paper's figure: its shape, or in words."""

    def __post_init__(self) -> None:
        _validate_scale(self.x_scale)
        if self.beside and not self.x:
            raise ConfigError(
                "study: drawing: beside goes with x; a value has no kept curve"
            )
        if self.x and self.lines:
            raise ConfigError(
                "study: drawing: lines go with a value, not with x; conditions are the lines"
            )
        for label, places in self.lines.items():
            points = tuple((x, 0.0) for x in places.values())
            _validate_points(points, f"study: drawing: line {shown(label)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A claim with its conditions and its rule; see docs/studies.md.

    Reproduced: all requirements and all primary comparisons hold. Contradicted: the requirements
    hold, and a primary comparison is significantly against the claim. Else inconclusive.
    """

    claim: str
    paper: str
    figure: str
    """The paper's figure or table that has the claim."""
    conditions: Mapping[str, Mapping[str, Any]]
    """{name: the overrides of its runs, seeds left out}."""
    seeds: int
    """Runs per condition. More of them later are another study."""
    values: Mapping[str, Value]
    """{name: a metric's name, or a function of an `Outcome`}."""
    primary: tuple[Comparison, ...]
    """At most 3; p-values and intervals are corrected for their number by Holm's method."""
    requires: tuple[Comparison, ...] = ()
    """Without any of these the runs cannot test the claim. Each is tested at 5 %."""
    curves: tuple[str, ...] = ()
    """Metrics that are kept at every step, for values and the figure."""
    drawing: Figure | None = None
    cost: str = ""
    """What it costs, in words."""

    def __post_init__(self) -> None:
        for name in ("claim", "paper", "figure"):
            _validate_text(getattr(self, name), f"study: {name}")
        _validate_count(self)
        _validate_conditions(self.conditions)
        names = [comparison.name for comparison in self.comparisons]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"study: two comparisons are called {shown(twice[0])}")
        for comparison in self.comparisons:
            _validate_names(self, comparison)
        for name, value in self.values.items():
            if not (isinstance(value, str | Across) or callable(value)):
                raise ConfigError(
                    f"study: values: {name}={shown(value)}: expected a metric's name or a"
                    " function"
                )
        if self.drawing is not None:
            _validate_drawing(self, self.drawing)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return (*self.requires, *self.primary)


def of(experiment: Experiment) -> Study | None:
    """Returns the study that an experiment file declares; None if it declares none.

    Raises:
      ConfigError: STUDY is something else.
    """
    study = experiment.names.get(NAME)
    if study is None or isinstance(study, Study):
        return study
    raise ConfigError(
        f"{experiment.file}: {NAME}={shown(study)}: expected rlhfjax.lab.Study(…)"
    )


def rule(study: Study) -> dict[str, Any]:
    """Returns the rule of a card as JSON types: all that decides the verdict.

    Functions stand in it with their source.
    """
    return {
        "seeds": study.seeds,
        "conditions": {name: dict(x) for name, x in study.conditions.items()},
        "values": {name: source(value) for name, value in study.values.items()},
        "primary": [dataclasses.asdict(x) for x in study.primary],
        "requires": [dataclasses.asdict(x) for x in study.requires],
    }


# ------------------------------------------------------------------ validation


def _validate_text(text: Any, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}={shown(text)}: expected a text")


def _validate_count(study: Study) -> None:
    if type(study.seeds) is not int or study.seeds < FEWEST_SEEDS:
        raise ConfigError(f"study: seeds={study.seeds}: must be >= {FEWEST_SEEDS}")
    if not study.primary:
        raise ConfigError("study: primary: expected a comparison, a rule must say what")
    if len(study.primary) > MOST_PRIMARY:
        raise ConfigError(
            f"study: primary: {len(study.primary)} comparisons, at most {MOST_PRIMARY}"
        )


def _validate_conditions(conditions: Mapping[str, Mapping[str, Any]]) -> None:
    if not conditions:
        raise ConfigError("study: conditions: expected {name: overrides}")
    for name, overrides in conditions.items():
        _validate_text(name, "study: condition's name")
        if not isinstance(overrides, Mapping):
            raise ConfigError(
                f"study: condition {shown(name)}: expected a dict {{option: value}}"
            )


def _validate_names(study: Study, comparison: Comparison) -> None:
    where = f"study: comparison {shown(comparison.name)}"
    baseline = comparison.baseline
    conditions = [comparison.condition]
    if isinstance(baseline, str):
        conditions.append(baseline)
    elif not _is_number(baseline):
        raise ConfigError(f"{where}: baseline={shown(baseline)}: expected a number")
    _validate_known(conditions, study.conditions, f"{where}: condition")
    _validate_known([comparison.value], study.values, f"{where}: value")


def _validate_drawing(study: Study, drawing: Figure) -> None:
    where = "study: drawing"
    drawn = [*drawing.conditions]
    drawn += [name for places in drawing.lines.values() for name in places]
    _validate_known(drawn, study.conditions, f"{where}: condition")
    if not drawing.x:
        _validate_known([drawing.y], study.values, f"{where}: y: value")
        return
    pairs = [(drawing.x, drawing.y), *drawing.beside.values()]
    series = [name for pair in pairs for name in pair if name != "step"]
    _validate_known(series, study.curves, f"{where}: curve")


def _validate_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{where} {shown(name)} is unknown; known: {', '.join(known) or 'none'}"
            )


def _validate_scale(scale: str) -> None:
    if scale not in ("linear", "log", "sqrt"):
        raise ConfigError(
            f"study: drawing: x_scale={shown(scale)}: must be linear, log or sqrt"
        )


def _validate_points(points: Points, where: str) -> None:
    numbers = [number for point in points for number in point]
    if not points or any(len(point) != 2 for point in points):
        raise ConfigError(f"{where}: expected points (x, y)")
    if not all(map(_is_number, numbers)):
        raise ConfigError(f"{where}: expected finite numbers")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
