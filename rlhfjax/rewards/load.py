"""Rewards and labelers by their names, as configs spell them.

    reward = load_reward("gold:sentiment", layout, tokenizer)  # or rule:…, or a stage's folder
    scores = reward(tokens, segments, mask)  # [n]
    labeler = load_labeler("rankings:people/*.jsonl", layout, tokenizer)  # or a reward's name
    scores = labeler(answers)  # [p, k], higher is better, equal is a tie

A stage that describes a reward, and trains no model of one, leaves reward.json in its folder:
{"kind": ..., ...}. It is one of KINDS, or the labeler `feedback`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhfjax import paths
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.rewards import (
    SCORERS,
    compose,
    dense,
    feedback,
    load_scorer,
    rubric,
    rules,
)
from rlhfjax.rewards.labelers import Labeler, RankingsLabeler, RewardLabeler
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.rankings import by_labeler, read_rankings
from rlhfjax.rewards.responses import FILE, Reward, TextReward, check_scalar, found
from rlhfjax.roles import DISK, Descriptions, Head, Sources

RANKINGS = "rankings:"


def load_reward(
    name: str,
    layout: Layout,
    tokenizer: Tokenizer,
    sources: Sources = DISK,
    program: str = "score",
) -> Reward:
    """Returns the reward of that name.

    Args:
      name: a scorer of text (gold:…, rule:…), or the workdir of a stage that made or described a
        reward.
      program: the name of what a model computes; a member of several has its number after it.

    Raises:
      ConfigError: the model there has no scalar head, or another vocabulary.
      CheckpointError: there is no model.
    """
    if is_text(name):
        return TextReward(load_scorer(name), tokenizer)
    values = sources.described(name)
    if values is None:
        return _model(sources.load(name, layout), tokenizer, name, program)
    kind, folder = values.pop("kind", None), paths.path(name)
    if kind == "compose":
        return _compose(values, folder, layout, tokenizer, sources, program)
    if kind not in KINDS:
        known = ", ".join(("compose", *KINDS))
        raise ConfigError(f"{folder / FILE}: kind {kind!r} is none of {known}")
    return KINDS[kind](values, folder, layout, tokenizer, sources, program)


def is_text(name: str) -> bool:
    """Returns whether a reward of that name scores text on the host."""
    return name in SCORERS or name.startswith(rules.PREFIX)


KINDS = {"rubric": rubric.load, "dense": dense.load}


def _model(saved: Any, tokenizer: Tokenizer, name: str, program: str) -> ModelReward:
    check_scalar(saved, tokenizer, name)
    return ModelReward(saved.model, saved.params, program)


def _compose(
    values: Mapping[str, Any],
    folder: Path,
    layout: Layout,
    tokenizer: Tokenizer,
    sources: Sources,
    program: str,
) -> Reward:
    config = compose.read(values, folder)

    def member(name: str, number: int) -> Reward:
        own = f"{program}_{number}"
        stacked = (
            config.combine != "sum"
            and not is_text(name)
            and sources.described(name) is None
        )
        if not stacked:
            return load_reward(name, layout, tokenizer, sources, own)
        opened = sources.open_model(
            name, layout
        )  # an ensemble copies its members into one tree
        saved = store.SavedModel(opened.model, opened.params(), opened.tokenizer)
        return _model(saved, tokenizer, name, own)

    members = [member(one.reward, i) for i, one in enumerate(config.members)]
    where = [
        load_reward(one.where, layout, tokenizer, sources, f"{program}_where_{i}")
        if one.where
        else None
        for i, one in enumerate(config.members)
    ]
    return compose.make(config, members, where, program)


class Scored(NamedTuple):
    """A model that scores, beside the suffix that its role and its program have."""

    suffix: str
    source: str
    head: Head


def models_of(name: str, sources: Descriptions, suffix: str = "") -> list[Scored]:
    """Returns the models that a reward or labeler of that name runs; none where rules score."""
    if is_text(name) or name.startswith(RANKINGS):
        return []
    values = sources.described(name)
    if values is None or values.get("kind") == "dense":
        return [Scored(suffix, name, "scalar")]
    folder = paths.path(name)
    if values.get("kind") == "compose":
        found_models: list[Scored] = []
        for i, member in enumerate(values["members"]):
            for key, part in (("reward", f"_{i}"), ("where", f"_where_{i}")):
                if member.get(key):
                    found_models += models_of(
                        found(member[key], folder), sources, suffix + part
                    )
        return found_models
    return [Scored(suffix, found(values["judge"]["model"], folder), "lm")]


def load_labeler(
    name: str, layout: Layout, tokenizer: Tokenizer, sources: Sources = DISK
) -> Labeler:
    """Returns the labeler of that name: `rankings:GLOB[@LABELER]`, AI feedback, or any reward.

    Raises:
      ConfigError: the file holds several labelers' rankings and none is named, or the named one is
        not there.
    """
    if name.startswith(RANKINGS):
        return _people(name)
    values = sources.described(name) or {}
    if values.pop("kind", None) == "feedback":
        return feedback.load(values, paths.path(name), layout, sources)
    return RewardLabeler(load_reward(name, layout, tokenizer, sources))


def _people(name: str) -> RankingsLabeler:
    pattern, _, who = name.removeprefix(RANKINGS).partition("@")
    people = by_labeler(read_rankings(pattern))
    if who not in people and (who or len(people) > 1):
        known = ", ".join(people)
        raise ConfigError(
            f"labeler {name!r}: name one of {known} as rankings:GLOB@LABELER"
        )
    return RankingsLabeler(people[who or next(iter(people))])
