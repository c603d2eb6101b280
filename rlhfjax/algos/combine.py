"""A sum of losses as one loss."""

from typing import Any

from rlhfjax.algos.masked import divide
from rlhfjax.types import Loss, Metrics, Scalar


def add_losses(**terms: tuple[Scalar, Loss]) -> Loss:
    """Returns sum_i c_i loss_i of losses with the same mask, such as PPO's policy and value loss.

    `add_losses(policy=(1.0, ppo_loss(...)), value=(0.1, clipped_value_loss(...)))` has the metrics
    loss, policy_loss, value_loss and all others of both under their own names. The coefficients
    are in "loss" and not in the parts. A loss with another weight (PPO's pretraining mix) is
    accumulated separately, and its gradient added.

    Raises:
      ValueError: two terms have a metric of the same name.

    Source: Schulman et al. 2017, eq. 9.
    """
    total: Any = 0.0
    weight: Any = None
    metrics: Metrics = {}
    for term, (coefficient, (_, term_metrics)) in terms.items():
        term_total, term_weight = term_metrics["loss"]
        total = total + coefficient * term_total
        weight = term_weight if weight is None else weight
        for metric, value in term_metrics.items():
            name = f"{term}_loss" if metric == "loss" else metric
            if name in metrics:
                raise ValueError(f"add_losses: two terms have a metric {name!r}")
            metrics[name] = value
    mean = divide(total, weight)
    return mean, {"loss": (total, weight), **metrics}
