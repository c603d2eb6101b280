"""Losses of the policy over sampled responses: arrays [batch, response time], a mask of the tokens that count."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.algos.log_ratios import clamp, clamped
from rlhfjax.algos.masked import divide, masked_max, token_mean
from rlhfjax.types import Loss, Scalar


def log_ratio(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, "b t"]:
    """log pi/pi_old on counted tokens, 0 elsewhere (so that padding has no gradient).

    Clamped at +-80 nats, with no gradient beyond: with an infinite ratio the gradient of a token
    that PPO clips would be 0 * inf.
    """
    return jnp.where(mask > 0, clamp(logprobs - lax.stop_gradient(old_logprobs)), 0)


def ratio_metrics(
    log_ratios: Float[Array, "b t"], mask: Float[Array, "b t"]
) -> dict[str, tuple[Array, Array]]:
    """How far the policy has moved from the one that sampled, as four metrics.

    approx_kl: k3 of KL(pi_old || pi), E_old[pi/pi_old - 1 - log pi/pi_old], nats per token: between
      PPO iterates, not to the reference.
    ratio: the mean of pi/pi_old.
    ratio_max: its maximum, of weight 1, so that over minibatches it is the mean of their maxima.
    ratio_clamped: the share of tokens at the limit of `log_ratio`.
    """
    approx_kl = jnp.expm1(log_ratios) - log_ratios
    ratio = jnp.exp(log_ratios)
    some = jnp.any(mask > 0).astype(ratio.dtype)
    return {
        "approx_kl": token_mean(approx_kl, mask),
        "ratio": token_mean(ratio, mask),
        "ratio_max": (masked_max(ratio, mask), some),
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
    """PPO's clipped surrogate, mean over tokens: -min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t).

    Args:
      logprobs: log pi(y_t | x, y_<t) of the policy that is trained, nats, at the sampling temperature.
      old_logprobs: those of the policy that sampled; rho_t = exp(logprobs - old_logprobs).
      advantages: A_t, a constant.
      mask: 1 on response tokens.
      clip: epsilon, 0.2 in the papers.

    Returns:
      the mean over counted tokens; metrics loss, clip_fraction (of tokens whose clipped term is the active one),
      and those of `ratio_metrics`.

    Source: Schulman et al. 2017, eq. 7; lm-human-preferences, train_policy.py `loss`.
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    ratio = jnp.exp(log_ratios)
    advantages = lax.stop_gradient(jnp.where(mask > 0, advantages, 0))
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    total, weight = token_mean(jnp.maximum(plain, clipped), mask)
    metrics = {
        "loss": (total, weight),
        "clip_fraction": token_mean((clipped > plain).astype(ratio.dtype), mask),
        **ratio_metrics(log_ratios, mask),
    }
    return divide(total, weight), metrics


def entropy_bonus(
    entropy: Float[Array, "b t"], mask: Float[Array, "b t"], *, coefficient: Scalar
) -> Loss:
    """-coefficient H(pi(. | x, y_<t)), mean over tokens; metric entropy in nats per token.

    Source: Schulman et al. 2017, eq. 9 (the term S).
    """
    total, weight = token_mean(entropy, mask)
    loss = -coefficient * total
    return divide(loss, weight), {"loss": (loss, weight), "entropy": (total, weight)}
