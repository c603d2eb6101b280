"""`log.profile`: a trace of a few steps, in which every program has its name."""

import re
from typing import Any

import jax

from rlhfjax import hosts
from rlhfjax.config import TrainConfig
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Mirror, Path

FOLDER = "profile"


def validate(config: TrainConfig) -> None:
    """Validates log.profile. Raises ConfigError."""
    steps = _traced_steps(config.log.profile)
    if steps and steps[0] > config.steps:
        raise ConfigError(
            f"log.profile={config.log.profile!r}: there are {config.steps} steps"
        )


def _traced_steps(text: str) -> range:
    """Returns the steps of "FIRST:LAST", both counted from 1 as in metrics.jsonl."""
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"log.profile={text!r}: expected FIRST:LAST, such as 10:15")
    return range(first, last + 1)


class Profile:
    """Writes the trace of the steps of log.profile into the workdir, on the first host.

    A run that ends earlier leaves the trace of the steps that it has done; one that resumes among
    the steps traces the rest of them.
    """

    def __init__(self, config: TrainConfig, workdir: Path):
        self._steps = _traced_steps(config.log.profile) if hosts.first() else range(0)
        self._folder = workdir / FOLDER
        self._output: Mirror | None = None  # while a trace is taken

    def before_step(self, step: int, state: Any) -> None:
        if step in self._steps and self._output is None:
            jax.block_until_ready(state)  # no step before this one is in the trace
            self._output = Mirror(self._folder)
            jax.profiler.start_trace(self._output.folder)

    def after_step(self, step: int, state: Any) -> None:
        if self._output is not None and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still being taken."""
        if self._output is not None:
            jax.profiler.stop_trace()
            self._output.close()
            self._output = None
