"""Metrics: exact accumulation, JSON lines, TensorBoard and wandb.

A metric is a pair `(sum, weight)` until it is written. Pairs add up exactly over microbatches,
steps and hosts, whereas means would have to be re-weighted. `finalize` divides, once.
"""

import os
from collections.abc import Iterable, Mapping
from typing import IO, Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from rlhfjax import hosts, json_text, paths, trackers
from rlhfjax.errors import Preempted
from rlhfjax.jsonl import REMEDY, read_jsonl, write_jsonl
from rlhfjax.paths import Path
from rlhfjax.ranges import Count
from rlhfjax.types import Metric, Metrics

Real = float | int
METRICS_FILE, TIMING_FILE = "metrics.jsonl", "timing.jsonl"
SAMPLES_FILE = "samples_steps.jsonl"  # responses during training
UPLOAD_EVERY = 30.0  # seconds between uploads to a bucket, beside those at checkpoints


# ------------------------------------------------------------------ accumulation


def add(total: Mapping[str, Metric], part: Mapping[str, Metric]) -> Metrics:
    """Adds two sets of metrics by name: (s1 + s2, w1 + w2). A name in one of them is taken as is.

    It works on traced arrays too, and so accumulates microbatches inside `jit`, and steps outside.
    """
    out = dict(total)
    for name, (value, weight) in part.items():
        if name in out:
            total_value, total_weight = out[name]
            out[name] = (total_value + value, total_weight + weight)
        else:
            out[name] = (value, weight)
    return out


def merge(*parts: Mapping[str, Metric]) -> Metrics:
    """Adds any number of sets of metrics, from left to right."""
    out: Metrics = {}
    for part in parts:
        out = add(out, part)
    return out


def finalize(total: Mapping[str, Metric], prefix: str = "") -> dict[str, float]:
    """Returns the means {prefix + name: sum / weight} as Python floats.

    Args:
      total: {name: (sum, weight)}. Arrays, such as pairs that `lax.scan` stacked, are summed over
        all their axes first, in float64.
      prefix: put before each name, for example `"sft/"`.

    Returns:
      Only metrics that were observed: those of weight 0 are left out.
    """
    means = {}
    for name, (value, weight) in total.items():
        weight_sum = _sum64(weight)
        if weight_sum != 0:
            means[prefix + name] = _sum64(value) / weight_sum
    return means


def _sum64(x: Any) -> float:
    return float(np.sum(np.asarray(x, dtype=np.float64)))


# ------------------------------------------------------------------ files


class Values(TypedDict, extra_items=float | None):
    """Metrics by their names, in a recipe with the stage."""

    stage: NotRequired[str]


class Row(TypedDict, extra_items=float | None):
    """A line of metrics.jsonl or timing.jsonl: a step, and metrics by their names."""

    step: Count
    stage: NotRequired[str]  # in the metrics.jsonl of a recipe


class _OfStep(TypedDict, extra_items=Any):
    """A line of any file that a resumed run continues."""

    step: Count


def read_rows(path: Path, hint: Any = Row) -> list[dict[str, Any]]:
    """Returns the lines of a stage's metrics.jsonl or timing.jsonl; [] if there is no file.

    A line has an int `step` and numbers by their names, None for one that was not finite. A
    half-written last line is left out.

    Args:
      hint: the type of a line; `Values` if no step is needed.

    Raises:
      DataError: another line is damaged; the message names it and says what to do.
    """
    return read_jsonl(path, hint, REMEDY)


def last_values(workdir: str | os.PathLike) -> dict[str, float]:
    """Returns the last value of every metric in a workdir's metrics.jsonl; null is read as NaN."""
    values: dict[str, float] = {}
    for row in read_rows(paths.path(workdir) / METRICS_FILE):
        values |= row
    values.pop("step", None)
    return json_text.nan_for_null(values)


def _drop_lines_after(path: Path, step: int | None) -> None:
    """Rewrites a file, atomically, without the lines of later steps (None: without any line)."""
    if not paths.exists(path):
        return
    kept = []
    if step is not None:
        hint = _OfStep if path.name == SAMPLES_FILE else Row
        kept = [row for row in read_rows(path, hint) if row["step"] <= step]
    write_jsonl(path, kept)


def _line(step: int, values: Mapping[str, Real]) -> str:
    """Returns one JSON object: step first, names sorted, null for NaN and infinities."""
    floats = {name: float(values[name]) for name in sorted(values)}
    row = {"step": int(step), **json_text.null_nonfinite(floats)}
    return json_text.encode(row, f"metrics of step {step}") + "\n"


class Writer:
    """Writes metrics to `metrics.jsonl`, timings to `timing.jsonl`, both to TensorBoard (`tb/`).

    `metrics.jsonl` holds only what the run determines, so that a run that is killed and resumed
    ends with the same bytes. So does `samples_steps.jsonl`. Wall times go to `timing.jsonl`.

    A line reaches the operating system as soon as it is written, and a bucket within UPLOAD_EVERY
    seconds. `flush` forces lines to the disk or the bucket. Call it before every checkpoint, so
    that no checkpoint is newer than its metrics.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int | None = None,
        *,
        samples: bool = False,
        tensorboard: bool = True,
        wandb: str = "",
        primary: bool | None = None,
    ):
        """Opens the files of a workdir.

        Args:
          workdir: created if missing.
          resume_step: the step of the checkpoint that the run resumes from. Lines of later steps
            are dropped, because they will be written again. None starts from empty files.
          samples: whether to write `samples_steps.jsonl` as well.
          tensorboard: whether to write `tb/` as well.
          wandb: project in Weights & Biases; empty: off.
          primary: whether this process writes at all; None: only the first host does.

        Raises:
          ConfigError: wandb is requested, and is not installed or does not start.
        """
        self._files: dict[str, IO[str]] = {}
        self._tensorboard: Any = None
        self._wandb: trackers.Wandb | None = None
        self._mirror: paths.Mirror | None = None
        if not (hosts.first() if primary is None else primary):
            return
        names = [METRICS_FILE, TIMING_FILE]
        if samples:
            names.append(SAMPLES_FILE)
        workdir = paths.path(workdir)
        self._mirror = paths.Mirror(workdir, names)
        folder = self._mirror.folder
        if wandb:
            self._wandb = trackers.Wandb(workdir, wandb)
        paths.make_folder(folder)
        for name in names:
            _drop_lines_after(folder / name, resume_step)
            self._files[name] = (folder / name).open("a", encoding="utf-8")
        if tensorboard:
            self._tensorboard = trackers.tensorboard(folder, workdir, resume_step)

    def write(self, step: int, metrics: Mapping[str, Real]) -> None:
        """Writes one line of metrics. A step may have several lines (training, evaluation)."""
        self._write(METRICS_FILE, step, metrics)

    def timing(self, step: int, timings: Mapping[str, Real]) -> None:
        """Writes one line of wall times and rates, which differ from run to run."""
        self._write(TIMING_FILE, step, timings)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes responses of a step, one line each."""
        if self._mirror is None:
            return
        for row in rows:
            line = json_text.encode({"step": int(step), **row}, SAMPLES_FILE)
            self._files[SAMPLES_FILE].write(line + "\n")
        self._files[SAMPLES_FILE].flush()

    def _write(self, file: str, step: int, values: Mapping[str, Real]) -> None:
        if not values or self._mirror is None:
            return
        self._files[file].write(_line(step, values))
        self._files[file].flush()
        if self._tensorboard:
            for name, value in sorted(values.items()):
                self._tensorboard.add_scalar(name, float(value), int(step))
        if self._wandb:
            self._wandb.log(int(step), values)
        self._mirror.sync(UPLOAD_EVERY)

    def flush(self) -> None:
        """Forces all lines so far to the disk or the bucket."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard:
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.sync()
        if self._mirror:
            self._mirror.sync()

    def close(self, failed: bool = False) -> None:
        """Flushes and closes everything. A second call does nothing.

        Args:
          failed: wandb marks the run as failed.
        """
        self.flush()
        for file in self._files.values():
            file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.close(failed)
        if self._mirror:
            self._mirror.close()
        self._files = {}
        self._tensorboard = self._wandb = self._mirror = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, Preempted))
