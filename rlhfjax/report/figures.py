"""Figures as inline SVG whose colors are the page's CSS variables, so that one file is readable in light and dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhfjax.evals.stats import best_of_n_kl
from rlhfjax.report.workdir import Curve

# Matplotlib wants colors; these stand for CSS variables, and `_svg` puts the variables in their place.
INK, MUTED, LINE, CARD, FIRST, SECOND = (f"#0a0b0{i}" for i in range(6))
_CSS = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    CARD: "--card",
    FIRST: "--first",
    SECOND: "--second",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhfjax",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 2,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "axes.formatter.limits": (-3, 5),
}
MARKERS = {"o": "●", "^": "▲", "D": "◆", "v": "▼"}  # matplotlib's name: the character
MOST_POINTS = 400
LONGEST = 30  # characters of a label beside a figure


def curves(train: Curve | None, val: Curve | None) -> str:
    """One metric over steps: the training line, smoothed where it is long, and the held-out points."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.9, 1.6)
        if train is not None:
            _line(axes, train)
        if val is not None:
            x, y = _finite(val)
            axes.plot(x, y, color=SECOND, lw=1.3, marker="o", ms=2.6, mew=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure)


def _line(axes: Axes, curve: Curve) -> None:
    x, y = _finite(curve)
    smoothed = smooth(y)
    long = len(x) > 40 and np.std(y - smoothed) > 0.02 * np.ptp(
        y
    )  # a schedule needs no smoothing
    few = (
        np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).astype(int)) if len(x) else []
    )
    marker = {"marker": "o", "ms": 2.6, "mew": 0} if len(x) < 8 else {}
    axes.plot(
        x[few],
        y[few],
        color=FIRST,
        lw=0.8 if long else 1.3,
        alpha=0.35 if long else 1,
        **marker,
    )
    if long:
        axes.plot(x[few], smoothed[few], color=FIRST, lw=1.3)


def smooth(y: np.ndarray) -> np.ndarray:
    """Centerd moving average over about a twentieth of the curve; towards the ends the window shrinks on both sides.

    Unlike an exponential average it does not lag behind, so that it can be compared with held-out points.
    """
    n = len(y)
    total = np.concatenate([[0.0], np.cumsum(y, dtype=np.float64)])
    i = np.arange(n)
    half = np.minimum(n // 40, np.minimum(i, n - 1 - i))
    return (total[i + half + 1] - total[i - half]) / (2 * half + 1)


def frontier(
    key: str,
    paths: Sequence[dict[str, list[float]]],
    end: Curve | None,
    pools: Sequence[dict[str, list[float]]] = (),
) -> str:
    """Reward against KL: what each step away from the reference bought.

    Args:
      key: the reward, "proxy" or "gold".
      paths: for each policy stage the columns `kl` and `key`, one row per validation; nothing
        where a stage has none, so that its mark is the same in every figure.
      end: of the last comparison, ([0, KL], [the baseline's reward, the policy's]).
      pools: for each best-of-n stage the columns `kl` and `key`, one row per n, or nothing.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.9, 2.6)
        for i, path in enumerate(paths):
            color, _, marker, _ = mark(i)
            if path:
                axes.plot(
                    path["kl"],
                    path[key],
                    color=color,
                    lw=1.3,
                    marker=marker,
                    ms=3,
                    mew=0,
                )
        for path in filter(None, pools):
            axes.plot(
                path["kl"],
                path[key],
                color=MUTED,
                lw=1,
                ls=(0, (4, 2)),
                marker="s",
                ms=2.6,
                mew=0,
            )
        if end is not None:
            kl, reward = end
            axes.plot(
                kl[:1], reward[:1], "o", ms=6, mfc=CARD, mec=INK, mew=1.2, zorder=3
            )
            axes.plot(kl[1:], reward[1:], "*", ms=10, color=INK, mew=0, zorder=3)
        # Reward grows about linearly in the square root of KL near the start (Gao et al. 2022, section 3).
        axes.set_xscale("function", functions=(_signed_sqrt, _signed_square))
        _kl_axis(axes)
        axes.set(xlabel="KL to the reference, nats per answer", ylabel=f"{key} reward")
        return _svg(figure)


def mark(i: int) -> tuple[str, str, str, str]:
    """Returns how a frontier's i-th curve looks: color, its class in the page, marker, its character.

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
    """Ticks at round KLs, and along the top, as a ruler, the KL that best-of-n sampling would have."""
    kls = [x for line in axes.lines for x in line.get_xdata()]
    right = max(1.15 * max(kls, default=0.0), 0.1)
    left = min(
        1.15 * min(kls, default=0.0), 0.0
    )  # below 0 where few responses were sampled
    width = 1 + math.sqrt(-left / right)  # of the axis, where its part above 0 has 1
    axes.set_xlim(min(left, -0.002 * right), right)
    ticks = _apart(
        [t * 10**e for e in range(-2, 4) for t in (1, 2, 5)], right, 0.1 * width
    )
    axes.set_xticks([0, *ticks], [f"{t:g}" for t in (0, *ticks)])
    ns = {best_of_n_kl(n): n for n in (4, 16, 64, 256, 1024)}
    for kl in _apart(list(ns), right, 0.13 * width):
        axes.axvline(kl, color=MUTED, lw=0.6, ls=(0, (2, 3)), zorder=0)
        axes.annotate(
            f"n={ns[kl]}",
            (kl, 1.01),
            xycoords=axes.get_xaxis_transform(),
            fontsize=6.5,
            color=MUTED,
            ha="center",
        )


def _apart(
    ticks: Sequence[float | int], right: float, least: float
) -> list[float | int]:
    """Those of the rising ticks up to `right` that are `least` of the square-root axis from the one before, or 0."""
    kept: list[float | int] = []
    before = 0.0
    for tick in ticks:
        if tick <= right and math.sqrt(tick / right) - before >= least:
            kept.append(tick)
            before = math.sqrt(tick / right)
    return kept


def reliability(calibration: dict) -> str:
    """Accuracy against stated confidence, with the diagonal of perfect calibration; bars are shares of the pairs."""
    confidence, accuracy, count = (
        np.asarray(calibration[key]) for key in ("confidence", "accuracy", "count")
    )
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.9, 2.3)
        axes.bar(
            confidence, count / max(count.sum(), 1), width=0.03, color=FIRST, alpha=0.25
        )
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, lw=0.8, ls=(0, (3, 3)))
        axes.plot(confidence, accuracy, color=FIRST, lw=1.3, marker="o", ms=3.5, mew=0)
        axes.set(
            xlim=(0.49, 1.01),
            ylim=(0, 1.02),
            xlabel="stated confidence",
            ylabel="accuracy",
        )
        return _svg(figure)


def distributions(
    baseline: Sequence[float], policy: Sequence[float], label: str
) -> str:
    """Two histograms on one axis: the baseline outlined, the policy filled."""
    low, high = min(*baseline, *policy), max(*baseline, *policy)
    bins = np.linspace(low, high if high > low else low + 1, 31)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.9, 2.3)
        axes.hist(policy, bins, color=FIRST, alpha=0.45, lw=0)
        axes.hist(baseline, bins, histtype="step", color=INK, lw=1)
        axes.set(xlabel=label, ylabel="answers")
        return _svg(figure)


def spread(
    groups: Mapping[str, Sequence[float]], places: Sequence[float] | None = None
) -> str:
    """A metric over the seeds of each group: a dot a run, the mean as a ring, a bar of one sample std to each side.

    Args:
      places: where the groups stand on a number line, along the bottom; None: their names are a list, downwards.
    """
    with matplotlib.rc_context(_STYLE):
        labels = [_label(name) for name in groups]
        lines = max((label.count("\n") + 1 for label in labels), default=1)
        figure, axes = _axes(
            3.9, 2.6 if places else 0.7 + max(0.4, 0.14 * lines) * len(groups)
        )
        at = list(places) if places else [float(i) for i in range(len(groups))]
        for place, values in zip(at, groups.values(), strict=True):
            _group(
                axes,
                place,
                np.asarray([x for x in values if math.isfinite(x)]),
                across=places is None,
            )
        if places is None:
            axes.set_yticks(at, labels)
            axes.set_ylim(len(groups) - 0.5, -0.5)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        else:
            if min(at) > 0 and max(at) >= 8 * min(at):
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_xticks(at, [f"{x:g}" for x in at])
            axes.set_xlabel(next(iter(groups)).partition(" = ")[0])
        return _svg(figure)


def _label(group: str) -> str:
    """A group's name, an option a line; of a long one the end, which is what tells groups apart."""
    return "\n".join(
        one if len(one) <= LONGEST else f"…{one[1 - LONGEST :]}"
        for one in group.split(", ")
    )


def _group(axes: Axes, place: float, values: np.ndarray, across: bool) -> None:
    if not len(values):
        return
    mean, std = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    dot = {"marker": "o", "ms": 4.5, "mew": 0, "ls": "", "color": FIRST, "zorder": 3}
    ring = {"marker": "o", "ms": 7, "mfc": "none", "mec": INK, "mew": 1.2}
    marks = (
        (list(values), dot),
        ([mean - std, mean + std], {"color": INK, "lw": 1.2}),
        ([mean], ring),
    )
    for measured, style in marks:
        places = [place] * len(measured)
        axes.plot(*((measured, places) if across else (places, measured)), **style)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = (
        np.asarray(curve[0], dtype=np.float64),
        np.asarray(curve[1], dtype=np.float64),
    )
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _svg(figure: Figure) -> str:
    """The figure as an SVG element: no XML head, no metadata, no fixed size, CSS variables for colors."""
    for axes in figure.axes:
        axes.set_axisbelow(True)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        r'<svg \1 aria-hidden="true">',
        svg,
        count=1,
        flags=re.DOTALL,
    )
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for color, variable in _CSS.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
