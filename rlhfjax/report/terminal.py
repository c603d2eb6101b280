"""Builds the report's tables for the terminal."""

import os

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhfjax import paths
from rlhfjax.redact import printable
from rlhfjax.report import tables
from rlhfjax.report.workdir import read_run

STAGE_COLUMNS = ("name", "status", "steps", "time", "speed", "metrics")


def summary_table(workdir: str | os.PathLike) -> Group:
    """Returns the stage table and, if there is a comparison, its result, for `rich.print`.

    Raises: as `write_report`.
    """
    run = read_run(paths.path(workdir))
    stages = _table("stages")
    for column in STAGE_COLUMNS:
        is_number = column in ("steps", "time", "speed")
        stages.add_column(column, justify="right" if is_number else "left")
    for stage in run.stages:
        row = tables.stage_row(stage)
        stages.add_row(*(_cell(row[column]) for column in STAGE_COLUMNS))
    headlines = tables.headlines(run)
    if not headlines:
        return Group(stages)
    result = _table("held-out prompts")
    result.add_column("")
    result.add_column("baseline", justify="right")
    result.add_column("policy", justify="right")
    result.add_column("")
    for row in headlines:
        cells = (row.label, row.baseline, row.policy, row.note)
        result.add_row(*map(_cell, cells))
    return Group(stages, Text(), result)


def _cell(text: str) -> Text:
    """Returns a text in which neither markup nor an escape of the terminal has an effect."""
    return Text(printable(text))


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
