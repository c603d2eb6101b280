"""The progress line of a stage, and numbers in it for people."""

import contextlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rich.console
import rich.progress

from rlhfjax import hosts

Real = float | int


def duration(seconds: Real) -> str:
    """Returns a length of time for people: `9s`, `3m05s`, `2h07m`, or `-` if unknown."""
    if not math.isfinite(seconds):
        return "-"
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return f"{s // 3600}h{s % 3600 // 60:02d}m"


# (seconds below which, seconds to a multiple of which) an estimate is rounded.
_ROUNDED_TO = ((60, 5), (300, 10), (3600, 60), (math.inf, 600))


def about(seconds: Real) -> str:
    """Returns an estimate for people: `20s`, `1m30s`, `7m`, `2h10m`."""
    step = next(step for limit, step in _ROUNDED_TO if seconds < limit)
    rounded = max(5, step * round(seconds / step))
    text = duration(rounded)
    return text.removesuffix("00s") if rounded >= 60 else text


def headline(metrics: Mapping[str, Real]) -> str:
    """Returns `reward VALUE` if there is a reward, else `loss VALUE`, else an empty text."""
    for wanted in ("reward", "loss"):
        for name, value in metrics.items():
            if name.rsplit("/", 1)[-1] == wanted:
                return f"{wanted} {value:.4g}"
    return ""


@contextlib.contextmanager
def followed_by(seconds: float | None) -> Iterator[None]:
    """Tells every `Progress` inside of the block how long the recipe's later stages take."""
    before = Progress.seconds_after
    Progress.seconds_after = seconds
    try:
        yield
    finally:
        Progress.seconds_after = before


class _Discard(io.TextIOBase):
    """The stream of hosts that print no progress."""

    def write(self, text: str) -> int:
        return len(text)


class Progress:
    """Shows one line of progress: title, step/total, percent, reward or loss, rate, ETA.

    On a terminal the line is updated in place (rich). Elsewhere, as in a log file, a plain line is
    printed at most every `interval` seconds, and always at the last step.

    In a recipe the line also has the time that the recipe still takes, if that is known.
    """

    seconds_after: float | None = None
    """What the recipe's later stages take, in seconds; None: unknown, or no recipe."""

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
        """Starts to measure time.

        Args:
          total: the number of the last step.
          unit: the unit of `count` in `update`, shown as units per second.
          title: the name of the stage.
          start: the step that a resumed run starts at; rate and ETA count from there.
          stream: where to print; None is stderr on the first host and nowhere on others.
          interval: seconds between plain lines.
          clock: returns monotonic seconds.
        """
        output: Any = stream  # sys.stderr need not be a TextIOBase
        if output is None:
            output = sys.stderr if hosts.first() else _Discard()
        self._total = total
        self._unit = unit
        self._title = title
        self._stream = output
        self._interval = interval
        self._clock = clock
        self._started = clock()
        self._printed = -math.inf
        # Step and time of the first update, which comes after compilation.
        self._first: tuple[int, float] | None = None
        self._count = 0.0  # units since the first update
        self._bar: rich.progress.Progress | None = None
        console = rich.console.Console(file=output)
        if console.is_terminal:
            columns = (
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = rich.progress.Progress(*columns, console=console, expand=True)
            self._task = self._bar.add_task(
                title, total=total, completed=start, text="compiling"
            )
            self._bar.start()

    def update(
        self, step: int, metrics: Mapping[str, Real] | None = None, count: Real = 0
    ) -> None:
        """Shows that `step` is done; it consumed `count` units. The first call ends compilation."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        else:
            self._count += count
        first_step, first_time = self._first
        elapsed = now - first_time
        parts = [
            f"{step}/{self._total}",
            f"{100 * step / max(self._total, 1):.0f}%",
            headline(metrics or {}),
        ]
        if elapsed > 0:
            parts.append(f"{self._count / elapsed:,.0f} {self._unit}/s")
        if step >= self._total:
            parts.append(f"took {duration(now - self._started)}")
        elif step > first_step:
            seconds_per_step = elapsed / (step - first_step)
            remaining = seconds_per_step * (self._total - step)
            parts.append(f"ETA {duration(remaining)}")
            if self.seconds_after:
                left = about(remaining + self.seconds_after)
                parts.append(f"recipe about {left} left")
        else:
            parts.append("ETA -")
        text = "  ".join(filter(None, parts))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._printed >= self._interval or step >= self._total:
            self._printed = now
            print(f"{self._title} {text}".strip(), file=self._stream, flush=True)

    def print(self, text: str) -> None:
        """Prints a line without breaking the progress line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the progress line; its last text stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
