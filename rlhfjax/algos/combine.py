"""Several losses as one."""

from rlhfjax.algos.masked import divide
from rlhfjax.types import Loss, Scalar


def add_losses(**terms: tuple[Scalar, Loss]) -> Loss:
    """sum_i c_i loss_i, of losses that share one weight (the same mask), such as PPO's policy, value and entropy.

    `add_losses(policy=(1.0, ppo_loss(...)), value=(0.1, clipped_value_loss(...)))` has the metrics loss, policy_loss,
    value_loss and all others of both under their own names. The coefficients are in "loss" and not in the parts.
    A loss with another weight (the pretraining mix) is accumulated on its own and its gradient added.

    Raises:
      ValueError: two terms with a metric of the same name.

    Source: Schulman et al. 2017, eq. 9.
    """
    metrics = {}
    total = 0.0
    for name, (coefficient, (_, parts)) in terms.items():
        total = total + coefficient * parts["loss"][0]
        for part, metric in parts.items():
            key = f"{name}_loss" if part == "loss" else part
            if key in metrics:
                raise ValueError(f"add_losses: two terms have a metric {key!r}")
            metrics[key] = metric
    weight = next(iter(terms.values()))[1][1]["loss"][1]
    return divide(total, weight), {"loss": (total, weight), **metrics}
