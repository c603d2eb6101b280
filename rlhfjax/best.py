"""The best parameters of a stage by a held-out metric, and whether a better evaluation is awaited.

    best/<step>/   parameters at the best evaluation so far, and at that of older checkpoints

What was evaluated is read from metrics.jsonl, of which a resumed run keeps the lines up to its
checkpoint. A resumed run therefore knows the record of that step, whatever came after it.
"""

import logging
import math
from typing import Any, NamedTuple

import jax

from rlhfjax import checkpoint, hosts, paths
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.config import TrainConfig
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.json_text import shown
from rlhfjax.metrics import METRICS_FILE, read_rows
from rlhfjax.paths import Path
from rlhfjax.state import TrainState
from rlhfjax.types import Metrics, PyTree

logger = logging.getLogger("rlhfjax")
FOLDER = "best"
_DIRECTIONS = ("min", "max")


class Record(NamedTuple):
    """An evaluation."""

    step: int
    value: float  # NaN: the metric was not finite


def validate(config: TrainConfig) -> None:
    """Validates keep_best and patience. Raises ConfigError."""
    stage, text = config.stage, config.keep_best
    if config.patience and not text:
        raise ConfigError(
            f"{stage}.patience={config.patience}: needs the metric that is to become better,"
            f" {stage}.keep_best"
        )
    if not text:
        return
    direction, _, name = text.partition(":")
    if direction not in _DIRECTIONS or not name:
        raise ConfigError(
            f"{stage}.keep_best={shown(text)}: expected min:METRIC or max:METRIC,"
            " such as min:val_loss"
        )
    if not config.eval_every:
        raise ConfigError(
            f"{stage}.keep_best={shown(text)}: needs {stage}.eval_every > 0;"
            " the only evaluation is that of the last step"
        )


class Best:
    """The record of a stage: its best evaluation, whose parameters are in best/.

    Of equal values the first is best, and a value that is not finite is never best. Without
    keep_best there is no record, and all methods do nothing.

    Args:
      resumed_step: the step of the checkpoint that the run resumes from; None: a fresh start.
    Raises:
      CheckpointError: the parameters of the record are gone.
    """

    def __init__(self, config: TrainConfig, workdir: Path, resumed_step: int | None):
        self._stage = config.stage
        self._patience = config.patience
        self._direction, _, name = config.keep_best.partition(":")
        self._name = full_name(config.stage, name)
        self._folder = paths.absolute(workdir) / FOLDER
        self._history: list[Record] = []
        if config.keep_best and resumed_step is not None:
            evaluations = hosts.share(lambda: _read(workdir, self._name))
            for step, value in evaluations:
                if step <= resumed_step:
                    self._history.append(Record(step, _number(value)))
            self._validate_there()

    def _validate_there(self) -> None:
        record = self.record
        if record is not None and not self._folder_of(record.step).exists():
            raise CheckpointError(
                f"{self._folder_of(record.step)}: the parameters of the best evaluation are not"
                " there; restore them from a copy, or start again in a new --workdir"
            )

    @property
    def record(self) -> Record | None:
        """The best evaluation so far."""
        return self._record_at(self._history)

    def is_exhausted(self) -> bool:
        """Returns whether the last `patience` evaluations were no better than one before them."""
        if not self._patience or len(self._history) < self._patience:
            return False
        record = self.record
        since = [
            entry for entry in self._history if not record or entry.step > record.step
        ]
        return len(since) >= self._patience

    def evaluated(self, step: int, values: dict[str, float], state: TrainState) -> None:
        """Takes the metrics of an evaluation; saves the parameters if they are the best so far.

        Raises:
          ConfigError: the evaluation has no such metric.
        """
        if not self._direction:
            return
        if self._name not in values:
            raise ConfigError(
                f"{self._stage}.keep_best={self._direction}:{self._name}: no metric of an"
                f" evaluation; expected one of {', '.join(sorted(values))}"
            )
        self._history.append(Record(step, values[self._name]))
        if self.record == self._history[-1]:
            checkpoint.save_tree(self._folder_of(step), _kept(state))
        elif self.is_exhausted():
            logger.info("%s: stops at step %d; %s", self._stage, step, self._summary())

    def prune(self, checkpoints: Checkpoints) -> None:
        """Removes all parameters but the best ones now and those at the checkpoints' steps."""
        if not self._direction:
            return
        histories = [
            [entry for entry in self._history if entry.step <= step]
            for step in checkpoints.steps()
        ]
        records = [self._record_at(history) for history in [*histories, self._history]]
        needed = {str(record.step) for record in records if record}

        def remove() -> None:
            for folder in paths.children(self._folder):
                if folder.name not in needed:
                    paths.remove(folder)

        hosts.share(remove)

    def state(self, state: TrainState) -> TrainState:
        """Returns the state with the best parameters; without a record as it is."""
        if not self._direction:
            return state
        record = self.record
        if record is None:
            logger.warning(
                "%s: no evaluation had a finite %s; the last parameters are kept",
                self._stage,
                self._name,
            )
            return state
        logger.info("%s: keeps step %d; %s", self._stage, record.step, self._summary())
        if record.step == int(state.step):
            return state
        abstract = jax.tree.map(_abstract, _kept(state))
        kept = checkpoint.load_tree(self._folder_of(record.step), abstract)
        return state.replace(params=kept["params"], extra=kept["extra"])

    def metrics(self) -> Metrics:
        """Returns the step and the value of the record."""
        record = self.record
        if record is None:
            return {}
        return {"best_step": (record.step, 1.0), "best_value": (record.value, 1.0)}

    def _summary(self) -> str:
        record = self.record
        best = "never finite" if record is None else f"{record.value:.5g}"
        step = "" if record is None else f" at step {record.step}"
        return f"{self._direction} {self._name}: {best}{step}"

    def _folder_of(self, step: int) -> Path:
        return self._folder / str(step)

    def _record_at(self, history: list[Record]) -> Record | None:
        finite = [entry for entry in history if math.isfinite(entry.value)]
        sign = -1.0 if self._direction == "max" else 1.0
        return min(finite, key=lambda entry: sign * entry.value, default=None)


def full_name(stage: str, name: str) -> str:
    """Returns the name of a metric with its stage, which an option may leave out."""
    return name if name.startswith(f"{stage}/") else f"{stage}/{name}"


def describe(config: Any, metrics: dict[str, float]) -> dict[str, Any] | None:
    """Returns what done.json says of the record of a stage; None if it keeps none.

    Args:
      metrics: the last metrics of the stage.
    """
    step = metrics.get(f"{config.stage}/best_step")
    if not getattr(config, "keep_best", "") or step is None:
        return None
    value = metrics[f"{config.stage}/best_value"]
    return {"metric": config.keep_best, "step": int(step), "value": value}


def _read(workdir: Path, name: str) -> list[tuple[int, float | None]]:
    """Returns the steps and values of a metric in metrics.jsonl."""
    rows = read_rows(workdir / METRICS_FILE)
    return [(row["step"], row[name]) for row in rows if name in row]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _kept(state: TrainState) -> PyTree:
    """Returns the parts of a state that make up the stage's models."""
    return {"params": state.params, "extra": state.extra}


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
