"""Old names: an error that gives the present one, or a file that is still read."""

import json

import pytest

from rlhfjax import claims, renamed, stages
from rlhfjax.config import build
from rlhfjax.data.rows import normalize
from rlhfjax.errors import ConfigError
from rlhfjax.report.workdir import read_run
from rlhfjax.rewards.rankings import read_rankings


def stages_with(option):
    """Returns the stages whose config has an option."""
    classes = {name: stages.config_class(name) for name in stages.names()}
    return [n for n, cls in classes.items() if option in cls.__dataclass_fields__]


@pytest.mark.parametrize(("old", "new"), renamed.OPTIONS.items())
def test_an_old_option_is_an_error_with_the_present_name(old, new):
    message = f"{old}: no such option; it is now called {new}$"
    owners = stages_with(new)
    assert owners and not stages_with(old)
    for stage in owners:
        with pytest.raises(ConfigError, match=message):
            stages.stage_config(stage, **{old: 1})
        with pytest.raises(ConfigError, match=message):
            build(stages.config_class(stage), {"stage": stage, old: 1}, stage)


def test_an_old_option_on_the_command_line(tmp_path):
    from rlhfjax.main import parse

    file = tmp_path / "config.py"
    file.write_text(
        "from rlhfjax.stages import stage_config\n"
        "def get_config(arg=None):\n    return stage_config('evaluate')\n"
    )
    argv = ["rlhfjax", "run", f"--config={file}", "--config.slots=3"]
    with pytest.raises(ConfigError, match="'slots'; it is now called decode_batch"):
        parse(argv)


@pytest.mark.parametrize(("old", "new"), renamed.STAGES.items())
def test_an_old_stage(old, new):
    with pytest.raises(
        ConfigError, match=f"'{old}' is unknown; it is now called {new};"
    ):
        stages.find(old)


OLD = {"stage": "collect", "slots": 4, "labeller": "gold:sentiment", "max_new": 8}
NEW = {
    "stage": "collect",
    "decode_batch": 4,
    "labeler": "gold:sentiment",
    "max_new_tokens": 8,
}


@pytest.mark.parametrize("in_recipe", [False, True])
def test_a_workdir_of_old_names_is_resumed_and_reported(tmp_path, in_recipe):
    old, new = OLD, NEW
    if in_recipe:
        old = {"stages": ["slots"], "slots": OLD}
        new = {"stages": ["slots"], "slots": NEW}
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "metrics.jsonl").write_text("")
    claims.compare(tmp_path, new)
    (stage,) = read_run(tmp_path).stages
    assert stage.config == NEW
    changed = json.loads(json.dumps(new).replace(": 8", ": 9"))
    with pytest.raises(ConfigError, match="max_new_tokens: 8 -> 9"):
        claims.compare(tmp_path, changed)


def test_the_stage_of_a_workdir_with_an_old_name(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "recentre"}')
    (tmp_path / "done.json").write_text('{"kind": "recentre", "metrics": {}}')
    (stage,) = read_run(tmp_path).stages
    assert stage.config == {"stage": "recenter"}
    assert stage.kind == "recenter"


def test_a_file_with_the_old_column(tmp_path):
    row = {
        "prompt": "p",
        "completions": ["a", "b"],
        "scores": [1, 0],
        "labeller": "ann",
    }
    assert normalize("preferences", row, {})["labeler"] == "ann"
    ranking = {"prompt": "p", "completions": ["a", "b"], "ranking": [1, 2]}
    file = tmp_path / "rankings.jsonl"
    file.write_text(json.dumps(ranking | {"labeller": "ann"}) + "\n")
    (read,) = read_rankings(str(file))
    assert read.labeler == "ann"
