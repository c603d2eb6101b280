"""Advantages and returns over the tokens of a response."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from rlhfjax.algos.masked import whiten
from rlhfjax.types import Scalar


def gae(
    rewards: Float[Array, "b t"],
    values: Float[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns advantages and returns by generalized advantage estimation (GAE).

    With t+1 the *next counted* token of the row:
      delta_t = r_t + gamma V_{t+1} - V_t
      A_t     = delta_t + gamma lam A_{t+1}
      R_t     = A_t + V_t
    After the last counted token V and A are 0: a response ends its episode, also at the length
    limit, so that there is no bootstrap.

    Args:
      rewards: r_t, received for emitting token t.
      values: V_t, of the state *before* token t was emitted.
      mask: 1 on response tokens. Padding on either side and holes are skipped, whatever they hold.
      gamma: discount per token (1 in all RLHF papers).
      lam: 1 is the Monte-Carlo return minus V; 0 is the one-step error.

    Returns:
      advantages and returns, 0 where the mask is 0.

    Source: Schulman et al. 2016, eq. 16; lm-human-preferences, train_policy.py `loss`.
    """

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, counted = inputs
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (
            jnp.where(counted, value, next_value),
            jnp.where(counted, advantage, next_advantage),
        )
        return carry, jnp.where(counted, advantage, 0)

    zeros = jnp.zeros_like(values[:, 0])
    columns = rewards.T, values.T, mask.T > 0
    _, advantages = jax.lax.scan(
        step, (zeros, zeros), columns, reverse=True, unroll=min(8, mask.shape[1])
    )
    advantages = advantages.T
    return advantages, jnp.where(mask > 0, advantages + values, 0)


def reinforce_pp(
    rewards: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, "b t"]:
    """Returns the advantages of REINFORCE++: the reward to come, normalized over the batch.

      G_t = sum_{s >= t} r_s
      A_t = (G_t - mean G) / sqrt(var G + 1e-8), over all counted tokens

    With r_t = -beta log pi / pi_ref (y_t), and the score added at the last token, G_t is the score
    minus beta times the KL that is still to come. There is no value function and no group: one
    response per prompt is enough.

    Args:
      rewards: r_t, received for emitting token t.
      mask: 1 on response tokens.

    Returns:
      advantages, 0 where the mask is 0.

    Source: Hu et al. 2025, "REINFORCE++", the variant for k >= 1 responses per prompt.
    """
    counted = jnp.where(mask > 0, rewards, 0)
    to_come = jnp.cumsum(counted[:, ::-1], axis=1)[:, ::-1]
    return whiten(to_come, mask)
