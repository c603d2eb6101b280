"""Reads the files of a workdir: a recipe or a single stage, finished or not."""

import dataclasses
import math
import statistics
from typing import Any, NotRequired

from typing_extensions import TypedDict

from rlhfjax import clock, json_text, paths, provenance, sums, workdirs
from rlhfjax.corpus import summary
from rlhfjax.errors import ConfigError
from rlhfjax.jsonl import REMEDY, read_jsonl
from rlhfjax.metrics import METRICS_FILE, SAMPLES_FILE, TIMING_FILE, read_rows
from rlhfjax.paths import Path
from rlhfjax.ranges import Count
from rlhfjax.renamed import STAGES
from rlhfjax.workdirs import CALIBRATION, Calibration

Curve = tuple[list[float | int], list[float]]
"""Steps (or KLs), and values; NaN where a value is not finite."""


Numbers = list[float | None]


class Rollout(TypedDict):
    """A line of samples_steps.jsonl, see `rl.samples`."""

    step: Count
    prompt: str
    response: str
    score: float | None
    pieces: list[str]
    log_ratio: NotRequired[Numbers]
    reward: NotRequired[Numbers]
    advantage: NotRequired[Numbers]
    value: NotRequired[Numbers]


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
    calibration: Calibration | None
    config: dict
    goodput: clock.Record | None  # None if the stage does not train
    corpus: summary.Summary | None = None  # what `prepare` did


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
      DataError: a file in it is damaged; the message names the file, the place and what to do.
    """
    if not paths.exists(workdir):
        raise ConfigError(f"workdir {workdir} does not exist")
    config = workdirs.read_config(workdir)
    if config is None and not paths.exists(workdir / METRICS_FILE):
        raise ConfigError(
            f"{workdir} is not the workdir of a run: it has neither config.json nor metrics.jsonl"
        )
    config = config or {}
    if "stages" in config:
        stages = [
            read_stage(name, workdir / f"{i:02d}_{name}", config.get(name) or {})
            for i, name in enumerate(config["stages"])
        ]
    else:
        stages = [read_stage(config.get("stage", workdir.name), workdir, config)]
    name = paths.absolute(workdir).name
    return Run(name, stages, provenance.read(workdir))


def read_stage(name: str, folder: Path, config: dict) -> Stage:
    """Reads the files of one stage, those that exist.

    Args:
      config: the stage's config, used until the folder has a config.json.
    """
    config = workdirs.read_config(folder) or config
    done = workdirs.read_done(folder)
    ended: Any = done or {}
    kind = ended.get("kind") or ""
    rows = read_rows(folder / METRICS_FILE)
    curves = _curves(rows)
    last = {name: values[-1] for name, (_, values) in curves.items()}
    timings = _curves(read_rows(folder / TIMING_FILE))
    if done is not None:
        status = "done"
    else:
        status = "unfinished" if paths.exists(folder) else "waiting"
    return Stage(
        name=name,
        kind=STAGES.get(kind, kind) or config.get("stage") or name,
        status=status,
        steps=ended.get("steps") or max((row["step"] for row in rows), default=0),
        total=config.get("steps") or ended.get("steps") or 0,
        seconds=ended.get("seconds"),
        last=last | _numbers(ended.get("metrics", {})),
        curves=curves,
        rates={
            name: statistics.median(values) for name, (_, values) in timings.items()
        },
        samples=read_jsonl(folder / "samples.jsonl", remedy=REMEDY),
        rollouts=read_jsonl(folder / SAMPLES_FILE, Rollout, REMEDY),
        provenance=provenance.read(folder),
        calibration=_calibration(folder) or ended.get("calibration"),
        config=config,
        goodput=clock.read(folder),
        corpus=_corpus(folder),
    )


def _corpus(folder: Path) -> summary.Summary | None:
    """Returns what `prepare` did to a corpus; None if the stage is another one."""
    return json_text.read_if_there(folder / summary.FILE, summary.Summary)


def _calibration(folder: Path) -> Calibration | None:
    """Returns how well a reward model is calibrated; None if it was not measured."""
    remedy = "restore it from a copy, or delete it to have a report without it"
    calibration = workdirs.read(folder / CALIBRATION, Calibration, remedy)
    if calibration is not None:
        sums.verify(folder, [CALIBRATION], remedy)
    return calibration


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
