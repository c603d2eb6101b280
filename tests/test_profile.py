"""log.profile: which steps are in the trace, and that it changes nothing else."""

import gzip
import json
import re
from pathlib import Path

import pytest

from rlhfjax import recipe
from rlhfjax.config import LogConfig, TrainConfig
from rlhfjax.errors import ConfigError, Preempted
from rlhfjax.profile import validate
from tests.test_resume import assert_same_stage, interrupt, recipe_folder
from tests.test_stages import stage_values


def profiled(steps: str, conversations: Path, finished: Path) -> dict:
    """Returns the config of the tiny pretrain stage, of 6 steps, with a trace of some."""
    return stage_values(
        "pretrain", conversations, finished, log={"every": 1, "profile": steps}
    )


def traced_steps(workdir: Path) -> int:
    """Returns how many runs of the program `step` are in the trace."""
    (file,) = (workdir / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "step" for event in events)


def test_a_trace_has_its_steps_by_name_and_changes_no_bit(
    conversations, finished, tmp_path
):
    """Of 6 steps two are traced; metrics, parameters and checkpoints are those without a trace."""
    recipe.run_stage(profiled("2:3", conversations, finished), tmp_path)
    assert traced_steps(tmp_path) == 2
    assert_same_stage(recipe_folder(finished, "pretrain"), tmp_path)


def test_without_it_nothing_is_traced(finished):
    assert not (recipe_folder(finished, "pretrain") / "profile").exists()


@pytest.mark.slow
def test_a_run_that_ends_among_its_steps_leaves_their_trace(
    conversations, finished, tmp_path, monkeypatch
):
    """SIGTERM comes during step 4 of the traced 3:100; the second start traces steps 5 and 6."""
    values = profiled("3:100", conversations, finished)
    with monkeypatch.context() as patch:
        interrupt(patch, "pretrain", 3, "sigterm")
        with pytest.raises(Preempted, match="stopped at step 4 and was saved"):
            recipe.run_stage(values, tmp_path)
    assert traced_steps(tmp_path) == 2
    (tmp_path / "profile").rename(tmp_path / "first")
    recipe.run_stage(values, tmp_path)
    assert traced_steps(tmp_path) == 2
    assert_same_stage(recipe_folder(finished, "pretrain"), tmp_path)


@pytest.mark.parametrize(
    "text", ("10", "10:", ":15", "a:b", "15:10", "0:3", "-1:3", "1:2:3", " 1:2")
)
def test_a_malformed_text_is_one_line(text, conversations, finished):
    message = f"log.profile={text!r}: expected FIRST:LAST, such as 10:15"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        recipe.check(profiled(text, conversations, finished), "pretrain")


def test_steps_that_a_run_does_not_have_are_invalid():
    config = TrainConfig(stage="fake", steps=9, log=LogConfig(profile="10:15"))
    with pytest.raises(ConfigError, match=r"^log\.profile='10:15': there are 9 steps$"):
        validate(config)
    validate(TrainConfig(stage="fake", steps=10, log=LogConfig(profile="10:15")))
