"""Builds the report's tables for the terminal."""

import os
from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhfjax import paths
from rlhfjax.redact import printable
from rlhfjax.report import names, tables
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
    models = names.of_models(run, run.comparisons[-1])
    result.add_column("")
    for model in (models["baseline"], models["policy"]):
        result.add_column(Text(model), justify="right")
    result.add_column("unit")
    result.add_column("interval")
    for row in headlines:
        cells = (row.label, row.baseline, row.policy, row.unit, row.note)
        result.add_row(*map(_cell, cells))
    parts = [stages, Text(), result, Text(tables.rewards_note(run), style="dim")]
    if tax := tables.tax_rows(run):
        parts += [Text(), _tax_table(tax, models)]
    return Group(*parts)


def _tax_table(rows: list[tables.TaxRow], models: Mapping[str, str]) -> Table:
    """Returns the losses on held-out text."""
    table = _table("alignment tax: losses on held-out text")
    table.add_column("")
    roles = list(rows[0].values)
    change = f"{models['policy']} - {models['baseline']}"
    for title in (*(models[role] for role in roles), change):
        table.add_column(_cell(title), justify="right")
    table.add_column("unit")
    for row in rows:
        values = [row.values.get(role, "") for role in roles]
        table.add_row(*map(_cell, (row.label, *values, row.change, row.unit)))
    return table


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
