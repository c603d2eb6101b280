"""Direct preference optimization (DPO) and its relatives: a policy from preferences.

They need neither a reward model nor samples. Arguments are log-probabilities of whole responses,
[n] for n pairs: `sequence_logprobs` (sums over tokens) for DPO, cDPO, IPO and KTO, `mean_logprobs`
for ORPO and SimPO. `weight` [n] is 1 on pairs that exist and 0 on padding.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.algos.log_ratios import LIMIT
from rlhfjax.algos.masked import divide, masked_mean, masked_sum, weighted_mean
from rlhfjax.algos.preference import pair_metrics
from rlhfjax.types import Loss, Metrics, Scalar


def sequence_logprobs(
    logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, "b"]:
    """Returns log pi(y | x) = sum_t log pi(y_t | x, y_<t), nats."""
    return masked_sum(logprobs, mask, axis=1)


def mean_logprobs(
    logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, "b"]:
    """Returns 1/|y| log pi(y | x), nats per token."""
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
    """Returns the DPO loss, -log sigmoid(beta h), mean over pairs.

      h = log pi/rho (y_w) - log pi/rho (y_l)

    Args:
      chosen, rejected: sequence log-probabilities of y_w and y_l under the policy.
      ref_chosen, ref_rejected: under the reference, constants.
      weight: 1 on pairs that exist.
      beta: 0.1 (TL;DR: 0.5).

    Returns:
      nats per pair; metrics loss, accuracy, margin, chosen_reward, rejected_reward (implicit
      rewards, beta log pi/rho).

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
    """Returns the conservative DPO loss, for labels that are wrong with probability eps.

      -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), mean over pairs

    Arguments and metrics are those of `dpo_loss`; smoothing is eps.

    Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    reward_w = implicit_reward(chosen, ref_chosen, weight, beta)
    reward_l = implicit_reward(rejected, ref_rejected, weight, beta)
    margin = reward_w - reward_l
    right = -(1 - smoothing) * jax.nn.log_sigmoid(margin)
    loss = right - smoothing * jax.nn.log_sigmoid(-margin)
    return pairwise_loss(loss, reward_w, reward_l, weight)


def ipo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
) -> Loss:
    """Returns the IPO loss, (h - 1 / (2 beta))^2, mean over pairs, with h as in `dpo_loss`.

    The gap of the log ratios is regressed on a constant; beta is the paper's tau. The rewards in
    the metrics are beta log pi/rho, so that the margin's target is 1/2.

    Source: Azar et al. 2023, eq. 17.
    """
    reward_w = implicit_reward(chosen, ref_chosen, weight, beta)
    reward_l = implicit_reward(rejected, ref_rejected, weight, beta)
    gap = (reward_w - reward_l) / beta
    return pairwise_loss((gap - 1 / (2 * beta)) ** 2, reward_w, reward_l, weight)


def simpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
    margin: Scalar,
) -> Loss:
    """Returns the SimPO loss, mean over pairs. It has no reference.

      -log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l)) - margin)

    Args:
      chosen, rejected: `mean_logprobs`, nats per token.
      weight: 1 on pairs that exist.
      beta: 2.0 to 2.5.
      margin: the paper's gamma, in units of reward; TRL's gamma_beta_ratio is margin / beta.

    Source: Meng et al. 2024, eq. 6.
    """
    reward_w = beta * jnp.where(weight > 0, chosen, 0)
    reward_l = beta * jnp.where(weight > 0, rejected, 0)
    loss = -jax.nn.log_sigmoid(reward_w - reward_l - margin)
    return pairwise_loss(loss, reward_w, reward_l, weight)


def orpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
) -> Loss:
    """Returns the ORPO loss, mean over pairs. It has no reference.

      -log P(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)),   odds(y) = P / (1 - P)

    Args:
      chosen, rejected: `mean_logprobs`: log P(y) is the mean over tokens, in both terms.
      weight: 1 on pairs that exist.
      beta: the paper's lambda, 0.1.

    Returns:
      as `dpo_loss`, with rewards beta log odds; and the metrics nll (the first term, nats per
      token, weight: pairs) and odds_clamped (share of pairs with a response at the limit of
      `log_odds`).

    Source: Hong et al. 2024, eq. 6 and 7.
    """
    chosen, rejected = (jnp.where(weight > 0, x, -1.0) for x in (chosen, rejected))
    odds_w, odds_l = log_odds(chosen), log_odds(rejected)
    loss = -chosen - beta * jax.nn.log_sigmoid(odds_w - odds_l)
    mean, metrics = pairwise_loss(loss, beta * odds_w, beta * odds_l, weight)
    at_limit = jnp.maximum(chosen, rejected) >= CERTAIN
    metrics["nll"] = weighted_mean(-chosen, weight)
    metrics["odds_clamped"] = weighted_mean(at_limit.astype(weight.dtype), weight)
    return mean, metrics


CERTAIN = -math.exp(-LIMIT)  # the log-probability whose log odds are at the limit


def log_odds(log_p: Float[Array, "n"]) -> Float[Array, "n"]:
    """Returns log(p / (1 - p)) from log p <= 0, accurate at both ends, at most 80.

    A response that is certain, or without tokens, has log p = 0 and infinite odds. Beyond the limit
    the gradient is 0.
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
    """Returns the KTO loss, lambda_y - v(y), mean over responses.

      v = lambda_D sigmoid(r - beta z) if y is desirable, lambda_U sigmoid(beta z - r) if not

    As 1 - sigmoid(x) is sigmoid(-x), the loss is lambda_D sigmoid(beta z - r) or
    lambda_U sigmoid(r - beta z). r = beta log pi/rho (y); z is the KL of policy and reference, a
    constant. There are no pairs, but one label per response.

    Args:
      logprobs, ref_logprobs: sequence log-probabilities.
      desirable: 1 or 0.
      weight: 1 on responses that exist.
      kl: z, from `kto_kl` over the *whole* batch (so that microbatches agree).
      beta: 0.1.
      desirable_weight, undesirable_weight: lambda_D, lambda_U; lambda_D n_D / (lambda_U n_U) should
        be in [1, 3/2].

    Returns:
      mean over responses; metrics loss, desirable_reward, undesirable_reward.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    reward = implicit_reward(logprobs, ref_logprobs, weight, beta)
    z = beta * lax.stop_gradient(jnp.asarray(kl))
    missing, excess = jax.nn.sigmoid(z - reward), jax.nn.sigmoid(reward - z)
    loss = jnp.where(
        desirable > 0, desirable_weight * missing, undesirable_weight * excess
    )
    good, bad = weight * (desirable > 0), weight * (desirable <= 0)
    total, count = weighted_mean(loss, weight)
    metrics: Metrics = {
        "loss": (total, count),
        "desirable_reward": weighted_mean(reward, good),
        "undesirable_reward": weighted_mean(reward, bad),
    }
    return divide(total, count), metrics


def kto_kl(
    mismatched: Float[Array, "n"],
    ref_mismatched: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Float[Array, ""]:
    """Returns z = max(0, mean of log pi/rho (y' | x)), without a gradient.

    Each y' is a response that is paired with another example's prompt.

    Source: Ethayarajh et al. 2024 (KTO).
    """
    mean = masked_mean(mismatched - ref_mismatched, weight)
    return lax.stop_gradient(jnp.maximum(0, mean))


def implicit_reward(
    logprobs: Float[Array, "n"],
    ref_logprobs: Float[Array, "n"],
    weight: Float[Array, "n"],
    beta: Scalar,
) -> Float[Array, "n"]:
    """Returns beta log pi/rho (y), and 0 on padding; the reference has no gradient."""
    return beta * jnp.where(weight > 0, logprobs - lax.stop_gradient(ref_logprobs), 0)


def pairwise_loss(
    loss: Float[Array, "n"],
    reward_w: Float[Array, "n"],
    reward_l: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """Returns the mean of a loss over pairs, with the metrics of `dpo_loss`."""
    total, count = weighted_mean(loss, weight)
    metrics: Metrics = {
        "loss": (total, count),
        **pair_metrics(reward_w - reward_l, weight),
        "chosen_reward": (masked_sum(reward_w, weight), count),
        "rejected_reward": (masked_sum(reward_l, weight), count),
    }
    return divide(total, count), metrics
