"""Losses of a reward model over the K completions of each prompt.

`rewards` [p, k] are the model's, `labels` [p, k] the labeler's (higher is better; minus the rank
for ranks). `valid` [p, k] is 1 on completions that exist, so that K may differ between prompts.
`same` [p, k] has equal numbers where completions of a prompt have the same tokens, perhaps because
they were truncated. Whatever its labels are, such a pair has no information and weight 0. Without
`same` all completions differ.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from rlhfjax.algos.masked import divide, masked_sum
from rlhfjax.types import Loss, Metrics


def distinct_pairs(
    valid: Float[Array, "p k"],
    same: Int[Array, "p k"] | None = None,
) -> Bool[Array, "p k k"]:
    """Returns True at [p, i, j] where completions i and j are valid and have other tokens."""
    both = (valid[:, :, None] > 0) & (valid[:, None, :] > 0)
    return both if same is None else both & (same[:, :, None] != same[:, None, :])


def untied_pairs(
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Int[Array, "p k"] | None = None,
) -> Float[Array, "p k k"]:
    """Returns 1 at [p, w, l] where w and l are a distinct pair and w has the higher label."""
    labels = jnp.where(valid > 0, labels, 0)
    better = labels[:, :, None] > labels[:, None, :]
    return (distinct_pairs(valid, same) & better).astype(valid.dtype)


def reward_differences(
    rewards: Float[Array, "p k"],
    valid: Float[Array, "p k"],
) -> Float[Array, "p k k"]:
    """Returns r_w - r_l at [p, w, l]. Invalid completions have no gradient."""
    rewards = jnp.where(valid > 0, rewards, 0)
    return rewards[:, :, None] - rewards[:, None, :]


def kwise_loss(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Int[Array, "p k"] | None = None,
) -> Loss:
    """Returns InstructGPT's reward loss: all pairs of a prompt are one batch element.

    With P_p the pairs (w, l) of prompt p whose labels differ (ties are dropped pair by pair):
      loss_p = -1/|P_p| sum_{(w,l) in P_p} log sigmoid(r_w - r_l)
      loss = mean of loss_p over prompts with |P_p| > 0
    Without ties |P_p| = C(K, 2), the paper's factor. A prompt without an untied pair has weight 0.

    Args:
      rewards: r(x, y_i), one forward pass per completion.
      labels: the labeler's score of each completion, higher is better.
      valid: 1 on completions that exist.
      same: equal where completions have the same tokens.

    Returns:
      nats per pair, mean over prompts; metrics loss (weight: prompts), accuracy and margin
      (weight: pairs).

    Source: Ouyang et al. 2022, eq. 1 and section 3.5.
    """
    pairs = untied_pairs(labels, valid, same)
    differences = reward_differences(rewards, valid)
    n_pairs = jnp.sum(pairs, axis=(1, 2))
    nll = jnp.sum(pairs * -jax.nn.log_sigmoid(differences), axis=(1, 2))
    total = jnp.sum(divide(nll, n_pairs))
    weight = jnp.sum((n_pairs > 0).astype(nll.dtype))
    mean = divide(total, weight)
    return mean, {"loss": (total, weight), **pair_metrics(differences, pairs)}


def pair_metrics(
    differences: Float[Array, "..."],
    pairs: Float[Array, "..."],
) -> Metrics:
    """Returns accuracy and margin of the pairs, both with the number of pairs as their weight.

    accuracy is the share of pairs with r_w > r_l, where equal rewards count one half. margin is the
    mean of r_w - r_l.
    """
    correct = (differences > 0) + 0.5 * (differences == 0)
    weight = jnp.sum(pairs)
    accuracy = masked_sum(correct.astype(pairs.dtype), pairs)
    margin = masked_sum(differences, pairs)
    return {"accuracy": (accuracy, weight), "margin": (margin, weight)}
