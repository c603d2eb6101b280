"""Rows of results: what a row has, what its hash depends on, and damaged ones."""

import json
import math

import pytest

from rlhfjax import claims, experiment, paths
from rlhfjax.errors import DataError
from rlhfjax.lab import card, results
from rlhfjax.lab.found import plan
from rlhfjax.sweep.expand import expand
from tests.lab import made_up


@pytest.fixture
def rows(tmp_path):
    """The rows of a finished study, and its card."""
    file = made_up.write(tmp_path / "x")
    runs = expand(file, paths.path(tmp_path / "w"))
    made_up.finish_all(runs)
    study = card.of(experiment.load(file))
    assert study is not None
    planned = plan(study, runs, file)
    return [
        results.read_row(paths.path(tmp_path / "w" / x.name), x, study) for x in planned
    ]


def test_a_row_by_hand(rows):
    row = rows[4]
    assert row["condition"] == "large" and row["seeds"] == {"arg.seed": 1}
    assert row["overrides"] == {"optim.learning_rate": 1e-3, "arg.seed": 1}
    assert row["metrics"] == {"val_loss": pytest.approx(1.1)}
    assert row["curves"] == {
        "val_loss": {
            "step": [2.0, 4.0],
            "value": [pytest.approx(3.1), pytest.approx(1.1)],
        }
    }
    assert row["seconds"] == row["stages"]["sft"]["seconds"] == 2.5
    assert row["commit"] == "c0ffee" and row["versions"] == {"jax": "0.10"}
    assert row["clean"] is True and row["command"] == "rlhfjax train"
    assert len({row["hash"] for row in rows}) == 6
    assert len({row["rule"] for row in rows}) == 1


def test_a_rows_command_has_no_places():
    """Rows are committed, and a workdir or a cache is of one machine."""
    places = " --workdir='/home/me/my runs/a' --cache=/tmp/c --compilation_cache= "
    assert (
        results.without_places(
            f"/usr/bin/rlhfjax run --config=a.py:x=1,seed=2{places}--config.ppo.steps=3"
        )
        == "rlhfjax run --config=a.py:x=1,seed=2 --config.ppo.steps=3"
    )


def test_a_row_is_read_as_it_was_written(rows, tmp_path):
    rows[0]["metrics"]["kl"] = None
    rows[0]["curves"]["val_loss"]["value"][0] = None
    file = results.write(paths.path(tmp_path), rows)
    assert results.read(file) == rows
    outcome = results.to_outcome(results.read(file)[0])
    assert math.isnan(outcome.metric("kl")) and math.isnan(outcome.curve("val_loss")[0])
    assert outcome.seed == "arg.seed=0" and outcome.curve("val_loss")[1] == 2.0
    with pytest.raises(DataError, match="kept: val_loss"):
        outcome.curve("gold")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hash": 3}, "x.jsonl:2: hash: input should be a valid string, got 3"),
        ({"seconds": -1.0}, "x.jsonl:2: seconds: input should be greater than"),
        (
            {"metrics": {"a": "1"}},
            "x.jsonl:2: metrics.a: input should be a valid number",
        ),
        (
            {"curves": {"a": {"step": [1.0], "value": []}}},
            "x.jsonl:2: curves.a: step and value must have one length",
        ),
    ],
)
def test_a_damaged_row_is_named(rows, tmp_path, change, said):
    file = tmp_path / "x.jsonl"
    lines = [json.dumps(rows[0]), json.dumps(rows[1] | change)]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        results.read(paths.path(file))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_hash_is_of_what_decides_the_result():
    """Logging, checkpoints and the mesh decide nothing, steps and seeds do."""
    config = {
        "stages": ["a"],
        "a": {"stage": "sft", "init_from": "x", "steps": 3, "seed": 0, "length": 8},
    }

    def changed(**options):
        return results.config_hash({"stages": ["a"], "a": config["a"] | options})

    same = results.config_hash(config)
    assert changed(log={"every": 7}) == changed(checkpoint={"minutes": 3.0}) == same
    assert changed(mesh={"fsdp": 2}) == same
    assert changed(microbatches=1) == same  # a default, written out
    others = [changed(seed=1), changed(steps=4), changed(init_from="y")]
    assert len({same, *others}) == 4
    assert results.config_hash({"stages": ["b"], "b": config["a"]}) != same


def test_the_decision_is_that_of_claims():
    options = claims.decisive_options({"stage": "sft", "steps": 3, "log": {"every": 2}})
    assert options["steps"] == 3 and "seed" in options
    assert not [x for x in options if x.startswith(("log.", "checkpoint.", "mesh."))]


def test_rows_of_one_config_are_compared(rows):
    again = json.loads(json.dumps(rows[:3]))
    assert results.repeats([*rows, *again]) == []  # copies of the same starts
    for row in again:
        row["date"] = "2021-01-01"
    again[1]["metrics"]["val_loss"] += 1e-9
    again[2]["curves"]["val_loss"]["value"][0] += 1e-9
    found = results.repeats([*rows, *again])
    assert [(x.name, x.equal, x.differs) for x in found] == [
        ("small, arg.seed=0", True, ""),
        ("small, arg.seed=1", False, "val_loss"),
        ("small, arg.seed=2", False, "val_loss"),
    ]
    assert results.by_hash([*rows, *again])[rows[1]["hash"]] is rows[1]


def test_a_shared_stage_is_paid_once(rows):
    base = {"id": "same", "seconds": 100.0}
    for row in rows:
        row["stages"] = row["stages"] | {"pretrain": base}
    assert results.seconds(rows) == 100 + 6 * 2.5
