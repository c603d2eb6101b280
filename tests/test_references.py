"""References: a recipe that refers to something that is not there stops before its first stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhfjax import recipe, references
from rlhfjax.config import to_dict
from rlhfjax.data import corpora, package_corpora
from rlhfjax.errors import UserError
from rlhfjax.stages import stage_config
from tests import tiny

SHAPE = {
    "vocab_size": tiny.VOCAB,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 32,
    "max_length": 32,
}


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The stages that a recipe starts, none of which computes anything."""
    names: list[str] = []

    def run_stage(config: Any, workdir: Path, **_: Any) -> dict[str, float]:
        names.append(workdir.name)
        return {}

    monkeypatch.setattr(recipe, "run_stage", run_stage)
    monkeypatch.setattr(recipe, "collect_metrics", lambda *_: None)
    return names


@pytest.fixture
def config(conversations, tmp_path) -> dict[str, Any]:
    """The tiny recipe, and beside it models of both heads, principles and rankings."""
    for head in ("lm", "scalar"):
        (tmp_path / head / "params").mkdir(parents=True)
        description = {"head": head, "transformer": SHAPE}
        (tmp_path / head / "config.json").write_text(json.dumps(description))
    (tmp_path / "lines.txt").write_text("Which is kinder?\n")
    (tmp_path / "empty").mkdir()
    return to_dict(tiny.get_config(f"data={conversations}"))


def add(config: dict[str, Any], name: str, **values: Any) -> None:
    """Appends a stage, whose kind is the name without a number, to a recipe."""
    config["stages"] = [*config["stages"], name]
    config[name] = to_dict(stage_config(name, **values))


def set_option(config: dict[str, Any], place: str, value: Any) -> None:
    *parents, last = place.split(".")
    for part in parents:
        config = config[int(part)] if part.isdigit() else config[part]
    config[int(last) if last.isdigit() else last] = value


def refused(config: dict[str, Any], workdir: Path, started: list[str]) -> str:
    """Returns the one line with which a recipe is refused before its first stage."""
    with pytest.raises(UserError) as caught:
        recipe.run(config, workdir)
    assert not started and not workdir.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_whose_references_are_there_starts(config, tmp_path, started):
    recipe.run(config, tmp_path / "run")
    assert len(started) == len(tiny.STAGES)


@pytest.mark.parametrize(
    ("reward", "is_model"),
    [
        ({"kind": "compose", "combine": "pessimistic"}, True),
        ({"kind": "compose", "combine": "sum"}, False),
        ({"kind": "dense", "model": "stage:reward"}, True),
    ],
)
def test_a_value_function_starts_from_any_reward_that_is_a_model(
    reward, is_model, config, tmp_path, started
):
    """An ensemble too: from its first member."""
    if reward["kind"] == "compose":
        reward["members"] = [{"reward": "stage:reward"}, {"reward": "stage:reward"}]
    config["ppo"]["reward"] = reward
    if is_model:
        recipe.run(config, tmp_path / "run")
        assert len(started) == len(tiny.STAGES)
    else:
        message = refused(config, tmp_path / "run", started)
        assert "is no model to start from" in message


REWARDS = "expected gold:NAME, rule:MODULE:FUNCTION, or the workdir of a stage"
LM, SCALAR = "a language model", "a reward model"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (
            "ppo.reward",
            "gold:foo",
            ("ppo.reward=gold:foo: gold.name='foo': expected one of 'sentiment'",),
        ),
        (
            "ppo.reward",
            "TMP/none",
            ("ppo.reward=TMP/none: there is no such reward", REWARDS),
        ),
        ("ppo.reward", "rankings:x", ("ppo.reward=rankings:x: expected a reward",)),
        (
            "ppo.reward",
            "stage:tokenizer",
            ("there is no such reward", "leaves no model"),
        ),
        ("ppo.reward", "stage:sft", ("ppo.reward=", f"expected {SCALAR}, found {LM}")),
        (
            "ppo.reward",
            "TMP/lm",
            (f"ppo.reward=TMP/lm: expected {SCALAR}, found {LM}",),
        ),
        (
            "ppo.reward",
            "rule:no.such:f",
            ("ppo.reward=rule:no.such:f: ", "no.such cannot be imported"),
        ),
        (
            "ppo.reward",
            "rule:json:dumps?retries=3",
            ("ppo.reward.retries: no such option",),
        ),
        (
            "ppo.reward",
            "rule:tests.rewards.some_rules:words?metadata=/no/x",
            ("metadata=/no/x: metadata=/no/x: no file matches",),
        ),
        (
            "ppo.human.reward",
            "gold:foo",
            ("ppo.human.reward=gold:foo: gold.name='foo'",),
        ),
        (
            "ppo.reward",
            "gold:sentiment",
            ('ppo.value="reward": gold:sentiment is no model to start from',),
        ),
        ("ppo.gold", "gold:foo", ("ppo.gold=gold:foo: gold.name='foo': expected",)),
        ("ppo.reference", "TMP/none", ("ppo.reference=TMP/none: no model here",)),
        (
            "ppo.reference",
            "TMP/scalar",
            (f"ppo.reference=TMP/scalar: expected {LM}, found",),
        ),
        (
            "ppo.init_from",
            "stage:reward",
            ("ppo.init_from=", f"expected {LM}, found {SCALAR}"),
        ),
        ("ppo.init_from", "TMP/scalar", ("ppo.init_from=TMP/scalar", f"expected {LM}")),
        (
            "sft.init_from",
            "stage:tokenizer",
            ("00_tokenizer: the stage tokenizer leaves no",),
        ),
        ("sft.init_from", "pip:no-such-package", ("no such package is installed",)),
        ("collect.init_from", "TMP/none", ("TMP/none: no model here",)),
        ("collect.labeler", "gold:foo", ("collect.labeler=gold:foo: gold.name='foo'",)),
        (
            "collect.labeler",
            "rankings:/no/*.jsonl",
            ("rankings=/no/*.jsonl: no file matches",),
        ),
        ("collect.labeler", "TMP/lm", (f"collect.labeler=TMP/lm: expected {SCALAR}",)),
        (
            "collect.others",
            ["gold:sentiment", "gold:foo"],
            ("collect.others[1]=gold:foo: ",),
        ),
        ("evaluate.gold", "gold:foo", ("evaluate.gold=gold:foo: gold.name='foo'",)),
        (
            "evaluate.proxy",
            "stage:sft",
            ("evaluate.proxy=", f"expected {SCALAR}, found {LM}"),
        ),
        (
            "evaluate.policy",
            "stage:reward",
            ("evaluate.policy=", f"expected {LM}, found"),
        ),
        (
            "evaluate.policy",
            "stage:collect",
            ("03_collect: the stage collect leaves no model",),
        ),
        (
            "evaluate.baseline",
            "TMP/none",
            ("evaluate.baseline=TMP/none: no model here",),
        ),
        (
            "evaluate.baseline",
            "TMP/scalar",
            ("evaluate.baseline=TMP/scalar: expected",),
        ),
        (
            "pretrain.tokenizer",
            "TMP/none",
            ("pretrain.tokenizer=TMP/none: expected a token",),
        ),
        (
            "reward.preferences",
            ["TMP/empty"],
            ("preferences[0]=TMP/empty: expected a folder",),
        ),
        (
            "reward.preferences",
            ["text:x"],
            ("preferences[0]=text:x: expected a folder",),
        ),
        (
            "reward.preferences",
            ["jsonl:/no/x"],
            ("preferences[0]=/no/x: no file matches",),
        ),
        (
            "sft.sources.0.spec",
            "xml:x",
            ("sft.sources[0].spec=xml:x: expected tfds:NAME",),
        ),
        (
            "sft.sources.0.spec",
            "x*.parquet",
            ("sft.sources[0].spec=x*.parquet: no file matches",),
        ),
        (
            "reward.preferences.0",
            "csv:x",
            ("reward.preferences[0]=x: no file matches",),
        ),
        (
            "reward.preferences.0",
            "pairs.txt",
            ("reward.preferences[0]=pairs.txt: expected a folder with a dataset",),
        ),
        (
            "sft.sources.0.spec",
            "jsonl:/no/x",
            ("sft.sources[0].spec=/no/x: no file matches",),
        ),
        (
            "sft.sources.0.spec",
            "tfds:no_such_set",
            ("spec=tfds:no_such_set: no such TFDS",),
        ),
        (
            "sft.sources.0.kind",
            "poem",
            ("kind='poem': expected one of 'text', 'messages'",),
        ),
        (
            "ppo.eval_prompts.source.spec",
            "jsonl:/no/x",
            ("ppo.eval_prompts.source.spec=/no/x",),
        ),
        (
            "ppo.ptx.sources.0.spec",
            "text:/no/x",
            ("ppo.ptx.sources[0].spec=/no/x: no file",),
        ),
    ],
)
def test_a_wrong_reference_is_one_line(place, value, said, config, tmp_path, started):
    filled = json.loads(json.dumps(value).replace("TMP", str(tmp_path)))
    set_option(config, place, filled)
    message = refused(config, tmp_path / "run", started)
    for part in said:
        assert part.replace("TMP", str(tmp_path)) in message


RANKED = {"preferences": ("stage:collect/preferences",), "length": 8, "batch_size": 8}
DIRECT = {**RANKED, "steps": 9}
BEST_OF_N = {"prompt_length": 8, "max_new_tokens": 8}
JUDGE = {"judge": {"model": "stage:reward", "length": 16}}
CLASSES = ({"option": "A", "reward": 1.0}, {"option": "B", "reward": 0.0})


@pytest.mark.parametrize(
    ("stage", "values", "said"),
    [
        (
            "recenter",
            {"init_from": "stage:sft", **RANKED},
            ("recenter.init_from=", f"expected {SCALAR}, found {LM}"),
        ),
        (
            "recenter",
            {
                "init_from": "stage:reward",
                "policy": "TMP/scalar",
                "batch_size": 8,
                **BEST_OF_N,
            },
            (f"recenter.policy=TMP/scalar: expected {LM}, found {SCALAR}",),
        ),
        (
            "direct",
            {"init_from": "stage:reward", **DIRECT},
            ("direct.init_from=", f"expected {LM}, found {SCALAR}"),
        ),
        (
            "direct",
            {"init_from": "TMP/scalar", **DIRECT, "loss": {"name": "simpo"}},
            ("direct.init_from=TMP/scalar: expected", f"found {SCALAR}"),
        ),
        (
            "direct",
            {"init_from": "stage:sft", "reference": "TMP/none", **DIRECT},
            ("direct.reference=TMP/none: no model here",),
        ),
        (
            "best_of_n",
            {"init_from": "stage:sft", "proxy": "gold:foo", **BEST_OF_N},
            ("best_of_n.proxy=gold:foo: gold.name='foo'",),
        ),
        (
            "best_of_n",
            {
                "init_from": "stage:sft",
                "proxy": "stage:reward",
                "gold": "TMP/lm",
                **BEST_OF_N,
            },
            (f"best_of_n.gold=TMP/lm: expected {SCALAR}",),
        ),
        (
            "best_of_n",
            {"init_from": "stage:reward", "proxy": "stage:reward", **BEST_OF_N},
            ("best_of_n.init_from=", f"expected {LM}"),
        ),
        (
            "critique",
            {
                "init_from": "stage:sft",
                "critic": "stage:reward",
                "principles": "TMP/lines.txt",
                "length": 16,
                "max_new_tokens": 8,
            },
            ("critique.critic=", f"expected {LM}, found {SCALAR}"),
        ),
        (
            "critique",
            {
                "init_from": "stage:sft",
                "principles": "TMP/none",
                "length": 16,
                "max_new_tokens": 8,
            },
            ("critique.principles=TMP/none: no file matches",),
        ),
        (
            "rubric",
            {"template": "{response}", "classes": CLASSES, **JUDGE},
            ("rubric.judge.model=", f"expected {LM}, found {SCALAR}"),
        ),
        (
            "feedback",
            {"principles": "TMP/none", "judge": {"model": "stage:sft", "length": 16}},
            ("feedback.principles=TMP/none: no file",),
        ),
        (
            "compose",
            {"members": ({"reward": "gold:foo"},)},
            ("compose.members[0].reward=gold:foo: gold.name='foo'",),
        ),
        (
            "compose",
            {"members": ({"reward": "stage:reward", "where": "rule:json:nothing"},)},
            ("compose.members[0].where=rule:json:nothing: rule", "has no 'nothing'"),
        ),
        (
            "select",
            {"preferences": ("stage:collect/preferences",), "tokenizer": "TMP/none"},
            ("select.tokenizer=TMP/none: expected a token",),
        ),
        (
            "import_rankings",
            {"rankings": "/no/*.jsonl", "tokenizer": "stage:tokenizer"},
            ("rankings=/no/*.jsonl: no file matches",),
        ),
        (
            "tamer",
            {
                "init_from": "stage:sft",
                "feedback": "TMP/none",
                "held_out": "TMP/lines.txt",
                "length": 8,
                "batch_size": 8,
                "steps": 9,
            },
            ("tamer.feedback=TMP/none: no file matches",),
        ),
    ],
)
def test_so_is_one_of_other_stages(stage, values, said, config, tmp_path, started):
    filled = json.loads(json.dumps(values).replace("TMP", str(tmp_path)))
    add(config, stage, **filled)
    message = refused(config, tmp_path / "run", started)
    for part in said:
        assert part.replace("TMP", str(tmp_path)) in message


def test_what_an_earlier_stage_makes_is_taken_on_trust(config, tmp_path, started):
    add(
        config,
        "compose",
        members=({"reward": "stage:reward"}, {"reward": "gold:sentiment"}),
    )
    add(
        config,
        "feedback",
        principles=str(tmp_path / "lines.txt"),
        judge={"model": "stage:sft", "length": 16},
    )
    add(
        config,
        "select",
        preferences=("stage:collect/preferences",),
        tokenizer="stage:sft",
    )
    config["ppo"]["human"]["reward"] = str(tmp_path / "scalar")
    config["collect"]["others"] = [str(tmp_path / "scalar")]
    recipe.run(config, tmp_path / "run")
    assert len(started) == len(tiny.STAGES) + 3


def test_the_parts_of_a_reward_on_disk_are_validated_too(config, tmp_path, started):
    """Relative to its folder, and however deep."""
    members = [{"reward": "gold:sentiment"}, {"reward": "scalar"}]
    inner = {"kind": "compose", "members": members, "combine": "sum"}
    (tmp_path / "empty" / "reward.json").write_text(json.dumps(inner))
    config["ppo"] |= {"reward": str(tmp_path / "empty"), "value": "policy"}
    message = refused(config, tmp_path / "run", started)
    assert (
        f"ppo.reward={tmp_path}/empty: members[1].reward=scalar: there is no such"
        in message
    )
    members[1]["reward"] = "../scalar"
    (tmp_path / "empty" / "reward.json").write_text(json.dumps(inner))
    recipe.run(config, tmp_path / "run")


def test_a_labeler_that_is_no_reward_rewards_nothing(config, tmp_path, started):
    values = {
        "kind": "feedback",
        "judge": {"model": str(tmp_path / "lm"), "length": 16},
        "principles": str(tmp_path / "lines.txt"),
    }
    (tmp_path / "empty" / "reward.json").write_text(json.dumps(values))
    config["ppo"]["reward"] = str(tmp_path / "empty")
    message = refused(config, tmp_path / "run", started)
    assert "expected a reward, feedback only labels responses" in message
    config["ppo"]["reward"] = "stage:reward"
    config["collect"]["labeler"] = str(tmp_path / "empty")
    recipe.run(config, tmp_path / "run")


def test_a_finished_stage_needs_nothing_any_more(config, tmp_path, started):
    workdir = tmp_path / "run"
    set_option(config, "sft.sources.0.spec", "jsonl:/no/x")
    assert "no file matches" in refused(config, workdir, started)
    for i, name in enumerate(tiny.STAGES[:3]):
        (workdir / f"{i:02d}_{name}").mkdir(parents=True)
        (workdir / f"{i:02d}_{name}" / "done.json").write_text('{"metrics": {}}')
    recipe.run(config, workdir)


def test_one_stage_by_itself_is_validated_too(config, tmp_path, conversations):
    values = config["ppo"] | {
        "init_from": str(tmp_path / "scalar"),
        "reward": "gold:sentiment",
    }
    with pytest.raises(
        UserError, match=r"ppo\.init_from=.*: expected a language model, found"
    ):
        recipe.run(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(corpora.BUILDERS))
def test_a_corpus_of_ours_need_not_be_prepared_before(name, tmp_path, monkeypatch):
    """What it is made from is looked for where it is not there yet; drawn ones need nothing."""
    wanted = []
    monkeypatch.setattr(
        package_corpora, "package_file", lambda *package: wanted.append(package)
    )
    references._validate_dataset("sources", f"tfds:{name}", name, str(tmp_path))
    source = getattr(corpora.BUILDERS[name], "source", None)
    assert [package[:2] for package in wanted] == ([source] if source else [])
