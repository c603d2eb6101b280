"""Draws a study's figure: the mean, its 95 % band and every seed; beside it the paper's shape."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullFormatter

from rlhfjax.errors import DataError
from rlhfjax.lab import outcomes, statistics
from rlhfjax.lab.card import Figure, Shape, Study
from rlhfjax.lab.outcomes import Outcome
from rlhfjax.lab.verdict import guarded
from rlhfjax.redact import printable
from rlhfjax.report.downloads import Drawing, drawing
from rlhfjax.report.figures import mark
from rlhfjax.report.svg import (
    LIGHT,
    MUTED,
    PAGE,
    STYLE,
    Palette,
    axes_of,
    render,
    style,
    to_png,
)

SIZE = (5.8, 3.4)  # inches
MOST_TICKS = 6  # of a logarithmic axis that has a tick at every point
LONGEST = 40  # characters of a label
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))


class Line(NamedTuple):
    """One line of a figure, with its seeds."""

    label: str
    x: np.ndarray  # [p]
    seeds: Mapping[str, tuple[np.ndarray, np.ndarray]]  # {seeds: (x, y)}
    mean: np.ndarray  # [p]
    half: np.ndarray  # [p], of Student's 95 % interval of the mean; 0 for a single seed


def figure(study: Study, found: Sequence[Outcome]) -> Drawing | None:
    """Returns the study's figure; None without a drawing, or before there is anything to draw."""
    card, lines = study.drawing, _lines(study, found)
    if card is None or not lines:
        return None
    names = list(_by_condition(found, card.conditions))
    with matplotlib.rc_context(STYLE):
        image = render(_plot(card, lines, names, PAGE))
    return drawing(card.title, image, _columns(lines))


def picture(study: Study, found: Sequence[Outcome]) -> bytes | None:
    """Returns the study's figure as PNG; None where `figure` is None."""
    card, lines = study.drawing, _lines(study, found)
    if card is None or not lines:
        return None
    names = list(_by_condition(found, card.conditions))
    with matplotlib.rc_context(style(LIGHT)):
        return to_png(_plot(card, lines, names, LIGHT))


def _lines(study: Study, found: Sequence[Outcome]) -> list[Line]:
    card = study.drawing
    if card is None:
        return []
    return list(_curves(card, found) if card.x else _values(study, card, found))


def paper(study: Study) -> Drawing | None:
    """Returns the paper's shape, in gray and on separate axes; None without points."""
    shape = study.drawing.paper if study.drawing else ""
    if not isinstance(shape, Shape):
        return None
    columns: dict[str, list[Any]] = {"line": [], "x": [], "y": []}
    with matplotlib.rc_context(STYLE):
        svg, axes = axes_of(*SIZE)
        for i, (label, points) in enumerate(shape.lines.items()):
            x, y = np.array(points, np.float64).T
            _draw_paper(axes, label, i, x, y)
            columns["line"] += [label] * len(x)
            columns["x"] += x.tolist()
            columns["y"] += y.tolist()
        _scale(axes, shape.x_scale, columns["x"])
        axes.set(xlabel=_label(shape.x))
        axes.set(ylabel=_label(shape.y))
        axes.legend(fontsize=7)
        image = render(svg)
    return drawing("paper", image, columns)


def _draw_paper(axes: Axes, label: str, i: int, x: np.ndarray, y: np.ndarray) -> None:
    _, _, marker, _ = mark(2 * i)
    axes.plot(
        x,
        y,
        label=_label(label),
        color=MUTED,
        marker=marker,
        markersize=3,
        markeredgewidth=0,
        linewidth=1.3,
        linestyle=DASHES[i % len(DASHES)],
    )


# ------------------------------------------------------------------ what is drawn


def _curves(card: Figure, found: Sequence[Outcome]) -> Iterable[Line]:
    """Yields a line per condition, then those beside them: means over the seeds at equal steps."""
    by_condition = _by_condition(found, card.conditions)
    drawn = [(name, card.x, card.y, here) for name, here in by_condition.items()]
    drawn += [(name, x, y, found) for name, (x, y) in card.beside.items()]
    for label, x_name, y_name, here in drawn:
        runs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for outcome in here:
            points = _points(outcome, x_name, y_name)
            if len(points[0]):
                runs.setdefault(outcome.seed, []).append(points)
        if not runs:
            continue
        # A line beside the conditions has a run of each of them per seed, and the unit is a seed.
        stacks = {seed: _stacked(points) for seed, points in runs.items()}
        seeds = {
            seed: (x.mean(axis=0), y.mean(axis=0)) for seed, (x, y) in stacks.items()
        }
        x, y = _stacked(list(seeds.values()))
        mean, half = _band(y)
        yield Line(label, x.mean(axis=0), seeds, mean, half)


def _stacked(
    runs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y [runs, points] at the points that all runs have: one may have stopped."""
    shared = min(len(x) for x, _ in runs)
    x = np.array([x[:shared] for x, _ in runs])
    y = np.array([y[:shared] for _, y in runs])
    return x, y


def _points(
    outcome: Outcome, x_name: str, y_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points of a run at the steps that both of its curves have."""
    if y_name not in outcome.curves:
        return np.zeros(0), np.zeros(0)
    y = _by_step(outcome.curves[y_name])
    x = {step: step for step in y}
    if x_name != "step":
        x = _by_step(outcome.curves.get(x_name, ([], [])))
    shared = [step for step in y if step in x]
    return (
        np.array([x[step] for step in shared]),
        np.array([y[step] for step in shared]),
    )


def _by_step(series: outcomes.Series) -> dict[float, float]:
    """Returns {step: value}, without values that are not finite."""
    pairs = zip(*series, strict=True)
    return {step: value for step, value in pairs if math.isfinite(value)}


def _values(study: Study, card: Figure, found: Sequence[Outcome]) -> Iterable[Line]:
    """Yields a line per label of the card, over the conditions; without labels a single one."""
    by_condition = _by_condition(found, card.conditions)
    lines = card.lines or {"": {name: i for i, name in enumerate(by_condition)}}
    for label, places in lines.items():
        rows: dict[float, dict[str, float]] = {}
        for name in sorted(places, key=places.__getitem__):
            row = measured(study, card.y, by_condition.get(name, []))
            if row:
                rows[float(places[name])] = row
        if rows:
            yield _line(label, rows)


def _line(label: str, rows: Mapping[float, Mapping[str, float]]) -> Line:
    """Returns the line of {x: {seeds: y}}."""
    means, halves = [], []
    points: dict[str, list[tuple[float, float]]] = {}
    for place, row in rows.items():
        values = list(row.values())
        mean, half = _band(np.array(values)[:, None])
        means.append(mean[0])
        halves.append(half[0])
        for seed, y in row.items():
            own = points.setdefault(seed, [])
            own.append((place, y))
    seeds = {}
    for seed, own in points.items():
        x, y = np.array(own).T
        seeds[seed] = (x, y)
    return Line(
        label,
        x=np.array(list(rows), np.float64),
        seeds=seeds,
        mean=np.array(means),
        half=np.array(halves),
    )


def measured(study: Study, name: str, here: Sequence[Outcome]) -> dict[str, float]:
    """Returns {seeds: value} of the runs that have the value."""
    value, found = study.values[name], {}
    for outcome in here:
        others = [other for other in here if other is not outcome]
        try:
            number = _one(name, value, outcome, others)
        except DataError:
            continue
        if math.isfinite(number):
            found[outcome.seed] = number
    return found


def _one(
    name: str, value: outcomes.Value, outcome: Outcome, others: Sequence[Outcome]
) -> float:
    return guarded(name, lambda: outcomes.value_of(value, outcome, others))


def _by_condition(
    found: Sequence[Outcome], chosen: Sequence[str]
) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {name: [] for name in chosen}
    for outcome in found:
        if not chosen or outcome.condition in chosen:
            groups.setdefault(outcome.condition, []).append(outcome)
    return {name: group for name, group in groups.items() if group}


def _band(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and half width of Student's 95 % interval per column of y [seeds, points]."""
    n = len(y)
    if n < 2:
        return y.mean(axis=0), np.zeros(y.shape[1])
    return y.mean(axis=0), statistics.detectable(n, 1.0) * y.std(axis=0, ddof=1)


# ------------------------------------------------------------------ how it is drawn


def _plot(
    card: Figure, lines: Sequence[Line], names: Sequence[str], palette: Palette
) -> Any:
    """Returns the figure; `names` are the conditions, in the order in which they stand."""
    plot, axes = axes_of(*SIZE)
    for i, line in enumerate(lines):
        color = (palette.first, palette.second)[i % 2]
        _draw(axes, line, i, color, joined=bool(card.x or card.lines))
    xs = np.concatenate([line.x for line in lines])
    _scale(axes, card.x_scale, xs.tolist())
    x_label = _label(card.x_label or card.x)
    y_label = _label(card.y_label or card.y)
    axes.set(xlabel=x_label, ylabel=y_label)
    if not card.x and not card.lines:
        _name_places(axes, names)
    if any(line.label for line in lines):
        plot.legend(fontsize=7, loc="outside right center")
    return plot


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), [_label(name) for name in names])
    axes.set_xlim(-0.5, len(names) - 0.5)


def _draw(axes: Axes, line: Line, i: int, color: str, joined: bool) -> None:
    """Draws the seeds thin, the band pale and the mean thick."""
    _, _, marker, _ = mark(i)
    dashes = ""
    if joined:
        dashes = DASHES[i // 2 % len(DASHES)]
    thin: Any = {"color": color, "alpha": 0.35, "lw": 0.6}
    if not joined:
        thin |= {"ls": "", "marker": "o", "ms": 3.5, "mew": 0}
    for x, y in line.seeds.values():
        axes.plot(x, y, **thin)
    if joined:
        low, high = line.mean - line.half, line.mean + line.half
        axes.fill_between(line.x, low, high, color=color, alpha=0.15, lw=0)
    else:
        bars: Any = {"ecolor": color, "elinewidth": 1.2, "capsize": 3}
        axes.errorbar(line.x, line.mean, yerr=line.half, ls="", **bars)
    style: Any = {"color": color, "marker": marker, "ms": 3.5, "mew": 0}
    style |= {"lw": 1.6, "ls": dashes, "label": _label(line.label)}
    axes.plot(line.x, line.mean, **style)


def _scale(axes: Axes, scale: str, xs: Sequence[float]) -> None:
    """Sets the scale of x; a logarithm or root of what has none stays linear."""
    if scale == "log" and min(xs) > 0:
        axes.set_xscale("log")
        # By itself the axis writes powers as formulas, which are not parsed here.
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if len(places := sorted(set(xs))) <= MOST_TICKS:
            axes.set_xticks(places)
    elif scale == "sqrt" and min(xs) >= 0:
        functions = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)
        axes.set_xscale("function", functions=functions)
        axes.set_xlim(left=0)


def _label(text: str) -> str:
    text = printable(text)
    # matplotlib leaves labels that begin with an underscore out of a legend.
    text = f" {text}" if text.startswith("_") else text
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _columns(lines: Sequence[Line]) -> dict[str, list[Any]]:
    """Returns the numbers of the figure in long form, a row per point of a seed or of a mean."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("line", "seeds", "x", "y", "half")
    }
    for line in lines:
        for seed, (x, y) in line.seeds.items():
            _append(columns, line.label, seed, x, y, np.full(len(x), math.nan))
        _append(columns, line.label, "mean", line.x, line.mean, line.half)
    return columns


def _append(
    columns: dict[str, list[Any]], label: str, seed: str, *numbers: np.ndarray
) -> None:
    count = len(numbers[0])
    columns["line"] += [label] * count
    columns["seeds"] += [seed] * count
    for name, values in zip(("x", "y", "half"), numbers, strict=True):
        columns[name] += values.tolist()
