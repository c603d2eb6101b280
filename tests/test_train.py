"""The loop: its order, what it writes, what it refuses to save, where it goes on."""

import dataclasses
import functools
import itertools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import state as states
from rlhfjax import train
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.config import CheckpointConfig, LogConfig, TrainConfig
from rlhfjax.device_memory import Memory
from rlhfjax.errors import CheckpointError, DataError, NonFiniteError
from rlhfjax.mesh import make_layout
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from tests.test_device_memory import GPUS

LAYOUT = make_layout(devices=jax.devices()[:1])
TX = optax.sgd(0.5)


class Numbers:
    """The stream 1, 2, 3, ...; writes down when it is asked."""

    def __init__(self, events: list):
        self.events, self.position = events, 0

    def __next__(self):
        self.position += 1
        self.events.append(f"next {self.position}")
        return {"x": np.full((2, 1), self.position, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def fake_stage(
    events: list,
    *,
    skip: bool = False,
    poison: int | None = None,
    keys: list | None = None,
) -> Stage:
    """Learns w towards the mean of what it sees.

    `poison` is the batch whose gradient is NaN; `keys` takes the keys.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, x, key):
        grads = {"w": state.params["w"] - x.mean() + 0.01 * jax.random.normal(key)}
        loss = jnp.sum(grads["w"] ** 2)
        if poison is not None:
            bad = jnp.where(x[0, 0] == poison, jnp.nan, 1.0)
            grads, loss = {"w": grads["w"] * bad}, loss * bad
        state, more = states.apply_gradients(state, grads, TX, skip_nonfinite=skip)
        return state.replace(step=state.step + 1), {
            "loss": (loss, jnp.ones(())),
            **more,
        }

    def step(state, batch, key):
        events.append(f"step {int(state.step)}")
        if keys is not None:
            keys.append(tuple(jax.random.key_data(key).tolist()))
        return update(state, batch["x"], key)

    def evals(state):
        events.append(f"evals {int(state.step)}")
        return {"val": (state.params["w"].sum(), 4.0)}

    def finish(state):
        events.append(f"finish {int(state.step)}")
        return Finished(
            {}, {"end": (1.0, 1.0)}, {"left.json": {"step": int(state.step)}}
        )

    return Stage(
        init=lambda key: TrainState.create({"w": jnp.zeros(4)}, TX),
        axes={"w": (None,)},
        start=lambda state: (events.append("start"), state)[1],
        step=step,
        batch=lambda _: {"x": jax.ShapeDtypeStruct((2, 1), np.float32)},
        open=lambda: Data(Numbers(events), evals, finish),
        units=2,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(stage, **config) -> last metrics; saves, reads and writes go into the stage's events."""

    def go(
        stage,
        events=None,
        *,
        steps=5,
        every=0,
        minutes=0.0,
        log=1,
        eval_every=0,
        keep=100,
        **more,
    ):
        config = TrainConfig(
            stage="fake",
            steps=steps,
            eval_every=eval_every,
            checkpoint=CheckpointConfig(every=every, minutes=minutes, keep_last=keep),
            log=LogConfig(every=log, tensorboard=False),
            **more,
        )
        with monkeypatch.context() as patch:
            if events is not None:
                save, flush = Checkpoints.save, train._MetricsLog.flush
                patch.setattr(
                    Checkpoints,
                    "save",
                    lambda self, step, state, data: (
                        events.append(f"save {step}"),
                        save(self, step, state, data),
                    )[1],
                )

                def reading(self):
                    if self._pending:
                        events.append(f"read {self._pending[0]}")
                    flush(self)

                patch.setattr(train._MetricsLog, "flush", reading)
            return train.run(stage, config, tmp_path, LAYOUT)

    return go


def lines(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_the_order_of_the_loop(run):
    """evaluate -> save -> next -> dispatch -> read the step before.

    What is read before a save is on disk with it.
    """
    events = []
    run(fake_stage(events), events, steps=4, every=2, eval_every=2)
    assert events == [
        "start",
        *("next 1", "step 0"),
        *("next 2", "step 1", "read 1"),
        *("read 2", "evals 2", "save 2", "next 3", "step 2"),
        *("next 4", "step 3", "read 3"),
        *("read 4", "evals 4", "finish 4", "save 4"),
    ]


def test_a_checkpoint_by_time_comes_after_its_minutes_and_counts_from_the_last_one(
    run, monkeypatch, tmp_path
):
    """Steps of 40 s: one minute has passed after two steps, and the save of step 3 starts the
    minute again.
    """
    events, reads = [], itertools.count()
    stage, now = fake_stage(events), [0.0]

    def step(*args):
        now[0] += 40.0
        return stage.step(*args)

    monkeypatch.setattr(
        train,
        "time",
        types.SimpleNamespace(monotonic=lambda: now[0] + 1e-6 * next(reads)),
    )
    timed = dataclasses.replace(stage, step=step)
    run(timed, events, steps=8, every=3, minutes=1.0)
    assert [event for event in events if event.startswith("save")] == [
        "save 2",
        "save 3",
        "save 5",
        "save 6",
        "save 8",
    ]
    assert (tmp_path / "checkpoints" / "5").is_dir()


def test_without_minutes_no_checkpoint_comes_by_time(run, monkeypatch):
    events, clock = [], iter(range(0, 10**9, 10**5))
    monkeypatch.setattr(
        train, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
    )
    run(fake_stage(events), events, steps=3)
    assert [event for event in events if event.startswith("save")] == ["save 3"]


def test_every_step_is_logged_and_the_last_one_too(run, tmp_path):
    last = run(fake_stage([]), steps=5, log=2, eval_every=3)
    assert [(row["step"], "fake/loss" in row) for row in lines(tmp_path)] == [
        *((2, True), (3, False), (4, True)),
        *((5, True), (5, False), (5, False)),
    ]
    assert last["fake/end"] == 1.0 and {
        "fake/loss",
        "fake/val",
        "fake/grad_norm",
    } <= set(last)
    assert json.loads((tmp_path / "left.json").read_text()) == {"step": 5}
    *rates, goodput = timing(tmp_path)
    per_step = [
        row["fake/tokens_per_second"] * row["fake/seconds_per_step"] for row in rates
    ]
    np.testing.assert_allclose(per_step, 2)  # the stage's units
    assert all(
        set(row) == {"step", "fake/tokens_per_second", "fake/seconds_per_step"}
        for row in rates
    )
    assert goodput["step"] == 5 and 0 < goodput["fake/goodput"] < 1
    assert not (tmp_path / "tb").exists()  # log.tensorboard=False


def test_the_peak_memory_of_a_device_is_a_timing(run, tmp_path, monkeypatch):
    """What a checkpoint continues bit for bit, metrics.jsonl, does not have it."""
    monkeypatch.setattr(train, "Memory", lambda: Memory(GPUS))
    run(fake_stage([]), steps=2)
    *rates, _ = timing(tmp_path)
    assert [row["fake/peak_memory"] for row in rates] == [5.0, 5.0]
    assert "memory" not in (tmp_path / "metrics.jsonl").read_text()


def timing(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()
    ]


def test_a_resume_neither_replays_nor_skips_a_batch(run, tmp_path):
    whole = run(fake_stage([]), steps=6, every=2)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints" / "6", tmp_path / "left.json"):
        path.rename(tmp_path / f"old_{path.name}")
    events = []
    assert run(fake_stage(events), events, steps=6, every=2) == whole
    assert (
        events[:2] == ["next 5", "step 4"] and "start" not in events
    )  # from the checkpoint of step 4
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


def test_progress_counts_from_where_a_run_resumes(run, tmp_path, capsys):
    run(fake_stage([]), steps=4, every=2)
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "old")
    capsys.readouterr()
    run(fake_stage([]), steps=4, every=2)
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("fake started in ")
    assert err[1].startswith("fake 3/4  75%  loss") and err[-1].startswith(
        "fake 4/4  100%  loss"
    )


def test_a_run_that_ended_before_its_marker_does_nothing_again(run):
    first = run(fake_stage([]), steps=3)
    events = []
    assert run(fake_stage(events), events, steps=3) == first
    assert events == []


def test_pitfall_30_a_steps_randomness_depends_on_seed_and_step_alone(run, tmp_path):
    """No two steps share a key, a resumed run draws what the whole one drew, another seed draws
    something else.
    """
    whole, resumed, other = [], [], []
    run(fake_stage([], keys=whole), steps=4, every=2)
    assert len(set(whole)) == 4
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "old_4")
    run(fake_stage([], keys=resumed), steps=4, every=2)
    assert resumed == whole[2:]
    (tmp_path / "checkpoints").rename(tmp_path / "old")
    run(fake_stage([], keys=other), steps=4, seed=1)
    assert not set(other) & set(whole)


def test_a_nan_stops_the_run_and_names_step_and_last_good_checkpoint(run, tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run(fake_stage([], poison=4), steps=8, every=1)
    assert str(caught.value) == (
        f"fake/grad_norm is nan at step 4; the last good checkpoint is {tmp_path}/checkpoints/3"
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "1",
        "2",
        "3",
    ]
    assert max(row["step"] for row in lines(tmp_path)) == 3
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        state, _ = checkpoints.restore(
            states.abstract(fake_stage([]).init(None), {"w": (None,)}, LAYOUT)
        )
    assert np.isfinite(state.params["w"]).all()


def test_a_nan_before_any_checkpoint_says_that_there_is_none(run):
    with pytest.raises(NonFiniteError, match=r"at step 1; no checkpoint$"):
        run(fake_stage([], poison=1), steps=3)


def test_an_evaluation_that_is_not_finite_stops_the_run(run):
    stage = fake_stage([])
    data = stage.open()._replace(evals=lambda state: {"val": (jnp.nan, 1.0)})
    broken = dataclasses.replace(stage, open=lambda: data)
    with pytest.raises(NonFiniteError, match="fake/val is nan at step 2"):
        run(broken, steps=4, eval_every=2)


def test_parameters_that_overflow_are_never_saved(run, tmp_path):
    """Loss and gradient of the step were finite, the update was not.

    Only looking at the state can tell.
    """
    stage = fake_stage([])

    def step(state, batch, key):
        state, pairs = stage.step(state, batch, key)
        return state.replace(
            params={"w": state.params["w"] + (jnp.inf if int(state.step) == 3 else 0.0)}
        ), pairs

    for policy in ("error", "skip"):
        broken = dataclasses.replace(stage, step=step)
        with pytest.raises(
            NonFiniteError,
            match=r"the state of fake is no longer finite at step 3; .*checkpoints/2$",
        ):
            run(broken, steps=5, every=1, on_nonfinite=policy)
        assert not (tmp_path / "checkpoints" / "3").exists()


def test_skip_leaves_the_state_as_it_was_and_counts(run, tmp_path):
    run(fake_stage([], skip=True, poison=3), steps=5, on_nonfinite="skip", every=1)
    rows = [row for row in lines(tmp_path) if "fake/skipped" in row]
    assert [row["fake/skipped"] for row in rows] == [0, 0, 1, 0, 0]
    assert rows[2]["fake/loss"] is None and "fake/grad_norm" not in rows[2]
    saved = []
    for n in (5, 3, 2):
        with Checkpoints(tmp_path, CheckpointConfig(keep_last=100)) as checkpoints:
            state, _ = checkpoints.restore(
                states.abstract(fake_stage([]).init(None), {"w": (None,)}, LAYOUT)
            )
        saved.append(np.asarray(state.params["w"]))
        for later in [s for s in checkpoints.steps() if s > {5: 3, 3: 2, 2: 0}[n]]:
            (tmp_path / "checkpoints" / str(later)).rename(tmp_path / f"old_{later}")
    assert np.isfinite(saved[0]).all()
    np.testing.assert_array_equal(saved[1], saved[2])  # step 3 changed nothing


def test_evaluate_needs_a_checkpoint_and_changes_nothing(run, tmp_path):
    config = TrainConfig(stage="fake", steps=2, log=LogConfig(tensorboard=False))
    with pytest.raises(CheckpointError, match="no checkpoint to evaluate"):
        train.evaluate(fake_stage([]), config, tmp_path, LAYOUT)
    last = run(fake_stage([]), steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train.evaluate(fake_stage([]), config, tmp_path, LAYOUT) == {
        "fake/val": last["fake/val"]
    }
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_data_that_cannot_be_opened_is_found_before_anything_is_written(run, tmp_path):
    """A workdir that holds no more than its config may be used with a corrected one."""

    def missing():
        raise DataError("no file matches")

    events = []
    stage = dataclasses.replace(fake_stage(events), open=missing)
    with pytest.raises(DataError, match="no file matches"):
        run(stage, events)
    assert events == [] and list(tmp_path.iterdir()) == []


def test_a_position_of_other_data_is_refused(run):
    run(fake_stage([]), steps=3)
    stage = fake_stage([])
    stage.batches.set_state = lambda state: state["elsewhere"]
    with pytest.raises(CheckpointError, match="data position does not fit"):
        run(stage, steps=3)
