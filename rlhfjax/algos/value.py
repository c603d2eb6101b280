"""Losses of the value function, normalized like the policy's: a mean over counted tokens."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.algos.masked import divide, masked_var, token_mean
from rlhfjax.types import Loss, Metric, Metrics


def clipped_value_loss(
    values: Float[Array, "b t"],
    old_values: Float[Array, "b t"],
    returns: Float[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    clip: float,
) -> Loss:
    """Returns the clipped value loss, mean over tokens.

      1/2 max((V_t - R_t)^2, (clip(V_t, V_old - clip, V_old + clip) - R_t)^2)

    Args:
      values: V_t of the value function that is trained, in reward units.
      old_values: V_t when the response was sampled.
      returns: R_t = A_t + V_old_t, a constant.
      mask: 1 on response tokens.
      clip: how far V_t may move from V_old_t in one iteration, in reward units.

    Returns:
      the mean over counted tokens, the factor 1/2 included (multiply by vf_coef); metrics loss,
      value_clip_fraction, value, value_error (mean of (V - R)^2, without the half).

    Source: lm-human-preferences, train_policy.py `loss` (vf_losses); "N implementation details",
    policy detail 10.
    """
    old_values, returns = lax.stop_gradient((old_values, returns))
    values, old_values, returns = (
        jnp.where(mask > 0, x, 0) for x in (values, old_values, returns)
    )
    error = (values - returns) ** 2
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    clipped_error = (clipped - returns) ** 2
    total, weight = token_mean(0.5 * jnp.maximum(error, clipped_error), mask)
    is_clipped = (clipped_error > error).astype(error.dtype)
    metrics: Metrics = {
        "loss": (total, weight),
        "value_clip_fraction": token_mean(is_clipped, mask),
        "value": token_mean(values, mask),
        "value_error": token_mean(error, mask),
    }
    return divide(total, weight), metrics


def value_loss(
    values: Float[Array, "b t"],
    returns: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns 1/2 (V_t - R_t)^2, mean over tokens: the value loss without clipping.

    Metrics loss, value, value_error (mean of (V - R)^2, without the half).

    Source: Schulman et al. 2017, eq. 9 (L^VF).
    """
    values, returns = (
        jnp.where(mask > 0, x, 0) for x in (values, lax.stop_gradient(returns))
    )
    error = (values - returns) ** 2
    total, weight = token_mean(0.5 * error, mask)
    metrics: Metrics = {
        "loss": (total, weight),
        "value": token_mean(values, mask),
        "value_error": token_mean(error, mask),
    }
    return divide(total, weight), metrics


def explained_variance(
    values: Float[Array, "b t"],
    returns: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Metric:
    """Returns 1 - Var[R - V] / Var[R] over counted tokens, with the weight of one batch.

    A perfect value function has 1, one no better than a constant 0. It is also 0 if the returns do
    not vary.
    """
    variance = masked_var(returns, mask)
    error = masked_var(returns - values, mask)
    explained = 1 - error / jnp.where(variance > 0, variance, 1)
    any_counted = jnp.any(mask > 0).astype(returns.dtype)
    return jnp.where(variance > 0, explained, 0), any_counted
