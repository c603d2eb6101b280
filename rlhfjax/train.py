"""The loop: the only one. It knows no stage by name.

Its order is deliberate. At step n, before the n-th update (counting from 0):

  1. evaluate the state, when it is due;
  2. save the state and the position of the data. Saving before `next` is what makes a resumed run neither replay nor
     skip a batch;
  3. take the next batch;
  4. dispatch the step;
  5. read the metrics of the step before, while the device works on this one.

Every line of metrics.jsonl up to step n is on the disk before the checkpoint of step n, and a resumed run drops the
lines after its checkpoint, so that an interrupted run ends with the same bytes as one that was not.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from rlhfjax import hosts
from rlhfjax import metrics as metric
from rlhfjax import state as states
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.clock import Clock
from rlhfjax.config import TrainConfig, write_json
from rlhfjax.errors import CheckpointError, ConfigError, NonFiniteError, Preempted, first_line
from rlhfjax.interop import peft, store
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.stage import Stage

_GO_ON, _SAVE, _STOP = 0, 1, 2  # what a host wishes at a step; the largest wish of all hosts decides


def run(
    stage: Stage, config: TrainConfig, workdir: Path, layout: Layout, clock: Clock | None = None
) -> dict[str, float]:
    """Trains a stage to its last step, from its beginning or from the workdir's latest checkpoint.

    Returns:
      The last value of every metric.
    Raises:
      NonFiniteError: a loss or gradient is NaN or infinite (unless on_nonfinite is "skip").
      Preempted: SIGTERM came; the state is saved.
    """
    key, clock = jax.random.key(config.seed), clock or Clock(workdir)
    batches = stage.batches  # opened before anything is written: a wrong path is corrected in place
    with layout.use(), _stop_on_sigterm() as stopping, Checkpoints(workdir, config.checkpoint) as checkpoints:
        with clock.part("restore"):
            state, resumed = _first_state(stage, key, layout, checkpoints)
        start = 0 if resumed is None else resumed
        outputs = {
            "tensorboard": config.log.tensorboard,
            "wandb": {"project": config.log.wandb} if config.log.wandb else None,
        }
        with (
            metric.Writer(workdir, resumed, **outputs) as writer,
            metric.Progress(config.steps, stage.unit, title=config.stage, start=start) as progress,
        ):
            log = _Log(config, stage, writer, progress, checkpoints, start, clock)
            clock.go_on()
            clock.save()
            vote = hosts.Vote()  # of all hosts, so that they save and stop at the same step
            timer = _SaveTimer(config.checkpoint.minutes)
            for step in range(start, config.steps + 1):
                wish = _STOP if stopping.is_set() else _SAVE if timer.is_due() else _GO_ON
                decision, last = vote(wish), step == config.steps
                stop = decision == _STOP
                save = decision != _GO_ON or _due(step, config.checkpoint.every, last)
                if step != resumed and _due(step, config.eval_every, last):
                    log.flush()
                    with clock.part("eval"):
                        log.evaluate(step, stage.evals(state))
                if step != resumed and save:
                    log.flush()
                    with clock.part("checkpoint"):
                        log.check_state(step, state)
                        if last:
                            log.evaluate(step, _finish(stage, state, workdir, layout))
                        writer.flush()
                        checkpoints.save(step, state, batches.get_state())
                    timer.restart()
                    log.clock(step)
                if stop or (last and hosts.anywhere(stopping.is_set())):
                    checkpoints.wait()
                    raise Preempted(f"{config.stage} stopped at step {step}: saved; the same command goes on from here")
                if last:
                    break
                with clock.part("data"):
                    batch = layout.put(next(batches))
                with clock.part("step"):
                    state, pairs = stage.step(state, batch, jax.random.fold_in(key, step))
                log.later(step + 1, pairs)
    return hosts.share(lambda: metric.last_values(workdir))


def evaluate(stage: Stage, config: TrainConfig, workdir: Path, layout: Layout) -> dict[str, float]:
    """The stage's held-out metrics for its latest checkpoint.

    Raises:
      CheckpointError: there is none.
    """
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        restored = checkpoints.restore(_abstract_state(stage, jax.random.key(0), layout))
    if restored is None:
        raise CheckpointError(f"{workdir}: no checkpoint to evaluate")
    return metric.finalize(hosts.whole(stage.evals(restored[0])), f"{config.stage}/")


def _finish(stage: Stage, state: states.TrainState, workdir: Path, layout: Layout) -> Any:
    """Keeps the stage's models; before the last save, so that a run killed in between does it again."""
    finished = stage.finish(state)
    for name, model in finished.models.items():
        store.save(workdir / name, model)
    for name, content in finished.files.items():
        write_json(workdir / name, content)
    for name, (model, adapters) in finished.adapters.items():
        _save_adapters(workdir / name, model, adapters, layout)
    return finished.pairs


def _save_adapters(folder: Path, model: Any, adapters: Any, layout: Layout) -> None:
    """Adapters as PEFT has them, by one process, which gathers them all; a model that PEFT does not know has none."""
    whole = jax.device_get(jax.jit(lambda x: x, out_shardings=layout.replicated)(adapters))
    if hosts.first():
        try:
            peft.save_peft(folder, model, whole)
        except ConfigError as e:
            logging.getLogger("rlhfjax").warning("%s is left out, the merged model is there: %s", folder, e)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0 and step > 0)


class _SaveTimer:
    """Says when `minutes` have passed on the first host since the last save, or since it said so.

    Hosts' clocks differ: the first host alone decides, and `hosts.Vote` takes its word to the others.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def is_due(self) -> bool:
        if not self._seconds or not hosts.first() or time.monotonic() - self._began < self._seconds:
            return False
        self.restart()  # with several hosts the save comes one step later; until then it is asked for once
        return True


def _first_state(
    stage: Stage, key: jax.Array, layout: Layout, checkpoints: Checkpoints
) -> tuple[states.TrainState, int | None]:
    """The state to go on from and the step it was saved at, None where the stage begins."""
    saved = checkpoints.restore(_abstract_state(stage, key, layout))
    if saved is None:
        return stage.start(states.create_sharded(stage.init, key, stage.axes, layout)), None
    state, position = saved
    try:
        stage.batches.set_state(position)
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            f"{checkpoints.directory}: its data position does not fit this data ({first_line(e)})"
        ) from e
    return state, int(state.step)


def _abstract_state(stage: Stage, key: jax.Array, layout: Layout) -> states.TrainState:
    return states.abstract(jax.eval_shape(stage.init, key), stage.axes, layout)


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside of the main thread signals are somebody else's."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


class _Log:
    """Metrics one step late: `later` hands over a step's device values and reads those of the step before."""

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        writer: metric.Writer,
        progress: metric.Progress,
        checkpoints: Checkpoints,
        start: int,
        clock: Clock,
    ):
        self.config, self.stage, self.writer, self.progress = config, stage, writer, progress
        self.checkpoints, self._clock, self._start = checkpoints, clock, start
        self._pending: tuple[int, Any] | None = None
        self._timed_at, self._timed_step = time.monotonic(), start

    def later(self, step: int, pairs: Any) -> None:
        self.flush()
        self._pending = (step, pairs)

    def flush(self) -> None:
        """Reads the metrics that are still on the device, checks and writes them."""
        if self._pending is None:
            return
        (step, pairs), self._pending = self._pending, None
        with self._clock.part("step"):  # waiting for the devices
            values = metric.finalize(hosts.whole(pairs), f"{self.config.stage}/")
        self._check_finite(step, values)
        if step == self._start + 1:
            self.progress.print(f"{self.config.stage} {self._clock.started()}")
        self.progress.update(step, values, self.stage.units)
        if step % self.config.log.every == 0 or step == self.config.steps:
            self.writer.write(step, values)
            self._time(step)

    def evaluate(self, step: int, pairs: Any) -> None:
        values = metric.finalize(hosts.whole(pairs), f"{self.config.stage}/")
        self._check_finite(step, values)
        self.writer.write(step, values)
        self._timed_at, self._timed_step = time.monotonic(), step

    def clock(self, step: int) -> None:
        """What the clock says at a checkpoint, for the metrics and for the next start."""
        self.writer.timing(step, {f"{self.config.stage}/{k}": v for k, v in self._clock.summary().items()})
        self._clock.save()

    def _time(self, step: int) -> None:
        now = time.monotonic()
        if step > self._timed_step:
            seconds = (now - self._timed_at) / (step - self._timed_step)
            rate = {f"{self.stage.unit}_per_second": self.stage.units / seconds, "seconds_per_step": seconds}
            self.writer.timing(step, {f"{self.config.stage}/{k}": v for k, v in rate.items()})
        self._timed_at, self._timed_step = now, step

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad and self.config.on_nonfinite == "error":
            self._stop(f"{bad[0]} is {values[bad[0]]}", step)

    def check_state(self, step: int, state: states.TrainState) -> None:
        """Stops before a checkpoint that nobody should go on from, whatever `on_nonfinite` says."""
        if not states.all_finite(state):
            self._stop(f"the state of {self.config.stage} is no longer finite", step)

    def _stop(self, what: str, step: int) -> None:
        self.checkpoints.wait()
        good = self.checkpoints.steps()
        where = f"the last good checkpoint is {self.checkpoints.directory / str(good[-1])}" if good else "no checkpoint"
        raise NonFiniteError(f"{what} at step {step}; {where}")
