"""Rows of results: one JSON line per finished run of a study.

    experiments/X/results/*.jsonl    committed rows, beside the study's file
    WORKDIR/results.jsonl            rows of the runs that are finished in a sweep's folder

A row is found by the hash of its run's config: all options that decide what a run computes, with
their defaults; paths of the workdir, logging, checkpoints and meshes are no part of it. The code is
none either: a row has the commit that computed it, and is valid until it is deleted. `dtype="auto"`
counts as "auto"; the row has the dtype that it stood for.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, NotRequired

from pydantic import AfterValidator
from typing_extensions import TypedDict

from rlhfjax import claims, dry_run, json_text, paths, stage_cache, workdirs
from rlhfjax.errors import DataError
from rlhfjax.experiment import Experiment
from rlhfjax.jsonl import located_rows, write_jsonl
from rlhfjax.lab.card import Study, rule
from rlhfjax.lab.outcomes import Outcome
from rlhfjax.paths import Path
from rlhfjax.report.workdir import Run as Finished
from rlhfjax.report.workdir import Stage, read_run
from rlhfjax.workdirs import Seconds

FOLDER, FILE = "results", "results.jsonl"


class _Series(TypedDict):
    step: list[float]
    value: list[float | None]


def _validate_lengths(series: _Series) -> _Series:
    if len(series["step"]) != len(series["value"]):
        raise ValueError("step and value must have one length")
    return series


class StageCost(TypedDict):
    """What one stage of a run took."""

    id: str
    """A digest of its config and those of the stages that it reads: equal where it is shared."""
    seconds: Seconds


class Row(TypedDict, extra_items=Any):
    """The result of one run."""

    hash: str
    condition: str
    overrides: dict[str, Any]
    seeds: dict[str, Any]
    metrics: dict[str, float | None]
    curves: dict[str, Annotated[_Series, AfterValidator(_validate_lengths)]]
    seconds: Seconds
    stages: dict[str, StageCost]
    dtype: list[str]
    rule: str
    """A digest of the card's rule when the row was written."""
    command: NotRequired[str]
    commit: NotRequired[str | None]
    clean: NotRequired[bool | None]
    date: NotRequired[str]
    hardware: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, str]]


class Planned(NamedTuple):
    """A run of a study, finished or not."""

    name: str
    condition: str
    overrides: Mapping[str, Any]
    seeds: Mapping[str, Any]
    hash: str
    config: Mapping[str, Any]


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns the hash of a run's config, 32 hexadecimal digits; see the module."""
    return stage_cache.digest(claims.decisive_options(config))


def rule_digest(study: Study) -> str:
    """Returns a digest of all that decides the verdict, so that a later rule is noticed."""
    return stage_cache.digest(rule(study))


# ------------------------------------------------------------------ files


def folder_of(experiment: Experiment) -> Path:
    """Returns the folder of the committed rows of a study."""
    return paths.path(experiment.file).parent / FOLDER


def committed(experiment: Experiment) -> list[Row]:
    """Returns the rows of all files of a study's results folder; [] without one.

    Raises:
      DataError: a line is damaged; the message names it.
    """
    folder = folder_of(experiment)
    files = sorted(paths.glob(str(folder / "*.jsonl")))
    return [row for file in files for row in read(file)]


def read(file: Path) -> list[Row]:
    """Returns the rows of a file.

    Raises:
      DataError: it cannot be read, or a line is no row of results; the message names the line.
    """
    return [json_text.validate(row, place, Row) for place, row in located_rows(file)]


def write(folder: Path, rows: Sequence[Row]) -> Path:
    """Writes the rows of a sweep's folder; returns the file."""
    write_jsonl(folder / FILE, rows)
    return folder / FILE


def by_hash(rows: Sequence[Row]) -> dict[str, Row]:
    """Returns the first row of each config."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["hash"], row)
    return found


class Repeat(NamedTuple):
    """Two rows of one config."""

    name: str
    equal: bool  # bit for bit, metrics and curves
    differs: str  # the first metric that differs


def repeats(rows: Sequence[Row]) -> list[Repeat]:
    """Returns the comparisons of rows with the first row of the same config."""
    first = by_hash(rows)
    found = []
    for row in rows:
        other = first[row["hash"]]
        if row is not other and not _is_copy(row, other):
            differs = _first_difference(row, other)
            found.append(Repeat(to_outcome(row).name, not differs, differs))
    return found


def _is_copy(row: Row, other: Row) -> bool:
    """Returns whether two rows are of one start: a row that was copied, not run again."""
    return row.get("date") == other.get("date") and row.get("commit") == other.get(
        "commit"
    )


def _first_difference(row: Row, other: Row) -> str:
    for part in ("metrics", "curves"):
        for name in row[part].keys() | other[part].keys():
            if row[part].get(name) != other[part].get(name):
                return name
    return ""


# ------------------------------------------------------------------ rows


def to_outcome(row: Row) -> Outcome:
    """Returns what a study reads of a row."""
    curves = {
        name: (series["step"], list(json_text.nan_for_null(_numbered(series)).values()))
        for name, series in row["curves"].items()
    }
    return Outcome(
        condition=row["condition"],
        seeds=row["seeds"],
        metrics=json_text.nan_for_null(row["metrics"]),
        curves=curves,
    )


def _numbered(series: _Series) -> dict[str, float | None]:
    return {str(i): value for i, value in enumerate(series["value"])}


def read_row(workdir: Path, planned: Planned, study: Study) -> Row:
    """Returns the row of a run that is finished in a workdir.

    Raises:
      DataError: a file in it is damaged, or a curve that the study keeps is not there.
    """
    run = read_run(workdir)
    start = dict(_last_start(run))
    if "command" in start:
        start["command"] = without_places(start["command"])
    curves = {name: _series(run, name) for name in study.curves}
    row: Row = {
        "hash": planned.hash,
        "condition": planned.condition,
        "overrides": dict(planned.overrides),
        "seeds": dict(planned.seeds),
        "metrics": json_text.null_nonfinite(_metrics(run)),
        "curves": curves,
        "seconds": sum((stage.seconds or 0.0 for stage in run.stages), 0.0),
        "stages": _stage_costs(run, planned.config),
        "dtype": _dtypes(workdir),
        "rule": rule_digest(study),
        **{key: start[key] for key in _STARTS if key in start},  # pyright: ignore
    }
    return row


def without_places(command: str) -> str:
    """Returns a command without its workdir and caches, which are of one machine.

    `rlhfjax run --config=a.py:seed=1 --workdir=/home/me/a --config.ppo.steps=3` gives
    `rlhfjax run --config=a.py:seed=1 --config.ppo.steps=3`.
    """
    program, *words = shlex.split(command)
    kept = [word for word in words if re.match(r"--config[=.]|[^-]", word)]
    return shlex.join([program.rpartition("/")[2], *kept])


_STARTS = ("command", "commit", "clean", "date", "hardware", "versions")


def _last_start(run: Finished) -> Mapping[str, Any]:
    starts = [*run.provenance, *(x for s in run.stages for x in s.provenance)]
    if run.provenance:
        starts = run.provenance
    return starts[-1] if starts else {}


def _prefix(run: Finished, stage: Stage) -> str:
    return f"{stage.name}/" if len(run.stages) > 1 else ""


def _metrics(run: Finished) -> dict[str, float]:
    """Returns the last value of every metric, in a recipe `STAGE/NAME`."""
    return {
        _prefix(run, stage) + name: value
        for stage in run.stages
        for name, value in stage.last.items()
    }


def _series(run: Finished, name: str) -> _Series:
    for stage in run.stages:
        base = name.removeprefix(_prefix(run, stage))
        if name == _prefix(run, stage) + base and base in stage.curves:
            steps, values = stage.curves[base]
            finite = json_text.null_nonfinite(values)
            return {"step": [float(step) for step in steps], "value": finite}
    raise DataError(f"{run.name}: no stage has the curve {name!r}, which STUDY keeps")


def _stage_costs(run: Finished, config: Mapping[str, Any]) -> dict[str, StageCost]:
    costs: dict[str, StageCost] = {}
    for stage in run.stages:
        digest = stage_cache.digest({"stage": dry_run.identity(config, stage.name)})
        costs[stage.name] = {"id": digest, "seconds": stage.seconds or 0.0}
    return costs


def _dtypes(workdir: Path) -> list[str]:
    """Returns the dtypes of a run's models as they were computed with."""
    config = workdirs.read_config(workdir) or {}
    found = [
        value
        for place, value in json_text.leaves(config).items()
        if place.rpartition(".")[2] == "dtype" and isinstance(value, str)
    ]
    return sorted(set(filter(None, found)))


def seconds(rows: Sequence[Row]) -> float:
    """Returns the seconds of several runs, each shared stage counted once."""
    known = {
        cost["id"]: cost["seconds"] for row in rows for cost in row["stages"].values()
    }
    return sum(known.values(), 0.0)


def processors(rows: Sequence[Row]) -> list[str]:
    """Returns the different CPUs of rows that say theirs, in order."""
    found = [row.get("hardware", {}).get("cpu") for row in rows]
    return list(dict.fromkeys(filter(None, found)))
