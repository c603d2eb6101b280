"""One reward made of several: a weighted sum of any rewards, or an ensemble of reward models."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rlhfjax import hosts
from rlhfjax.errors import ConfigError
from rlhfjax.programs import Rows, on_host
from rlhfjax.ranges import Finite, NonNegative
from rlhfjax.rewards.ensemble import EnsembleReward
from rlhfjax.rewards.registry import Loader, Part, RewardSource, describe, label
from rlhfjax.rewards.responses import (
    Reward,
    Scored,
    TextReward,
    score,
    score_shapes,
    validate_reward_model,
)
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True)
class MemberConfig:
    """One of several rewards."""

    reward: RewardSource
    """the reward, by name or described in place"""
    name: str = ""
    """its name in the metrics, as score_NAME; empty: its number"""
    weight: Finite = 1.0
    """its factor in the sum (combine="sum")"""
    where: RewardSource = ""
    """a scorer of 1 for the prompts where the member counts and 0 for others; empty: everywhere"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """How members make one reward.

    The sum is sum_i weight_i where_i r_i; an ensemble has the mean, the worst, or mean - c std.
    """

    members: tuple[MemberConfig, ...] = ()
    """the rewards; an ensemble has at least two"""
    combine: Literal["sum", "mean", "worst", "pessimistic"] = "sum"
    """sum of any rewards, or the combination of an ensemble of reward models"""
    coefficient: NonNegative = 1.0
    """factor c of the standard deviation (combine="pessimistic")"""

    def __post_init__(self):
        least = 1 if self.combine == "sum" else 2
        if len(self.members) < least:
            raise ConfigError(
                f'compose.members: combine="{self.combine}" needs at least {least},'
                f" got {len(self.members)}"
            )
        for member in self.members:
            if self.combine != "sum" and (member.weight != 1.0 or member.where):
                raise ConfigError(
                    "compose.members: weight and where are options of"
                    f' combine="sum", not of "{self.combine}"'
                )
        names = self.names
        if len(set(names)) < len(names):
            repeated = ", ".join(names)
            raise ConfigError(f"compose.members: names must differ, got {repeated}")

    @property
    def names(self) -> list[str]:
        """The members' names in the metrics."""
        return [member.name or str(i) for i, member in enumerate(self.members)]


def parts(config: ComposeConfig) -> Iterator[Part]:
    """Yields the rewards that a composed one is made of, in the order of their roles."""
    for i, member in enumerate(config.members):
        yield Part(f"members[{i}].reward", member.reward, None, f"_{i}")
        if member.where:
            yield Part(f"members[{i}].where", member.where, None, f"_where_{i}")


def load(config: ComposeConfig, loader: Loader) -> Reward:
    """Returns a composed reward, its members loaded.

    Raises:
      ConfigError: a member of an ensemble is no reward model, or has another model_config.
    """
    if is_ensemble(config):
        return _load_ensemble(config, loader)
    rewards = [loader.load(part) for part in parts(config)]
    members: list[tuple[Reward, Reward | None]] = []
    for member in config.members:
        reward = rewards.pop(0)
        members.append((reward, rewards.pop(0) if member.where else None))
    return WeightedSum(config, members)


def is_ensemble(config: ComposeConfig) -> bool:
    """Returns whether members are combined as models of one shape; else they are summed."""
    return config.combine != "sum"


def _load_ensemble(config: ComposeConfig, loader: Loader) -> EnsembleReward:
    opened = []
    for i, member in enumerate(config.members):
        kind, options = describe(member.reward, loader.sources)
        place = f"compose.members[{i}]={label(member.reward)}"
        if kind != "model":
            raise ConfigError(f"{place}: an ensemble has reward models, not {kind!r}")
        # Opened, not loaded: the ensemble copies the parameters into one tree.
        model = loader.sources.open_model(options.model, loader.layout)
        validate_reward_model(model, loader.tokenizer, options.model)
        opened.append(model)
        if model.model != opened[0].model:
            raise ConfigError(f"{place}: expected the model_config of the first member")
    return EnsembleReward(
        opened[0].model,
        [model.params() for model in opened],
        how=config.combine,
        coefficient=config.coefficient,
        program=loader.program,
    )


class WeightedSum:
    """The reward r = sum_i weight_i where_i r_i.

    Metrics: score_NAME, the mean of r_i over the responses where it counts, before its weight;
    applied_NAME, the share of those responses, for members with `where`; and the members' own
    metrics, as METRIC_NAME.

    Args:
      members: each member's reward, and what tells where it counts (None: everywhere).
    """

    def __init__(
        self, config: ComposeConfig, members: Sequence[tuple[Reward, Reward | None]]
    ):
        self._config, self._members = config, members

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns the scores [n]."""
        return self.with_metrics(tokens, attention_mask, mask)[0]

    def with_metrics(
        self,
        tokens: Rows,
        attention_mask: Rows,
        mask: Rows,
        counts: Rows | None = None,
    ) -> Scored:
        """Returns the scores [n] and the metrics of all members.

        Args:
          counts: [n], 0 for responses whose score does not count; None: all count.
        """
        rows = (tokens, attention_mask, mask)
        both = on_host(_both, lambda *given: given[1])
        scored: list[Scored] = []
        wheres: list[Rows | None] = []
        for reward, where in self._members:
            applied = None if where is None else where(*rows)
            member_counts = both(counts, applied)
            scored.append(_score(reward, rows, member_counts))
            wheres.append(member_counts)
        shapes = score_shapes(*rows)
        add = on_host(self._sum, lambda *_: (shapes, {}))
        return add(scored, wheres, mask.shape[0])

    def _sum(
        self, scored: list[Scored], counts: list[Any], n: int
    ) -> tuple[np.ndarray, Metrics]:
        """Returns the weighted sum [n] of scores where they count, and the metrics."""
        total = np.zeros(n, np.float32)
        metrics: Metrics = {}
        config = self._config
        members = zip(config.members, config.names, scored, counts, strict=True)
        for member, name, (scores, own_metrics), where in members:
            applied = np.ones_like(total) if where is None else _on_host(where)
            scores = np.where(applied > 0, _on_host(scores) * applied, 0)
            total = total + np.float32(member.weight) * scores
            weight = np.float32(applied.sum())
            for metric, value in own_metrics.items():
                metrics[f"{metric}_{name}"] = value
            metrics[f"score_{name}"] = (np.float32(scores.sum()), weight)
            if member.where:
                metrics[f"applied_{name}"] = (weight, np.float32(n))
        return total, metrics


def _both(counts: Any, where: Any) -> np.ndarray | None:
    """Returns where a member counts [n], within what counts of the whole; None: everywhere."""
    applied = None if where is None else _on_host(where)
    if counts is None:
        return applied
    counted = _on_host(counts) > 0
    if applied is None:
        return counted.astype(np.float32)
    return np.where(counted, applied, 0)


def _score(reward: Reward, rows: tuple[Rows, Rows, Rows], counts: Any) -> Scored:
    """Returns the scores [n] and metrics of a member; text is only scored where it counts."""
    if counts is not None and isinstance(reward, TextReward | WeightedSum):
        return reward.with_metrics(*rows, counts)
    return score(reward, *rows)


def _on_host(x: Any) -> np.ndarray:
    return np.asarray(hosts.whole(x), np.float32)
