"""The loop: the only one. It knows no stage by name.

Its order is deliberate. At step n, before the n-th update (counting from 0):

  1. evaluate the state, when it is due;
  2. save the state and the position of the data. Saving before `next` is what makes a resumed run
     neither replay nor skip a batch;
  3. take the next batch;
  4. dispatch the step;
  5. read the metrics of the step before, while the device works on this one.

Every line of metrics.jsonl up to step n is on the disk before the checkpoint of step n, and a
resumed run drops the lines after its checkpoint, so that an interrupted run ends with the same
bytes as one that was not.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import jax

from rlhfjax import hosts
from rlhfjax import metrics as metric
from rlhfjax import state as states
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.clock import Clock
from rlhfjax.config import TrainConfig, write_json
from rlhfjax.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    Preempted,
    first_line,
)
from rlhfjax.interop import peft, store
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.profile import Profile
from rlhfjax.stage import Stage

# What a host wishes at a step; the largest wish of all hosts decides.
_GO_ON, _SAVE, _STOP = 0, 1, 2


def run(
    stage: Stage,
    config: TrainConfig,
    workdir: Path,
    layout: Layout,
    clock: Clock | None = None,
) -> dict[str, float]:
    """Trains a stage to its last step, from its beginning or from the workdir's latest checkpoint.

    Returns:
      The last value of every metric.
    Raises:
      NonFiniteError: a loss or gradient is NaN or infinite (unless on_nonfinite is "skip").
      Preempted: SIGTERM came; the state is saved.
    """
    key = jax.random.key(config.seed)
    clock = clock or Clock(workdir)
    batches = (
        stage.batches
    )  # opened before anything is written: a wrong path is corrected in place
    with (
        layout.use(),
        _stop_on_sigterm() as stopping,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        with clock.part("restore"):
            state, resumed = _first_state(stage, key, layout, checkpoints)
        start = 0 if resumed is None else resumed
        with (
            metric.Writer(workdir, resumed, **_outputs(config)) as writer,
            metric.Progress(
                config.steps, stage.unit, title=config.stage, start=start
            ) as progress,
            closing(Profile(config, workdir)) as profile,
        ):
            guard = _FiniteGuard(config, checkpoints)
            log = _MetricsLog(config, stage, writer, progress, guard, clock, start)
            clock.go_on()
            clock.save()
            vote = (
                hosts.Vote()
            )  # of all hosts, so that they save and stop at the same step
            timer = _SaveTimer(config.checkpoint.minutes)
            for step in range(start, config.steps + 1):
                last = step == config.steps
                decision = vote(_wish(stopping, timer))
                evaluates = is_due(step, config.eval_every, last)
                saves = decision != _GO_ON or is_due(
                    step, config.checkpoint.every, last
                )
                if evaluates and step != resumed:
                    log.flush()
                    with clock.part("eval"):
                        log.evaluate(step, stage.evals(state))
                if saves and step != resumed:
                    log.flush()
                    with clock.part("checkpoint"):
                        guard.check_state(step, state)
                        if last:
                            log.evaluate(step, _finish(stage, state, workdir, layout))
                        writer.flush()
                        checkpoints.save(step, state, batches.get_state())
                    timer.restart()
                    log.clock(step)
                if decision == _STOP or (last and hosts.anywhere(stopping.is_set())):
                    checkpoints.wait()
                    done = f"{config.stage} stopped at step {step}: saved"
                    raise Preempted(f"{done}; the same command goes on from here")
                if last:
                    break
                profile.before_step(step + 1, state)
                with clock.part("data"):
                    batch = layout.put(next(batches))
                with clock.part("step"):
                    state, metrics = stage.step(
                        state, batch, jax.random.fold_in(key, step)
                    )
                profile.after_step(step + 1, state)
                log.later(step + 1, metrics)
    return hosts.share(lambda: metric.last_values(workdir))


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something happens at this step: at every `every`-th (0: none) and at the last one."""
    return last or (every > 0 and step % every == 0 and step > 0)


def _wish(stopping: threading.Event, timer: "_SaveTimer") -> int:
    if stopping.is_set():
        return _STOP
    return _SAVE if timer.is_due() else _GO_ON


def _outputs(config: TrainConfig) -> dict[str, Any]:
    wandb = {"project": config.log.wandb} if config.log.wandb else None
    return {"tensorboard": config.log.tensorboard, "wandb": wandb}


def evaluate(
    stage: Stage, config: TrainConfig, workdir: Path, layout: Layout
) -> dict[str, float]:
    """The stage's held-out metrics for its latest checkpoint.

    Raises:
      CheckpointError: there is none.
    """
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        restored = checkpoints.restore(
            _abstract_state(stage, jax.random.key(0), layout)
        )
    if restored is None:
        raise CheckpointError(f"{workdir}: no checkpoint to evaluate")
    return metric.finalize(hosts.whole(stage.evals(restored[0])), f"{config.stage}/")


def _finish(
    stage: Stage, state: states.TrainState, workdir: Path, layout: Layout
) -> Any:
    """Saves the stage's models and returns its last metrics.

    It comes before the last save, so that a run killed in between does it again.
    """
    finished = stage.finish(state)
    for name, model in finished.models.items():
        store.save(workdir / name, model)
    for name, content in finished.files.items():
        write_json(workdir / name, content)
    for name, (model, adapters) in finished.adapters.items():
        _save_adapters(workdir / name, model, adapters, layout)
    return finished.metrics


def _save_adapters(folder: Path, model: Any, adapters: Any, layout: Layout) -> None:
    """Saves adapters as PEFT has them, on the first host; warns if PEFT lacks the model."""
    whole = jax.device_get(
        jax.jit(lambda x: x, out_shardings=layout.replicated)(adapters)
    )
    if hosts.first():
        try:
            peft.save_peft(folder, model, whole)
        except ConfigError as e:
            left_out = "%s is left out, the merged model is there: %s"
            logging.getLogger("rlhfjax").warning(left_out, folder, e)


class _SaveTimer:
    """Says when `minutes` have passed on the first host since the last save, or since it said so.

    Hosts' clocks differ: the first host alone decides, and `hosts.Vote` tells the others.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def is_due(self) -> bool:
        if (
            not self._seconds
            or not hosts.first()
            or time.monotonic() - self._began < self._seconds
        ):
            return False
        self.restart()  # with several hosts the save comes one step later: ask for it once
        return True


def _first_state(
    stage: Stage, key: jax.Array, layout: Layout, checkpoints: Checkpoints
) -> tuple[states.TrainState, int | None]:
    """The state to go on from and the step it was saved at, None where the stage begins."""
    saved = checkpoints.restore(_abstract_state(stage, key, layout))
    if saved is None:
        return stage.start(
            states.create_sharded(stage.init, key, stage.axes, layout)
        ), None
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


class _MetricsLog:
    """Writes metrics one step late, and how fast the steps were.

    `later` hands over a step's values, which the devices still compute, and reads those of the step
    before.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        writer: metric.Writer,
        progress: metric.Progress,
        guard: "_FiniteGuard",
        clock: Clock,
        start: int,
    ):
        self._config, self._stage = config, stage
        self._writer, self._progress = writer, progress
        self._guard, self._clock, self._start = guard, clock, start
        self._pending: tuple[int, Any] | None = None
        self._timed_at, self._timed_step = time.monotonic(), start

    def later(self, step: int, metrics: Any) -> None:
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads the metrics that are still on the device, checks and writes them."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with self._clock.part("step"):  # waiting for the devices
            values = self._read(step, metrics)
        if step == self._start + 1:
            self._progress.print(f"{self._config.stage} {self._clock.started()}")
        self._progress.update(step, values, self._stage.units)
        if step % self._config.log.every == 0 or step == self._config.steps:
            self._writer.write(step, values)
            self._write_speed(step)

    def evaluate(self, step: int, metrics: Any) -> None:
        """Checks and writes metrics of an evaluation, whose time does not count as the steps'."""
        self._writer.write(step, self._read(step, metrics))
        self._timed_at, self._timed_step = time.monotonic(), step

    def clock(self, step: int) -> None:
        """What the clock says at a checkpoint, for the metrics and for the next start."""
        self._write_timing(step, self._clock.summary())
        self._clock.save()

    def _read(self, step: int, metrics: Any) -> dict[str, float]:
        values = metric.finalize(hosts.whole(metrics), f"{self._config.stage}/")
        self._guard.check_metrics(step, values)
        return values

    def _write_speed(self, step: int) -> None:
        """Writes the mean speed of the steps since the timer was started."""
        now = time.monotonic()
        steps = step - self._timed_step
        if steps > 0:
            seconds = (now - self._timed_at) / steps
            per_second = f"{self._stage.unit}_per_second"
            speed = {
                per_second: self._stage.units / seconds,
                "seconds_per_step": seconds,
            }
            self._write_timing(step, speed)
        self._timed_at, self._timed_step = now, step

    def _write_timing(self, step: int, values: dict[str, float]) -> None:
        named = {
            f"{self._config.stage}/{name}": value for name, value in values.items()
        }
        self._writer.timing(step, named)


class _FiniteGuard:
    """Stops a run whose numbers are no longer finite; the error names the last good checkpoint."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints

    def check_metrics(self, step: int, values: dict[str, float]) -> None:
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad and self._config.on_nonfinite == "error":
            self._stop(f"{bad[0]} is {values[bad[0]]}", step)

    def check_state(self, step: int, state: states.TrainState) -> None:
        """Stops before a checkpoint that nobody should go on from, whatever `on_nonfinite` says."""
        if not states.all_finite(state):
            self._stop(f"the state of {self._config.stage} is no longer finite", step)

    def _stop(self, what: str, step: int) -> NoReturn:
        self._checkpoints.wait()
        good = self._checkpoints.steps()
        where = "no checkpoint"
        if good:
            where = f"the last good checkpoint is {self._checkpoints.directory / str(good[-1])}"
        raise NonFiniteError(f"{what} at step {step}; {where}")
