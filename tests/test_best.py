"""keep_best and patience: which parameters a stage leaves, and when it ends."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from rlhfjax import best, checkpoint, train
from rlhfjax.config import CheckpointConfig, LogConfig, TrainConfig
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.stage import Finished
from tests.test_train import LAYOUT, fake_stage, lines


def scripted(values: dict[int, float], left: list | None = None):
    """A stage whose evaluation after n steps has this val; `left` takes the w it leaves."""
    stage = fake_stage([])
    left = [] if left is None else left

    def evals(state):
        return {"val": (values[int(state.step)], 1.0)}

    def finish(state):
        left.append(np.asarray(state.params["w"]).tolist())
        return Finished({}, {}, {"left.json": {"w": left[-1]}})

    data = stage.open()._replace(evals=evals, finish=finish)
    return dataclasses.replace(stage, open=lambda: data)


def config_of(**options) -> TrainConfig:
    options = {"steps": 6, "eval_every": 1, "keep_best": "min:val"} | options
    return TrainConfig(
        stage="fake",
        checkpoint=CheckpointConfig(every=2, keep_last=2),
        log=LogConfig(every=1, tensorboard=False),
        **options,
    )


def run(folder: Path, values: dict[int, float], **options) -> dict[str, float]:
    return train.run(scripted(values), config_of(**options), folder, LAYOUT)


def w_after(steps: int, tmp_path: Path) -> list[float]:
    """The parameters after a number of steps of a run that keeps the last ones."""
    left: list = []
    stage = scripted(dict.fromkeys(range(99), 0.0), left)
    config = config_of(steps=steps, keep_best="")
    train.run(stage, config, tmp_path / f"plain{steps}", LAYOUT)
    return left[-1]


def left(folder: Path) -> list[float]:
    return json.loads((folder / "left.json").read_text())["w"]


CURVE = {1: 5.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: 1.0, 6: 4.0}
KEPT = [
    ("min:val", CURVE, 3),  # of equal values the first
    ("max:fake/val", CURVE, 1),
    ("min:val", {**CURVE, 3: math.nan, 5: math.inf}, 4),
    ("min:val", {step: -float(step) for step in CURVE}, 6),
]


@pytest.mark.parametrize(("keep_best", "values", "step"), KEPT)
def test_a_stage_leaves_the_parameters_of_its_best_evaluation(
    keep_best, values, step, tmp_path
):
    metrics = run(tmp_path, values, keep_best=keep_best, on_nonfinite="skip")
    assert left(tmp_path) == w_after(step, tmp_path)
    assert metrics["fake/best_step"] == step
    assert metrics["fake/best_value"] == values[step]
    # The last checkpoint is of the last step, so that a run with more steps goes on from there.
    assert (tmp_path / "checkpoints" / "6").is_dir()


def test_without_a_finite_value_the_last_parameters_are_left(tmp_path, caplog):
    values = dict.fromkeys(CURVE, math.nan)
    metrics = run(tmp_path, values, on_nonfinite="skip")
    assert left(tmp_path) == w_after(6, tmp_path)
    assert "fake/best_step" not in metrics
    assert "no evaluation had a finite fake/val" in caplog.text


PATIENCE = [(1, 4, 3), (2, 5, 3), (3, 6, 3), (0, 6, 3)]


@pytest.mark.parametrize(("patience", "last", "step"), PATIENCE)
def test_a_stage_ends_after_evaluations_that_are_no_better(
    patience, last, step, tmp_path
):
    metrics = run(tmp_path, CURVE, patience=patience)
    assert max(row["step"] for row in lines(tmp_path)) == last
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert metrics["fake/best_step"] == step and left(tmp_path) == w_after(
        step, tmp_path
    )
    # The same command again finds it at its end.
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(tmp_path, CURVE, patience=patience)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("crash", range(1, 7))
@pytest.mark.parametrize("patience", [0, 2])
def test_a_run_that_crashed_keeps_its_record(crash, patience, tmp_path, monkeypatch):
    """After the evaluation and the best parameters of a step, before its checkpoint."""

    class Crash(Exception):
        pass

    whole = run(tmp_path / "whole", CURVE, patience=patience)
    evaluated = best.Best.evaluated

    def crashing(self, step, values, state):
        evaluated(self, step, values, state)
        if step == crash:
            raise Crash

    if crash <= max(row["step"] for row in lines(tmp_path / "whole")):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(best.Best, "evaluated", crashing)
            run(tmp_path / "run", CURVE, patience=patience)
    assert run(tmp_path / "run", CURVE, patience=patience) == whole
    for file in ("metrics.jsonl", "left.json"):
        ours, theirs = (tmp_path / x / file for x in ("run", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    folders = [
        {x.name for x in (tmp_path / y / "best").iterdir()} for y in ("run", "whole")
    ]
    assert folders[0] == folders[1]


def test_the_record_of_an_older_checkpoint_is_kept_until_it_is_gone(tmp_path):
    """Checkpoints 4 and 6 are kept: their records are 3 and 5. That of 2 is gone with it."""
    values = {1: 9.0, 2: 8.0, 3: 7.0, 4: 7.5, 5: 6.0, 6: 6.5}
    run(tmp_path, values)
    assert {x.name for x in (tmp_path / "best").iterdir()} == {"3", "5"}
    # The newest checkpoint is damaged: the run goes on from 4, and knows that 3 was best.
    record = best.Best(config_of(), tmp_path, 4).record
    assert record == best.Record(3, 7.0)


def test_parameters_that_are_gone_are_missed_before_training_goes_on(tmp_path):
    run(tmp_path, CURVE)
    (tmp_path / "best" / "3").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"best/3: the parameters of the best"):
        run(tmp_path, CURVE, steps=8)


def test_saved_parameters_have_what_models_are_made_of_and_no_moments(tmp_path):
    run(tmp_path, CURVE)
    place = SingleDeviceSharding(jax.devices()[0])
    w = jax.ShapeDtypeStruct((4,), np.float32, sharding=place)
    abstract = {"params": {"w": w}, "extra": {}}
    kept = checkpoint.load_tree(tmp_path / "best" / "3", abstract)
    assert np.asarray(kept["params"]["w"]).tolist() == left(tmp_path)


def test_a_metric_that_no_evaluation_has_is_named(tmp_path):
    said = r"^fake.keep_best=min:fake/loss: no metric of an evaluation; expected one of fake/val$"
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, CURVE, keep_best="min:loss")


BAD = [
    ({"keep_best": "val"}, r"fake.keep_best='val': expected min:METRIC or max:METRIC"),
    ({"keep_best": "min:"}, r"expected min:METRIC or max:METRIC"),
    ({"keep_best": "least:val"}, r"expected min:METRIC or max:METRIC"),
    ({"eval_every": 0}, r"fake.keep_best='min:val': needs fake.eval_every > 0"),
    ({"keep_best": "", "patience": 1}, r"fake.patience=1: needs .* fake.keep_best"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_options_that_do_not_fit_are_config_errors(options, said):
    best.validate(config_of())
    with pytest.raises(ConfigError, match=said):
        best.validate(config_of(**options))


def test_done_json_says_which_step_was_kept():
    metrics = {"fake/best_step": 3.0, "fake/best_value": 0.5}
    assert best.describe(config_of(), metrics) == {
        "metric": "min:val",
        "step": 3,
        "value": 0.5,
    }
    assert best.describe(config_of(keep_best=""), metrics) is None
    assert best.describe(config_of(), {}) is None
