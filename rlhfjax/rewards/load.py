"""Rewards and labellers by their names, as configs spell them.

    reward = load_reward("gold:sentiment", layout, tokenizer)  # or rule:…, or a stage's folder
    scores = reward(tokens, segments, mask)  # [n]
    labeller = load_labeller("rankings:people/*.jsonl", layout, tokenizer)  # or a reward's name
    scores = labeller(answers)  # [p, k], higher is better, equal is a tie

A stage that describes a reward, and trains no model of one, leaves reward.json in its folder:
{"kind": ..., ...}. It is one of KINDS, or the labeller `feedback`.
"""

import json
from collections.abc import Mapping
from typing import Any

from rlhfjax import paths
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.rewards import SCORERS, compose, dense, feedback, load_scorer, rubric, rules
from rlhfjax.rewards.labellers import Labeller, RankingsLabeller, RewardLabeller
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.rankings import by_labeller, read_rankings
from rlhfjax.rewards.responses import FILE, Reward, TextReward, check_scalar

RANKINGS = "rankings:"


def load_reward(name: str, layout: Layout, tokenizer: Tokenizer) -> Reward:
    """Returns the reward of that name.

    Args:
      name: a scorer of text (gold:…, rule:…), or the workdir of a stage that made or described a
        reward.

    Raises:
      ConfigError: the model there has no scalar head, or another vocabulary.
      CheckpointError: there is no model.
    """
    if name in SCORERS or name.startswith(rules.PREFIX):
        return TextReward(load_scorer(name), tokenizer)
    if (paths.path(name) / FILE).is_file():
        return described(paths.path(name), layout, tokenizer)
    saved = store.load(name, layout)
    check_scalar(saved, tokenizer, name)
    return ModelReward(saved.model, saved.params)


def described(folder: Path, layout: Layout, tokenizer: Tokenizer) -> Reward:
    """Returns the reward that a folder's reward.json describes.

    Raises:
      ConfigError: a kind that there is not.
    """
    values: dict[str, Any] = json.loads((folder / FILE).read_text())
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(f"{folder / FILE}: kind {kind!r} is none of {', '.join(KINDS)}")
    return KINDS[kind](values, folder, layout, tokenizer)


def _compose(
    values: Mapping[str, Any],
    folder: Path,
    layout: Layout,
    tokenizer: Tokenizer,
) -> Reward:
    return compose.load(values, folder, lambda name: load_reward(name, layout, tokenizer))


KINDS = {"compose": _compose, "rubric": rubric.load, "dense": dense.load}


def load_labeller(name: str, layout: Layout, tokenizer: Tokenizer) -> Labeller:
    """Returns the labeller of that name: `rankings:GLOB[@LABELLER]`, AI feedback, or any reward.

    Raises:
      ConfigError: the file holds several labellers' rankings and none is named, or the named one is
        not there.
    """
    if name.startswith(RANKINGS):
        return _people(name)
    folder = paths.path(name)
    file = folder / FILE
    values = json.loads(file.read_text()) if file.is_file() else {}
    if values.pop("kind", None) == "feedback":
        return feedback.load(values, folder, layout)
    return RewardLabeller(load_reward(name, layout, tokenizer))


def _people(name: str) -> RankingsLabeller:
    pattern, _, who = name.removeprefix(RANKINGS).partition("@")
    people = by_labeller(read_rankings(pattern))
    if who not in people and (who or len(people) > 1):
        known = ", ".join(people)
        raise ConfigError(f"labeller {name!r}: name one of {known} as rankings:GLOB@LABELLER")
    return RankingsLabeller(people[who or next(iter(people))])
