"""Intervals of means over pairs whose members are in several pairs.

Two pairs with a common member are not independent: with n members there are up to n (n - 1) / 2
pairs, and no more than n independent judgments. An interval that counts pairs is too narrow.
Numpy, float64.
"""

import numpy as np
from jaxtyping import Float, Int, Num

from rlhfjax.evals.stats import Interval, validate_scores


def pair_mean(
    values: Num[np.ndarray, " pairs"],
    first: Int[np.ndarray, " pairs"],
    second: Int[np.ndarray, " pairs"],
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Returns the mean over pairs with a bootstrap interval over the members of the pairs.

    A resample draws n of the n members with replacement; w_i counts how often member i is drawn.
    A pair (i, j) then counts w_i w_j times:

        mean* = sum_ij w_i w_j x_ij / sum_ij w_i w_j

    The interval's ends are percentiles of mean*. Resamples without a pair are left out.

    Args:
      values: one per pair, for example 1 where a pair is ordered right, 1/2 at a tie, else 0.
      first, second: numbers of the members of each pair, from 0.
      level: confidence level.
      resamples: number of bootstrap samples.
      seed: the same seed gives the same interval.

    Raises:
      DataError: a value is NaN or infinite.
      ValueError: there is no pair, or a pair has one member twice.

    Source: Snijders and Borgatti 1999, "Non-parametric standard errors and tests for network
      statistics", the vertex bootstrap; here a member drawn twice makes no pair with itself.
    """
    if not len(values) or np.any(first == second):
        raise ValueError("expected at least one pair, and two members in each")
    validate_scores(values, "mean over pairs")
    members, numbers = np.unique(np.concatenate([first, second]), return_inverse=True)
    one, other = np.split(numbers, 2)
    generator = np.random.default_rng(seed)
    n = len(members)
    x = values.astype(np.float64)
    means = []
    for _ in range(resamples):
        draws = generator.integers(n, size=n)
        counts = np.bincount(draws, minlength=n).astype(np.float64)
        weights = counts[one] * counts[other]
        if weights.any():
            means.append(weighted_mean(x, weights))
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high), "bootstrap of members")


def weighted_mean(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Returns sum w x / sum w."""
    return float(np.sum(values * weights) / np.sum(weights))
