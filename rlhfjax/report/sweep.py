"""Writes the results of a sweep: one CSV row per run, one per group and metric, and an HTML page.

A group consists of the runs that differ by their seeds only.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from rlhfjax import json_text, paths
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Path
from rlhfjax.report import figures, meanings, origin, tables
from rlhfjax.report.downloads import Drawing, drawing
from rlhfjax.report.page import REPORT, encodable, environment
from rlhfjax.report.workdir import read_run

RUNS, GROUPS, PAGE = "sweep.csv", "sweep_groups.csv", "sweep.html"
BASE = "no overrides"  # the name of the group without any


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of a sweep."""

    name: str
    setting: dict[str, Any]  # the overrides that are not seeds
    seeds: dict[str, Any]  # those that are
    status: str  # "done", "unfinished" or "waiting"
    metrics: dict[str, float]  # the last values; in a recipe named STAGE/METRIC
    telling: tuple[str, ...] = ()  # metrics of the last stage, most telling first
    page: str = ""  # its report, relative to the sweep's folder
    starts: Sequence[Mapping[str, Any]] = ()  # of its provenance.jsonl
    sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of models
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of stages

    @property
    def group(self) -> str:
        options = [f"{option} = {value}" for option, value in self.setting.items()]
        return ", ".join(options) or BASE


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One metric over the seeds of a group."""

    n: int
    mean: float
    std: float  # of the sample (n - 1); NaN for a single seed
    low: float  # the least value; not the end of an interval
    high: float  # the greatest value

    def __str__(self) -> str:
        mean = tables.number(self.mean)
        return mean if self.n < 2 else f"{mean} ± {tables.number(self.std)}"


def read_result(
    folder: Path, name: str, setting: Mapping[str, Any], seeds: Mapping[str, Any]
) -> Result:
    """Reads the run in folder/name, as far as it has come."""
    setting, seeds = dict(setting), dict(seeds)
    workdir = folder / name
    try:
        run = read_run(workdir)
    except ConfigError:  # it has not started
        return Result(name, setting, seeds, status="waiting", metrics={})
    is_recipe = len(run.stages) > 1
    metrics: dict[str, float] = {}
    telling: tuple[str, ...] = ()
    for stage in run.stages:
        prefix = f"{stage.name}/" if is_recipe else ""
        metrics |= {prefix + key: value for key, value in stage.last.items()}
        if stage.last:
            telling = tuple(prefix + key for key in tables.telling(stage))
    is_done = all(stage.status == "done" for stage in run.stages)
    return Result(
        name=name,
        setting=setting,
        seeds=seeds,
        status="done" if is_done else "unfinished",
        metrics=metrics,
        telling=telling,
        page=quote(f"{name}/{REPORT}") if (workdir / REPORT).exists() else "",
        starts=run.provenance or [row for s in run.stages for row in s.provenance],
        sizes=origin.sizes(run),
        kinds={stage.name: stage.kind for stage in run.stages},
    )


def statistic(values: Sequence[float]) -> Statistic:
    x = np.asarray(values, dtype=np.float64)
    return Statistic(
        n=len(x),
        mean=float(np.mean(x)),
        std=float(np.std(x, ddof=1)) if len(x) > 1 else math.nan,
        low=float(np.min(x)),
        high=float(np.max(x)),
    )


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Returns the finished runs of each group, in the sweep's order; a group may be empty."""
    members: dict[str, list[Result]] = {result.group: [] for result in results}
    for result in results:
        if result.status == "done":
            members[result.group].append(result)
    return members


def summary(results: Sequence[Result]) -> dict[str, dict[str, Statistic]]:
    """Returns {group: {metric: its statistic over the finished runs that have it}}."""
    statistics: dict[str, dict[str, Statistic]] = {}
    for group, members in groups(results).items():
        values: dict[str, list[float]] = {}
        for result in members:
            for name, value in result.metrics.items():
                values.setdefault(name, []).append(value)
        statistics[group] = {name: statistic(xs) for name, xs in values.items()}
    return statistics


def shown(results: Sequence[Result], metrics: Sequence[str] = ()) -> list[str]:
    """Returns the metrics of the page: those asked for, or the telling ones of the last stage.

    Raises:
      ConfigError: a metric that is asked for is in no finished run.
    """
    finished = [result for result in results if result.status == "done"]
    known = dict.fromkeys(name for result in finished for name in result.metrics)
    missing = [name for name in metrics if name not in known]
    if finished and missing:
        raise ConfigError(
            f"--metrics={missing[0]}: no run has it; known: {', '.join(known)}"
        )
    telling = dict.fromkeys(name for result in finished for name in result.telling)
    return list(metrics or telling)


def write_sweep(
    folder: Path, results: Sequence[Result], metrics: Sequence[str] = ()
) -> Path:
    """Writes sweep.csv, sweep_groups.csv and sweep.html, and returns the path of the page.

    Raises: as `shown`.
    """
    names = shown(results, metrics)
    paths.write(folder / RUNS, _csv(run_rows(results)))
    paths.write(folder / GROUPS, _csv(group_rows(results)))
    page = render(paths.absolute(folder).name, results, names)
    return paths.write(folder / PAGE, page)


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
    """Returns the page as HTML."""
    template = environment().get_template("sweep.html")
    origin_rows = origin.of_starts([row for result in results for row in result.starts])
    origin_rows += origin.of_sizes([result.sizes for result in results])
    figures_shown = [(name, _figure(results, name)) for name in metrics]
    sections = {"groups": "Groups", "figures": "Figures", "runs": "Runs"}
    if not figures_shown:
        del sections["figures"]
    if origin_rows:
        sections["origin"] = "Provenance"
    page = template.render(
        title=title,
        results=results,
        done=sum(result.status == "done" for result in results),
        metrics=metrics,
        rows=summary(results),
        sizes={group: len(members) for group, members in groups(results).items()},
        panels=figures_shown,
        meanings={name: _meaning(results, name) for name in metrics},
        origin=origin_rows,
        contents=sections.items(),
    )
    return encodable(page)


def _meaning(results: Sequence[Result], metric: str) -> dict[str, str]:
    """Returns unit and hint of a metric, which a recipe calls STAGE/NAME."""
    stage, _, name = metric.rpartition("/")
    kinds = {name: kind for result in results for name, kind in result.kinds.items()}
    kind = kinds.get(stage) or next(iter(kinds.values()), "")
    meaning = meanings.find(name, kind)
    unit = meaning.unit if meaning else ""
    return {"unit": unit, "hint": meanings.hint(name, kind)}


def _figure(results: Sequence[Result], metric: str) -> Drawing:
    values, places = points(results, metric)
    svg = figures.spread(values, places)
    return drawing(metric, svg, values)


def points(
    results: Sequence[Result], metric: str
) -> tuple[dict[str, list[float]], list[float] | None]:
    """Returns the values of a metric by group, and the groups' places on a number line.

    The places are None unless the groups differ by one numeric option.
    """
    values = {
        group: [
            result.metrics[metric] for result in members if metric in result.metrics
        ]
        for group, members in groups(results).items()
    }
    settings = {result.group: result.setting for result in results}
    options = {option for setting in settings.values() for option in setting}
    numbers = [value for setting in settings.values() for value in setting.values()]
    if len(options) != 1 or not len(numbers) == len(settings) > 1:
        return values, None
    if any(type(value) not in (int, float) for value in numbers):
        return values, None
    return values, [float(value) for value in numbers]
