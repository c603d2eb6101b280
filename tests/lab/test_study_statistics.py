"""The statistics of studies, by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from rlhfjax.lab.statistics import (
    Estimate,
    against_number,
    decide,
    detectable,
    holm,
    holm_alphas,
    interval,
    interval_level,
    paired,
    welch,
)

# Gold rewards of five seeds, recorded.
A = [0.61, 0.48, 0.55, 0.70, 0.52]
B = [0.42, 0.40, 0.41, 0.52, 0.47]


def test_paired_t_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, error 1 / sqrt 3, t = 2 sqrt 3, with 2 degrees of freedom.

    For those P(T > t) is (1 - t / sqrt(t^2 + 2)) / 2, and the 97.5 % quantile 4.3027.
    """
    estimate = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert estimate.mean == pytest.approx(2) and estimate.sd == pytest.approx(1)
    assert (estimate.n, estimate.df, estimate.method) == (3, 2, "paired t")
    t = 2 * np.sqrt(3)
    decision = decide(estimate, "greater", 0.0)
    assert decision.p == pytest.approx(1 - t / np.sqrt(t**2 + 2)) and decision.holds
    assert decide(estimate, "less", 0.0) == (pytest.approx(decision.p), False)
    assert interval(estimate, 0.95) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-4)


def test_the_t_tests_are_scipy_s():
    ours = decide(paired(A, B), "greater", 0.0)
    theirs = stats.ttest_rel(A, B)
    assert ours == (pytest.approx(theirs.pvalue), True)
    low, high = theirs.confidence_interval(0.95)
    assert interval(paired(A, B), 0.95) == pytest.approx((low, high))
    assert decide(against_number(A, 0.5), "less", 0.0).p == pytest.approx(
        stats.ttest_1samp(A, 0.5).pvalue
    )
    theirs = stats.ttest_ind(A, B[:4], equal_var=False)
    estimate = welch(A, B[:4])
    assert decide(estimate, "greater", 0.0).p == pytest.approx(theirs.pvalue)
    assert estimate.df == pytest.approx(theirs.df) and estimate.n == 4
    low, high = theirs.confidence_interval(0.9)
    assert interval(estimate, 0.9) == pytest.approx((low, high))


def test_a_margin_moves_the_hypothesis():
    """More than 0.1 is the test of the differences less 0.1."""
    shifted = stats.ttest_rel(A, np.array(B) + 0.05)
    assert decide(paired(A, B), "greater", 0.05).p == pytest.approx(shifted.pvalue)
    assert decide(paired(B, A), "less", 0.05).p == pytest.approx(shifted.pvalue)
    # A mean between 0 and the margin is decided neither way.
    assert decide(paired(A, B), "greater", 0.2).p == 1.0


def test_equivalence_by_hand():
    """d = 0.1, error 0.1, 4 degrees of freedom, margin 0.5: the worse side has t = 4."""
    estimate = Estimate(0.1, 0.1, 4.0, 0.1 * np.sqrt(5), 5, "t")
    p, holds = decide(estimate, "equal", 0.5)
    assert p == pytest.approx(stats.t.sf(4, 4)) and holds
    p, holds = decide(estimate._replace(mean=1.0), "equal", 0.5)
    assert p == pytest.approx(stats.t.sf(5, 4)) and not holds


@pytest.mark.parametrize("expected", ["greater", "less", "equal"])
@pytest.mark.parametrize("mean", [-1.0, -0.42, -0.1, 0.0, 0.1, 0.42, 1.0])
def test_a_comparison_is_decided_where_its_interval_lies(expected, mean):
    """At alpha = 5 % and 1 %: above or below the margins, as the module's table says."""
    estimate, margin = Estimate(mean, 0.1, 4.0, 0.2, 5, "t"), 0.3
    for alpha in (0.05, 0.01):
        low, high = interval(estimate, interval_level(expected, alpha))
        holds, against = {
            "greater": (low > margin, high < 0),
            "less": (high < -margin, low > 0),
            "equal": (-margin < low and high < margin, low > margin or high < -margin),
        }[expected]
        p, for_it = decide(estimate, expected, margin)
        assert (p <= alpha and for_it, p <= alpha and not for_it) == (holds, against)


def test_seeds_that_do_not_vary_a_difference_decide_nothing():
    rounded = paired([0.3, 0.5, 0.7], [0.1, 0.3, 0.5])  # 0.2 up to rounding
    assert rounded.error == 0 and decide(rounded, "greater", 0.0).p == 1.0
    assert decide(welch([1.0, 1.0], [0.0, 0.0]), "greater", 0.0).p == 1.0


def test_holm_by_hand():
    """3 x 0.01, 2 x 0.03 and 1 x 0.04, which must not be below the one before it."""
    p = [0.01, 0.04, 0.03]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06])
    assert holm_alphas(p) == pytest.approx([0.05 / 3, 0.025, 0.025])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    # 0.04 is below 5 %, yet the method has stopped at 0.03.
    assert holm_alphas([0.001, 0.02]) == pytest.approx([0.025, 0.05])
    assert holm([]) == []


def test_a_level_by_holm_decides_as_the_adjusted_p():
    rng = np.random.default_rng(0)
    for p in rng.random((300, 3)) * rng.choice([0.02, 0.1, 1], (300, 1)):
        adjusted, alphas = holm(p.tolist()), holm_alphas(p.tolist())
        decided = [a <= 0.05 for a in adjusted]
        assert decided == [x <= a for x, a in zip(p, alphas, strict=True)]


def test_what_five_seeds_can_detect():
    assert detectable(5, 1.0) == pytest.approx(1.2417, abs=1e-4)
    assert detectable(5, 2.0) == pytest.approx(2 * detectable(5, 1.0))
    low, high = interval(paired(A, B), 0.95)
    assert detectable(5, paired(A, B).sd) == pytest.approx((high - low) / 2)
