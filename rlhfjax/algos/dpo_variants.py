"""Variants of DPO: per token, with a likelihood term, with a penalty, for wrong labels.

Arguments are as in `direct.dpo_loss`: sequence log-probabilities [n] of n pairs under the policy pi
and, as constants, under the reference rho. `weight` [n] is 1 on pairs that exist and 0 on padding.
With h = log pi/rho (y_w) - log pi/rho (y_l), DPO is -log sigmoid(beta h).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlhfjax.algos.direct import implicit_reward, pairwise_loss
from rlhfjax.algos.masked import weighted_mean
from rlhfjax.types import Loss, Scalar


def dpo_norm_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    chosen_length: Float[Array, "n"],
    rejected_length: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
) -> Loss:
    """Returns length-normalized DPO, mean over pairs. It is DPO of log ratios per token.

      -log sigmoid(beta / |y_w| log pi/rho (y_w) - beta / |y_l| log pi/rho (y_l))

    Args:
      chosen_length, rejected_length: |y_w| and |y_l|, tokens with the eos.
      beta: 5 (Tulu 3); a mean over tokens is smaller than a sum.

    Returns:
      nats per pair; metrics of `direct.dpo_loss`, with rewards beta / |y| log pi/rho.

    Source: Lambert et al. 2024 (Tulu 3), section 5.1.2; open-instruct `dpo_norm`.
    """
    reward_w = implicit_reward(chosen, ref_chosen, weight, beta)
    reward_l = implicit_reward(rejected, ref_rejected, weight, beta)
    reward_w = reward_w / jnp.maximum(chosen_length, 1)
    reward_l = reward_l / jnp.maximum(rejected_length, 1)
    loss = -jax.nn.log_sigmoid(reward_w - reward_l)
    return pairwise_loss(loss, reward_w, reward_l, weight)


def irpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    chosen_mean: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
    alpha: Scalar,
) -> Loss:
    """Returns the loss of iterative reasoning preference optimization, mean over pairs.

      -log sigmoid(beta h) - alpha / |y_w| log pi(y_w)

    The second term keeps the likelihood of the chosen response from falling. The paper and TRL
    (`rpo_alpha`) call it RPO. Reward-aware preference optimization (Nemotron-4, 2024) is called RPO
    too and is another loss, which regresses on the gap of given rewards.

    Args:
      chosen_mean: 1/|y_w| log pi(y_w), nats per token, as `direct.mean_logprobs` returns it.
      beta: 0.1 (the paper).
      alpha: weight of the likelihood, nats per nat per token; 1 (the paper).

    Returns:
      metrics of `direct.dpo_loss`, and nll (nats per token, weight: pairs).

    Source: Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1.
    """
    reward_w = implicit_reward(chosen, ref_chosen, weight, beta)
    reward_l = implicit_reward(rejected, ref_rejected, weight, beta)
    nll = -jnp.where(weight > 0, chosen_mean, 0)
    loss = -jax.nn.log_sigmoid(reward_w - reward_l) + alpha * nll
    mean, metrics = pairwise_loss(loss, reward_w, reward_l, weight)
    metrics["nll"] = weighted_mean(nll, weight)
    return mean, metrics


def dpop_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
    penalty: Scalar,
) -> Loss:
    """Returns the DPO-positive loss, mean over pairs.

      -log sigmoid(beta (h - lambda max(0, log rho/pi (y_w))))

    DPO can push both responses down, as long as the rejected one falls faster. Here a chosen
    response that is less likely than under the reference makes the margin smaller.

    Args:
      beta: 0.3 (the paper).
      penalty: lambda; 50 (the paper).

    Returns:
      metrics of `direct.dpo_loss`, whose rewards have no penalty, and chosen_drop, the mean of
      max(0, log rho/pi (y_w)), nats per response, weight: pairs.

    Source: Pal et al. 2024, "Smaug", eq. 3.
    """
    reward_w = implicit_reward(chosen, ref_chosen, weight, beta)
    reward_l = implicit_reward(rejected, ref_rejected, weight, beta)
    log_ratio = jnp.where(weight > 0, chosen - lax.stop_gradient(ref_chosen), 0)
    drop = jnp.maximum(0, -log_ratio)
    loss = -jax.nn.log_sigmoid(reward_w - reward_l - beta * penalty * drop)
    mean, metrics = pairwise_loss(loss, reward_w, reward_l, weight)
    metrics["chosen_drop"] = weighted_mean(drop, weight)
    return mean, metrics


def robust_dpo_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    ref_chosen: Float[Array, "n"],
    ref_rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    beta: Scalar,
    smoothing: Scalar,
) -> Loss:
    """Returns the provably robust DPO loss, for labels that are wrong with probability eps.

      (-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps), mean over pairs

    Its expectation over such labels is the DPO loss of the right labels, so that it is unbiased;
    `direct.cdpo_loss` is not. It has no lower bound: as beta h grows, it falls with slope
    -eps / (1 - 2 eps).

    Args:
      smoothing: eps, below 1/2.

    Returns:
      metrics of `direct.dpo_loss`.

    Source: Chowdhury et al. 2024, "Provably Robust DPO", section 3.
    """
    reward_w = implicit_reward(chosen, ref_chosen, weight, beta)
    reward_l = implicit_reward(rejected, ref_rejected, weight, beta)
    margin = reward_w - reward_l
    right = -(1 - smoothing) * jax.nn.log_sigmoid(margin)
    wrong = -smoothing * jax.nn.log_sigmoid(-margin)
    loss = (right - wrong) / (1 - 2 * smoothing)
    return pairwise_loss(loss, reward_w, reward_l, weight)
