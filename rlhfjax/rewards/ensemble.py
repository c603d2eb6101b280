"""An ensemble of reward models of one shape: one vmapped forward over stacked parameters."""

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
from rlhfjax.types import PyTree

Pairs = dict[str, tuple[Any, Any]]
COMBINE = ("mean", "worst", "pessimistic")


def combine(
    rewards: Float[Array, "m n"], how: str, coefficient: float
) -> Float[Array, " n"]:
    """mean_m r_m, min_m r_m, or mean_m r_m - coefficient std_m r_m (pessimistic)."""
    if how == "worst":
        return normalize.ensemble_worst(rewards)
    if how == "pessimistic":
        return normalize.ensemble_pessimistic(rewards, coefficient=coefficient)
    return normalize.ensemble_mean(rewards)


def stack(members: list[PyTree]) -> PyTree:
    """Parameters of m models as one tree with a leading axis, each array laid over the mesh as its members are."""

    def place(x: Any) -> Any:
        placed = x.sharding
        return (
            NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))
            if isinstance(placed, NamedSharding)
            else None
        )

    shardings = jax.tree.map(place, members[0])
    if recording():
        return jax.tree.map(
            lambda x, s: Held(
                (len(members), *x.shape),
                x.dtype,
                sharding=s,
                owner=x.owner,
                path=f"stacked {x.path}",
            ),
            members[0],
            shardings,
        )
    return jax.jit(
        lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees),
        out_shardings=shardings,
    )(members)


class EnsembleReward(ModelReward):
    """m reward models as one: scores [n] are combined, and their spread is the metric `reward_disagreement`.

    A value function that starts from "the reward model" starts from the first member.

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
        by_member = (None, "batch")
        self._all = Program(program, jax.jit(self._rewards), by_member)
        one = jax.jit(
            functools.partial(combine, how=how, coefficient=float(coefficient))
        )
        self._combine = Program(f"{program}_combine", one, ROWS)
        spread = jax.jit(lambda rewards: normalize.ensemble_disagreement(rewards).sum())
        self._spread = Program(f"{program}_spread", spread)

    def _rewards(
        self, stacked: PyTree, tokens: jax.Array, segments: jax.Array
    ) -> jax.Array:
        return jax.vmap(
            lambda params: sequence_rewards(self.model, params, tokens, segments)
        )(stacked)

    def members(self, tokens: Rows, segments: Rows) -> Rows:
        """Every member's rewards [m, n]."""
        return self._all(self.stacked, tokens, segments)

    def __call__(self, tokens: Rows, segments: Rows, mask: Rows) -> Rows:
        """tokens, segments [n, p + r], response mask [n, r] -> scores [n]."""
        return self._combine(self.members(tokens, segments))

    def with_metrics(
        self, tokens: Rows, segments: Rows, mask: Rows
    ) -> tuple[Rows, Pairs]:
        """Scores, and the mean standard deviation over members as `reward_disagreement`."""
        rewards = self.members(tokens, segments)
        pairs = {
            "reward_disagreement": (
                self._spread(rewards),
                jnp.float32(rewards.shape[1]),
            )
        }
        return self._combine(rewards), pairs
