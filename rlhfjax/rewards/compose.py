"""Several rewards as one: an ensemble of reward models, or a weighted sum of whatever scores a response."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rlhfjax import hosts
from rlhfjax.config import build, write_json
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Path
from rlhfjax.programs import Rows, on_host
from rlhfjax.ranges import Finite, NonNegative
from rlhfjax.rewards import ensemble
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.responses import FILE, Pairs, Reward, beside, found, score_shapes
from rlhfjax.rewards.responses import score as score_one


@dataclasses.dataclass(frozen=True)
class MemberConfig:
    """One reward of several."""

    reward: str  # a name that `load_reward` knows
    name: str = ""  # in the metrics: score_NAME; empty: its number
    weight: Finite = 1.0  # of combine="sum"
    where: str = ""  # a scorer that gives 1 on prompts where this member counts and 0 elsewhere; empty: everywhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """How members make one reward: sum_i weight_i where_i r_i, or an ensemble's mean, worst, or mean - c std."""

    members: tuple[MemberConfig, ...] = ()
    combine: Literal["sum", "mean", "worst", "pessimistic"] = "sum"
    coefficient: NonNegative = 1.0  # c of pessimistic

    def __post_init__(self):
        if len(self.members) < (1 if self.combine == "sum" else 2):
            raise ConfigError(
                f'compose.members: combine="{self.combine}" needs more than {len(self.members)}'
            )
        if self.combine != "sum" and any(
            m.weight != 1.0 or m.where for m in self.members
        ):
            raise ConfigError(
                f'compose.members: weight and where are of combine="sum", not of "{self.combine}"'
            )
        labels = [member_name(i, m) for i, m in enumerate(self.members)]
        if len(set(labels)) < len(labels):
            raise ConfigError(
                f"compose.members: a name stands twice: {', '.join(labels)}"
            )


def member_name(i: int, member: MemberConfig) -> str:
    return member.name or str(i)


def save(folder: Path, config: ComposeConfig) -> None:
    """Writes reward.json."""
    values = dataclasses.asdict(config)
    for member in values["members"]:
        member["reward"] = beside(member["reward"], folder)
    write_json(folder / FILE, {"kind": "compose", **values})


def read(values: Mapping[str, Any], folder: Path) -> ComposeConfig:
    """Returns what a folder's reward.json describes, its members as they are reached from here."""
    config = build(ComposeConfig, values, str(folder / FILE))
    members = [
        dataclasses.replace(one, reward=found(one.reward, folder))
        for one in config.members
    ]
    return dataclasses.replace(config, members=tuple(members))


def make(
    config: ComposeConfig,
    members: list[Reward],
    where: list[Reward | None],
    program: str = "score",
) -> Reward:
    """One reward out of loaded ones.

    Raises:
      ConfigError: an ensemble's member is no reward model, or has another shape.
    """
    if config.combine == "sum":
        return WeightedSum(config, members, where)
    for i, member in enumerate(members):
        if type(member) is not ModelReward or member.model != members[0].model:
            raise ConfigError(
                f"compose.members: an ensemble is of reward models of one shape, {config.members[i].reward} is not"
            )
    params = [member.params for member in members]
    return ensemble.EnsembleReward(
        members[0].model,
        params,
        how=config.combine,
        coefficient=config.coefficient,
        program=program,
    )


class WeightedSum:
    """r = sum_i weight_i where_i r_i, with every component as a metric of its own.

    Metrics: score_NAME, the mean of r_i over the responses where it counts, before its weight; applied_NAME, how often
    that is, where it is not everywhere; and the members' own metrics, as METRIC_NAME.
    """

    def __init__(
        self, config: ComposeConfig, members: list[Reward], where: list[Reward | None]
    ):
        self._config, self._members, self._where = config, members, where

    def __call__(self, tokens: Rows, segments: Rows, mask: Rows) -> Rows:
        return self.with_metrics(tokens, segments, mask)[0]

    def with_metrics(
        self, tokens: Rows, segments: Rows, mask: Rows
    ) -> tuple[Rows, Pairs]:
        scored = [score_one(member, tokens, segments, mask) for member in self._members]
        counts = [where and where(tokens, segments, mask) for where in self._where]
        shapes = score_shapes(tokens, segments, mask)
        return on_host(self._sum, lambda *_: (shapes, {}))(
            scored, counts, mask.shape[0]
        )

    def _sum(
        self, scored: list[tuple[Any, Pairs]], counted: list[Any], n: int
    ) -> tuple[Rows, Pairs]:
        """Adds the members' scores [n] with their weights, where they count."""
        total, pairs = np.zeros(n, np.float32), {}
        parts = zip(self._config.members, scored, counted, strict=True)
        for i, (member, (scores, own), where) in enumerate(parts):
            counts = np.ones_like(total) if where is None else _host(where)
            scores = np.where(counts > 0, _host(scores) * counts, 0)
            total = total + np.float32(member.weight) * scores
            name = member_name(i, member)
            pairs |= {f"{key}_{name}": pair for key, pair in own.items()}
            pairs[f"score_{name}"] = (
                np.float32(scores.sum()),
                np.float32(counts.sum()),
            )
            if where is not None:
                pairs[f"applied_{name}"] = (np.float32(counts.sum()), np.float32(n))
        return total, pairs


def _host(x: Any) -> np.ndarray:
    return np.asarray(hosts.whole(x), np.float32)
