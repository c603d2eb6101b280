"""An ensemble of reward models with one model_config: a vmapped forward over stacked parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rlhfjax.algos import normalize
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Held, Program, Rows, keep, recording
from rlhfjax.rewards.model import ModelReward, sequence_rewards
from rlhfjax.rewards.responses import Scored
from rlhfjax.types import PyTree


def combine(
    rewards: Float[Array, "m n"], how: str, coefficient: float
) -> Float[Array, " n"]:
    """Returns the mean over members, the worst, or mean - coefficient std (pessimistic)."""
    if how == "worst":
        return normalize.ensemble_worst(rewards)
    if how == "pessimistic":
        return normalize.ensemble_pessimistic(rewards, coefficient=coefficient)
    return normalize.ensemble_mean(rewards)


def stack(members: list[PyTree]) -> PyTree:
    """Returns the parameters of m models as one tree with a leading axis, which is not sharded."""

    def stacked_sharding(x: Any) -> Any:
        if not isinstance(x.sharding, NamedSharding):
            return None
        spec = PartitionSpec(None, *x.sharding.spec)
        return NamedSharding(x.sharding.mesh, spec)

    def held(x: Any, sharding: Any) -> Held:
        shape = (len(members), *x.shape)
        path = f"stacked {x.path}"
        return Held(shape, x.dtype, sharding=sharding, owner=x.owner, path=path)

    shardings = jax.tree.map(stacked_sharding, members[0])
    if recording():
        return jax.tree.map(held, members[0], shardings)
    return jax.jit(
        lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees),
        out_shardings=shardings,
    )(members)


class EnsembleReward(ModelReward):
    """Combines the scores of m reward models; their spread is the metric `reward_disagreement`.

    A value function that starts from the reward model starts from the first member.

    Source: Coste et al. 2023, "Reward model ensembles help mitigate overoptimization".
    """

    def __init__(
        self,
        model: Model,
        members: list[PyTree],
        *,
        how: str = "mean",
        coefficient: float = 1.0,
        program: str = "score",
    ):
        super().__init__(model, members[0])
        keep(members[0])
        self.stacked = keep(stack(members))
        member_rows = (None, "batch")
        self._members = Program(program, jax.jit(self._rewards), member_rows)
        combined = functools.partial(combine, how=how, coefficient=float(coefficient))
        self._combine = Program(f"{program}_combine", jax.jit(combined), ROWS)
        spread = jax.jit(lambda rewards: normalize.ensemble_disagreement(rewards).sum())
        self._spread = Program(f"{program}_spread", spread)

    def _rewards(
        self, stacked: PyTree, tokens: jax.Array, attention_mask: jax.Array
    ) -> jax.Array:
        return jax.vmap(
            lambda params: sequence_rewards(self.model, params, tokens, attention_mask)
        )(stacked)

    def members(self, tokens: Rows, attention_mask: Rows) -> Rows:
        """Returns every member's rewards [m, n]."""
        return self._members(self.stacked, tokens, attention_mask)

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns the scores [n]; the mask of the responses is not used."""
        return self._combine(self.members(tokens, attention_mask))

    def with_metrics(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Scored:
        """Returns the scores [n] and the mean standard deviation over members."""
        rewards = self.members(tokens, attention_mask)
        spread = (self._spread(rewards), jnp.float32(rewards.shape[1]))
        return self._combine(rewards), {"reward_disagreement": spread}
