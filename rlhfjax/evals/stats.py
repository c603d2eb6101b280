"""Statistics of comparisons: win rates with intervals, pairwise accuracy, calibration. Numpy, float64."""

import dataclasses
import math
import statistics
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from rlhfjax.errors import DataError

Scores = Num[np.ndarray, "p k"]  # k completions of each of p prompts
BCA_LEAST = 20  # values, from which on BCa covers a mean as often as Student's t
ELEMENTS = 2**22  # numbers of the resamples that are in memory together


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float
    method: str  # "Wilson", "BCa" or "t"


def wilson(wins: float | int, n: int, *, level: float = 0.95) -> Interval:
    """Returns the rate wins / n with its Wilson interval.

    With p = wins / n and z the normal quantile of (1 + level) / 2, the rates q for which
    |p - q| <= z sqrt(q (1 - q) / n):

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Unlike a bootstrap's, it has a width where all or none of the comparisons are won.

    Args:
      wins: in [0, n]; a tie is half a win.
      n: number of independent comparisons, at least 1.
      level: of confidence.

    Raises:
      ValueError: there are no comparisons, or more wins than comparisons.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    if not 0 <= wins <= n or n < 1:
        raise ValueError(
            f"{wins} wins of {n}: expected at least one comparison, and as many wins at most"
        )
    p, z = wins / n, statistics.NormalDist().inv_cdf((1 + level) / 2)
    center = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # The equation gives exactly 0 for no win and exactly 1 for all; rounding would not.
    low = 0.0 if wins == 0 else (center - half) / scale
    high = 1.0 if wins == n else (center + half) / scale
    return Interval(p, low, high, "Wilson")


def win_rate(
    policy: Num[np.ndarray, " n"],
    baseline: Num[np.ndarray, " n"],
    *,
    level: float = 0.95,
) -> Interval:
    """Returns how often the policy's response beats the baseline's to the same prompt.

    The rate is p = (wins + ties / 2) / n over all n prompts, ties among them; the interval is
    Wilson's of this p and n. An outcome of 0, 1/2 or 1 with mean p has at most the variance
    p (1 - p) of one without ties, so that with ties the interval is too wide rather than too
    narrow.

    Args:
      policy, baseline: scores of the responses to the same n prompts; more is better.
      level: of confidence.

    Raises:
      DataError: a score is NaN or infinite.
      ValueError: there are no prompts.
    """
    validate_scores(policy, "win rate, policy")
    validate_scores(baseline, "win rate, baseline")
    outcomes = (
        np.sign(policy.astype(np.float64) - baseline.astype(np.float64)) + 1
    ) / 2
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
    account, which percentiles of resampled means do not. Below BCA_LEAST values it is too narrow
    (of 5 normal values it covers the mean 83 % of the time, Student's 95 %; of 5 exponential ones
    80 % against 88 %), and of equal values it is not defined: there the interval is Student's,
    mean -+ t sqrt(variance / n).

    Args:
      values: one per prompt, not one per pair: responses to one prompt are not independent. Of
        a comparison, the differences prompt by prompt.
      level: of confidence.
      resamples: number of bootstrap samples.
      seed: the same seed gives the same interval, whatever the order of the values.

    Raises:
      DataError: a value is NaN or infinite.
      ValueError: there are fewer than two values: one says nothing of its spread.

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
    """The ends of the BCa interval of the mean; NaN where they are not defined."""
    from scipy import stats  # here: seconds that training need not pay

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
    """mean -+ t sqrt(variance / n), t the quantile of n - 1 degrees of freedom."""
    from scipy import stats

    mean, error = float(np.mean(x)), float(np.std(x, ddof=1)) / math.sqrt(len(x))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * error
    return Interval(mean, mean - half, mean + half, "t")


def validate_scores(
    scores: Num[np.ndarray, "..."],
    context: str,
    valid: Num[np.ndarray, "..."] | None = None,
) -> None:
    """Raises DataError unless all scores are finite: NaN compares with nothing and spoils a mean.

    Args:
      scores: [prompts] or [prompts, responses].
      context: whose scores they are, for the error.
      valid: non-zero where there is a score; None: everywhere.
    """
    bad = ~np.isfinite(scores)
    if valid is not None:
        bad &= valid != 0
    if not bad.any():
        return
    first = tuple(np.argwhere(bad)[0].tolist())
    prompt, *response = first
    place = f"prompt {prompt}" + (f", response {response[0]}" if response else "")
    raise DataError(
        f"{context}: the score of {place} is {scores[first]}; expected a finite number"
    )


def margins(
    scores: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> Float[np.ndarray, " pairs"]:
    """Score of the better completion minus score of the worse, for all pairs of one prompt.

    Args:
      scores: what is judged.
      labels: the truth; more is better. Pairs with equal labels say nothing and are dropped.
      valid: non-zero where there is a completion; None: everywhere.
      same: equal where completions of a prompt have the same tokens, a pair of which is dropped;
        None: nowhere.
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
    """Of the pairs that the labels order, how many the scores order alike; equal scores are half right.

    Args: see `margins`.

    Returns:
      (correct, pairs), a metric: it adds up over batches, and the ratio is the accuracy.
    """
    margin = margins(scores, labels, valid, same)
    return float(np.sum((np.sign(margin) + 1) / 2)), float(margin.size)


def length_accuracy(
    lengths: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> tuple[float, float]:
    """The accuracy of a judge who knows no more than that longer is better, as (correct, pairs).

    What a reward model has to beat. An accuracy a below 1/2 says that shorter answers are preferred: the baseline to
    quote is max(a, 1 - a), see `length_baseline`.
    """
    return pairwise_accuracy(lengths, labels, valid, same)


def length_baseline(
    lengths: Scores,
    labels: Scores,
    valid: Scores | None = None,
    same: Scores | None = None,
) -> float:
    """Accuracy of judging by length alone in the better of the two directions; 1/2 when there are no pairs."""
    correct, pairs = length_accuracy(lengths, labels, valid, same)
    return max(correct, pairs - correct) / pairs if pairs else 0.5


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Stated confidence against accuracy, by bins of confidence in [1/2, 1]; empty bins are left out."""

    confidence: tuple[float, ...]  # mean of what was stated in the bin
    accuracy: tuple[float, ...]
    count: tuple[int, ...]  # pairs
    ece: float  # expected calibration error: sum_b count_b / n x |accuracy_b - confidence_b|

    def as_dict(self) -> dict:
        """As JSON has it: what the report draws."""
        return {
            name: list(v) if isinstance(v, tuple) else v
            for name, v in dataclasses.asdict(self).items()
        }


def calibration(margin: Float[np.ndarray, " pairs"], *, bins: int = 10) -> Calibration:
    """Whether Bradley-Terry probabilities mean what they say.

    A pair with margin m (`margins`) is predicted with confidence sigmoid(|m|), rightly iff m > 0 (m = 0: half).

    Args:
      margin: score of the better minus score of the worse.
      bins: of equal width over [1/2, 1].

    Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 2-3.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (np.sign(margin) + 1) / 2
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    used = count > 0
    stated = np.bincount(which, weights=confidence, minlength=bins)[used] / count[used]
    accuracy = np.bincount(which, weights=right, minlength=bins)[used] / count[used]
    ece = float(np.sum(count[used] * np.abs(accuracy - stated)) / max(margin.size, 1))
    return Calibration(
        tuple(stated.tolist()),
        tuple(accuracy.tolist()),
        tuple(count[used].tolist()),
        ece,
    )


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n sampling to the sampled policy, in nats: log n - (n - 1) / n.

    Source: Stiennon et al. 2020, appendix G.3.
    """
    return float(np.log(n) - (n - 1) / n)
