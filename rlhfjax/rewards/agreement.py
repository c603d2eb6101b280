"""How far labelers agree about pairs of completions. Numpy, float64.

A labeler's opinion of a pair (i, j) of one prompt's completions is +1 (i is better), 0 (a tie) or -1.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

Scores = Float[
    np.ndarray, "p k"
]  # higher is better, NaN where there is no completion or no opinion
OPINIONS = (-1, 0, 1)


def opinions(scores: Scores) -> Float[np.ndarray, " pairs"]:
    """The opinion about every pair i < j of every prompt: +1, 0, -1, or NaN; pairs = p k (k - 1) / 2."""
    i, j = np.triu_indices(scores.shape[1], k=1)
    return np.sign(scores[:, i].astype(np.float64) - scores[:, j]).ravel()


def pair_agreement(
    a: Float[np.ndarray, " pairs"], b: Float[np.ndarray, " pairs"]
) -> tuple[float, float]:
    """(agreements, pairs): over the pairs that both have an opinion about, ties included.

    The same opinion counts 1; a tie against a preference 1/2; opposite preferences 0.

    Source: ties as in Dubois et al. 2023 and the win rate's; without ties this is the agreement of Ouyang et al. 2022,
    section 3.4 (72.6 ± 1.5 % between training labelers).
    """
    both = ~(np.isnan(a) | np.isnan(b))
    return float(np.sum(1 - np.abs(a[both] - b[both]) / 2)), float(both.sum())


def untied_agreement(
    a: Float[np.ndarray, " pairs"], b: Float[np.ndarray, " pairs"]
) -> tuple[float, float]:
    """(agreements, pairs) over the pairs that neither calls a tie."""
    both = ~(np.isnan(a) | np.isnan(b)) & (a != 0) & (b != 0)
    return float(np.sum(a[both] == b[both])), float(both.sum())


def fleiss_kappa(counts: Int[np.ndarray, "pairs categories"]) -> float:
    """kappa = (P - P_e) / (1 - P_e), from how many raters put each pair into each of (-1, 0, +1).

    Which completion of a pair stands first says nothing, so chance gives -1 and +1 the same share:
    p_-1 = p_+1. Pairs with fewer than two raters are left out; their number may differ between pairs:
      P = mean over pairs of sum_c n_c (n_c - 1) / (n (n - 1)),  P_e = sum_c p_c^2.
    With two raters this is Scott's pi. 1 when there is nothing to disagree about.

    Source: Fleiss 1971, eq. 1-7 (one number of raters); Scott 1955.
    """
    counts = counts[counts.sum(1) >= 2].astype(np.float64)
    if not len(counts):
        return float("nan")
    n = counts.sum(1)
    observed = np.mean((counts * (counts - 1)).sum(1) / (n * (n - 1)))
    share = counts.sum(0) / counts.sum()
    share[[0, 2]] = share[[0, 2]].mean()
    expected = float(np.sum(share**2))
    return 1.0 if expected == 1 else float((observed - expected) / (1 - expected))


def agreement(labels: Mapping[str, Scores] | Sequence[Scores]) -> dict[str, float]:
    """Inter-labeler agreement of all labelers over the same completions.

    Returns:
      agreement: mean over pairs of labelers and of completions, a tie against a preference being 1/2;
      agreement_untied: over pairs that neither calls a tie; agreement_kappa: Fleiss'; agreement_pairs: how many pairs
      of completions at least two labelers judged. Numbers that nothing was observed for are left out.
    """
    return agreement_of(
        [
            opinions(x)
            for x in (labels.values() if isinstance(labels, Mapping) else labels)
        ]
    )


def agreement_of(rows: Sequence[Float[np.ndarray, " pairs"]]) -> dict[str, float]:
    """`agreement` of opinions about the same pairs, a row a labeler."""
    couples = list(itertools.combinations(rows, 2))
    counts = np.array([sum((row == c).astype(int) for row in rows) for c in OPINIONS]).T
    out = {
        "agreement_kappa": fleiss_kappa(counts),
        "agreement_pairs": float(np.sum(counts.sum(1) >= 2)),
    }
    for name, measure in (
        ("agreement", pair_agreement),
        ("agreement_untied", untied_agreement),
    ):
        total, weight = np.sum([measure(a, b) for a, b in couples], axis=0)
        out[name] = float(total / weight) if weight else float("nan")
    return {name: value for name, value in out.items() if np.isfinite(value)}
