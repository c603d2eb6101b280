"""Figures as inline SVG.

Their colors are the page's CSS variables, so that one file is readable on light and dark pages.
"""

import io
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhfjax.report.workdir import Curve


class Palette(NamedTuple):
    """The colors of a figure."""

    ink: str
    muted: str
    line: str
    card: str
    first: str
    second: str


# Placeholder colors for matplotlib, which `render` replaces by CSS variables.
PAGE = Palette(*(f"#0a0b0{i}" for i in range(6)))
INK, MUTED, LINE, CARD, FIRST, SECOND = PAGE
CSS = {color: f"--{name}" for name, color in PAGE._asdict().items()}
# Those of style.css on a light page, for a picture without a page.
LIGHT = Palette("#1c1d20", "#6b6e76", "#e2e3e0", "#ffffff", "#2b6cd4", "#d9671e")


def style(palette: Palette) -> Any:
    """Returns matplotlib's options for figures in these colors."""
    return {
        **_STYLE,
        "text.color": palette.ink,
        "axes.edgecolor": palette.line,
        "axes.labelcolor": palette.muted,
        "grid.color": palette.line,
        "xtick.color": palette.line,
        "ytick.color": palette.line,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "legend.labelcolor": palette.ink,
    }


_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhfjax",
    "text.parse_math": False,  # a name with $ is a name
    "font.size": 8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "axes.formatter.limits": (-3, 5),
}
STYLE = style(PAGE)


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a figure of a size in inches, with its one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def to_png(figure: Figure) -> bytes:
    """Returns a figure as PNG, without metadata: equal figures are equal files."""
    out = io.BytesIO()
    with warnings.catch_warnings():  # as in `render`
        warnings.simplefilter("ignore")
        figure.savefig(
            out,
            format="png",
            dpi=100,
            facecolor=LIGHT.card,
            metadata={"Software": None},
        )
    return out.getvalue()


def finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of a curve, without values that are not finite."""
    x, y = (np.asarray(column, dtype=np.float64) for column in curve)
    is_finite = np.isfinite(y)
    return x[is_finite], y[is_finite]


def render(figure: Figure) -> str:
    """Returns an SVG element without XML head, metadata and size, with CSS variables as colors."""
    for axes in figure.axes:
        axes.set_axisbelow(True)
    out = io.StringIO()
    with (
        warnings.catch_warnings()
    ):  # of characters that matplotlib's font lacks; browsers have them
        warnings.simplefilter("ignore")
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    head = r'(?s)<svg [^>]*?(viewBox="[^"]*")[^>]*>'
    svg = re.sub(head, r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for color, variable in CSS.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
