"""What a resumed run may change in its config, and that it computes what one run would have."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from rlhfjax import claims, dry_run, recipe, rerun, stages
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from tests.test_older_workdirs import STAGE, part_of, started
from tests.test_resume import arrays, checkpoint_note, interrupt
from tests.test_stages import stage_values

GOLDEN = Path(__file__).parent / "golden" / "resume.json"
SECTIONS = ("log", "checkpoint", "mesh")


def options() -> list[str]:
    """The options of all stages, and those within the sections that may change."""
    found = set()
    for name in stages.names():
        hints = dataclasses.fields(stages.config_class(name))
        found |= {field.name for field in hints}
    values = to_dict(STAGE)
    for section in SECTIONS:
        found.remove(section)
        found |= {f"{section}.{name}" for name in values[section]}
    return sorted(found)


def test_every_option_is_classified():
    """A new option is a new line of the golden file: refused, unless `claims` says otherwise.

    UPDATE_GOLDEN=1 writes it. Whoever adds an option decides here whether a resumed run may change
    it.
    """
    kinds = {option: claims.change_of(option) for option in options()}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(kinds, indent=1) + "\n")
    assert kinds == json.loads(GOLDEN.read_text())
    assert set(kinds.values()) == {"free", "mesh", "steps", "refused"}


# ------------------------------------------------------------------ the comparison


def changed(config: dict, **values) -> dict:
    """The config with other values; a name has "__" for "."."""
    config = json.loads(json.dumps(config))
    for place, value in values.items():
        part, name = part_of(config, place.replace("__", "."))
        part[name] = value
    return config


MAY = [
    {"log__every": 7},
    {"log__profile": "1:2"},
    {"checkpoint__minutes": 3.0},
    {"checkpoint__keep_last": 5},
    {"mesh__fsdp": 2},
    {"mesh__rules": {}},
]


@pytest.mark.parametrize("values", MAY)
@pytest.mark.parametrize("nested", [False, True], ids=["stage", "recipe"])
def test_logging_checkpoints_and_the_mesh_may_change_and_are_recorded(
    values, nested, tmp_path, caplog
):
    before, now = to_dict(STAGE), changed(to_dict(STAGE), **values)
    if nested:  # a stage may have the name of an option
        before, now = ({"stages": ["log"], "log": one} for one in (before, now))
    workdir = started(tmp_path / "run", before)
    with caplog.at_level(logging.WARNING, logger="rlhfjax"):
        claims.claim(workdir, now)
    assert json.loads((workdir / "config.json").read_text()) == now
    warned = "the mesh has changed (mesh." in caplog.text
    assert warned == (any("mesh" in name for name in values) and not nested)
    seed = changed(now, **{"log__seed" if nested else "seed": 3})
    place = "log.seed" if nested else "seed"
    with pytest.raises(ConfigError, match=rf"\({place}: 0 -> 3\)"):
        claims.claim(workdir, seed)


def test_a_finished_stage_keeps_the_config_that_it_was_computed_with(tmp_path):
    workdir = started(tmp_path / "run", to_dict(STAGE))
    (workdir / "done.json").write_text('{"metrics": {}}')
    claims.claim(workdir, changed(to_dict(STAGE), log__every=7))
    assert json.loads((workdir / "config.json").read_text()) == to_dict(STAGE)


CONSTANT = {"optim__schedule": "constant"}
DECAYS = {"optim__decay_steps": 5}
STEPS = [
    (CONSTANT, 9, ""),
    (DECAYS, 9, ""),
    ({}, 9, r"steps: 3 -> 9, and the learning rate decays .* needs optim.schedule="),
    ({}, 2, r"steps: 3 -> 2, they can only be raised"),
    (CONSTANT, 2, r"steps: 3 -> 2, they can only be raised"),
]


@pytest.mark.parametrize(("optim", "steps", "said"), STEPS)
def test_steps_are_raised_only_where_the_learning_rate_does_not_depend_on_them(
    optim, steps, said, tmp_path
):
    before = changed(to_dict(STAGE), steps=3, **optim)
    workdir = started(tmp_path / "run", before)
    now = changed(before, steps=steps)
    if said:
        with pytest.raises(ConfigError, match=said):
            claims.claim(workdir, now)
        return
    claims.claim(workdir, now)
    assert json.loads((workdir / "config.json").read_text())["steps"] == steps


def test_every_optimizer_of_a_stage_counts(tmp_path):
    ppo = to_dict(stages.stage_config("ppo", init_from="x", steps=3))
    ppo = changed(ppo, **CONSTANT)
    workdir = started(tmp_path / "run", ppo)
    with pytest.raises(ConfigError, match=r"needs value_optim.schedule='constant' or"):
        claims.claim(workdir, changed(ppo, steps=9))


def test_a_finished_stage_with_more_steps_goes_on_unless_a_later_one_has_begun(
    tmp_path,
):
    stage = changed(to_dict(STAGE), steps=3, **CONSTANT)
    before = {"stages": ["a", "b"], "a": stage, "b": stage}
    now = {**before, "a": changed(stage, steps=9)}
    workdir = started(tmp_path / "run", before)
    first = started(workdir / "00_a", stage)
    (first / "done.json").write_text('{"metrics": {}}')
    assert claims.raised(workdir, now) == [first]
    claims.compare(workdir, now)
    assert (first / "done.json").exists()
    started(workdir / "01_b", stage)
    said = (
        r"a.steps: 3 -> 9, and b has begun with .*\); use a new --workdir, or --from=a"
    )
    with pytest.raises(ConfigError, match=said):
        claims.claim(workdir, now)
    for file in (workdir / "01_b").iterdir():
        file.unlink()
    claims.claim(workdir, now)
    assert not (first / "done.json").exists() and not claims.raised(workdir, now)


def test_stages_that_do_not_run_again_may_log_otherwise(tmp_path):
    stage = to_dict(STAGE)
    before = {"stages": ["a", "b"], "a": stage, "b": stage}
    workdir = started(tmp_path / "run", before)
    folders = recipe.stage_folders(before, workdir)
    (started(workdir / "00_a", stage) / "done.json").write_text('{"metrics": {}}')
    choice = rerun.Choice("from", "b")
    now = {**before, "a": changed(stage, log__every=3)}
    assert rerun.to_move(now, folders, workdir, choice) == ([], False)
    now = {**before, "a": changed(stage, steps=9, **CONSTANT)}
    with pytest.raises(ConfigError, match="has changed, and a does not run again"):
        rerun.to_move(now, folders, workdir, choice)


# ------------------------------------------------------------------ runs


def of(conversations, finished, **changes) -> dict:
    """Pretraining at a constant learning rate."""
    values = stage_values("pretrain", conversations, finished, eval_every=0)
    values["optim"] = values["optim"] | {"schedule": "constant"}
    return values | changes


def assert_same_state(one: Path, other: Path) -> None:
    ours, theirs = arrays(one.parent), arrays(other.parent)
    assert ours.keys() == theirs.keys() != set()
    for name in ours:
        np.testing.assert_array_equal(
            ours[name].view(np.uint32), theirs[name].view(np.uint32)
        )
    assert checkpoint_note(one) == checkpoint_note(other)


@pytest.mark.slow
def test_raised_steps_end_where_a_run_of_so_many_steps_ends(
    conversations, finished, tmp_path, monkeypatch, capsys
):
    """After an interruption metrics.jsonl is the same to the byte.

    After an end it also has the evaluation of that end.
    """
    folders = {name: tmp_path / name / "run" for name in ("whole", "stopped", "ended")}
    recipe.run(of(conversations, finished, steps=6), folders["whole"])
    with monkeypatch.context() as patch:
        interrupt(patch, "pretrain", 3, "exception")
        with pytest.raises(Exception, match=r"^$"):
            recipe.run(of(conversations, finished, steps=4), folders["stopped"])
    recipe.run(of(conversations, finished, steps=4), folders["ended"])
    assert recipe.finished(of(conversations, finished, steps=4), folders["ended"])
    assert not recipe.finished(of(conversations, finished, steps=6), folders["ended"])
    dry_run.show(of(conversations, finished, steps=6), folders["ended"])
    assert "resumes at step 4" in capsys.readouterr().out
    for name in ("stopped", "ended"):
        recipe.run(of(conversations, finished, steps=6), folders[name])
        assert_same_state(folders[name], folders["whole"])
        done = json.loads((folders[name] / "done.json").read_text())
        assert done["steps"] == 6
    whole, stopped, ended = (
        (folder / "metrics.jsonl").read_bytes() for folder in folders.values()
    )
    assert stopped == whole
    lines = ended.splitlines()
    extra = [line for line in lines if line not in whole.splitlines()]
    assert [json.loads(line)["step"] for line in extra] == [4]
    assert [line for line in lines if line not in extra] == whole.splitlines()
