"""Metrics: exact accumulation, JSON lines, TensorBoard, wandb, and the progress line.

A metric is a pair `(sum, weight)` until it is written. Pairs add up exactly over microbatches, steps and
hosts, where means would have to be re-weighted; the division happens once, in `finalize`.
"""

import hashlib
import importlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress

from rlhfjax import hosts, json_text, paths
from rlhfjax.errors import ConfigError
from rlhfjax.jsonl import read_jsonl, write_jsonl
from rlhfjax.paths import Path

Pairs = Mapping[
    str, tuple[Any, Any]
]  # {name: (sum, weight)}, scalars or arrays of numpy or jax
Real = float | int
UPLOAD_EVERY = (
    30.0  # seconds between uploads to a bucket, where no checkpoint asks for one
)


# ------------------------------------------------------------------ accumulation


def add(total: Pairs, more: Pairs) -> dict[str, tuple[Any, Any]]:
    """Adds two sets of metrics: (s1 + s2, w1 + w2) by name; a name in one of them only is taken as it is.

    Works on traced arrays too: it accumulates microbatches inside `jit` as it does steps outside.
    """
    out = dict(total)
    for name, (value, weight) in more.items():
        out[name] = (
            (out[name][0] + value, out[name][1] + weight)
            if name in out
            else (value, weight)
        )
    return out


def merge(*parts: Pairs) -> dict[str, tuple[Any, Any]]:
    """Adds any number of sets of metrics, from left to right."""
    out: dict[str, tuple[Any, Any]] = {}
    for part in parts:
        out = add(out, part)
    return out


def finalize(total: Pairs, prefix: str = "") -> dict[str, float]:
    """Turns pairs into means: {prefix + name: sum / weight}.

    Args:
      total: {name: (sum, weight)}. Arrays (pairs stacked by `lax.scan`, say) are first summed over all their
        axes, in float64.
      prefix: put before each name, for example `"sft/"`.

    Returns:
      Python floats. A metric of weight 0 was not observed, and is left out.
    """
    sums = {
        name: (_sum64(value), _sum64(weight)) for name, (value, weight) in total.items()
    }
    return {
        prefix + name: value / weight
        for name, (value, weight) in sums.items()
        if weight != 0
    }


def _sum64(x: Any) -> float:
    return float(np.sum(np.asarray(x, dtype=np.float64)))


# ------------------------------------------------------------------ files


def last_values(workdir: str | os.PathLike) -> dict[str, float]:
    """The last value of every metric in a workdir's metrics.jsonl; NaN for null."""
    values: dict[str, float] = {}
    for row in read_jsonl(paths.path(workdir) / "metrics.jsonl"):
        values |= {name: value for name, value in row.items() if name != "step"}
    return json_text.nan_for_null(values)


def _keep_until(path: Path, step: int | None) -> None:
    """Rewrites a file of lines, atomically, to those with `step` at most `step` (None: to none)."""
    if path.exists():
        write_jsonl(
            path,
            []
            if step is None
            else [row for row in read_jsonl(path) if row["step"] <= step],
        )


def _line(step: int, values: Mapping[str, Real]) -> str:
    """One JSON object: step first, names sorted, floats by repr, null for NaN and infinities."""
    floats = {name: float(values[name]) for name in sorted(values)}
    row = json_text.null_nonfinite(floats)
    return (
        json_text.encode({"step": int(step), **row}, f"metrics of step {step}") + "\n"
    )


class Writer:
    """Writes metrics to `metrics.jsonl`, timings to `timing.jsonl`, and both to TensorBoard (`tb/`).

    `metrics.jsonl` holds only what the run determines, so that a run killed and resumed ends with the same
    bytes; clocks go to `timing.jsonl`. A line reaches the operating system as soon as it is written, a bucket within
    UPLOAD_EVERY seconds; `flush` puts it on the disk or into the bucket, and belongs before every checkpoint, so that
    no checkpoint is newer than its metrics.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        primary: bool | None = None,
    ):
        """Opens the files of a workdir.

        Args:
          workdir: made if missing.
          resume_step: the step of the checkpoint the run goes on from: lines of later steps are dropped, for
            they will be written again. None starts from empty files.
          tensorboard: whether to write `tb/` as well.
          wandb: keyword arguments of `wandb.init` ({} for the defaults), or None to leave it alone.
          primary: False where nothing is written; None: on every host but the first.

        Raises:
          ConfigError: wandb is asked for and is not installed.
        """
        self._files: dict[str, io.TextIOBase] = {}
        self._tensorboard = self._wandb = self._mirror = None
        if not (hosts.first() if primary is None else primary):
            return
        names = ("metrics.jsonl", "timing.jsonl")
        self._mirror = paths.Mirror(paths.path(workdir), names)
        folder = self._mirror.folder
        self._wandb = (
            _start_wandb(folder, paths.path(workdir), wandb)
            if wandb is not None
            else None
        )
        paths.make_folder(folder)
        for name in names:
            _keep_until(folder / name, resume_step)
            self._files[name] = (folder / name).open("a", encoding="utf-8")
        self._tensorboard = (
            _start_tensorboard(folder, resume_step) if tensorboard else None
        )

    def write(self, step: int, metrics: Mapping[str, Real]) -> None:
        """Writes one line of metrics; a step may have several lines (training, evaluation)."""
        self._write("metrics.jsonl", step, metrics)

    def timing(self, step: int, timings: Mapping[str, Real]) -> None:
        """Writes one line of what the clock says (seconds, tokens a second): never the same twice."""
        self._write("timing.jsonl", step, timings)

    def _write(self, file: str, step: int, values: Mapping[str, Real]) -> None:
        if not values or file not in self._files:
            return
        self._files[file].write(_line(step, values))
        self._files[file].flush()
        for name, value in sorted(values.items()) if self._tensorboard else ():
            self._tensorboard.add_scalar(name, float(value), int(step))
        if self._wandb:
            self._wandb.log(dict(values), step=int(step))
        self._mirror.sync(UPLOAD_EVERY)

    def flush(self) -> None:
        """Puts every line so far where it is to stay."""
        for f in self._files.values():
            f.flush()
            os.fsync(f.fileno())
        if self._tensorboard:
            self._tensorboard.flush()
        if self._mirror:
            self._mirror.sync()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        self.flush()
        for f in self._files.values():
            f.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        if self._mirror:
            self._mirror.close()
        self._files, self._tensorboard, self._wandb, self._mirror = {}, None, None, None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _start_tensorboard(workdir: Path, resume_step: int | None) -> Any:
    from tensorboardX import (
        SummaryWriter,
    )  # here: half a second that `--help` need not pay

    first = 0 if resume_step is None else resume_step + 1
    return SummaryWriter(str(workdir / "tb"), purge_step=first, flush_secs=10)


def _start_wandb(folder: Path, workdir: Path, options: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            "config.wandb: wandb is not installed; pip install 'rlhfjax[wandb]', or leave it unset"
        ) from None
    # One workdir is one wandb run, however often it is resumed.
    name = hashlib.sha256(str(paths.absolute(workdir)).encode()).hexdigest()[:16]
    return wandb.init(**{"dir": str(folder), "id": name, "resume": "allow", **options})


# ------------------------------------------------------------------ progress


def duration(seconds: Real) -> str:
    """A length of time for people: `9s`, `3m05s`, `2h07m`, `-` when unknown."""
    if not math.isfinite(seconds):
        return "-"
    s = round(seconds)
    return (
        f"{s}s"
        if s < 60
        else f"{s // 60}m{s % 60:02d}s"
        if s < 3600
        else f"{s // 3600}h{s % 3600 // 60:02d}m"
    )


def headline(metrics: Mapping[str, Real]) -> str:
    """The number to watch: the reward where there is one, else the loss; `name value`, or nothing."""
    for wanted in ("reward", "loss"):
        for name, value in metrics.items():
            if name.rsplit("/", 1)[-1] == wanted:
                return f"{wanted} {value:.4g}"
    return ""


class _Nowhere(io.TextIOBase):
    """What hosts other than the first print into."""

    def write(self, text: str) -> int:
        return len(text)


class Progress:
    """One line of progress: title, step/total, percent, loss or reward, units a second, ETA.

    On a terminal the line stays in place (rich); elsewhere, in a log file, a plain line is printed at most
    every `interval` seconds, and always for the last step.
    """

    def __init__(
        self,
        total: int,
        unit: str = "tokens",
        *,
        title: str = "",
        start: int = 0,
        stream: io.TextIOBase | None = None,
        interval: Real = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts the clock.

        Args:
          total: the number of the last step.
          unit: what `count` of `update` counts, for the rate.
          title: the stage.
          start: the step a resumed run begins at; rate and ETA count from there.
          stream: where to print; None is stderr.
          interval: seconds between plain lines.
          clock: seconds, monotonic.
        """
        self._total, self._unit, self._title, self._interval, self._clock = (
            total,
            unit,
            title,
            interval,
            clock,
        )
        self._stream = (
            (sys.stderr if hosts.first() else _Nowhere()) if stream is None else stream
        )
        self._began, self._printed = clock(), -math.inf
        self._first: tuple[int, float] | None = (
            None  # step and time of the first update, after compilation
        )
        self._count, self._text, self._bar = 0.0, "", None
        console = rich.console.Console(file=self._stream)
        if console.is_terminal:
            columns = (
                "{task.description}",
                rich.progress.BarColumn(bar_width=None),
                "{task.fields[text]}",
            )
            self._bar = rich.progress.Progress(*columns, console=console, expand=True)
            self._task = self._bar.add_task(
                title, total=total, completed=start, text="compiling"
            )
            self._bar.start()

    def update(
        self, step: int, metrics: Mapping[str, Real] | None = None, count: Real = 0
    ) -> None:
        """Says that `step` is done, `count` units after the last update; the first call ends compilation."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        else:
            self._count += count
        self._text = self._describe(step, now, metrics or {})
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text)
        elif now - self._printed >= self._interval or step >= self._total:
            self._printed = now
            print(f"{self._title} {self._text}".strip(), file=self._stream, flush=True)

    def _describe(self, step: int, now: float, metrics: Mapping[str, Real]) -> str:
        first_step, first_time = self._first
        elapsed = now - first_time
        eta = (
            elapsed / (step - first_step) * (self._total - step)
            if step > first_step
            else math.inf
        )
        rate = f"{self._count / elapsed:,.0f} {self._unit}/s" if elapsed > 0 else ""
        percent = f"{100 * step / max(self._total, 1):.0f}%"
        end = (
            f"ETA {duration(eta)}"
            if step < self._total
            else f"took {duration(now - self._began)}"
        )
        return "  ".join(
            filter(
                None, (f"{step}/{self._total}", percent, headline(metrics), rate, end)
            )
        )

    def print(self, text: str) -> None:
        """Prints a line without breaking the progress line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Takes the line down; what it said last stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
