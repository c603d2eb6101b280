"""Statistics of comparisons: win rates with intervals, pairwise accuracy, calibration. Numpy, float64."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

Scores = Num[np.ndarray, "p k"]  # k completions of each of p prompts


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(
    values: Num[np.ndarray, " n"], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of independent values with a percentile bootstrap interval.

    Draws n of the n values with replacement, `resamples` times; the interval holds the middle `level` of the means.

    Args:
      values: one a prompt (not one a pair: answers to one prompt are not independent).
      level: of confidence.
      resamples: how often to draw.
      seed: the same seed gives the same interval.

    Raises:
      ValueError: there are no values.

    Source: Efron 1979; percentile method.
    """
    if not len(values):
        raise ValueError("no values to take a mean of")
    # Only counts of equal values matter, which makes win rates (three values) cheap at any n.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws @ distinct / n, [tail, 100 - tail])
    return Interval(float(counts @ distinct / n), float(low), float(high))


def win_rate(
    policy: Num[np.ndarray, " n"],
    baseline: Num[np.ndarray, " n"],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """How often the policy's answer beats the baseline's to the same prompt: mean of [p > b] + [p = b] / 2.

    Args:
      policy, baseline: scores of the answers to the same n prompts; more is better.
      level, resamples, seed: see `bootstrap_mean`.

    Returns:
      The rate in [0, 1] with a percentile bootstrap interval over prompts.
    """
    outcomes = (np.sign(policy.astype(np.float64) - baseline.astype(np.float64)) + 1) / 2
    return bootstrap_mean(outcomes, level=level, resamples=resamples, seed=seed)


def margins(
    scores: Scores, labels: Scores, valid: Scores | None = None, same: Scores | None = None
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
    scores: Scores, labels: Scores, valid: Scores | None = None, same: Scores | None = None
) -> tuple[float, float]:
    """Of the pairs that the labels order, how many the scores order alike; equal scores are half right.

    Args: see `margins`.

    Returns:
      (correct, pairs), a metric: it adds up over batches, and the ratio is the accuracy.
    """
    margin = margins(scores, labels, valid, same)
    return float(np.sum((np.sign(margin) + 1) / 2)), float(margin.size)


def length_accuracy(
    lengths: Scores, labels: Scores, valid: Scores | None = None, same: Scores | None = None
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
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


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
    return Calibration(tuple(stated.tolist()), tuple(accuracy.tolist()), tuple(count[used].tolist()), ece)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n sampling to the sampled policy, in nats: log n - (n - 1) / n.

    Source: Stiennon et al. 2020, appendix G.3.
    """
    return float(np.log(n) - (n - 1) / n)
