"""Reads what a run left in its workdir; an unfinished or single-stage run is as good as a whole recipe."""

import dataclasses
import json
import math
import statistics
from typing import Any

from rlhfjax import paths
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import read_jsonl
from rlhfjax.paths import Path
from rlhfjax.renamed import STAGES, config_with_present_names

Curve = tuple[
    list[float | int], list[float]
]  # steps (or KLs), values; NaN where a value was not finite


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage's folder. Names of metrics are without the stage (`val_loss`, not `sft/val_loss`)."""

    name: str
    kind: str
    status: str  # "done", "unfinished" (it has metrics) or "waiting"
    steps: int  # done so far
    total: int  # of so many, 0 when it does not count steps
    seconds: float | None  # None until it is done
    last: dict[str, float]  # the last value of every metric
    curves: dict[str, Curve]
    rates: dict[str, float]  # the median of every timing
    samples: list[dict]
    calibration: dict | None  # `Calibration.as_dict()`
    config: dict
    goodput: dict  # what `clock.Clock.save` wrote; empty where nothing is trained


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir: a recipe's stages in order, or the one stage it holds."""

    name: str
    stages: list[Stage]

    @property
    def comparisons(self) -> list[Stage]:
        """The stages that compared a policy with a baseline: their metrics have NAME_policy and
        NAME_baseline."""
        return [stage for stage in self.stages if _has_both(stage.last)]


def _has_both(metrics: dict[str, float]) -> bool:
    names = [
        name.removesuffix("_policy") for name in metrics if name.endswith("_policy")
    ]
    return any(f"{name}_baseline" in metrics for name in names)


def read_run(workdir: Path) -> Run:
    """Reads a workdir.

    Raises:
      ConfigError: it does not exist, or holds no run.
      DataError: a file in it is damaged; the message names the file and line.
    """
    if not workdir.exists():
        raise ConfigError(f"workdir {workdir} does not exist")
    config = config_with_present_names(_read_json(workdir / "config.json"))
    if "stages" in config:
        folders = [
            (name, workdir / f"{i:02d}_{name}")
            for i, name in enumerate(config["stages"])
        ]
        stages = [
            read_stage(name, folder, config.get(name) or {}) for name, folder in folders
        ]
    elif (workdir / "config.json").exists() or (workdir / "metrics.jsonl").exists():
        stages = [read_stage(config.get("stage", workdir.name), workdir, config)]
    else:
        raise ConfigError(
            f"{workdir} is not the workdir of a run: it has neither config.json nor metrics.jsonl"
        )
    return Run(paths.absolute(workdir).name, stages)


def read_stage(name: str, folder: Path, config: dict) -> Stage:
    """Reads one stage's folder, as far as it exists; `config` stands in for a config.json that is not there yet."""
    config = config_with_present_names(_read_json(folder / "config.json") or config)
    done = _read_json(folder / "done.json")
    kind = done.get("kind")
    rows = read_jsonl(folder / "metrics.jsonl")
    curves = _curves(rows)
    last = {name: values[-1] for name, (_, values) in curves.items()} | _numbers(
        done.get("metrics", {})
    )
    timings = _curves(read_jsonl(folder / "timing.jsonl"))
    return Stage(
        name=name,
        kind=STAGES.get(kind, kind) or config.get("stage") or name,
        status="done" if done else "unfinished" if folder.exists() else "waiting",
        steps=done.get("steps") or max((row["step"] for row in rows), default=0),
        total=config.get("steps") or done.get("steps") or 0,
        seconds=done.get("seconds"),
        last=last,
        curves=curves,
        rates={
            name: statistics.median(values) for name, (_, values) in timings.items()
        },
        samples=read_jsonl(folder / "samples.jsonl"),
        calibration=_read_json(folder / "calibration.json") or done.get("calibration"),
        config=config,
        goodput=_read_json(folder / "goodput.json"),
    )


def _curves(rows: list[dict]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in _numbers(row).items():
            if name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Names without the stage; null, which stands for a value that was not finite, as NaN."""
    return {
        name.rsplit("/", 1)[-1]: math.nan if value is None else float(value)
        for name, value in row.items()
        if value is None or isinstance(value, int | float)
    }


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e})") from None
