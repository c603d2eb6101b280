"""Where the wall time of a stage goes, over all of its starts: goodput is the share of it that trains.

step          training: steps dispatched, and waited for
compile       lowering and compiling, whatever it is that is compiled
data          making the next batch; the devices may be at work on the step before, so that it is the most they waited
eval, checkpoint
imports       of the process, and joining other hosts; build: data and models read; restore: the first state
restart       from the last checkpoint of a start that did not end to the next start: steps lost, and nobody there
other         the rest
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping

import jax

import rlhfjax
from rlhfjax import hosts
from rlhfjax.config import write_json
from rlhfjax.paths import Path

FILE = "goodput.json"
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
_COMPILING = (
    "/jax/core/compile/backend_compile_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


class Clock:
    """Every second since a stage began, in exactly one part.

    A second start in the same workdir goes on from what `save` wrote last.
    """

    _running: "Clock | None" = None  # what compilation is told to
    _counted = False  # whether a clock has this process's own start

    def __init__(self, workdir: Path):
        self._path = workdir / FILE
        kept = hosts.share(
            lambda: json.loads(self._path.read_text()) if self._path.exists() else {}
        )
        self.seconds = dict.fromkeys(PARTS, 0.0) | kept.get("seconds", {})
        self.starts = kept.get("starts", 0) + 1
        began = time.time() if Clock._counted else rlhfjax.BEGAN
        self.seconds["restart"] += max(0.0, began - kept.get("at", began))
        self._before = dict(self.seconds)
        self._part, self._since = "imports", began
        self._switch("build")
        if not Clock._counted:
            Clock._counted = True
            jax.monitoring.register_event_duration_secs_listener(_compiled)
        Clock._running = self

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within is this part, and not the one around it."""
        before = self._part
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def go_on(self) -> None:
        """Ends the building: what is not named from here on is `other`."""
        self._switch("other")

    def _switch(self, part: str) -> None:
        now = time.time()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def compiled(self, seconds: float) -> None:
        self.seconds["compile"] += seconds
        self.seconds[self._part] -= seconds

    def goodput(self) -> float:
        """Seconds of steps over all seconds so far, restarts among them."""
        self._switch(self._part)
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def summary(self) -> dict[str, float]:
        """goodput and seconds_PART, for the metrics."""
        return {"goodput": self.goodput()} | {
            f"seconds_{name}": value for name, value in self.seconds.items()
        }

    def save(self) -> None:
        """Writes what a later start goes on from; belongs beside every checkpoint."""
        goodput = self.goodput()
        kept = {
            "at": time.time(),
            "starts": self.starts,
            "goodput": goodput,
            "seconds": self.seconds,
        }
        write_json(self._path, kept)

    def started(self) -> str:
        """How long this start took up to here, and what of it went where; for the log."""
        self._switch(self._part)
        own = {
            name: self.seconds[name] - self._before[name]
            for name in PARTS
            if name != "restart"
        }
        return f"started in {sum(own.values()):.1f} s: {describe(own)}"


def describe(seconds: Mapping[str, float]) -> str:
    """`compile 3.1 s, step 0.2 s`, longest first, without what is next to nothing."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{name} {value:.1f} s" for name, value in longest if value >= 0.05
    )


def _compiled(event: str, seconds: float, **_: object) -> None:
    if event in _COMPILING and Clock._running is not None:
        Clock._running.compiled(seconds)
