"""Accounts for the wall time of a stage over all of its starts.

Goodput is the share of the wall time that training steps took. Every second is in one part:

step          dispatching training steps and waiting for them
compile       lowering and compiling any program
data          waiting for the next batch; the devices may still be computing the previous step
eval          evaluating
checkpoint    saving, and writing the stage's models at the end
imports       starting the process, importing modules, joining other hosts
build         reading data and models
restore       creating or restoring the first state
restart       from the last checkpoint of a start that was cut off to the next start
other         everything else
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Annotated

import jax
from annotated_types import Interval
from typing_extensions import TypedDict

import rlhfjax
from rlhfjax import hosts, workdirs
from rlhfjax.config import write_json
from rlhfjax.paths import Path
from rlhfjax.ranges import PositiveCount, Share
from rlhfjax.workdirs import Seconds

FILE = "goodput.json"
_REMEDY = (
    "restore it from a copy, or delete it to count the wall time from this start on"
)
PARTS = (
    "step",
    "compile",
    "data",
    "eval",
    "checkpoint",
    "imports",
    "build",
    "restore",
    "restart",
    "other",
)
_COMPILE_EVENTS = (
    "/jax/core/compile/backend_compile_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


class Record(TypedDict):
    """What `Clock.save` writes. A part that is absent, in an older file, is 0."""

    at: Annotated[float, Interval(ge=0, le=3.2e10)]  # seconds since 1970
    starts: PositiveCount
    goodput: Share
    seconds: dict[str, Seconds]


def read(workdir: Path) -> Record | None:
    """Returns the wall time of a stage; None if it has not been saved.

    Raises:
      DataError: the file is damaged.
    """
    record = workdirs.read(workdir / FILE, Record, _REMEDY)
    if record is not None:
        record["seconds"] = dict.fromkeys(PARTS, 0.0) | record["seconds"]
    return record


class Clock:
    """Adds every second since the stage's first start to exactly one part.

    A later start in the same workdir continues from what `save` wrote last.
    """

    _current: "Clock | None" = None  # the clock that compilation times are added to
    _process_start_counted = False

    def __init__(self, workdir: Path):
        self._path = workdir / FILE
        saved = hosts.share(lambda: read(workdir))
        started = time.time() if Clock._process_start_counted else rlhfjax.BEGAN
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.starts = 1
        if saved is not None:
            self.seconds = dict(saved["seconds"])
            self.seconds["restart"] += max(0.0, started - saved["at"])
            self.starts += saved["starts"]
        self._seconds_before = dict(self.seconds)
        self._part, self._since = "imports", started
        self._switch("build")
        if not Clock._process_start_counted:
            Clock._process_start_counted = True
            jax.monitoring.register_event_duration_secs_listener(_on_duration)
        Clock._current = self

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside the block as this part, not as that of an enclosing block."""
        enclosing = self._part
        self._switch(name)
        try:
            yield
        finally:
            self._switch(enclosing)

    def end_build(self) -> None:
        """Ends the part `build`; from here on, time outside of any block is `other`."""
        self._switch("other")

    def _switch(self, part: str) -> None:
        now = time.time()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def add_compilation(self, seconds: float) -> None:
        """Moves seconds that were spent on compilation from the current part to `compile`."""
        self.seconds["compile"] += seconds
        self.seconds[self._part] -= seconds

    def goodput(self) -> float:
        """Returns the seconds of training steps over all seconds so far, restarts included."""
        self._switch(self._part)
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def worked(self) -> float:
        """Returns the seconds of all starts so far, without the time between them."""
        self._switch(self._part)
        return sum(self.seconds.values()) - self.seconds["restart"]

    def summary(self) -> dict[str, float]:
        """Returns the metrics goodput and seconds_PART."""
        goodput = {"goodput": self.goodput()}
        return goodput | {f"seconds_{part}": s for part, s in self.seconds.items()}

    def save(self) -> None:
        """Writes what a later start continues from. Call it with every checkpoint."""
        goodput = self.goodput()
        content = {
            "at": time.time(),
            "starts": self.starts,
            # A part is negative if programs were compiled side by side.
            "goodput": min(1.0, max(0.0, goodput)),
            "seconds": {part: max(0.0, s) for part, s in self.seconds.items()},
        }
        write_json(self._path, content)

    def describe_start(self) -> str:
        """Returns how long this start has taken so far and how the time divides, for the log."""
        self._switch(self._part)
        spent = {
            part: self.seconds[part] - self._seconds_before[part]
            for part in PARTS
            if part != "restart"
        }
        return f"started in {sum(spent.values()):.1f} s: {describe(spent)}"


def describe(seconds: Mapping[str, float]) -> str:
    """Returns `compile 3.1 s, step 0.2 s`, longest first, without parts under 0.05 s."""
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{part} {value:.1f} s" for part, value in longest_first if value >= 0.05
    )


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _COMPILE_EVENTS and Clock._current is not None:
        Clock._current.add_compilation(duration_secs)
