"""The training loop, the only one. It works for every stage and knows none by name.

Before the update of step n, counted from 0, the loop does the following in this order:

  1. evaluates the state if an evaluation is due, and keeps its parameters if they are the best;
  2. saves the state and the data position if a save is due. Saving before `next(batches)` is what
     keeps a resumed run from replaying or skipping a batch;
  3. takes the next batch;
  4. dispatches the step;
  5. reads the metrics of the previous step while the device computes this one.

All lines of metrics.jsonl up to step n are on disk before the checkpoint of step n, and a resumed
run drops the lines after its checkpoint. An interrupted run therefore ends with the same bytes as
an uninterrupted one.
"""

import logging
import time
from contextlib import closing
from typing import Any

import jax

from rlhfjax import finish, hosts, process
from rlhfjax import metrics as metric
from rlhfjax import state as states
from rlhfjax.best import Best
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.clock import Clock
from rlhfjax.config import TrainConfig
from rlhfjax.data.counted import data_metrics
from rlhfjax.device_memory import Memory
from rlhfjax.errors import CheckpointError, first_line
from rlhfjax.finite import FiniteGuard
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.profile import Profile
from rlhfjax.progress import Progress
from rlhfjax.stage import Batches, Stage
from rlhfjax.types import Metrics, PyTree

logger = logging.getLogger("rlhfjax")
# What a host asks for at a step. The largest number among the hosts is what all of them do.
_CONTINUE, _SAVE, _STOP = 0, 1, 2


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
      NonFiniteError: a loss or a gradient is NaN or infinite, and on_nonfinite is "error".
      Preempted: SIGTERM or Ctrl-C was received and the state was saved.
    """
    key = jax.random.key(config.seed)
    clock = clock or Clock(workdir)
    # The datasets are opened before anything is written, so that a wrong path leaves no files.
    batches = stage.batches
    with (
        layout.use(),
        process.stop_requests() as stop_requested,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        with clock.part("restore"):
            state, resumed_step = _first_state(stage, key, layout, checkpoints)
        start = 0 if resumed_step is None else resumed_step
        if start:
            where = f"step {start} of {config.steps}"
            logger.info("%s: resuming at %s", config.stage, where)
        with (
            _open_writer(stage, config, workdir, resumed_step) as writer,
            Progress(
                config.steps, stage.unit, title=config.stage, start=start
            ) as progress,
            closing(Profile(config, workdir)) as profile,
        ):
            guard = FiniteGuard(config, checkpoints)
            timings = _TimingsLog(config, stage, writer, clock, start)
            log = _MetricsLog(config, stage, writer, progress, guard, timings)
            best = Best(config, workdir, resumed_step)
            if resumed_step is None:
                log.data(batches)
            logger.info("%s: compiling; the first step takes longest", config.stage)
            clock.end_build()
            clock.save()
            vote = hosts.Vote()  # all hosts save and stop at the same step
            save_timer = _SaveTimer(config.checkpoint.minutes)
            for step in range(start, config.steps + 1):
                is_last = step == config.steps or best.is_exhausted()
                is_resumed = step == resumed_step  # evaluated and saved already
                action = vote(_requested_action(stop_requested, save_timer))

                # 1. Evaluate.
                if is_due(step, config.eval_every, is_last) and not is_resumed:
                    log.flush()
                    with clock.part("eval"):
                        values = log.evaluation(step, stage.evals(state))
                        best.evaluated(step, values, state)
                    is_last = is_last or best.is_exhausted()

                # 2. Save. The last save comes after the stage's models are written.
                save_due = is_due(step, config.checkpoint.every, is_last)
                if (save_due or action != _CONTINUE) and not is_resumed:
                    log.flush()
                    with clock.part("checkpoint"):
                        guard.check_state(step, state)
                        if is_last:
                            kept = best.state(state)
                            ended = finish.write(stage, kept, workdir, layout)
                            log.evaluation(step, {**ended, **best.metrics()})
                        writer.flush()
                        checkpoints.save(step, state, batches.get_state())
                        best.prune(checkpoints)
                    save_timer.restart()
                    timings.write_clock(step)
                if action == _STOP or (
                    is_last and hosts.anywhere(bool(stop_requested))
                ):
                    checkpoints.wait()
                    raise stop_requested.error(
                        f"{config.stage} stopped at step {step} and was saved"
                    )
                if is_last:
                    break

                # 3. and 4. Take the next batch and dispatch the step.
                profile.before_step(step + 1, state)
                with clock.part("data"):
                    batch = layout.put(next(batches))
                with clock.part("step"):
                    step_key = jax.random.fold_in(key, step)
                    log.before_step(step + 1)
                    with timings.memory.observing(step == start):
                        state, metrics = stage.step(state, batch, step_key)
                profile.after_step(step + 1, state)

                # 5. Read the metrics of the previous step.
                log.later(step + 1, metrics)
            checkpoints.wait()
            best.prune(checkpoints)
    return hosts.share(lambda: metric.last_values(workdir))


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Returns whether a step is the last one or a positive multiple of `every` (0: never)."""
    return is_last or (every > 0 and step % every == 0 and step > 0)


def _requested_action(
    stop_requested: process.StopRequests, save_timer: "_SaveTimer"
) -> int:
    if stop_requested:
        return _STOP
    return _SAVE if save_timer.is_due() else _CONTINUE


def _open_writer(
    stage: Stage, config: TrainConfig, workdir: Path, resumed_step: int | None
) -> metric.Writer:
    return metric.Writer(
        workdir,
        resumed_step,
        samples=stage.samples is not None and config.log.samples_every > 0,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
    )


def evaluate(
    stage: Stage, config: TrainConfig, workdir: Path, layout: Layout
) -> dict[str, float]:
    """Returns the held-out metrics of the workdir's latest checkpoint.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    abstract_state = _abstract_state(stage, jax.random.key(0), layout)
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        restored = checkpoints.restore(abstract_state)
    if restored is None:
        raise CheckpointError(f"{workdir}: no checkpoint to evaluate")
    state, _ = restored
    return metric.finalize(hosts.whole(stage.evals(state)), f"{config.stage}/")


class _SaveTimer:
    """Tells when a save is due by wall time, on the first host.

    The clocks of hosts differ: only the first host decides, and `hosts.Vote` tells the others.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes  # 0: never due
        self.restart()

    def restart(self) -> None:
        self._started = time.monotonic()

    def is_due(self) -> bool:
        """Returns whether the time since the last restart has passed, and restarts if it has.

        It restarts by itself because with several hosts the save comes one step after the request.
        """
        if not self._seconds or not hosts.first():
            return False
        if time.monotonic() - self._started < self._seconds:
            return False
        self.restart()
        return True


def _first_state(
    stage: Stage, key: jax.Array, layout: Layout, checkpoints: Checkpoints
) -> tuple[states.TrainState, int | None]:
    """Returns the state to train from and the step it was saved at, None for a fresh state."""
    restored = checkpoints.restore(_abstract_state(stage, key, layout))
    if restored is None:
        fresh = states.create_sharded(stage.init, key, stage.axes, layout)
        return stage.start(fresh), None
    state, position = restored
    try:
        stage.batches.set_state(position)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{checkpoints.directory}: its data position does not fit this data ({first_line(e)})"
        ) from e
    return state, int(state.step)


def _abstract_state(stage: Stage, key: jax.Array, layout: Layout) -> PyTree:
    return states.abstract(jax.eval_shape(stage.init, key), stage.axes, layout)


class _MetricsLog:
    """Checks and writes metrics, those of training one step late.

    `later` takes the metrics of a step, which the devices are still computing, and reads those of
    the step before.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        writer: metric.Writer,
        progress: Progress,
        guard: FiniteGuard,
        timings: "_TimingsLog",
    ):
        self._config = config
        self._stage = stage
        self._writer = writer
        self._progress = progress
        self._guard = guard
        self._timings = timings
        # Step, metrics, and samples if there are any.
        self._pending: tuple[int, Metrics, Any] | None = None

    def before_step(self, step: int) -> None:
        if self._stage.samples is not None:
            every = self._config.log.samples_every
            due = every > 0 and (step == 1 or step % every == 0)
            self._stage.samples.wanted = due

    def later(self, step: int, metrics: Metrics) -> None:
        self.flush()
        kept = self._stage.samples.take() if self._stage.samples is not None else None
        self._pending = (step, metrics, kept)

    def flush(self) -> None:
        """Reads the pending metrics from the devices, checks and writes them."""
        if self._pending is None:
            return
        step, metrics, kept = self._pending
        self._pending = None
        with self._timings.clock.part("step"):  # waits for the devices
            values = self._read(step, metrics)
        if step == self._timings.start + 1:
            start = self._timings.clock.describe_start()
            self._progress.print(f"{self._config.stage} {start}")
            if memory := self._timings.memory.describe():
                self._progress.print(f"{self._config.stage} {memory}")
        self._progress.update(step, values, self._stage.units)
        if step % self._config.log.every == 0 or step == self._config.steps:
            self._writer.write(step, values)
            self._timings.write_speed(step)
        if kept is not None and self._stage.samples is not None:
            rows = self._stage.samples.rows(kept, self._config.log.samples)
            self._writer.samples(step, rows)

    def data(self, batches: Batches) -> None:
        """Writes what was left out of the data and changed in it, if the batches count that."""
        self._writer.write(0, data_metrics(batches, self._config.stage))

    def evaluation(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Checks and writes the metrics of an evaluation; its time does not count as training."""
        values = self._read(step, metrics)
        self._writer.write(step, values)
        self._timings.restart(step)
        return values

    def _read(self, step: int, metrics: Metrics) -> dict[str, float]:
        values = metric.finalize(hosts.whole(metrics), f"{self._config.stage}/")
        self._guard.check_metrics(step, values)
        return values


class _TimingsLog:
    """Writes the speed of the steps, the devices' memory and where the wall time went."""

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        writer: metric.Writer,
        clock: Clock,
        start: int,
    ):
        self.clock = clock
        self.memory = Memory()
        self.start = start
        self._prefix = f"{config.stage}/"
        self._stage = stage
        self._writer = writer
        self.restart(start)

    def restart(self, step: int) -> None:
        """Starts to time the steps after `step`."""
        self._timed_from = time.monotonic()
        self._timed_step = step

    def write_speed(self, step: int) -> None:
        """Writes the mean speed of the steps since `restart`."""
        steps = step - self._timed_step
        if steps > 0:
            seconds = (time.monotonic() - self._timed_from) / steps
            per_second = f"{self._stage.unit}_per_second"
            speed = {
                per_second: self._stage.units / seconds,
                "seconds_per_step": seconds,
            }
            self._write(step, speed | self.memory.metrics())
        self.restart(step)

    def write_clock(self, step: int) -> None:
        """Writes the goodput to timing.jsonl, and the clock's file for the next start."""
        self._write(step, self.clock.summary())
        self.clock.save()

    def _write(self, step: int, values: dict[str, float]) -> None:
        named = {self._prefix + name: value for name, value in values.items()}
        self._writer.timing(step, named)
