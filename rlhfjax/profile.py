"""Writes the profiler trace that `log.profile` asks for; each program is named in it."""

import re
from typing import Any

import jax

from rlhfjax import hosts
from rlhfjax.config import TrainConfig
from rlhfjax.errors import ConfigError
from rlhfjax.json_text import shown
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
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"log.profile={shown(text)}: expected FIRST:LAST, such as 10:15"
        )
    return range(first, last + 1)


class Profile:
    """Traces the steps of log.profile and writes the trace to the workdir, on the first host.

    A run that ends before the last of these steps leaves the trace of those it did. A run that
    resumes between them traces the remaining ones.
    """

    def __init__(self, config: TrainConfig, workdir: Path):
        self._steps = _traced_steps(config.log.profile) if hosts.first() else range(0)
        self._folder = workdir / FOLDER
        self._output: Mirror | None = None  # set while a trace is taken

    def before_step(self, step: int, state: Any) -> None:
        if step in self._steps and self._output is None:
            jax.block_until_ready(state)  # keeps earlier steps out of the trace
            self._output = Mirror(self._folder)
            jax.profiler.start_trace(self._output.folder)

    def after_step(self, step: int, state: Any) -> None:
        if self._output is not None and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends and writes the trace if one is being taken."""
        if self._output is not None:
            jax.profiler.stop_trace()
            self._output.close()
            self._output = None
