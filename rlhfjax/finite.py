"""Stops a run whose numbers are no longer finite."""

import math
from typing import NoReturn

from rlhfjax import state as states
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.config import TrainConfig
from rlhfjax.errors import NonFiniteError


class FiniteGuard:
    """Stops a run whose numbers are not finite; the error names the last good checkpoint."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints):
        self._config = config
        self._checkpoints = checkpoints

    def check_metrics(self, step: int, values: dict[str, float]) -> None:
        if self._config.on_nonfinite != "error":
            return
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad:
            self._stop(f"{bad[0]} is {values[bad[0]]}", step)

    def check_state(self, step: int, state: states.TrainState) -> None:
        """Raises before a checkpoint that could not be resumed from, whatever `on_nonfinite` is."""
        if not states.all_finite(state):
            self._stop(f"the state of {self._config.stage} is no longer finite", step)

    def _stop(self, problem: str, step: int) -> NoReturn:
        self._checkpoints.wait()
        good_steps = self._checkpoints.steps()
        advice = "no checkpoint"
        if good_steps:
            last_good = self._checkpoints.directory / str(good_steps[-1])
            advice = f"the last good checkpoint is {last_good}"
        raise NonFiniteError(f"{problem} at step {step}; {advice}")
