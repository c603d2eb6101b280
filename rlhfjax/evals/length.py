"""Length and comparisons: the win rate at equal length, and the correlation of reward and length.

Numpy, float64.
"""

import math

import numpy as np
from jaxtyping import Float, Num

from rlhfjax.evals.stats import Interval, normal_quantile, win_rate


def length_controlled_win_rate(
    policy: Num[np.ndarray, " n"],
    baseline: Num[np.ndarray, " n"],
    longer: Num[np.ndarray, " n"],
    *,
    level: float = 0.95,
    ridge: float = 0.01,
) -> Interval:
    """Returns the win rate that the policy would have if its responses were as long as the others.

    With y_i = 1, 1/2 or 0 for a win, a tie or a loss, d_i the difference in length and s the
    standard deviation of d, a logistic regression explains wins by length:

        P(y_i = 1) = sigmoid(theta + phi x_i),  x_i = tanh(d_i / s)

    The rate is sigmoid(theta), the probability at d = 0. theta and phi minimize the negative
    log-likelihood plus ridge phi^2 / 2, which keeps phi finite if length decides every comparison.
    The interval is Wald's for theta, mapped by the sigmoid. If all responses win, or none, or all
    pairs have the same difference, there is nothing to regress: the result is that of `win_rate`.

    AlpacaEval's regression has a term per instruction too; one comparison per prompt cannot fit it.

    Args:
      policy, baseline: scores of the responses to the same n prompts; higher is better.
      longer: length of the policy's response minus the baseline's; any unit, it cancels.
      level: confidence level.
      ridge: weight of the penalty on phi.

    Raises: as `win_rate`.

    Source: Dubois et al. 2024, "Length-controlled AlpacaEval", section 3, eq. 2.
    """
    plain = win_rate(policy, baseline, level=level)
    spread = float(np.std(longer))
    if not 0 < plain.value < 1 or spread == 0:
        return plain
    difference = policy.astype(np.float64) - baseline.astype(np.float64)
    outcome = (np.sign(difference) + 1) / 2
    intercept = np.ones(len(outcome))
    features = np.stack([intercept, np.tanh(longer / spread)], axis=1)
    weights, covariance = _logistic(features, outcome, np.array([0.0, ridge]))
    theta = float(weights[0])
    half = normal_quantile(level) * math.sqrt(covariance[0, 0])
    return Interval(
        _sigmoid(theta),
        _sigmoid(theta - half),
        _sigmoid(theta + half),
        "Wald",
    )


def _logistic(
    features: Float[np.ndarray, "n k"],
    outcome: Float[np.ndarray, " n"],
    ridge: Float[np.ndarray, " k"],
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k k"]]:
    """Returns the weights of a logistic regression and their covariance, by Newton's method."""
    weights = np.zeros(features.shape[1])
    covariance = np.eye(features.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (p - outcome) + ridge * weights
        variance = p * (1 - p)
        curvature = (features.T * variance) @ features + np.diag(ridge)
        covariance = np.linalg.inv(curvature)
        step = covariance @ gradient
        longest = float(np.abs(step).max())
        # A full step overshoots where the sigmoids are saturated.
        weights = weights - step / max(1.0, longest)
        if longest < 1e-10:
            break
    return weights, covariance


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def correlation(
    x: Num[np.ndarray, " n"], y: Num[np.ndarray, " n"], *, level: float = 0.95
) -> Interval | None:
    """Returns Pearson's correlation r with its interval tanh(atanh r -+ z / sqrt(n - 3)).

    It is None with fewer than four pairs, or if x or y does not vary.

    Source: Fisher 1921.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    matrix = np.corrcoef(x.astype(np.float64), y.astype(np.float64))
    r = min(max(float(matrix[0, 1]), -1.0), 1.0)  # rounding may leave [-1, 1]
    if abs(r) == 1:
        return Interval(r, r, r, "Fisher")
    half = normal_quantile(level) / math.sqrt(len(x) - 3)
    center = math.atanh(r)
    low = math.tanh(center - half)
    high = math.tanh(center + half)
    return Interval(r, low, high, "Fisher")
