"""Measures how far labelers agree about pairs of completions. Numpy, float64.

A labeler's opinion of a pair (i, j) of one prompt's completions is +1 (i is better), 0 (a tie) or
-1.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

Scores = Float[np.ndarray, "p k"]
"""Scores of k completions of each of p prompts; NaN where there is no completion or no opinion."""

Opinions = Float[np.ndarray, " pairs"]
"""A labeler's opinions of pairs: +1, 0, -1, or NaN for none."""

OPINIONS = (-1, 0, 1)


def opinions(scores: Scores) -> Opinions:
    """Returns the opinion of every pair i < j of every prompt; pairs = p k (k - 1) / 2."""
    i, j = np.triu_indices(scores.shape[1], k=1)
    first = scores[:, i].astype(np.float64)
    return np.sign(first - scores[:, j]).ravel()


def pair_agreement(a: Opinions, b: Opinions) -> tuple[float, float]:
    """Returns (agreements, pairs) over the pairs that both labelers have an opinion of.

    The same opinion counts 1, a tie against a preference 1/2, opposite preferences 0.

    Source: ties as in Dubois et al. 2023 and in the win rate; without ties this is the agreement of
    Ouyang et al. 2022, section 3.4 (72.6 ± 1.5 % between training labelers).
    """
    both = ~(np.isnan(a) | np.isnan(b))
    agreements = 1 - np.abs(a[both] - b[both]) / 2
    return float(np.sum(agreements)), float(both.sum())


def untied_agreement(a: Opinions, b: Opinions) -> tuple[float, float]:
    """Returns (agreements, pairs) over the pairs that neither labeler calls a tie."""
    judged = ~(np.isnan(a) | np.isnan(b))
    both = judged & (a != 0) & (b != 0)
    return float(np.sum(a[both] == b[both])), float(both.sum())


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
    counts = counts[counts.sum(1) >= 2].astype(np.float64)
    if not len(counts):
        return float("nan")
    n = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1)
    observed = np.mean(agreeing / (n * (n - 1)))
    share = counts.sum(0) / counts.sum()
    share[[0, 2]] = share[[0, 2]].mean()
    expected = float(np.sum(share**2))
    if expected == 1:
        return 1.0
    return float((observed - expected) / (1 - expected))


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
    by_opinion = []
    for opinion in OPINIONS:
        by_opinion.append(sum((row == opinion).astype(int) for row in labelers))
    counts = np.array(by_opinion).T
    metrics = {
        "agreement_kappa": fleiss_kappa(counts),
        "agreement_pairs": float(np.sum(counts.sum(1) >= 2)),
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
