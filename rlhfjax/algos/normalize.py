"""Rewards on a known scale, and the combination of an ensemble's rewards."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from rlhfjax.algos.masked import masked_mean, masked_std
from rlhfjax.types import Scalar


def gain_and_bias(
    rewards: Float[Array, "b"],
    mask: Float[Array, "b"],
    *,
    mean: Scalar,
    std: Scalar,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns gain g and bias b such that g r + b has the given mean and (biased) std.

      g = std / std_r,   b = mean - g mean_r

    The rewards are of samples of the *reference* policy, before and after the reward model is
    trained. Equal rewards have g = 1.

    Source: Ziegler et al. 2019; "N implementation details", reward detail 3.
    """
    spread = masked_std(rewards, mask)
    gain = jnp.where(spread > 0, std / jnp.where(spread > 0, spread, 1), 1)
    return gain, mean - gain * masked_mean(rewards, mask)


def centring_bias(
    rewards: Float[Array, "b"],
    mask: Float[Array, "b"],
    *,
    mean: Scalar = 0.0,
) -> Float[Array, ""]:
    """Returns b such that r + b has the given mean.

    The rewards are of demonstrations (InstructGPT), or of new samples to recenter.

    Source: Ouyang et al. 2022, appendix C.2; Stiennon et al. 2020, section 3.4 (where references
    score 0).
    """
    return mean - masked_mean(rewards, mask)


def ensemble_mean(rewards: Float[Array, "m b"]) -> Float[Array, "b"]:
    """Returns mean_m r_m."""
    return jnp.mean(rewards, axis=0)


def ensemble_worst(rewards: Float[Array, "m b"]) -> Float[Array, "b"]:
    """Returns min_m r_m, for worst-case optimization.

    Source: Coste et al. 2023.
    """
    return jnp.min(rewards, axis=0)


def ensemble_pessimistic(
    rewards: Float[Array, "m b"],
    *,
    coefficient: Scalar,
) -> Float[Array, "b"]:
    """Returns mean_m r_m - coefficient std_m r_m (biased std): uncertainty-weighted optimization.

    Source: Coste et al. 2023 (which penalizes the variance; the std has the reward's unit).
    """
    return jnp.mean(rewards, axis=0) - coefficient * ensemble_disagreement(rewards)


def ensemble_disagreement(rewards: Float[Array, "m b"]) -> Float[Array, "b"]:
    """Returns std_m r_m (biased), in reward units."""
    return jnp.std(rewards, axis=0)
