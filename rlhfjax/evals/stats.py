"""Statistics of comparisons: win rates with intervals, pairwise accuracy, calibration.

Numpy, float64.
"""

import dataclasses
import math
import statistics
import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from rlhfjax.errors import DataError

Scores = Num[np.ndarray, "p k"]
"""Scores of k completions of each of p prompts."""

BCA_LEAST = 20  # values; with fewer, BCa covers a mean less often than Student's t
ELEMENTS = 2**22  # numbers of resamples in memory at a time


METHODS = ("wilson", "bca", "t", "wald")  # of intervals, as metrics name them


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float  # the estimate
    low: float
    high: float
    method: str  # "Wilson", "BCa", "t", "Wald", "Fisher" or "bootstrap of members"


def wilson(wins: float | int, n: int, *, level: float = 0.95) -> Interval:
    """Returns the rate wins / n with its Wilson interval.

    With p = wins / n and z the normal quantile of (1 + level) / 2, the interval holds the rates q
    for which |p - q| <= z sqrt(q (1 - q) / n):

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Unlike a bootstrap interval, it has a width if all or none of the comparisons are won.

    Args:
      wins: in [0, n]; a tie is half a win.
      n: number of independent comparisons, at least 1.
      level: confidence level.

    Raises:
      ValueError: there are no comparisons, or more wins than comparisons.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    if not 0 <= wins <= n or n < 1:
        raise ValueError(
            f"{wins} wins of {n}: expected at least one comparison, and no more wins"
        )
    p = wins / n
    z = normal_quantile(level)
    center = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # The equation is exactly 0 for no win and exactly 1 for all; rounded values are not.
    low = 0.0 if wins == 0 else (center - half) / scale
    high = 1.0 if wins == n else (center + half) / scale
    return Interval(p, low, high, "Wilson")


def normal_quantile(level: float) -> float:
    """Returns z such that a standard normal variable is in [-z, z] with probability `level`."""
    return statistics.NormalDist().inv_cdf((1 + level) / 2)


def win_rate(
    policy: Num[np.ndarray, " n"],
    baseline: Num[np.ndarray, " n"],
    *,
    level: float = 0.95,
) -> Interval:
    """Returns how often the policy's response beats the baseline's to the same prompt.

    The rate is p = (wins + ties / 2) / n over all n prompts, ties included; the interval is
    Wilson's for this p and n. An outcome of 0, 1/2 or 1 with mean p has at most the variance
    p (1 - p) of an outcome without ties: with ties the interval is too wide rather than too narrow.

    Args:
      policy, baseline: scores of the responses to the same n prompts; higher is better.
      level: confidence level.

    Raises:
      DataError: a score is NaN or infinite.
      ValueError: there are no prompts.
    """
    validate_scores(policy, "win rate, policy")
    validate_scores(baseline, "win rate, baseline")
    difference = policy.astype(np.float64) - baseline.astype(np.float64)
    outcomes = (np.sign(difference) + 1) / 2
    return wilson(float(outcomes.sum()), len(outcomes), level=level)


def mean_interval(
    values: Num[np.ndarray, " n"],
    *,
    level: float = 0.95,
    resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """Returns the mean of independent values with its interval: BCa, or Student's for few values.

    BCa (the bias-corrected and accelerated bootstrap) takes the skewness of the values into
    account, which percentiles of resampled means do not. Below BCA_LEAST values it is too narrow:
    for 5 normal values it covers the mean 83 % of the time, Student's 95 %; for 5 exponential ones
    80 % against 88 %. For equal values it is not defined. In both cases the interval is Student's,
    mean -+ t sqrt(variance / n).

    Args:
      values: one per prompt, not one per pair: responses to one prompt are not independent. For
        a comparison, the differences prompt by prompt.
      level: confidence level.
      resamples: number of bootstrap samples.
      seed: the same seed gives the same interval, whatever the order of the values.

    Raises:
      DataError: a value is NaN or infinite.
      ValueError: there are fewer than two values.

    Source: Efron 1987; Efron and Tibshirani 1993, section 14.3.
    """
    if len(values) < 2:
        raise ValueError(
            f"values: {len(values)}; the interval of a mean needs at least 2"
        )
    validate_scores(values, "interval of a mean")
    x = np.sort(values.astype(np.float64))
    if len(x) >= BCA_LEAST and x[0] < x[-1]:
        low, high = _bca(x, level, resamples, seed)
        if math.isfinite(low) and math.isfinite(high):
            return Interval(float(np.mean(x)), low, high, "BCa")
    return _student(x, level)


def _bca(
    x: Float[np.ndarray, " n"],
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Returns the ends of the BCa interval of the mean; NaN where they are not defined."""
    from scipy import stats  # here, because the import takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (x,),
            np.mean,
            method="BCa",
            confidence_level=level,
            n_resamples=resamples,
            batch=max(1, ELEMENTS // len(x)),
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    return float(low), float(high)


def _student(x: Float[np.ndarray, " n"], level: float) -> Interval:
    """Returns mean -+ t sqrt(variance / n), t the quantile of n - 1 degrees of freedom."""
    from scipy import stats

    mean = float(np.mean(x))
    error = float(np.std(x, ddof=1)) / math.sqrt(len(x))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * error
    return Interval(mean, mean - half, mean + half, "t")


def validate_scores(
    scores: Num[np.ndarray, "..."],
    context: str,
    valid: Num[np.ndarray, "..."] | None = None,
) -> None:
    """Raises DataError unless all scores are finite.

    Args:
      scores: [prompts] or [prompts, responses].
      context: what the scores are, for the error.
      valid: non-zero where there is a score; None: everywhere.
    """
    bad = ~np.isfinite(scores)
    if valid is not None:
        bad &= valid != 0
    if not bad.any():
        return
    first = tuple(np.argwhere(bad)[0].tolist())
    names = ("prompt", "response")
    place = ", ".join(f"{name} {i}" for name, i in zip(names, first, strict=False))
    raise DataError(
        f"{context}: the score of {place} is {scores[first]}; expected a finite number"
    )


def margins(
    scores: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> Float[np.ndarray, " pairs"]:
    """Returns the score of the better minus the score of the worse completion, for every pair.

    Args:
      scores: the scores to evaluate.
      labels: the truth; higher is better. Pairs with equal labels are dropped.
      valid: non-zero where there is a completion; None: everywhere.
      same: group numbers of completions with the same tokens; pairs within a group are dropped;
        None: no two completions are the same.
    """
    scores, labels = scores.astype(np.float64), labels.astype(np.float64)
    i, j = np.triu_indices(scores.shape[1], k=1)
    direction = np.sign(labels[:, i] - labels[:, j])
    counts = direction != 0
    if valid is not None:
        counts &= (valid[:, i] != 0) & (valid[:, j] != 0)
    if same is not None:
        counts &= same[:, i] != same[:, j]
    return ((scores[:, i] - scores[:, j]) * direction)[counts]


def pairwise_accuracy(
    scores: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> tuple[float, float]:
    """Returns (correct, pairs): how many of the pairs that labels order, scores order alike.

    Equal scores count 1/2. The result is a metric: it adds up over batches, and its ratio is the
    accuracy.

    Args: see `margins`.
    """
    margin = margins(scores, labels, valid, same)
    return float(np.sum((np.sign(margin) + 1) / 2)), float(margin.size)


def length_accuracy(
    lengths: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> tuple[float, float]:
    """Returns the accuracy of preferring the longer completion, as (correct, pairs).

    A reward model has to exceed it. An accuracy a below 1/2 means that shorter completions are
    preferred: the baseline to quote is max(a, 1 - a), see `length_baseline`.
    """
    return pairwise_accuracy(lengths, labels, valid, same)


def length_baseline(
    lengths: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> float:
    """Returns the accuracy of length alone, in the better direction; 1/2 without pairs."""
    correct, pairs = length_accuracy(lengths, labels, valid, same)
    return max(correct, pairs - correct) / pairs if pairs else 0.5


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, by bins of confidence in [1/2, 1] that are not empty."""

    confidence: tuple[float, ...]  # mean per bin
    accuracy: tuple[float, ...]  # share of right predictions per bin
    count: tuple[int, ...]  # pairs per bin
    ece: float  # expected calibration error, sum_b count_b / n |accuracy_b - confidence_b|

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types, for the report."""
        return {
            "confidence": list(self.confidence),
            "accuracy": list(self.accuracy),
            "count": list(self.count),
            "ece": self.ece,
        }


def calibration(margin: Float[np.ndarray, " pairs"], *, bins: int = 10) -> Calibration:
    """Returns how well Bradley-Terry probabilities are calibrated.

    A pair with margin m (`margins`) is predicted with confidence sigmoid(|m|). The prediction is
    right if m > 0, and half right if m = 0.

    Args:
      margin: score of the better minus score of the worse.
      bins: number of bins of equal width over [1/2, 1].

    Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 2-3.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (np.sign(margin) + 1) / 2
    bin_of_pair = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of_pair, minlength=bins)
    used = counts > 0
    count = counts[used]
    confidences = np.bincount(bin_of_pair, weights=confidence, minlength=bins)[used]
    stated = confidences / count
    accuracy = np.bincount(bin_of_pair, weights=right, minlength=bins)[used] / count
    gaps = count * np.abs(accuracy - stated)
    return Calibration(
        confidence=tuple(stated.tolist()),
        accuracy=tuple(accuracy.tolist()),
        count=tuple(count.tolist()),
        ece=float(np.sum(gaps) / max(margin.size, 1)),
    )


def best_of_n_kl(n: int) -> float:
    """Returns the KL in nats of best-of-n sampling to the policy, log n - (n - 1) / n.

    Source: Stiennon et al. 2020, appendix G.3.
    """
    return float(np.log(n) - (n - 1) / n)
