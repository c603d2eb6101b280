"""The results of a sweep: a table a run and a table a group of seeds as CSV, and both with figures as one HTML page."""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from rlhfjax import json_text, paths
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Path
from rlhfjax.report import figures, tables
from rlhfjax.report.page import REPORT, environment
from rlhfjax.report.workdir import read_run

RUNS, GROUPS, PAGE = "sweep.csv", "sweep_groups.csv", "sweep.html"
STATISTICS = ("mean", "std", "low", "high")
BASE = "as the file has it"  # the group of no overrides


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of one run: `metrics` are its last values, named STAGE/METRIC in a recipe."""

    name: str
    setting: dict[str, Any]  # the overrides that are not seeds
    seeds: dict[str, Any]  # those that are
    status: str  # "done", "unfinished" or "waiting"
    metrics: dict[str, float]
    telling: tuple[str, ...] = ()  # of the last stage, most telling first
    page: str = ""  # its report, relative to the sweep's folder

    @property
    def group(self) -> str:
        return (
            ", ".join(f"{option} = {value}" for option, value in self.setting.items())
            or BASE
        )


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One metric over the seeds of a group.

    std: the sample's (n - 1), NaN for a single seed.
    low, high: the least and the greatest value; no interval.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float

    def __str__(self) -> str:
        return tables.number(self.mean) + (
            "" if self.n < 2 else f" ± {tables.number(self.std)}"
        )


def read_result(
    folder: Path, name: str, setting: Mapping[str, Any], seeds: Mapping[str, Any]
) -> Result:
    """Reads the run in folder/name, as far as it has come."""
    workdir = folder / name
    try:
        run = read_run(workdir)
    except ConfigError:  # it has not begun
        return Result(name, dict(setting), dict(seeds), "waiting", {})
    done = all(stage.status == "done" for stage in run.stages)
    prefix = {
        stage.name: f"{stage.name}/" if len(run.stages) > 1 else ""
        for stage in run.stages
    }
    metrics = {
        prefix[stage.name] + key: value
        for stage in run.stages
        for key, value in stage.last.items()
    }
    last = [stage for stage in run.stages if stage.last][-1:]
    telling = tuple(
        prefix[stage.name] + key for stage in last for key in tables.telling(stage)
    )
    page = f"{name}/{REPORT}" if (workdir / REPORT).exists() else ""
    return Result(
        name,
        dict(setting),
        dict(seeds),
        "done" if done else "unfinished",
        metrics,
        telling,
        page,
    )


def statistic(values: Sequence[float]) -> Statistic:
    x = np.asarray(values, dtype=np.float64)
    std = float(np.std(x, ddof=1)) if len(x) > 1 else math.nan
    return Statistic(len(x), float(np.mean(x)), std, float(np.min(x)), float(np.max(x)))


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The finished runs by what is not a seed, in the sweep's order; a group without one is empty."""
    found: dict[str, list[Result]] = {result.group: [] for result in results}
    for result in results:
        if result.status == "done":
            found[result.group].append(result)
    return found


def summary(results: Sequence[Result]) -> dict[str, dict[str, Statistic]]:
    """{group: {metric: its statistic over the finished runs that have it}}."""
    return {
        group: {
            name: statistic(
                [result.metrics[name] for result in members if name in result.metrics]
            )
            for name in dict.fromkeys(
                name for result in members for name in result.metrics
            )
        }
        for group, members in groups(results).items()
    }


def shown(results: Sequence[Result], metrics: Sequence[str] = ()) -> list[str]:
    """The metrics of the page: those asked for, or the telling ones of the last stage.

    Raises:
      ConfigError: one that is asked for is in no finished run.
    """
    finished = [result for result in results if result.status == "done"]
    known = dict.fromkeys(name for result in finished for name in result.metrics)
    if finished and (missing := [name for name in metrics if name not in known]):
        raise ConfigError(
            f"--metrics={missing[0]}: no run has it; known: {', '.join(known)}"
        )
    return list(
        metrics or dict.fromkeys(name for result in finished for name in result.telling)
    )


def write_sweep(
    folder: Path, results: Sequence[Result], metrics: Sequence[str] = ()
) -> Path:
    """Writes sweep.csv, a row a run; sweep_groups.csv, a row a group and metric; and sweep.html. Returns its path.

    Raises: as `shown`.
    """
    names = shown(results, metrics)
    paths.write(folder / RUNS, _csv(run_rows(results)))
    paths.write(folder / GROUPS, _csv(group_rows(results)))
    return paths.write(
        folder / PAGE, render(paths.absolute(folder).name, results, names)
    )


def run_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {"run": r.name, "status": r.status, **r.setting, **r.seeds, **r.metrics}
        for r in results
    ]


def group_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    settings = {result.group: result.setting for result in results}
    return [
        {"group": group, **settings[group], "metric": name, **dataclasses.asdict(value)}
        for group, row in summary(results).items()
        for name, value in row.items()
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(json_text.null_nonfinite(row))  # None is an empty cell
    return out.getvalue()


def render(title: str, results: Sequence[Result], metrics: Sequence[str]) -> str:
    """The page as HTML."""
    rows = summary(results)
    return (
        environment()
        .get_template("sweep.html")
        .render(
            title=title,
            results=results,
            done=sum(result.status == "done" for result in results),
            metrics=metrics,
            rows=rows,
            sizes={group: len(members) for group, members in groups(results).items()},
            panels=[
                (name, Markup(figures.spread(*points(results, name))))
                for name in metrics
            ],
        )
    )


def points(
    results: Sequence[Result], metric: str
) -> tuple[dict[str, list[float]], list[float] | None]:
    """The values of a metric by group, and the groups' places on a number line where one number tells them apart."""
    values = {
        group: [
            result.metrics[metric] for result in members if metric in result.metrics
        ]
        for group, members in groups(results).items()
    }
    settings = {result.group: result.setting for result in results}
    one = {option for setting in settings.values() for option in setting}
    numbers = [value for setting in settings.values() for value in setting.values()]
    numeric = all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in numbers
    )
    is_line = len(one) == 1 and numeric and len(numbers) == len(settings) > 1
    return values, [float(value) for value in numbers] if is_line else None
