"""Draws the figures of reports and sweeps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rlhfjax.evals.stats import best_of_n_kl
from rlhfjax.redact import printable
from rlhfjax.report.svg import (
    CARD,
    FIRST,
    INK,
    MUTED,
    SECOND,
    STYLE,
    axes_of,
    finite,
    render,
)
from rlhfjax.report.workdir import Curve
from rlhfjax.workdirs import Calibration

# How a line with few points, a diagonal and a small curve are drawn.
_SOLID = {"lw": 1.3, "mew": 0}
_DASHED = {
    "color": MUTED,
    "lw": 1,
    "ls": (0, (4, 2)),
    "marker": "s",
    "ms": 2.6,
    "mew": 0,
}
MARKERS = {"o": "●", "^": "▲", "D": "◆", "v": "▼"}  # matplotlib's name: the character
MAX_POINTS = 400  # points drawn of a curve
LABEL_LENGTH = 30  # maximum characters of a line of a label beside a figure
MAX_LINES = 20  # of a label


def curves(train: Curve | None, val: Curve | None) -> str:
    """Returns a figure of one metric over steps: training as a line, held-out values as points.

    A long, noisy training curve is smoothed, with the raw values behind it.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = axes_of(2.9, 1.6)
        if train is not None:
            _line(axes, train)
        if val is not None:
            x, y = finite(val)
            style = {"color": SECOND, "marker": "o", "ms": 2.6}
            style |= _SOLID
            axes.plot(x, y, **style)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return render(figure)


def _line(axes: Axes, curve: Curve) -> None:
    x, y = finite(curve)
    smoothed = smooth(y)
    # A curve without noise, such as a schedule, needs no smoothing.
    is_noisy = len(x) > 40 and np.std(y - smoothed) > 0.02 * np.ptp(y)
    drawn = np.arange(len(x))
    if len(x) > MAX_POINTS:
        places = np.linspace(0, len(x) - 1, MAX_POINTS)
        drawn = np.unique(places.astype(int))
    style: dict[str, Any] = {"color": FIRST, "lw": 1.3}
    if is_noisy:
        axes.plot(x[drawn], y[drawn], color=FIRST, lw=0.8, alpha=0.35)
        axes.plot(x[drawn], smoothed[drawn], **style)
        return
    if len(x) < 8:
        style |= {"marker": "o", "ms": 2.6, "mew": 0}
    axes.plot(x[drawn], y[drawn], **style)


def smooth(y: np.ndarray) -> np.ndarray:
    """Returns a centered moving average over about a twentieth of the curve.

    The window shrinks towards both ends. Unlike an exponential average it does not lag behind, so
    that the curve can be compared with held-out points.
    """
    n = len(y)
    sums = np.cumsum(y, dtype=np.float64)
    total = np.concatenate([[0.0], sums])
    i = np.arange(n)
    half = np.minimum(n // 40, np.minimum(i, n - 1 - i))
    return (total[i + half + 1] - total[i - half]) / (2 * half + 1)


def frontier(
    key: str,
    paths: Sequence[dict[str, list[float]]],
    end: Curve | None,
    pools: Sequence[dict[str, list[float]]] = (),
) -> str:
    """Returns a figure of reward against KL.

    Args:
      key: the reward, "proxy" or "gold".
      paths: for each policy stage the columns `kl` and `key`, one row per validation; {} for a
        stage without validations, so that a stage has the same mark in every figure.
      end: the last comparison, ([0, KL], [reward of the baseline, reward of the policy]).
      pools: for each best-of-n stage the columns `kl` and `key`, one row per n; may be {}.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = axes_of(3.9, 2.6)
        for i, path in enumerate(paths):
            color, _, marker, _ = mark(i)
            if path:
                style = {"color": color, "marker": marker, "ms": 3}
                axes.plot(path["kl"], path[key], **style, **_SOLID)
        for path in filter(None, pools):
            axes.plot(path["kl"], path[key], **_DASHED)
        if end is not None:
            kl, reward = end
            ring = {"ms": 6, "mfc": CARD, "mec": INK, "mew": 1.2, "zorder": 3}
            star = {"ms": 10, "color": INK, "mew": 0, "zorder": 3}
            axes.plot(kl[:1], reward[:1], "o", **ring)
            axes.plot(kl[1:], reward[1:], "*", **star)
        # Near the start, reward is about linear in the square root of KL (Gao et al. 2022, sec. 3).
        axes.set_xscale("function", functions=(_signed_sqrt, _signed_square))
        _kl_axis(axes)
        axes.set(xlabel="KL to the reference, nats per response")
        axes.set(ylabel=f"{key} reward")
        return render(figure)


def mark(i: int) -> tuple[str, str, str, str]:
    """Returns the i-th curve's color, the CSS class of that color, its marker and the character.

    The marks repeat after eight curves.
    """
    color, css_class = ((FIRST, "first"), (SECOND, "second"))[i % 2]
    marker, character = list(MARKERS.items())[i // 2 % len(MARKERS)]
    return color, css_class, marker, character


def _signed_sqrt(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _kl_axis(axes: Axes) -> None:
    """Sets ticks at round KLs, and marks along the top the KL of best-of-n sampling."""
    kls = [float(x) for line in axes.lines for x in np.asarray(line.get_xdata())]
    right = max(1.15 * max(kls, default=0.0), 0.1)
    # An estimate from few responses may be below 0.
    left = min(1.15 * min(kls, default=0.0), 0.0)
    width = 1 + math.sqrt(-left / right)  # of the axis; its part above 0 has width 1
    axes.set_xlim(min(left, -0.002 * right), right)
    round_kls = [t * 10**e for e in range(-2, 4) for t in (1, 2, 5)]
    ticks = [0, *_apart(round_kls, right, 0.1 * width)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ns = {best_of_n_kl(n): n for n in (4, 16, 64, 256, 1024)}
    text: Any = {"fontsize": 6.5, "color": MUTED, "ha": "center"}
    for kl in _apart(list(ns), right, 0.13 * width):
        axes.axvline(kl, color=MUTED, lw=0.6, ls=(0, (2, 3)), zorder=0)
        place: Any = (kl, 1.01)
        axes.annotate(f"n={ns[kl]}", place, xycoords=axes.get_xaxis_transform(), **text)


def _apart(
    ticks: Sequence[float | int], right: float, least: float
) -> list[float | int]:
    """Selects ticks, in rising order, that are far enough apart on the square-root axis.

    A tick is kept if it is at most `right` and at least `least` of the axis from the previous one.
    """
    kept: list[float | int] = []
    previous = 0.0
    for tick in ticks:
        if tick <= right and math.sqrt(tick / right) - previous >= least:
            kept.append(tick)
            previous = math.sqrt(tick / right)
    return kept


def reliability(calibration: Calibration) -> str:
    """Returns a figure of accuracy against stated confidence, with the diagonal for reference.

    The bars are each bin's share of the pairs.
    """
    confidence = np.asarray(calibration["confidence"])
    accuracy = np.asarray(calibration["accuracy"])
    count = np.asarray(calibration["count"])
    share = count / max(count.sum(), 1)
    diagonal = {"color": MUTED, "lw": 0.8, "ls": (0, (3, 3))}
    points = {"color": FIRST, "marker": "o", "ms": 3.5}
    with matplotlib.rc_context(STYLE):
        figure, axes = axes_of(2.9, 2.3)
        axes.bar(confidence, share, width=0.03, color=FIRST, alpha=0.25)
        axes.plot([0.5, 1], [0.5, 1], **diagonal)
        axes.plot(confidence, accuracy, **points, **_SOLID)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("stated confidence")
        axes.set_ylabel("accuracy")
        return render(figure)


def distributions(
    baseline: Sequence[float], policy: Sequence[float], label: str
) -> str:
    """Returns two histograms on one axis: the policy filled, the baseline outlined."""
    low, high = min(*baseline, *policy), max(*baseline, *policy)
    bins: Any = np.linspace(low, high if high > low else low + 1, 31)
    with matplotlib.rc_context(STYLE):
        figure, axes = axes_of(2.9, 2.3)
        axes.hist(policy, bins, color=FIRST, alpha=0.45, lw=0)
        axes.hist(baseline, bins, histtype="step", color=INK, lw=1)
        axes.set(xlabel=label, ylabel="responses")
        return render(figure)


def lengths(edges: Sequence[int], before: Sequence[int], after: Sequence[int]) -> str:
    """Returns a histogram of lengths: what is left is filled, what was read is outlined.

    Args:
      edges: the smallest length of each bin.
      before, after: how many rows are in each bin.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = axes_of(3.9, 2.3)
        places = np.arange(len(edges))
        axes.bar(places, after, width=1, color=FIRST, alpha=0.45, lw=0)
        axes.bar(places, before, width=1, color="none", ec=INK, lw=0.8)
        names = [f"{edge:,}" for edge in edges[::2]]
        axes.set_xticks(places[::2], names, rotation=45)
        axes.set(xlabel="words, from", ylabel="rows")
        return render(figure)


def proxy_and_gold(proxy: Curve | None, gold: Curve | None) -> str:
    """Returns a figure of held-out proxy and gold reward over steps, each with its own axis.

    The proxy is at the left and the gold reward at the right: their units differ.
    """
    with matplotlib.rc_context(STYLE):
        figure, left = axes_of(3.9, 2.3)
        left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        left.set_xlabel("step")
        right = left.twinx() if proxy is not None and gold is not None else left
        right.grid(right is left)
        sides = (
            (left, proxy, "proxy reward", FIRST, "o"),
            (right, gold, "gold reward", SECOND, "D"),
        )
        for axes, curve, label, color, marker in sides:
            if curve is not None:
                style = {"color": color, "marker": marker, "ms": 3}
                axes.plot(*finite(curve), **style, **_SOLID)
                axes.set_ylabel(label, color=color)
                axes.tick_params(axis="y", labelcolor=color)
                axes.yaxis.set_major_locator(MaxNLocator(5))
        return render(figure)


def scatter(
    baseline: tuple[Sequence[float], Sequence[float]],
    policy: tuple[Sequence[float], Sequence[float]],
    label: str,
) -> str:
    """Returns a figure of reward against length: the policy filled, the baseline as rings.

    Args:
      baseline, policy: lengths and rewards.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = axes_of(3.9, 2.6)
        rings = {"mfc": "none", "mec": MUTED, "mew": 0.7}
        axes.plot(*baseline, "o", ms=3.4, ls="", **rings)
        filled = {"color": FIRST, "mew": 0, "alpha": 0.7}
        axes.plot(*policy, "o", ms=3.2, ls="", **filled)
        axes.set(xlabel="tokens per response", ylabel=label)
        return render(figure)


def spread(
    groups: Mapping[str, Sequence[float]], places: Sequence[float] | None = None
) -> str:
    """Returns a figure of a metric over the seeds of each group.

    A dot is a run, the ring is the mean, and the bar reaches one sample std to each side.

    Args:
      places: where the groups are on the horizontal axis; None lists their names downwards.
    """
    with matplotlib.rc_context(STYLE):
        labels = [_label(name) for name in groups]
        lines = max((label.count("\n") + 1 for label in labels), default=1)
        height = 0.7 + max(0.4, 0.14 * lines) * len(groups)
        height = 2.6 if places else height
        figure, axes = axes_of(3.9, height)
        positions = list(places) if places else [float(i) for i in range(len(groups))]
        for place, values in zip(positions, groups.values(), strict=True):
            finite = np.asarray([x for x in values if math.isfinite(x)])
            _group(axes, place, finite, across=places is None)
        if places is None:
            axes.set_yticks(positions, labels)
            axes.set_ylim(len(groups) - 0.5, -0.5)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        else:
            if min(positions) > 0 and max(positions) >= 8 * min(positions):
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_xticks(positions, [f"{x:g}" for x in positions])
            axes.set_xlabel(_shortened(next(iter(groups)).partition(" = ")[0]))
        return render(figure)


def _label(group: str) -> str:
    """Returns a group's name, one option per line; a long option keeps its end, which differs."""
    options = group.split(", ")[:MAX_LINES]
    return "\n".join(map(_shortened, options))


def _shortened(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LABEL_LENGTH else f"…{text[1 - LABEL_LENGTH :]}"


def _group(axes: Axes, place: float, values: np.ndarray, across: bool) -> None:
    if not len(values):
        return
    mean = np.mean(values)
    std = np.std(values, ddof=1) if len(values) > 1 else 0.0
    dots = {"marker": "o", "ms": 4.5, "mew": 0, "ls": "", "color": FIRST, "zorder": 3}
    bar = {"color": INK, "lw": 1.2}
    ring = {"marker": "o", "ms": 7, "mfc": "none", "mec": INK, "mew": 1.2}
    for measured, style in (
        (list(values), dots),
        ([mean - std, mean + std], bar),
        ([mean], ring),
    ):
        places = [place] * len(measured)
        x, y = (measured, places) if across else (places, measured)
        axes.plot(x, y, **style)
