"""Every stage has a config for a few steps on a finished quickstart:
experiments/quickstart/stages.py.

That all of them run is seen by .ci/run, on what the quickstart's smoke has left.
"""

import runpy
from pathlib import Path

import pytest

from rlhfjax import recipe, stages
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.rewards.rankings import read_rankings

FOLDER = Path(__file__).parents[1] / "experiments" / "quickstart"
GET_CONFIG = runpy.run_path(str(FOLDER / "stages.py"))["get_config"]


@pytest.mark.parametrize("name", stages.names())
def test_every_stage_has_a_smoke_config_that_can_be_meant(name, finished, tmp_path):
    """A new stage fails here until it has one."""
    config = to_dict(GET_CONFIG(f"stage={name},run={finished}"))
    typed = recipe.check_all({name: config}, {name: tmp_path / name})[name]
    assert typed.stage == name
    assert getattr(typed, "steps", 0) <= 3


def test_as_a_recipe_all_stages_are_there_once_and_some_stand_on_others(
    finished, tmp_path
):
    config = to_dict(GET_CONFIG(f"run={finished}"))
    assert sorted(config["stages"]) == sorted(stages.names())
    folders = recipe.stage_folders(config, tmp_path)
    resolved = {name: recipe.resolve(config[name], folders, name) for name in folders}
    typed = recipe.check_all(resolved, folders)
    assert typed["group"].reward == str(folders["compose"])
    assert typed["collect"].labeler == str(folders["feedback"])
    assert typed["sft"].sources[0].spec == f"jsonl:{folders['select']}/train.jsonl"


def test_the_run_has_to_be_finished(tmp_path):
    with pytest.raises(ConfigError, match="has run to its end"):
        GET_CONFIG(f"run={tmp_path}")


def test_an_unknown_stage_is_named(finished):
    with pytest.raises(ConfigError, match="stage=nothing"):
        GET_CONFIG(f"stage=nothing,run={finished}")


def test_the_data_beside_it_is_in_the_documented_forms():
    """Two people ranked the same answers, or their agreement could not be computed."""
    rankings = read_rankings(str(FOLDER / "data" / "rankings.jsonl"))
    people = [{one.key for one in rankings if one.labeler == who} for who in ("a", "b")]
    assert len(people[0] & people[1]) >= 2
