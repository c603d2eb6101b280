"""Process rewards: the probability that each step of a solution is right.

A model gives one logit z per token. Those at the last tokens of the steps count; the probability
that a step is right is sigmoid(z).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from rlhfjax.algos.masked import divide, masked_sum, weighted_mean
from rlhfjax.types import Loss, Metrics

Combine = Literal["product", "minimum"]


def step_loss(
    logits: Float[Array, "b t"],
    labels: Float[Array, "b t"],
    weight: Float[Array, "b t"],
) -> Loss:
    """Returns the binary cross-entropy of step labels, mean over steps.

      -y log sigmoid(z) - (1 - y) log sigmoid(-z)

    Args:
      logits: z, the scalar head at every token.
      labels: y in [0, 1], 1 for a right step, at the last token of each step.
      weight: 1 at the last token of each step whose label counts.

    Returns:
      nats per step; metrics loss, accuracy (z > 0 where y > 1/2), positive (the share of steps
      with y > 1/2), all with the number of steps as their weight.

    Source: Lightman et al. 2023, section 2.6; Uesato et al. 2022, section 2.4.
    """
    logits = jnp.where(weight > 0, logits, 0)
    labels = jnp.where(weight > 0, labels, 0)
    right = -labels * jax.nn.log_sigmoid(logits)
    loss = right - (1 - labels) * jax.nn.log_sigmoid(-logits)
    total, count = weighted_mean(loss, weight)
    positive = labels > 0.5
    correct = (logits > 0) == positive
    metrics: Metrics = {
        "loss": (total, count),
        "accuracy": weighted_mean(correct.astype(weight.dtype), weight),
        "positive": weighted_mean(positive.astype(weight.dtype), weight),
    }
    return divide(total, count), metrics


def solution_scores(
    logits: Float[Array, "b t"],
    ends: Float[Array, "b t"],
    *,
    combine: Combine,
) -> Float[Array, "b"]:
    """Returns the score of each solution, in [0, 1]; 0 for one without a step.

      product: prod_s sigmoid(z_s), the probability that all steps are right
      minimum: min_s sigmoid(z_s)

    Args:
      ends: 1 at the last token of each step.

    Source: Lightman et al. 2023, section 2.6 (product) and appendix F (both); Wang et al. 2024
      (Math-Shepherd; minimum).
    """
    log_p = jax.nn.log_sigmoid(jnp.where(ends > 0, logits, 0))
    log_p = jnp.where(ends > 0, log_p, 0)
    if combine == "product":
        log_score = masked_sum(log_p, ends, axis=1)
    else:
        log_score = jnp.min(log_p, axis=1)
    has_step = jnp.any(ends > 0, axis=1)
    return jnp.where(has_step, jnp.exp(log_score), 0)


def solution_metrics(
    scores: Float[Array, "b"],
    labels: Float[Array, "b t"],
    weight: Float[Array, "b t"],
) -> Metrics:
    """Returns accuracy and share of right solutions; a solution is right if no step is wrong.

    solution_accuracy is the share of solutions with (score > 1/2) equal to that. Solutions without
    a label that counts are left out.

    Args:
      scores: of `solution_scores`.
      labels, weight: as in `step_loss`.
    """
    wrong = jnp.any((weight > 0) & (labels <= 0.5), axis=1)
    labeled = jnp.any(weight > 0, axis=1).astype(weight.dtype)
    correct = (scores > 0.5) == ~wrong
    return {
        "solution_accuracy": weighted_mean(correct.astype(weight.dtype), labeled),
        "solution_positive": weighted_mean((~wrong).astype(weight.dtype), labeled),
    }
