"""The losses of the reward stage by name, each as a function of a prompt's K completions.

A loss takes `rewards`, `labels`, `valid` and `same`, all [p, k]: higher labels are better, `valid`
is 0 where a prompt has fewer than K completions, and completions with equal `same` have the same
tokens, of which a pair weighs 0 (None: all differ). Those of pairs see every pair of one prompt
once and are means over pairs; `kwise`, `plackett_luce` and `best_of_k` are means over prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.algos import ranking
from rlhfjax.algos.preference import distinct_pairs, kwise_loss, untied_pairs
from rlhfjax.ranges import Finite, NonNegative, Positive, ShareBelowHalf
from rlhfjax.types import Loss

RewardLoss = Callable[..., Loss]  # (rewards, labels, valid, same=None), all [p, k]
Same = Int[Array, "p k"] | None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which likelihood of the labels a reward model maximizes.

    kwise: InstructGPT, eq. 1.  bradley_terry: the mean over pairs (Stiennon 2020).  smoothed: labels are wrong with
    probability `smoothing`.  margin: Llama 2, eq. 2.  soft: P(i better) = sigmoid(label_scale (l_i - l_j)), as a judge
    gives it.  half_ties: WebGPT, a tie is a label of 1/2.  rao_kupper: ties are outcomes of their own.
    plackett_luce: the whole ranking.  best_of_k: Ziegler 2019, eq. 1, the labeler picks one.
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
    smoothing: ShareBelowHalf = (
        0.1  # of `smoothed`: cDPO's and Wang et al.'s usual value
    )
    margin: NonNegative = 1.0  # of `margin`: reward units a unit of label difference
    label_scale: Finite = (
        1.0  # of `soft`: 1 where a label is a log-probability, as judges give
    )
    eta: Positive = 0.5  # of `rao_kupper`: rewards closer than about this are called equal; ours, the paper fits it


def make_loss(config: LossConfig) -> RewardLoss:
    """The loss that a config names, (rewards, labels, valid, same=None) [p, k] -> (scalar,
    metrics)."""
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


def ordered_pairs(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Same = None,
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Reward of the better, of the worse, label difference and weight of every untied pair; n = p k k."""
    weight = untied_pairs(labels, valid, same)
    rewards, labels = (jnp.where(valid > 0, x, 0) for x in (rewards, labels))
    better, worse = (
        jnp.broadcast_to(x, weight.shape)
        for x in (rewards[:, :, None], rewards[:, None, :])
    )
    gaps = labels[:, :, None] - labels[:, None, :]
    return better.ravel(), worse.ravel(), gaps.ravel(), weight.ravel()


def all_pairs(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Same = None,
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Rewards a and b, label_a - label_b and weight of every pair i < j, ties included; n = p k (k - 1) / 2."""
    i, j = jnp.triu_indices(rewards.shape[1], k=1)
    rewards, labels = (jnp.where(valid > 0, x, 0) for x in (rewards, labels))
    weight = distinct_pairs(valid, same)[:, i, j].astype(rewards.dtype)
    return (
        rewards[:, i].ravel(),
        rewards[:, j].ravel(),
        (labels[:, i] - labels[:, j]).ravel(),
        weight.ravel(),
    )


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
    a, b, gaps, weight = all_pairs(rewards, labels, valid, same)
    return ranking.soft_label_loss(a, b, jax.nn.sigmoid(label_scale * gaps), weight)


def _half_ties(
    rewards: jax.Array, labels: jax.Array, valid: jax.Array, same: Same = None
) -> Loss:
    a, b, gaps, weight = all_pairs(rewards, labels, valid, same)
    return ranking.soft_label_loss(a, b, (jnp.sign(gaps) + 1) / 2, weight)


def _rao_kupper(
    rewards: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    same: Same = None,
    *,
    eta: float,
) -> Loss:
    a, b, gaps, weight = all_pairs(rewards, labels, valid, same)
    return ranking.rao_kupper_loss(a, b, (jnp.sign(gaps) + 1) / 2, weight, eta=eta)


def _best_of_k(
    rewards: jax.Array, labels: jax.Array, valid: jax.Array, same: Same = None
) -> Loss:
    """A prompt whose best is tied names no best, and has weight 0. What has the best's tokens does
    not compete."""
    labels = jnp.where(valid > 0, labels, -jnp.inf)
    top = jnp.max(labels, axis=1, keepdims=True)
    single = jnp.sum((labels == top) & (valid > 0), axis=1, keepdims=True) == 1
    best = jnp.argmax(labels, axis=1).astype(jnp.int32)
    if same is not None:
        twin = same == jnp.take_along_axis(same, best[:, None], axis=1)
        valid = valid * (~twin | (jnp.arange(valid.shape[1]) == best[:, None]))
    return ranking.best_of_k_loss(rewards, best, valid * single)
