"""Reads the files of a workdir: a recipe or a single stage, finished or not."""

import dataclasses
import json
import math
import statistics
from typing import Any

from rlhfjax import paths, provenance
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import read_jsonl
from rlhfjax.metrics import SAMPLES_FILE
from rlhfjax.paths import Path
from rlhfjax.renamed import STAGES, config_with_present_names

Curve = tuple[list[float | int], list[float]]
"""Steps (or KLs), and values; NaN where a value is not finite."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """The files of one stage. Names of metrics lack the stage: `val_loss`, not `sft/val_loss`."""

    name: str
    kind: str
    status: str  # "done", "unfinished" (it has a folder) or "waiting"
    steps: int  # finished so far
    total: int  # steps of the whole stage, 0 if it does not count steps
    seconds: float | None  # wall time, None until it is done
    last: dict[str, float]  # the last value of every metric
    curves: dict[str, Curve]
    rates: dict[str, float]  # the median of every timing
    samples: list[dict]
    rollouts: list[dict]  # responses during training, see `rl.samples`
    provenance: list[dict]  # one line per start
    calibration: dict | None  # `Calibration.as_dict()`
    config: dict
    goodput: dict  # what `clock.Clock.save` wrote; {} if the stage does not train


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir: the stages of a recipe in order, or its single stage."""

    name: str
    stages: list[Stage]
    provenance: list[dict]  # one line per start of the whole run

    @property
    def comparisons(self) -> list[Stage]:
        """The stages that compared a policy with a baseline.

        Their metrics have NAME_policy and NAME_baseline.
        """
        return [stage for stage in self.stages if _has_both(stage.last)]


def _has_both(metrics: dict[str, float]) -> bool:
    return any(
        name.endswith("_policy")
        and f"{name.removesuffix('_policy')}_baseline" in metrics
        for name in metrics
    )


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
        stages = [
            read_stage(name, workdir / f"{i:02d}_{name}", config.get(name) or {})
            for i, name in enumerate(config["stages"])
        ]
    elif (workdir / "config.json").exists() or (workdir / "metrics.jsonl").exists():
        stages = [read_stage(config.get("stage", workdir.name), workdir, config)]
    else:
        raise ConfigError(
            f"{workdir} is not the workdir of a run: it has neither config.json nor metrics.jsonl"
        )
    name = paths.absolute(workdir).name
    return Run(name, stages, provenance.read(workdir))


def read_stage(name: str, folder: Path, config: dict) -> Stage:
    """Reads the files of one stage, those that exist.

    Args:
      config: the stage's config, used until the folder has a config.json.
    """
    config = config_with_present_names(_read_json(folder / "config.json") or config)
    done = _read_json(folder / "done.json")
    kind = done.get("kind") or ""
    rows = read_jsonl(folder / "metrics.jsonl")
    curves = _curves(rows)
    last = {name: values[-1] for name, (_, values) in curves.items()}
    timings = _curves(read_jsonl(folder / "timing.jsonl"))
    if done:
        status = "done"
    else:
        status = "unfinished" if folder.exists() else "waiting"
    return Stage(
        name=name,
        kind=STAGES.get(kind, kind) or config.get("stage") or name,
        status=status,
        steps=done.get("steps") or max((row["step"] for row in rows), default=0),
        total=config.get("steps") or done.get("steps") or 0,
        seconds=done.get("seconds"),
        last=last | _numbers(done.get("metrics", {})),
        curves=curves,
        rates={
            name: statistics.median(values) for name, (_, values) in timings.items()
        },
        samples=read_jsonl(folder / "samples.jsonl"),
        rollouts=read_jsonl(folder / SAMPLES_FILE),
        provenance=provenance.read(folder),
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
    """Returns the numbers of a row under their names without the stage; null is NaN."""
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
