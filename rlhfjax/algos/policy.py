"""Losses of the policy over sampled responses: arrays [batch, response time] and a token mask."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.algos.log_ratios import clamp, clamped
from rlhfjax.algos.masked import divide, masked_max, token_mean
from rlhfjax.types import Loss, Metrics, Scalar


def log_ratio(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, "b t"]:
    """Returns log pi/pi_old on counted tokens, and 0 elsewhere, so that padding has no gradient.

    It is clamped at +-80 nats, without a gradient beyond. With an infinite ratio the gradient of a
    token that PPO clips would be 0 * inf.
    """
    return jnp.where(mask > 0, clamp(logprobs - lax.stop_gradient(old_logprobs)), 0)


def ratio_metrics(
    log_ratios: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Metrics:
    """Returns how far the policy has moved from the one that sampled, as four metrics.

    approx_kl: k3 of KL(pi_old || pi), E_old[pi/pi_old - 1 - log pi/pi_old], nats per token. It is
      between PPO iterates, not to the reference.
    ratio: the mean of pi/pi_old.
    ratio_max: its maximum, with weight 1: over minibatches it is the mean of their maxima.
    ratio_clamped: the share of tokens at the limit of `log_ratio`.
    """
    approx_kl = jnp.expm1(log_ratios) - log_ratios
    ratio = jnp.exp(log_ratios)
    any_counted = jnp.any(mask > 0).astype(ratio.dtype)
    return {
        "approx_kl": token_mean(approx_kl, mask),
        "ratio": token_mean(ratio, mask),
        "ratio_max": (masked_max(ratio, mask), any_counted),
        "ratio_clamped": clamped(log_ratios, mask),
    }


def ppo_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    clip: float,
) -> Loss:
    """Returns PPO's clipped surrogate, mean over tokens.

      -min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t),   rho_t = exp(logprobs - old_logprobs)

    Args:
      logprobs: log pi(y_t | x, y_<t) of the policy that is trained, nats, at the sampling
        temperature.
      old_logprobs: those of the policy that sampled.
      advantages: A_t, a constant.
      mask: 1 on response tokens.
      clip: epsilon, 0.2 in the papers.

    Returns:
      the mean over counted tokens; metrics loss, clip_fraction (share of tokens whose clipped term
      is the active one), and those of `ratio_metrics`.

    Source: Schulman et al. 2017, eq. 7; lm-human-preferences, train_policy.py `loss`.
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    ratio = jnp.exp(log_ratios)
    advantages = lax.stop_gradient(jnp.where(mask > 0, advantages, 0))
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    total, weight = token_mean(jnp.maximum(plain, clipped), mask)
    is_clipped = (clipped > plain).astype(ratio.dtype)
    return surrogate_loss(total, weight, is_clipped, log_ratios, mask)


def surrogate_loss(
    total: Float[Array, ""],
    weight: Float[Array, ""],
    is_clipped: Float[Array, "b t"],
    log_ratios: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns total / weight; metrics loss, clip_fraction and those of `ratio_metrics`."""
    metrics: Metrics = {
        "loss": (total, weight),
        "clip_fraction": token_mean(is_clipped, mask),
        **ratio_metrics(log_ratios, mask),
    }
    return divide(total, weight), metrics


def entropy_bonus(
    entropy: Float[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    coefficient: Scalar,
) -> Loss:
    """Returns -coefficient H(pi(. | x, y_<t)), mean over tokens.

    The metric entropy is in nats per token.

    Source: Schulman et al. 2017, eq. 9 (the term S).
    """
    total, weight = token_mean(entropy, mask)
    loss = -coefficient * total
    return divide(loss, weight), {"loss": (loss, weight), "entropy": (total, weight)}
