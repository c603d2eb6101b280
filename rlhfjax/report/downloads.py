"""Figures that can be downloaded: an SVG and a CSV file each, in links of the page itself."""

import base64
import csv
import dataclasses
import io
import itertools
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

# Colors of a separate file, by the page's CSS variables: those of the light page.
LIGHT = {
    "--ink": "#1c1d20",
    "--muted": "#6b6e76",
    "--line": "#e2e3e0",
    "--card": "#ffffff",
    "--first": "#2b6cd4",
    "--second": "#d9671e",
}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with the numbers that it shows."""

    file: str  # name of the downloaded files, without the ending
    markup: str  # the SVG element
    columns: Mapping[str, Sequence[Any]]  # of the CSV file

    @property
    def svg(self) -> Markup:
        return Markup(self.markup)

    @property
    def svg_link(self) -> str:
        """The figure as a separate file, in a data: link."""
        content = _encoded(standalone(self.markup))
        return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"

    @property
    def csv_link(self) -> str:
        """The numbers as a CSV file, in a data: link."""
        text = urllib.parse.quote(_encoded(csv_text(self.columns)))
        return f"data:text/csv;charset=utf-8,{text}"


def _encoded(text: str) -> bytes:
    """Returns UTF-8, with escapes for what it lacks: bytes of a file's name in another code."""
    return text.encode(errors="backslashreplace")


def drawing(file: str, markup: str, columns: Mapping[str, Sequence[Any]]) -> Drawing:
    """Returns a figure whose files have a safe name."""
    return Drawing(re.sub(r"[^\w.-]+", "_", file)[:80], markup, columns)


def standalone(svg: str) -> str:
    """Returns an SVG element of the page as a file, with colors for light paper."""
    for variable, color in LIGHT.items():
        svg = svg.replace(f"var({variable})", color)
    names = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    )
    return svg.replace("<svg ", f'<svg {names} font-family="sans-serif" ', 1)


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Returns a CSV file; shorter columns end with empty cells, as do numbers that are NaN."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in itertools.zip_longest(*columns.values(), fillvalue=""):
        writer.writerow([_cell(value) for value in row])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
