"""`run --from=STAGE` and `--only=STAGE`: what runs again, what is kept, what is an error."""

import json

import pytest

from rlhfjax import recipe, rerun
from rlhfjax.errors import ConfigError
from rlhfjax.rerun import Choice
from tests.test_recipe import jobs


def three(**changes) -> dict:
    """A recipe in which c depends on b through its data, and nothing depends on a."""
    stage = {"stage": "tokenizer", "vocab_size": 300}
    source = {"spec": "text:stage:b/*.txt"}
    config = {"stages": ["a", "b", "c"], "a": stage, "b": stage}
    config["c"] = {**stage, "sources": [source]}
    for place, value in changes.items():
        name, option = place.split("_", 1)
        config[name] = {**config[name], option: value}
    return config


@pytest.fixture
def ran(monkeypatch, tmp_path) -> list[str]:
    """The stages that ran, in order; those of the first run are left out."""
    stages: list[str] = []
    jobs(monkeypatch, stages)
    monkeypatch.setattr(recipe.references, "validate", lambda *_: None)
    recipe.run(three(), tmp_path)
    stages.clear()
    return stages


def test_from_runs_a_changed_stage_and_those_after_it_again(tmp_path, ran):
    changed = three(b_vocab_size=301)
    with pytest.raises(ConfigError, match="or --from=b, which runs b and"):
        recipe.run(changed, tmp_path)
    metrics = rerun.run(changed, tmp_path, Choice("from", "b"))
    assert ran == ["01_b", "02_c"]
    assert metrics == {"00_a/x": 300.0, "01_b/x": 301.0, "02_c/x": 300.0}
    assert json.loads((tmp_path / "config.json").read_text()) == changed
    for name in ("01_b", "02_c"):
        before = json.loads((tmp_path / "previous/1" / name / "done.json").read_text())
        assert before["metrics"] == {f"{name}/x": 300.0}
    # The changed config is now the workdir's: nothing is left to run.
    recipe.run(changed, tmp_path)
    assert ran == ["01_b", "02_c"]


def test_from_resumes_what_is_unfinished_and_repeats_what_is_finished(tmp_path, ran):
    (tmp_path / "02_c" / "done.json").unlink()
    rerun.run(three(), tmp_path, Choice("from", "b"))
    assert ran == ["02_c"] and not (tmp_path / "previous").exists()
    rerun.run(three(), tmp_path, Choice("from", "b"))
    rerun.run(three(), tmp_path, Choice("from", "c"))
    assert ran == ["02_c", "01_b", "02_c", "02_c"]
    assert sorted(p.name for p in (tmp_path / "previous").iterdir()) == ["1", "2"]


def test_only_runs_one_stage_and_moves_away_what_depends_on_it(tmp_path, ran):
    rerun.run(three(a_vocab_size=301), tmp_path, Choice("only", "a"))
    assert ran == ["00_a"] and (tmp_path / "02_c" / "done.json").exists()
    rerun.run(three(a_vocab_size=301), tmp_path, Choice("only", "b"))
    assert ran == ["00_a", "01_b"]
    assert not (tmp_path / "02_c").exists()
    assert (tmp_path / "previous/2/02_c/done.json").exists()


@pytest.mark.parametrize(
    "choice, changes, message",
    [
        (Choice("from", "d"), {}, "--from=d: the stages are a, b, c"),
        (Choice("from", "c"), {"b_vocab_size": 9}, "b.vocab_size has changed"),
        (Choice("only", "b"), {"a_vocab_size": 9}, "a.vocab_size has changed"),
        (Choice("only", "a"), {"b_vocab_size": 9}, "b.vocab_size has changed"),
    ],
)
def test_what_cannot_be_run_again_is_an_error_that_changes_nothing(
    tmp_path, ran, choice, changes, message
):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=message):
        rerun.run(three(**changes), tmp_path, choice)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert ran == []


def test_stages_before_must_be_done(tmp_path, ran):
    (tmp_path / "00_a" / "done.json").unlink()
    with pytest.raises(ConfigError, match="--only=b: a is not finished in"):
        rerun.run(three(), tmp_path, Choice("only", "b"))
    with pytest.raises(ConfigError, match="this config is a single stage"):
        rerun.run({"stage": "tokenizer"}, tmp_path, Choice("from", "a"))


def test_what_cannot_start_is_not_moved_away(tmp_path, ran, monkeypatch):
    def refuse(configs, folders, done, again=()):
        raise ConfigError("b.sources: no file matches")

    monkeypatch.setattr(rerun.references, "validate", refuse)
    with pytest.raises(ConfigError, match="no file matches"):
        rerun.run(three(b_vocab_size=301), tmp_path, Choice("from", "b"))
    assert (tmp_path / "01_b" / "done.json").exists()
    assert not (tmp_path / "previous").exists()
