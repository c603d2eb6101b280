"""The best policy at a KL, from samples of the policy that the KL is to."""

import numpy as np
from jaxtyping import Float

_STEEPEST = 2.0**40  # of 1 / beta


def tilt_at_kl(
    rewards: Float[np.ndarray, "p N"], kl: float
) -> Float[np.ndarray, "p N"] | None:
    """Returns the weights of the tilt pi ∝ rho exp(r / beta) that has a KL to rho, for p prompts.

    It is the policy of the highest reward at its KL, E[r] - beta KL. From N samples of rho per
    prompt,
      w_i = exp(r_i / beta) / sum_j exp(r_j / beta),    KL = sum_i w_i log(N w_i),
    with one beta for all prompts, at which the mean of their KL is the given one. E[f] under the
    tilt is sum_i w_i f_i. The estimate is too low where the KL is near log N; up to log N - 3 it
    can be used.

    Args:
      kl: nats, mean over prompts, at least 0.
    Returns:
      The weights; they sum to 1 per prompt. None if no beta has that KL: too few samples, or too
      many equal rewards.
    Raises:
      ValueError: kl is below 0.

    Source: Ziegler et al. 2019, section 2.2.
    """
    if kl < 0:
        raise ValueError(f"kl={kl}: must be >= 0")
    centered = np.asarray(rewards, np.float64)
    centered = centered - centered.max(axis=1, keepdims=True)

    def weights(scale):  # scale = 1 / beta
        tilted = np.exp(scale * centered)
        return tilted / tilted.sum(axis=1, keepdims=True)

    def kl_of(w):
        logs = np.log(np.where(w > 0, w * w.shape[1], 1))
        return np.mean(np.sum(w * logs, axis=1))

    low, high = 0.0, 1.0
    while kl_of(weights(high)) < kl:
        low, high = high, 2 * high
        if high > _STEEPEST:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kl_of(weights(middle)) >= kl else (middle, high)
    return weights(low)
