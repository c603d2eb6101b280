"""Recipes: references, what is run again and what is not, changed configs, collected metrics."""

import json
import math

import pytest

from rlhfjax import recipe, stages
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from tests import tiny
from tests.test_json_text import strict


def test_a_finished_recipe_only_answers(conversations, finished):
    """The same command again: no stage runs or writes anything, and the result is the same."""
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*/**/*") if p.is_file()}
    config = to_dict(tiny.get_config(f"data={conversations}"))
    final = recipe.run(config, finished)
    assert {
        p: p.stat().st_mtime_ns for p in finished.glob("*/**/*") if p.is_file()
    } == before
    for folder in recipe.stage_folders(config, finished).values():
        done = json.loads((folder / "done.json").read_text())
        assert done["metrics"].items() <= final.items()


def test_the_recipes_metrics_are_those_of_all_stages_in_order(finished):
    collected = [
        json.loads(line)
        for line in (finished / "metrics.jsonl").read_text().splitlines()
    ]
    expected = []
    for number, name in enumerate(tiny.STAGES):
        for line in (
            (finished / f"{number:02d}_{name}" / "metrics.jsonl")
            .read_text()
            .splitlines()
        ):
            expected.append({"stage": name, **json.loads(line)})
    assert collected == expected
    assert {row["stage"] for row in collected} == set(tiny.STAGES)


def test_every_stage_says_how_much_it_cut(finished):
    """`reward/val_pairs_dropped` is there where a held-out prompt has answers that are not tied."""
    lines = [
        json.loads(line)
        for line in (finished / "metrics.jsonl").read_text().splitlines()
    ]
    values = {name: value for line in lines for name, value in line.items()}
    names = {name for name in values if name.endswith(("_cut", "_dropped"))}
    assert names - {"reward/val_pairs_dropped"} == {
        "sft/examples_cut",
        "sft/val_examples_cut",
        "collect/prompts_cut",
        "reward/rows_cut",
        "reward/val_rows_cut",
        "reward/pairs_dropped",
        "ppo/prompts_cut",
        "ppo/val_prompts_cut",
        "evaluate/prompts_cut",
    }
    assert all(0 <= values[name] <= 1 for name in names)
    assert (
        values["reward/rows_cut"] == 0
    )  # its length is that of what `collect` sampled


def jobs(monkeypatch, ran: list) -> None:
    """Replaces what a tokenizer stage does by a note that it was done."""
    from rlhfjax.stages import tokenizer

    def run(config, workdir, layout):
        ran.append(workdir.name)
        (workdir / "metrics.jsonl").write_text(
            json.dumps({"step": 0, "x": config.vocab_size}) + "\n"
        )
        return {f"{workdir.name}/x": float(config.vocab_size)}

    monkeypatch.setattr(tokenizer, "run", run)


def two(**changes) -> dict:
    one = {"stage": "tokenizer", "vocab_size": 300}
    return {"stages": ["a", "b"], "a": one, "b": {**one, **changes}}


def test_only_what_is_not_finished_runs(tmp_path, monkeypatch):
    ran = []
    jobs(monkeypatch, ran)
    assert recipe.run(two(), tmp_path) == {"00_a/x": 300.0, "01_b/x": 300.0}
    (tmp_path / "01_b" / "done.json").unlink()
    assert recipe.run(two(), tmp_path) == {"00_a/x": 300.0, "01_b/x": 300.0}
    assert ran == ["00_a", "01_b", "01_b"]


def test_pitfall_35_a_metric_that_is_nan_is_null_in_done_json(tmp_path, monkeypatch):
    """It is NaN in memory, on the first run and when the finished stage is asked again."""
    metrics = {"a/x": 0.5, "a/kl": math.nan, "a/high": math.inf}
    monkeypatch.setattr(stages.find("tokenizer"), "run", lambda *_: metrics)
    for expected in (metrics, metrics | {"a/high": math.nan}):
        got = recipe.run({"stage": "tokenizer", "vocab_size": 300}, tmp_path)
        assert got == pytest.approx(expected, nan_ok=True)
        done = strict((tmp_path / "done.json").read_text())
        assert done["metrics"] == {"a/x": 0.5, "a/kl": None, "a/high": None}


def test_a_changed_config_names_the_keys_that_differ_with_both_values(
    tmp_path, monkeypatch
):
    ran = []
    jobs(monkeypatch, ran)
    recipe.run(two(), tmp_path)
    with pytest.raises(ConfigError) as caught:
        recipe.run(
            two(mesh={"fsdp": 2}, vocab_size=301, model_type="unigram"), tmp_path
        )
    message = str(caught.value)
    assert "b.model_type: absent (bpe) -> unigram" in message
    assert "mesh" not in message  # another mesh may resume a run
    assert (
        "b.vocab_size: 300 -> 301" in message
        and "a." not in message
        and "\n" not in message
    )
    assert "use a new --workdir" in message and ran == ["00_a", "01_b"]
    with pytest.raises(ConfigError, match=r"vocab_size: 300 -> 9"):
        recipe.run({"stage": "tokenizer", "vocab_size": 9}, tmp_path / "00_a")


def test_a_config_that_led_nowhere_may_be_corrected_in_place(tmp_path, monkeypatch):
    """Nothing was computed: a typing error in a path must not cost the workdir."""
    with pytest.raises(ConfigError, match="at least one source"):
        recipe.run(two(), tmp_path)
    ran = []
    jobs(monkeypatch, ran)
    recipe.run(two(vocab_size=301), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == two(vocab_size=301)


def test_references_are_paths_of_earlier_stages(tmp_path):
    config = {"stages": ["a", "b", "c"], "a": {}, "b": {}, "c": {}}
    folders = recipe.stage_folders(config, tmp_path)
    value = {
        "x": ["stage:a", {"y": "stage:b/preferences"}],
        "z": "jsonl:stage:a/*.jsonl",
        "n": 3,
        "t": "stage",
    }
    assert recipe.resolve(value, folders, "c") == {
        "x": [f"{tmp_path}/00_a", {"y": f"{tmp_path}/01_b/preferences"}],
        "z": f"jsonl:{tmp_path}/00_a/*.jsonl",
        "n": 3,
        "t": "stage",
    }
    for name, target in (("b", "c"), ("b", "b"), ("a", "b"), ("c", "d")):
        earlier = {"a": "none", "b": "a", "c": "a, b"}[name]
        with pytest.raises(
            ConfigError,
            match=f"{name} refers to 'stage:{target}'; the stages before it are {earlier}",
        ):
            recipe.resolve(f"stage:{target}", folders, name)


@pytest.mark.parametrize(
    "text",
    [
        "Judge this stage: is it good?",
        "stage: the first of three",
        "backstage:pass",
        "Is it\nstage:\n{response}",
        "on stage:a",
        "http://host/stage:a",
    ],
)
def test_text_that_is_no_reference_stays(tmp_path, text):
    folders = recipe.stage_folders({"stages": ["a", "b"], "a": {}, "b": {}}, tmp_path)
    value = {"x": [text], "y": {"template": "stage:{response}", "option": "stage:A"}}
    assert recipe.resolve(value, folders, "b") == value


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("stage:a", "TMP/00_a"),
        ("stage:a/my file.json", "TMP/00_a/my file.json"),
        ("text:stage:a/{split}/*.txt", "text:TMP/00_a/{split}/*.txt"),
        ("rule:m.n:f?metadata=stage:a/*.jsonl", "rule:m.n:f?metadata=TMP/00_a/*.jsonl"),
        ("stage:", None),
        ("stage:aa", None),
        ("stage:A", None),
        ("jsonl:stage:pretrian/x", None),
        ("rule:m:f?metadata=stage:pretrian/x", None),
    ],
)
def test_references_stand_alone_or_after_a_scheme(tmp_path, reference, path):
    folders = recipe.stage_folders({"stages": ["a", "b"], "a": {}, "b": {}}, tmp_path)
    if path is None:
        with pytest.raises(
            ConfigError, match=r"b refers to .*; the stages before it are a"
        ):
            recipe.resolve({"init_from": reference}, folders, "b")
        return
    resolved = recipe.resolve({"init_from": reference}, folders, "b")
    assert resolved == {"init_from": path.replace("TMP", str(tmp_path))}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"stages": ["a"]}, "stage 'a' is in `stages` but has no config"),
        ({"stages": ["a"], "a": {}, "b": {}}, "'b' is not in `stages`: a"),
        ({"stages": ["a", "a"], "a": {}}, "a name appears twice"),
        (
            {"stages": ["a"], "a": {"stage": "bogus"}},
            "stage 'bogus' is unknown; known: ",
        ),
        ({"stages": ["a"], "a": {}}, "stage '' is unknown"),
        (two(bogus=1), "b.bogus: no such option"),
        (two(vocab_size="many"), "b.vocab_size='many': expected int"),
    ],
)
def test_a_recipe_that_cannot_be_meant(config, said, tmp_path):
    with pytest.raises(ConfigError) as caught:
        recipe.run(config, tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_eval_says_again_what_the_run_said_last(finished):
    done = json.loads((finished / "01_pretrain" / "done.json").read_text())["metrics"]
    again = recipe.evaluate(None, finished / "01_pretrain")
    assert again == {name: value for name, value in done.items() if "/val_" in name}


def test_eval_of_what_has_no_checkpoint(finished, tmp_path):
    for folder, said in (
        (finished, "is the workdir of a recipe; name one of its stages"),
        (finished / "00_tokenizer", "the stage tokenizer has no checkpoint"),
        (tmp_path, "no config.json here"),
    ):
        with pytest.raises(ConfigError, match=said):
            recipe.evaluate(None, folder)


OUTSIDE = """
import dataclasses

from rlhfjax.mesh import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    stage: str = "my_stages:Settings"
    number: int
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(config, workdir, layout):
    return {"mine/number": float(config.number)}
"""


def test_a_stage_outside_of_the_package_is_a_stage_as_any(tmp_path, monkeypatch):
    (tmp_path / "my_stages.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    mine = stages.stage_config("my_stages:Settings", number=7)
    assert recipe.run(mine, tmp_path / "run") == {"mine/number": 7.0}
    done = strict((tmp_path / "run" / "done.json").read_text())
    assert (done["kind"], done["metrics"]) == (
        "my_stages:Settings",
        {"mine/number": 7.0},
    )
    with pytest.raises(ConfigError, match="number"):
        recipe.run({"stage": "my_stages:Settings"}, tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module:Config",
            r"stage 'no_such_module:Config': no_such_module cannot be imported",
        ),
        (
            "json:JSONDecoder",
            "stage 'json:JSONDecoder': json has neither build nor run",
        ),
        (
            "my_stages:Options",
            "stage 'my_stages:Options': my_stages has no class 'Options'",
        ),
        ("my_stages:run", "my_stages has no class 'run'"),
        (
            "my_stages",
            "stage 'my_stages' is unknown; .* or package.module:Config of your own",
        ),
    ],
)
def test_a_stage_outside_that_is_none_is_named(name, message, tmp_path, monkeypatch):
    (tmp_path / "my_stages.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        recipe.run({"stage": name, "number": 7}, tmp_path / "run")
