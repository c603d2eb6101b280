"""Direct preference optimization and its relatives: a policy from preferences, without a reward model or samples.

Arguments are log-probabilities of whole responses, [n] for n pairs: `sequence_logprobs` (sums over tokens) for DPO,
cDPO, IPO and KTO, `mean_logprobs` for ORPO and SimPO. `weight` [n] is 1 on pairs that exist, 0 on padding.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.algos.log_ratios import LIMIT
from rlhfjax.algos.masked import divide, masked_mean, masked_sum
from rlhfjax.algos.preference import pair_metrics
from rlhfjax.types import Loss, Scalar


def sequence_logprobs(
    logprobs: Float[Array, "b t"], mask: Float[Array, "b t"]
) -> Float[Array, "b"]:
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t), nats."""
    return masked_sum(logprobs, mask, axis=1)


def mean_logprobs(
    logprobs: Float[Array, "b t"], mask: Float[Array, "b t"]
) -> Float[Array, "b"]:
    """1/|y| log pi(y | x), nats per token."""
    return masked_mean(logprobs, mask, axis=1)


def dpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
) -> Loss:
    """-log sigmoid(beta h), h = log pi/rho (y_w) - log pi/rho (y_l), mean over pairs.

    Args:
      chosen, rejected: sequence log-probabilities of y_w and y_l under the policy.
      ref_chosen, ref_rejected: under the reference, constants.
      weight: 1 on pairs that exist.
      beta: 0.1 (TL;DR: 0.5).

    Returns:
      nats per pair; metrics loss, accuracy, margin, chosen_reward, rejected_reward (implicit, beta log pi/rho).

    Source: Rafailov et al. 2023, eq. 7.
    """
    return cdpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, weight, beta=beta, smoothing=0.0
    )


def cdpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
    smoothing: Scalar,
) -> Loss:
    """-(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h): labels flip with probability eps. Else `dpo_loss`.

    Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    reward_w, reward_l = (
        _implicit(chosen, ref_chosen, weight, beta),
        _implicit(rejected, ref_rejected, weight, beta),
    )
    margin = reward_w - reward_l
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(
        margin
    ) - smoothing * jax.nn.log_sigmoid(-margin)
    return _pairwise(loss, reward_w, reward_l, weight)


def ipo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
) -> Loss:
    """(h - 1 / (2 beta))^2, h as in `dpo_loss`: the log-ratio gap is regressed on a constant (the paper's tau is beta).

    The metrics' rewards are beta log pi/rho, the margin's target hence 1/2.

    Source: Azar et al. 2023, eq. 17.
    """
    reward_w, reward_l = (
        _implicit(chosen, ref_chosen, weight, beta),
        _implicit(rejected, ref_rejected, weight, beta),
    )
    return _pairwise(
        ((reward_w - reward_l) / beta - 1 / (2 * beta)) ** 2, reward_w, reward_l, weight
    )


def simpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
    margin: Scalar,
) -> Loss:
    """-log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l)) - margin); no reference.

    Args:
      chosen, rejected: `mean_logprobs`, nats per token.
      weight: 1 on pairs that exist.
      beta: 2.0 to 2.5.
      margin: the paper's gamma, in units of reward; TRL's gamma_beta_ratio is margin / beta.

    Source: Meng et al. 2024, eq. 6.
    """
    reward_w, reward_l = (
        beta * jnp.where(weight > 0, x, 0) for x in (chosen, rejected)
    )
    return _pairwise(
        -jax.nn.log_sigmoid(reward_w - reward_l - margin), reward_w, reward_l, weight
    )


def orpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
) -> Loss:
    """-log P(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)), odds(y) = P / (1 - P); no reference.

    Args:
      chosen, rejected: `mean_logprobs`: log P(y) is the mean over tokens, in both terms.
      weight: 1 on pairs that exist.
      beta: the paper's lambda, 0.1.

    Returns:
      as `dpo_loss`, rewards being beta log odds; and the metrics nll (first term, nats per token,
      weight: pairs) and odds_clamped (share of pairs with a response at the limit of `log_odds`).

    Source: Hong et al. 2024, eq. 6 and 7.
    """
    chosen, rejected = (jnp.where(weight > 0, x, -1.0) for x in (chosen, rejected))
    odds_w, odds_l = log_odds(chosen), log_odds(rejected)
    loss = -chosen - beta * jax.nn.log_sigmoid(odds_w - odds_l)
    scalar, metrics = _pairwise(loss, beta * odds_w, beta * odds_l, weight)
    at_limit = jnp.maximum(chosen, rejected) >= CERTAIN
    metrics |= {
        "nll": (masked_sum(-chosen, weight), jnp.sum(weight)),
        "odds_clamped": (
            masked_sum(at_limit.astype(weight.dtype), weight),
            jnp.sum(weight),
        ),
    }
    return scalar, metrics


CERTAIN = -math.exp(-LIMIT)  # the log-probability whose log odds are the limit


def log_odds(log_p: Float[Array, "n"]) -> Float[Array, "n"]:
    """log(p / (1 - p)) from log p <= 0, accurate at both ends; at most 80.

    A response that is certain, or that has no tokens, has log p = 0 and infinite odds. Beyond the
    limit the gradient is 0.
    """
    log_p = jnp.minimum(log_p, CERTAIN)
    return log_p - jnp.log(-jnp.expm1(log_p))


def kto_loss(
    logprobs: Float[Array, "n"],
    ref_logprobs: Float[Array, "n"],
    desirable: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    kl: Scalar,
    beta: Scalar,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """lambda_y - v(y), v = lambda_D sigmoid(r - beta z) if desirable, lambda_U sigmoid(beta z - r) if not; mean.

    As 1 - sigmoid(x) is sigmoid(-x), this is
    lambda_D sigmoid(beta z - r) or lambda_U sigmoid(r - beta z).
    r = beta log pi/rho (y), z the KL of policy and reference, a constant: no pairs, one label a response.

    Args:
      logprobs, ref_logprobs: sequence log-probabilities.
      desirable: 1 or 0.
      weight: 1 on responses that exist.
      kl: z, from `kto_kl` over the *whole* batch (so that microbatches agree).
      beta: 0.1.
      desirable_weight, undesirable_weight: lambda_D, lambda_U; lambda_D n_D / (lambda_U n_U) in [1, 3/2].

    Returns:
      mean over responses; metrics loss, desirable_reward, undesirable_reward.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    reward = _implicit(logprobs, ref_logprobs, weight, beta)
    z = beta * lax.stop_gradient(jnp.asarray(kl))
    missing, excess = jax.nn.sigmoid(z - reward), jax.nn.sigmoid(reward - z)
    loss = jnp.where(
        desirable > 0, desirable_weight * missing, undesirable_weight * excess
    )
    good, bad = weight * (desirable > 0), weight * (desirable <= 0)
    total, count = masked_sum(loss, weight), jnp.sum(weight)
    metrics = {
        "loss": (total, count),
        "desirable_reward": (masked_sum(reward, good), jnp.sum(good)),
        "undesirable_reward": (masked_sum(reward, bad), jnp.sum(bad)),
    }
    return divide(total, count), metrics


def kto_kl(
    mismatched: Float[Array, "n"],
    ref_mismatched: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Float[Array, ""]:
    """z = max(0, mean of log pi/rho (y' | x)) over responses y' paired with another example's prompt; no gradient.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    return lax.stop_gradient(
        jnp.maximum(0, masked_mean(mismatched - ref_mismatched, weight))
    )


def _implicit(logprobs, ref_logprobs, weight, beta):
    return beta * jnp.where(weight > 0, logprobs - lax.stop_gradient(ref_logprobs), 0)


def _pairwise(loss, reward_w, reward_l, weight) -> Loss:
    total, count = masked_sum(loss, weight), jnp.sum(weight)
    metrics = {
        "loss": (total, count),
        **pair_metrics(reward_w - reward_l, weight),
        "chosen_reward": (masked_sum(reward_w, weight), count),
        "rejected_reward": (masked_sum(reward_l, weight), count),
    }
    return divide(total, count), metrics
