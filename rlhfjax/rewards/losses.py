"""The losses of the reward stage by name, as functions of the K completions of each prompt.

A loss takes these arrays, all [p, k]:
  rewards: the model's rewards.
  labels: higher labels are better.
  valid: 0 where a prompt has fewer than K completions.
  same: equal where completions have the same tokens. Their pairs have weight 0. None: all differ.

`kwise`, `plackett_luce` and `best_of_k` are means over prompts. The other losses are means over
pairs, with every pair of a prompt once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.algos import ranking
from rlhfjax.algos.masked import divide
from rlhfjax.algos.preference import distinct_pairs, kwise_loss, untied_pairs
from rlhfjax.ranges import Finite, NonNegative, Positive, ShareBelowHalf
from rlhfjax.types import Loss

RewardLoss = Callable[..., Loss]  # (rewards, labels, valid, same=None), all [p, k]
Same = Int[Array, "p k"] | None
WITH_TIES = ("soft", "half_ties", "rao_kupper")  # losses of all pairs i < j
OVER_PROMPTS = ("kwise", "plackett_luce")  # losses that are means over prompts


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The likelihood of the labels that a reward model maximizes.

    kwise: InstructGPT, eq. 1.
    bradley_terry: the mean over pairs (Stiennon 2020).
    smoothed: a label is wrong with probability `smoothing`.
    margin: Llama 2, eq. 2.
    soft: P(i better than j) = sigmoid(label_scale (l_i - l_j)), as an LLM judge gives it.
    half_ties: a tie is a label of 1/2 (WebGPT).
    rao_kupper: a tie is an outcome of its own.
    plackett_luce: the likelihood of the whole ranking.
    best_of_k: the likelihood of the labeler's choice of the best (Ziegler 2019, eq. 1).
    """

    name: Literal[
        "kwise",
        "bradley_terry",
        "smoothed",
        "margin",
        "soft",
        "half_ties",
        "rao_kupper",
        "plackett_luce",
        "best_of_k",
    ] = "kwise"
    """Name of the loss."""
    smoothing: ShareBelowHalf = 0.1
    """Probability that a label is wrong; smoothed only. cDPO and Wang et al. use 0.1."""
    margin: NonNegative = 1.0
    """Reward units per unit of label difference; margin only."""
    label_scale: Finite = 1.0
    """Nats per unit of label difference; soft only. 1 if labels are log-probabilities."""
    eta: Positive = 0.5
    """Reward difference below which responses tend to be called equal; rao_kupper only. The paper
    fits it; the default is ours."""
    centering: NonNegative = 0.0
    """Weight of (r_i + r_j)^2 of each pair, which draws rewards to 0 in training; 0 is off.
    Eisenstein et al. 2023 and TRL: 0.01. Not with best_of_k, which has no pairs."""


def make_loss(config: LossConfig) -> RewardLoss:
    """Returns the loss that a config names.

    It is a function (rewards, labels, valid, same=None) -> (loss, metrics). With `centering` its
    metric "centering" is the mean of (r_i + r_j)^2 over the pairs of the loss, and "loss" has it.
    """
    loss = _named(config)
    if not config.centering:
        return loss
    return functools.partial(_centered, loss, config)


def _named(config: LossConfig) -> RewardLoss:
    return {
        "kwise": kwise_loss,
        "bradley_terry": _bradley_terry,
        "smoothed": functools.partial(_smoothed, smoothing=config.smoothing),
        "margin": functools.partial(_margin, margin=config.margin),
        "soft": functools.partial(_soft, label_scale=config.label_scale),
        "half_ties": _half_ties,
        "rao_kupper": functools.partial(_rao_kupper, eta=config.eta),
        "plackett_luce": ranking.plackett_luce_loss,
        "best_of_k": _best_of_k,
    }[config.name]


def _centered(
    loss: RewardLoss,
    config: LossConfig,
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Same = None,
) -> Loss:
    """Returns a loss plus `centering` times the mean of (r_i + r_j)^2 over its own pairs."""
    _, metrics = loss(rewards, labels, valid, same)
    pairs = centered_pairs(config.name, labels, valid, same)
    _, centering = ranking.centering_loss(rewards, pairs)
    total, weight = metrics["loss"]
    center_total, _ = centering["loss"]
    total = total + config.centering * center_total
    metrics = {**metrics, "loss": (total, weight), "centering": centering["loss"]}
    return divide(total, weight), metrics


def centered_pairs(
    name: str,
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Same = None,
) -> Float[Array, "p k k"]:
    """Returns the weights of the pairs of a loss; their sum is the weight of the loss itself.

    They are 1 for a mean over pairs, and 1 / (pairs of the prompt) for a mean over prompts.
    """
    if name in WITH_TIES:
        distinct = distinct_pairs(valid, same).astype(valid.dtype)
        return jnp.triu(distinct, k=1)
    pairs = untied_pairs(labels, valid, same)
    if name in OVER_PROMPTS:
        count = jnp.sum(pairs, axis=(1, 2), keepdims=True)
        return divide(pairs, jnp.broadcast_to(count, pairs.shape))
    return pairs


def ordered_pairs(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Same = None,
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Returns better reward, worse reward, label difference and weight of all n = p k k pairs.

    The weight is 1 where the first completion is labeled better than the second, else 0.
    """
    weight = untied_pairs(labels, valid, same)
    rewards = jnp.where(valid > 0, rewards, 0)
    labels = jnp.where(valid > 0, labels, 0)
    better, worse = rewards[:, :, None], rewards[:, None, :]
    better = jnp.broadcast_to(better, weight.shape)
    worse = jnp.broadcast_to(worse, weight.shape)
    gaps = labels[:, :, None] - labels[:, None, :]
    return better.ravel(), worse.ravel(), gaps.ravel(), weight.ravel()


def all_pairs(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Same = None,
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Returns rewards i and j, label_i - label_j and weight of all n = p k (k - 1) / 2 pairs i < j.

    Ties are included. The weight is 0 where a completion is not valid or both have the same tokens.
    """
    i, j = jnp.triu_indices(rewards.shape[1], k=1)
    rewards = jnp.where(valid > 0, rewards, 0)
    labels = jnp.where(valid > 0, labels, 0)
    weight = distinct_pairs(valid, same)[:, i, j].astype(rewards.dtype)
    first = rewards[:, i].ravel()
    second = rewards[:, j].ravel()
    gaps = (labels[:, i] - labels[:, j]).ravel()
    return first, second, gaps, weight.ravel()


def _bradley_terry(
    rewards: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    same: Same = None,
) -> Loss:
    better, worse, _, weight = ordered_pairs(rewards, labels, valid, same)
    return ranking.bradley_terry_loss(better, worse, weight)


def _smoothed(
    rewards: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    same: Same = None,
    *,
    smoothing: float,
) -> Loss:
    better, worse, _, weight = ordered_pairs(rewards, labels, valid, same)
    return ranking.smoothed_loss(better, worse, weight, smoothing=smoothing)


def _margin(
    rewards: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    same: Same = None,
    *,
    margin: float,
) -> Loss:
    better, worse, gaps, weight = ordered_pairs(rewards, labels, valid, same)
    return ranking.margin_loss(better, worse, margin * gaps, weight)


def _soft(
    rewards: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    same: Same = None,
    *,
    label_scale: float,
) -> Loss:
    first, second, gaps, weight = all_pairs(rewards, labels, valid, same)
    return ranking.soft_label_loss(
        first, second, jax.nn.sigmoid(label_scale * gaps), weight
    )


def _half_ties(
    rewards: jax.Array, labels: jax.Array, valid: jax.Array, same: Same = None
) -> Loss:
    first, second, gaps, weight = all_pairs(rewards, labels, valid, same)
    return ranking.soft_label_loss(first, second, (jnp.sign(gaps) + 1) / 2, weight)


def _rao_kupper(
    rewards: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    same: Same = None,
    *,
    eta: float,
) -> Loss:
    first, second, gaps, weight = all_pairs(rewards, labels, valid, same)
    return ranking.rao_kupper_loss(
        first, second, (jnp.sign(gaps) + 1) / 2, weight, eta=eta
    )


def _best_of_k(
    rewards: jax.Array, labels: jax.Array, valid: jax.Array, same: Same = None
) -> Loss:
    """Gives weight 0 to prompts whose best is tied. Completions with the tokens of the best do not
    compete with it."""
    labels = jnp.where(valid > 0, labels, -jnp.inf)
    top = jnp.max(labels, axis=1, keepdims=True)
    single = jnp.sum((labels == top) & (valid > 0), axis=1, keepdims=True) == 1
    best = jnp.argmax(labels, axis=1).astype(jnp.int32)
    if same is not None:
        twin = same == jnp.take_along_axis(same, best[:, None], axis=1)
        valid = valid * (~twin | (jnp.arange(valid.shape[1]) == best[:, None]))
    return ranking.best_of_k_loss(rewards, best, valid * single)
