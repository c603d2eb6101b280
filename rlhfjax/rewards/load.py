"""The kinds of rewards and labelers, and what loads them by name or by description.

The table at the end is the registry; `registry.py` has what uses it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rlhfjax.algos.process import Combine
from rlhfjax.errors import ConfigError
from rlhfjax.rewards import compose, feedback, gold, rubric, rules
from rlhfjax.rewards.dense import DenseReward
from rlhfjax.rewards.labelers import RankingsLabeler
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.process import SEPARATOR, ProcessReward, validate_separator
from rlhfjax.rewards.rankings import by_labeler, read_rankings
from rlhfjax.rewards.registry import (
    KINDS,
    Kind,
    LabelerSource,
    Loader,
    Part,
    RewardSource,
    describe,
    label,
    load_labeler,
    load_reward,
    models_of,
    stage_description,
    validate_acyclic,
    validate_kind,
    write,
)
from rlhfjax.rewards.responses import TextReward, validate_reward_model
from rlhfjax.rewards.workers import validate_function

__all__ = [
    "KINDS",
    "LabelerSource",
    "RewardSource",
    "describe",
    "label",
    "load_labeler",
    "load_reward",
    "models_of",
    "stage_description",
    "validate_acyclic",
    "validate_kind",
    "write",
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A trained reward model."""

    model: str
    """the workdir of a reward stage, or another source of a model with a scalar head"""


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A model that rewards every token."""

    model: str = ""
    """the workdir of a tamer stage; empty in its own reward.json: the folder of that file"""


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """A model that scores the steps of a response."""

    model: str = ""
    """the workdir of a process_reward stage; empty in its own reward.json: the folder of that
    file"""
    separator: str = SEPARATOR
    """text between two steps, that of training"""
    combine: Combine = "product"
    """the score of a response: product or minimum of the probabilities of its steps"""


@dataclasses.dataclass(frozen=True)
class RankingsConfig:
    """Rankings by people, as a labeler."""

    rankings: str
    """a glob of JSON lines"""
    labeler: str = ""
    """whose rankings count; needed where the files hold those of several"""


def _load_model(config: ModelConfig, loader: Loader) -> ModelReward:
    saved = loader.sources.load(config.model, loader.layout)
    validate_reward_model(saved, loader.tokenizer, config.model)
    return ModelReward(saved.model, saved.params, loader.program)


def _load_dense(config: DenseConfig, loader: Loader) -> DenseReward:
    saved = loader.sources.load(config.model, loader.layout)
    validate_reward_model(saved, loader.tokenizer, config.model)
    return DenseReward(saved.model, saved.params, loader.program)


def _load_process(config: ProcessConfig, loader: Loader) -> ProcessReward:
    saved = loader.sources.load(config.model, loader.layout)
    validate_reward_model(saved, loader.tokenizer, config.model)
    return ProcessReward(
        saved,
        tokenizer=loader.tokenizer,
        layout=loader.layout,
        separator=config.separator,
        combine=config.combine,
        program=loader.program,
    )


def _reward_model(config: ModelConfig | DenseConfig | ProcessConfig) -> Iterator[Part]:
    if config.model:
        yield Part("model", config.model, "scalar")


def _judge_model(config: Any) -> Iterator[Part]:
    yield Part("judge.model", config.judge.model, "lm")


def _load_gold(config: gold.GoldConfig, loader: Loader) -> TextReward:
    return TextReward(gold.SCORERS[config.name](), loader.tokenizer)


def _load_rule(config: rules.RuleConfig, loader: Loader) -> TextReward:
    return TextReward(rules.Rule(config), loader.tokenizer, config.hosts)


def _parse_rankings(text: str) -> dict[str, str]:
    pattern, _, labeler = text.partition("@")
    return {"rankings": pattern, "labeler": labeler}


def _load_rankings(config: RankingsConfig, loader: Loader) -> RankingsLabeler:
    people = by_labeler(read_rankings(config.rankings))
    if config.labeler not in people and (config.labeler or len(people) > 1):
        raise ConfigError(
            f"rankings {config.rankings!r}: labeler={config.labeler!r} has none there;"
            f" name one of {', '.join(people)} as rankings:GLOB@LABELER"
        )
    return RankingsLabeler(people[config.labeler or next(iter(people))])


KINDS.update(
    gold=Kind(
        gold.GoldConfig,
        _load_gold,
        check=lambda config: gold.SCORERS[config.name](),
        parse=lambda name: {"name": name},
    ),
    rule=Kind(
        rules.RuleConfig,
        _load_rule,
        check=lambda config: validate_function(config.function),
        parse=rules.parse,
        files=("metadata",),
    ),
    model=Kind(
        ModelConfig,
        _load_model,
        _reward_model,
        sources=("model",),
        is_model=lambda config: True,
    ),
    dense=Kind(
        DenseConfig,
        _load_dense,
        _reward_model,
        sources=("model",),
        is_model=lambda config: True,
    ),
    process=Kind(
        ProcessConfig,
        _load_process,
        _reward_model,
        check=lambda config: validate_separator(config.separator, "process"),
        sources=("model",),
        is_model=lambda config: True,
    ),
    compose=Kind(
        compose.ComposeConfig,
        compose.load,
        compose.parts,
        sources=("reward", "where"),
        is_model=compose.is_ensemble,
    ),
    rubric=Kind(rubric.RubricConfig, rubric.load, _judge_model, sources=("model",)),
    feedback=Kind(
        feedback.FeedbackConfig,
        feedback.load,
        _judge_model,
        sources=("model",),
        files=("principles",),
        labels=True,
    ),
    rankings=Kind(
        RankingsConfig,
        _load_rankings,
        parse=_parse_rankings,
        files=("rankings",),
        labels=True,
    ),
)
