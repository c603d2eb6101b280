"""The report's tables for the terminal."""

import os

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhfjax import paths
from rlhfjax.report import tables
from rlhfjax.report.workdir import read_run

STAGE_COLUMNS = ("name", "status", "steps", "time", "speed", "metrics")


def summary_table(workdir: str | os.PathLike) -> Group:
    """The stage table and, once there is one, the result of the comparison: `rich.print(summary_table(workdir))`.

    Raises: as `write_report`.
    """
    run = read_run(paths.path(workdir))
    stages = Table(
        title="stages",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in STAGE_COLUMNS:
        stages.add_column(
            column, justify="right" if column in ("steps", "time", "speed") else "left"
        )
    for stage in run.stages:
        row = tables.stage_row(stage)
        stages.add_row(*(Text(row[column]) for column in STAGE_COLUMNS))
    headlines = tables.headlines(run)
    if not headlines:
        return Group(stages)
    result = Table(
        title="held-out prompts",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column, justify in (
        ("", "left"),
        ("baseline", "right"),
        ("policy", "right"),
        ("", "left"),
    ):
        result.add_column(column, justify=justify)
    for row in headlines:
        result.add_row(
            *(Text(x) for x in (row.label, row.baseline, row.policy, row.note))
        )
    return Group(stages, Text(), result)
