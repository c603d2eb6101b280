"""Rewards that are described in place: the same as the stage's, validated, resolved, planned and
resumed.
"""

import json
import os
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.data.preferences import read_preferences
from rlhfjax.errors import CheckpointError, ConfigError, DataError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.origins import Origins, roles_of
from rlhfjax.rewards.labelers import make_answers
from rlhfjax.rewards.load import (
    KINDS,
    describe,
    label,
    load_labeler,
    load_reward,
    models_of,
)
from rlhfjax.rewards.responses import score
from rlhfjax.stages import stage_config
from tests import tiny
from tests.test_stages import stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
GOLD = {"kind": "gold", "name": "sentiment"}
WORDS = {"kind": "rule", "function": "tests.rewards.some_rules:words", "workers": 1}
WHERE = "rule:tests.rewards.some_rules:where_tea?workers=1"
JUDGE = {"model": "stage:sft", "length": 32, "batch_size": 4}
RUBRIC = {
    "kind": "rubric",
    "judge": JUDGE,
    "template": "{response}",
    "classes": [{"option": "a", "reward": 1.0}, {"option": "b", "reward": 0.0}],
}


def resolved(value, finished):
    """Returns a value whose `stage:` references are those of the finished run."""
    config = tiny.get_config("data=nowhere")
    folders = recipe.stage_folders(to_dict(config), finished)
    return recipe.resolve(to_dict(value), folders, "evaluate")


def rows():
    """Returns tokens, attention mask and response mask of four responses."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, tiny.VOCAB, size=(4, 32)).astype(np.int32)
    mask = np.ones((4, 8), np.float32)
    return jnp.asarray(tokens), jnp.ones((4, 32), np.int32), jnp.asarray(mask)


def scores_of(source, finished):
    tokenizer = store.load(finished / "02_sft", ONE).tokenizer
    with ONE.use():
        return score(load_reward(source, ONE, tokenizer), *rows())


SUM = {
    "kind": "compose",
    "members": [
        {"reward": {"kind": "model", "model": "stage:reward"}, "weight": 0.5},
        {"reward": WORDS, "name": "words", "where": WHERE},
        {"reward": {"kind": "compose", "members": [{"reward": GOLD}]}, "name": "gold"},
        {"reward": RUBRIC, "name": "rubric", "weight": -1.0},
    ],
}
ENSEMBLE = {
    "kind": "compose",
    "combine": "pessimistic",
    "members": [{"reward": "stage:reward"}, {"reward": "stage:reward", "name": "b"}],
}


@pytest.mark.parametrize("described", [SUM, ENSEMBLE], ids=["sum", "ensemble"])
def test_a_reward_in_place_is_that_of_the_stage(described, finished, tmp_path):
    """Scores and metrics are equal, and still are when the stage's folder is moved."""
    described = resolved(described, finished)
    options = {name: value for name, value in described.items() if name != "kind"}
    recipe.run(stage_config("compose", **options), tmp_path / "stage")
    (tmp_path / "stage").rename(tmp_path / "moved")
    scores, metrics = scores_of(described, finished)
    of_stage, stage_metrics = scores_of(str(tmp_path / "moved"), finished)
    np.testing.assert_array_equal(scores, of_stage)
    assert np.ptp(scores) > 0 and metrics.keys() == stage_metrics.keys()
    for name, pair in metrics.items():
        np.testing.assert_array_equal(pair, stage_metrics[name], err_msg=name)


def test_a_name_and_a_description_are_one_thing():
    assert describe("gold:sentiment") == describe(GOLD)
    name = "rule:tests.rewards.some_rules:words?workers=1"
    assert describe(name) == describe(WORDS)
    people = {"kind": "rankings", "rankings": "p/*.jsonl", "labeler": "ann"}
    assert describe("rankings:p/*.jsonl@ann") == describe(people)
    assert describe("runs/rm") == describe({"kind": "model", "model": "runs/rm"})
    assert (label("runs/rm"), label(SUM)) == ("runs/rm", "compose")


def member(**options):
    return {"kind": "compose", "members": [{"reward": "x"}, options]}


KNOWN = ", ".join(map(repr, KINDS))
INVALID = [
    (3, "=3: expected the name of a reward, or a mapping with its `kind`"),
    ({"name": "sentiment"}, f".kind=None: expected one of {KNOWN}"),
    ({"kind": "golden"}, f".kind='golden': expected one of {KNOWN}"),
    ("gold:wit", "=gold:wit: gold.name='wit': expected one of 'sentiment'"),
    ({"kind": "gold"}, ".name: a value is required"),
    ("rule:m:f?timeout=0", ".timeout=0.0: expected float > 0 and <= 86400"),
    (WORDS | {"speed": 3}, ".speed: no such option; ppo.reward has function,"),
    ("rankings:x", "=rankings:x: expected a reward, rankings only labels"),
    (
        {"kind": "feedback", "judge": JUDGE, "principles": "p"},
        "=feedback: expected a reward, feedback only labels",
    ),
    (RUBRIC | {"judge": JUDGE | {"length": 0}}, ".judge.length=0: expected int >= 1"),
    (RUBRIC | {"classes": []}, ": rubric.classes: a choice needs at least 2, got 0"),
    ({"kind": "compose"}, ': compose.members: combine="sum" needs at least 1, got 0'),
    (member(reward="y", weight=1e99), ".members[1].weight=1e+99: expected float >="),
    (member(reward=["y"]), ".members[1].reward=['y']: expected the name of a reward"),
    (
        member(reward={"kind": "gold", "name": "wit"}),
        ".members[1].reward: gold.name='wit'",
    ),
    (member(reward=member(reward={})), ".members[1].reward.members[1].reward.kind="),
]


@pytest.mark.parametrize(("reward", "message"), INVALID)
def test_an_invalid_description_is_one_line_with_its_place(reward, message):
    config = to_dict(tiny.get_config("data=nowhere"))
    config["ppo"]["reward"] = reward
    with pytest.raises(ConfigError) as caught:
        recipe.validate(config)
    assert str(caught.value).startswith(f"ppo.reward{message}")
    assert "\n" not in str(caught.value)


def test_a_labelers_place_is_named_and_feedback_is_a_labeler():
    config = to_dict(tiny.get_config("data=nowhere"))
    feedback = {"kind": "feedback", "judge": JUDGE, "principles": "p.txt"}
    config["collect"] |= {"labeler": feedback, "others": ["rankings:x", {"kind": "z"}]}
    with pytest.raises(ConfigError, match=r"collect\.others\[1\]\.kind='z'"):
        recipe.validate(config)
    config["collect"]["others"].pop()
    assert label(recipe.validate(config)["collect"].labeler) == "feedback"


def test_references_within_a_description_are_those_of_the_recipe(tmp_path):
    """Paths are resolved, each member has a role of its own, and later stages cannot be named."""
    config = to_dict(tiny.get_config("data=nowhere"))
    config["ppo"] |= {"reward": SUM, "value": "policy"}
    folders = recipe.stage_folders(config, tmp_path)
    values = {
        name: recipe.resolve(config[name], folders, name) for name in config["stages"]
    }
    typed = recipe.check_all(values, folders)
    judge = typed["ppo"].reward["members"][3]["reward"]["judge"]
    assert judge["model"] == str(folders["sft"])
    earlier = {str(folders[name]): typed[name] for name in folders if name != "ppo"}
    origins = Origins(earlier)
    roles = origins.single(roles_of(typed["ppo"]))
    assert (roles["reward_0"].source, roles["reward_0"].head) == (
        str(folders["reward"]),
        "scalar",
    )
    assert (roles["reward_3"].source, roles["reward_3"].head) == (
        str(folders["sft"]),
        "lm",
    )
    assert "reward_1" not in roles and "reward_2" not in roles
    nets = {net.name: net.numbers for net in origins.nets(roles, "ppo")}
    assert nets["reward_0"] == nets["value"] and nets["reward_3"] == nets["policy"]
    config["ppo"]["reward"] = member(reward="stage:evaluate")
    with pytest.raises(ConfigError, match="ppo refers to 'stage:evaluate'"):
        recipe.validate(config)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (member(reward="nowhere"), ConfigError, "members[0].reward=x: there is no"),
        (
            {"kind": "rubric", **RUBRIC, "judge": JUDGE | {"model": "stage:reward"}},
            ConfigError,
            "judge.model={reward}: expected a language model, found a reward model",
        ),
        (
            {"kind": "rule", "function": "no:f"},
            ConfigError,
            "{place}=rule: rule 'no:f'",
        ),
        (WORDS | {"metadata": "no/*.jsonl"}, DataError, "metadata=no/*.jsonl: no file"),
        (
            {"kind": "rubric", **RUBRIC, "judge": JUDGE | {"model": "no"}},
            CheckpointError,
            "judge.model=no",
        ),
    ],
)
def test_what_a_description_refers_to_is_there_before_the_first_stage(
    reward, error, message, conversations, finished, tmp_path
):
    values = stage_values("ppo", conversations, finished)
    values["reward"] = resolved(reward, finished)
    with pytest.raises(error) as caught:
        recipe.run(values, tmp_path / "run")
    message = message.format(place="ppo.reward", reward=finished / "04_reward")
    assert message in str(caught.value) and "ppo.reward" in str(caught.value)
    assert not (tmp_path / "run").exists()


FILE = """
from rlhfjax.stages import stage_config
def get_config():
    config = stage_config("best_of_n", init_from="x", proxy={described},
                          prompt_length=8, max_new_tokens=8)
    {more}
    return config
"""


@pytest.mark.parametrize(
    ("proxy", "more", "override", "expected"),
    [
        (GOLD, "", [], GOLD),
        ("x", f"config.proxy = {GOLD}", [], GOLD),
        (GOLD, "config.proxy = 'x'", [], "x"),
        ("x", f"config.gold = {GOLD}", [], "x"),
        (GOLD, "", ["--config.proxy=gold:sentiment"], "gold:sentiment"),
        ("x", "", ["--config.proxy=gold:sentiment"], "gold:sentiment"),
        ("x", "", [f"--config.proxy={GOLD}"], GOLD),
        (GOLD, "", ["--config.proxy.name=sentiment"], GOLD),
        (WORDS, "", ["--config.proxy.workers=3"], WORDS | {"workers": 3}),
    ],
)
def test_a_name_and_a_description_take_each_others_place(
    proxy, more, override, expected, tmp_path
):
    """In an experiment file, and by a flag."""
    file = tmp_path / "experiment.py"
    file.write_text(FILE.format(described=repr(proxy), more=more))
    assert "get_config" in runpy.run_path(str(file))
    values = flags.FlagValues()
    command = ["program", f"--config={file}", *override]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    typed = recipe.check(to_dict(values.config), "best_of_n")
    assert typed.proxy == expected


def test_a_config_with_a_description_is_kept_and_compared(
    conversations, finished, tmp_path
):
    """`collect` with a description runs, is finished when run again, and a change is named."""
    labeler = {"kind": "compose", "members": [{"reward": GOLD, "weight": 2.0}]}
    values = stage_values("collect", conversations, finished, labeler=labeler)
    metrics = recipe.run(values, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["labeler"] == labeler
    assert recipe.run(values, tmp_path) == metrics
    changed = {"kind": "compose", "members": [{"reward": GOLD, "weight": 3.0}]}
    with pytest.raises(ConfigError, match=r"labeler\.members\[0\]\.weight: 2\.0 -> 3"):
        recipe.run(values | {"labeler": changed}, tmp_path)
    row = read_preferences(tmp_path / "preferences", "train")[0]
    assert row["labeler"] == "compose"


def test_a_labeler_of_a_description_gives_a_rewards_scores(finished):
    tokenizer = store.load(finished / "02_sft", ONE).tokenizer
    tokens, attention_mask, mask = rows()
    answers = make_answers(tokens, attention_mask, mask, 2, tokenizer)
    labels = load_labeler(GOLD, ONE, tokenizer)(answers)
    scores, _ = scores_of("gold:sentiment", finished)
    np.testing.assert_array_equal(labels, np.reshape(scores, (2, 2)))


@pytest.mark.slow
def test_a_policy_is_resumed_with_a_reward_in_place(conversations, finished, tmp_path):
    """From the checkpoint after two of four steps it ends with the same metrics."""
    values = stage_values(
        "ppo",
        conversations,
        finished,
        reward=resolved(SUM, finished),
        value="policy",
        steps=4,
    )
    metrics = recipe.run(values, tmp_path)
    assert np.isfinite(metrics["ppo/score_gold"])
    (tmp_path / "done.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert recipe.run(values, tmp_path) == metrics


def test_a_reward_that_is_a_part_of_itself_is_an_error(tmp_path):
    """Also where it is one by way of another: a → b → a."""
    for name, member in (("a", "../b"), ("b", "../a"), ("c", "")):
        (tmp_path / name).mkdir()
        members = [{"reward": "gold:sentiment"}, {"reward": member}]
        text = json.dumps({"kind": "compose", "members": members})
        (tmp_path / name / "reward.json").write_text(text)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(ConfigError) as error:
        models_of(a, store)
    chain = str(error.value).rpartition(": ")[2].split(" → ")
    assert [os.path.normpath(name) for name in chain] == [a, b, a]
    with pytest.raises(ConfigError, match="reward='': expected the name of a reward"):
        models_of(str(tmp_path / "c"), store)
