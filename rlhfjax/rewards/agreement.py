"""Measures how far labelers agree about pairs of completions. Numpy, float64.

A labeler's opinion of a pair (i, j) of one prompt's completions is +1 (i is better), 0 (a tie) or
-1.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Scores = Float[np.ndarray, "p k"]
"""Scores of k completions of each of p prompts; NaN where there is no completion or no opinion."""

Opinions = Float[np.ndarray, " pairs"]
"""A labeler's opinions of pairs: +1, 0, -1, or NaN for none."""

OPINIONS = (-1, 0, 1)


def opinions(scores: Scores) -> Opinions:
    """Returns the opinion of every pair i < j of every prompt; pairs = p k (k - 1) / 2."""
    k = scores.shape[1]
    i, j = np.triu_indices(k, k=1)
    scores = scores.astype(np.float64)
    margins = scores[:, i] - scores[:, j]
    return np.sign(margins).ravel()


def pair_agreement(a: Opinions, b: Opinions) -> tuple[float, float]:
    """Returns (agreements, pairs) over the pairs that both labelers have an opinion of.

    The same opinion counts 1, a tie against a preference 1/2, opposite preferences 0.

    Source: ties as in Dubois et al. 2023 and in the win rate; without ties this is the agreement of
    Ouyang et al. 2022, section 3.4 (72.6 ± 1.5 % between training labelers).
    """
    both = _both_judged(a, b)
    distance = np.abs(a[both] - b[both])
    agreements = np.sum(1 - distance / 2)
    return float(agreements), float(both.sum())


def untied_agreement(a: Opinions, b: Opinions) -> tuple[float, float]:
    """Returns (agreements, pairs) over the pairs that neither labeler calls a tie."""
    both = _both_judged(a, b) & (a != 0) & (b != 0)
    agreements = np.sum(a[both] == b[both])
    return float(agreements), float(both.sum())


def _both_judged(a: Opinions, b: Opinions) -> Bool[np.ndarray, " pairs"]:
    return ~(np.isnan(a) | np.isnan(b))


def fleiss_kappa(counts: Int[np.ndarray, "pairs categories"]) -> float:
    """Returns kappa = (P - P_e) / (1 - P_e), the agreement beyond chance; NaN without pairs.

    The order of a pair's completions is arbitrary, so chance gives -1 and +1 the same share,
    p_-1 = p_+1. Pairs with fewer than two raters are left out; the number of raters n may differ
    between pairs:

      P = mean over pairs of sum_c n_c (n_c - 1) / (n (n - 1)),  P_e = sum_c p_c^2

    With two raters this is Scott's pi. It is 1 if all opinions are ties.

    Args:
      counts: how many raters put each pair into each of (-1, 0, +1).

    Source: Fleiss 1971, eq. 1-7 (one number of raters); Scott 1955.
    """
    n = counts.sum(1)
    is_judged = n >= 2
    n = n[is_judged]
    counts = counts[is_judged].astype(np.float64)
    if not len(n):
        return float("nan")
    agreeing = (counts * (counts - 1)).sum(1)
    rater_pairs = n * (n - 1)
    observed = np.mean(agreeing / rater_pairs)
    share = counts.sum(0) / counts.sum()
    share[[0, 2]] = share[[0, 2]].mean()
    expected = float(np.sum(share**2))
    if expected == 1:
        return 1.0
    kappa = (observed - expected) / (1 - expected)
    return float(kappa)


def agreement(labels: Mapping[str, Scores] | Sequence[Scores]) -> dict[str, float]:
    """Returns the agreement of labelers over the same completions.

    Returns:
      agreement: mean over pairs of labelers and of completions, a tie against a preference counts
      1/2; agreement_untied: over pairs that neither calls a tie; agreement_kappa: Fleiss' kappa;
      agreement_pairs: number of pairs that at least two labelers judged. A number without a pair is
      left out.
    """
    scores = labels.values() if isinstance(labels, Mapping) else labels
    return agreement_of([opinions(x) for x in scores])


def agreement_of(labelers: Sequence[Opinions]) -> dict[str, float]:
    """Returns `agreement`, given every labeler's opinions of the same pairs."""
    table = np.array(labelers)
    counts = np.stack([(table == opinion).sum(0) for opinion in OPINIONS], axis=1)
    judged_by_two = counts.sum(1) >= 2
    metrics = {
        "agreement_kappa": fleiss_kappa(counts),
        "agreement_pairs": float(judged_by_two.sum()),
        "agreement": _mean_over_labelers(labelers, pair_agreement),
        "agreement_untied": _mean_over_labelers(labelers, untied_agreement),
    }
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _mean_over_labelers(
    labelers: Sequence[Opinions],
    measure: Callable[[Opinions, Opinions], tuple[float, float]],
) -> float:
    """Returns the share of agreements over all pairs of labelers; NaN without pairs."""
    agreements = pairs = 0.0
    for a, b in itertools.combinations(labelers, 2):
        counted, weight = measure(a, b)
        agreements += counted
        pairs += weight
    return agreements / pairs if pairs else float("nan")
