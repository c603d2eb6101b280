"""Comparisons: hand-computed numbers, plain-loop references, exact binomial sums, and scipy."""

import math
import statistics

import numpy as np
import pytest
import scipy.stats

from rlhfjax.errors import DataError
from rlhfjax.evals import stats

Z = 1.959963984540054  # the normal quantile of 0.975


def test_win_rate_counts_ties_as_half():
    rate = stats.win_rate(
        np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])
    )
    assert rate.value == (1 + 0.5 + 0 + 1) / 4


def test_win_rate_of_a_policy_against_itself_is_exactly_half():
    """100 ties are 50 wins of 100: 0.5 -+ z sqrt(0.25 / 100 + z^2 / 4e4) / (1 + z^2 / 100)."""
    scores = np.random.default_rng(0).normal(size=100)
    rate = stats.win_rate(scores, scores)
    half = Z * math.sqrt(0.25 / 100 + Z**2 / 4e4) / (1 + Z**2 / 100)
    assert rate.value == 0.5 and rate.method == "Wilson"
    assert (rate.low, rate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


def test_win_rates_of_two_policies_against_each_other_add_to_one():
    a, b = np.random.default_rng(0).integers(0, 4, size=(2, 50))
    ours, theirs = stats.win_rate(a, b), stats.win_rate(b, a)
    assert ours.value + theirs.value == pytest.approx(1.0)
    assert (ours.low, ours.high) == pytest.approx(
        (1 - theirs.high, 1 - theirs.low), abs=1e-12
    )


def test_win_rate_compares_the_responses_to_one_prompt():
    """Shuffled scores are other pairs: what wins every prompt by a little loses a third of them."""
    baseline = np.array([0.0, 10.0, 20.0])
    assert stats.win_rate(baseline + 1, baseline).value == 1
    assert stats.win_rate(np.roll(baseline + 1, 1), baseline).value == pytest.approx(
        1 / 3
    )


def test_pitfall_36_sixteen_wins_of_sixteen_by_hand():
    """p = 1: (1 + z^2 / 32 - z sqrt(z^2 / 1024)) / (1 + z^2 / 16) = 16 / (16 + z^2) = 0.80639."""
    got = stats.win_rate(np.ones(16), np.zeros(16))
    assert (got.value, got.high) == (1.0, 1.0)
    assert (
        got.low == pytest.approx(16 / (16 + Z**2), abs=1e-12)
        and round(got.low, 5) == 0.80639
    )
    none = stats.win_rate(np.zeros(16), np.ones(16))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(Z**2 / (16 + Z**2), abs=1e-12)
    # 2 wins and 2 ties of 4 prompts: p = 3 / 4, n = 4
    tied = stats.win_rate(np.array([1.0, 1.0, 0.0, 0.0]), np.zeros(4))
    half = Z * math.sqrt(0.75 * 0.25 / 4 + Z**2 / 64)
    ends = [(0.75 + Z**2 / 8 + sign * half) / (1 + Z**2 / 4) for sign in (-1, 1)]
    assert tied.value == 0.75 and (tied.low, tied.high) == pytest.approx(
        ends, abs=1e-12
    )


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_pitfall_36_wilson_is_scipys(level):
    for n in (1, 2, 16, 200):
        for wins in {0, 1, n // 3, n // 2, n - 1, n}:
            theirs = scipy.stats.binomtest(wins, n).proportion_ci(
                level, method="wilson"
            )
            got = stats.wilson(wins, n, level=level)
            assert (got.low, got.high) == pytest.approx(
                (theirs.low, theirs.high), abs=1e-12
            )


def test_pitfall_36_a_win_rate_near_one_is_covered():
    """The true rate 0.95, n = 20, every number of wins by its probability; percentiles: 0.64."""
    n, rate = 20, 0.95
    covered = 0.0
    for wins in range(n + 1):
        interval = stats.win_rate(np.arange(n), np.full(n, n - wins - 0.5))
        if interval.low <= rate <= interval.high:
            covered += math.comb(n, wins) * rate**wins * (1 - rate) ** (n - wins)
    assert covered == pytest.approx(0.9245, abs=1e-4)  # 18, 19 and 20 wins


def skewed(n):
    return np.random.default_rng(1).exponential(size=n)


def test_pitfall_36_the_interval_of_a_skewed_mean_is_bca_by_a_plain_loop():
    """Efron 1987: percentiles at Phi(z0 + (z0 + z) / (1 - a (z0 + z))).

    z0 is from the share of resampled means below the mean, a from the skewness of the means of all
    values but one."""
    x, rng, normal = skewed(30), np.random.default_rng(5), statistics.NormalDist()
    means = sorted(float(np.mean(rng.choice(x, len(x)))) for _ in range(40_000))
    below = sum(mean < np.mean(x) for mean in means) / len(means)
    without = [(x.sum() - value) / (len(x) - 1) for value in x]
    left = [np.mean(without) - one for one in without]
    a = sum(d**3 for d in left) / (6 * sum(d**2 for d in left) ** 1.5)
    z0, ends = normal.inv_cdf(below), []
    for tail in (0.025, 0.975):
        z = z0 + normal.inv_cdf(tail)
        ends.append(means[int(normal.cdf(z0 + z / (1 - a * z)) * len(means))])
    got = stats.mean_interval(x)
    assert got.method == "BCa" and got.value == pytest.approx(float(np.mean(x)))
    assert (got.low, got.high) == pytest.approx(tuple(ends), abs=0.02)
    percentiles = np.percentile(means, [2.5, 97.5])
    # towards the long tail
    assert got.high - percentiles[1] > 0.04 and got.low - percentiles[0] > 0.02


def test_pitfall_36_bca_is_scipys_and_the_order_does_not_matter():
    x = skewed(50)
    rng = np.random.default_rng(3)
    theirs = scipy.stats.bootstrap((np.sort(x),), np.mean, rng=rng).confidence_interval
    got = stats.mean_interval(x, seed=3)
    assert (got.low, got.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert stats.mean_interval(x[::-1].copy(), seed=3) == got
    assert stats.mean_interval(x, seed=4) != got
    narrow, wide = stats.mean_interval(x, level=0.5), stats.mean_interval(x, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_pitfall_36_the_interval_of_few_or_equal_values_is_students():
    """1, 2, 6: mean 3, variance 7, t of 2 degrees of freedom 4.3027: 3 -+ 4.3027 sqrt(7 / 3)."""
    got = stats.mean_interval(np.array([1.0, 2.0, 6.0]))
    half = 4.302652729911275 * math.sqrt(7 / 3)
    assert got.method == "t"
    assert (got.value, got.low, got.high) == pytest.approx(
        (3.0, 3 - half, 3 + half), rel=1e-9
    )
    equal = stats.mean_interval(np.full(40, 0.1))
    assert equal.method == "t"
    assert (equal.low, equal.value, equal.high) == pytest.approx(
        (0.1, 0.1, 0.1), abs=1e-12
    )


def test_pitfall_36_nothing_has_no_interval():
    none = np.array([])
    with pytest.raises(ValueError, match="at least one comparison"):
        stats.win_rate(none, none)
    for wins, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(
            ValueError, match=f"{wins} wins of {n}: expected at least one"
        ):
            stats.wilson(wins, n)
    for few in (none, np.ones(1)):
        with pytest.raises(
            ValueError, match=f"{len(few)}; the interval of a mean needs"
        ):
            stats.mean_interval(few)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pitfall_36_a_score_that_is_not_finite_is_refused_not_compared(bad):
    scores = np.array([1.0, 0.0, bad, bad])
    for whose, pair in (
        ("policy", (scores, np.zeros(4))),
        ("baseline", (np.zeros(4), scores)),
    ):
        with pytest.raises(
            DataError, match=rf"^win rate, {whose}: .* of prompt 2 is {bad};"
        ):
            stats.win_rate(*pair)
    with pytest.raises(
        DataError, match=rf"^interval of a mean: the score of prompt 2 is {bad};"
    ):
        stats.mean_interval(scores)
    table = np.array([[1.0, bad], [0.0, bad]])
    with pytest.raises(
        DataError, match=rf"^x: the score of prompt 1, response 1 is {bad};"
    ):
        stats.validate_scores(table, "x", valid=np.array([[1, 0], [1, 1]]))
    stats.validate_scores(table, "x", valid=np.array([[1, 0], [1, 0]]))


def loop_accuracy(scores, labels, valid):
    correct = pairs = 0.0
    for p in range(len(scores)):
        for i in range(len(scores[p])):
            for j in range(i):
                if not (valid[p][i] and valid[p][j]) or labels[p][i] == labels[p][j]:
                    continue
                better, worse = (i, j) if labels[p][i] > labels[p][j] else (j, i)
                pairs += 1
                correct += 1.0 if scores[p][better] > scores[p][worse] else 0.0
                correct += 0.5 if scores[p][better] == scores[p][worse] else 0.0
    return correct, pairs


def test_pairwise_accuracy_by_hand():
    # Labels 3 > 2 = 2: two pairs count. Scores put the best first in one of them and level in the
    # other.
    scores, labels = np.array([[1.0, 0.0, 1.0]]), np.array([[3.0, 2.0, 2.0]])
    assert stats.pairwise_accuracy(scores, labels) == (1.5, 2.0)


def test_pairwise_accuracy_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, size=(2, 30, 4))
    valid = rng.integers(0, 2, size=(30, 4))
    assert stats.pairwise_accuracy(scores, labels, valid) == loop_accuracy(
        scores, labels, valid
    )


def test_padding_that_holds_nan_does_not_count():
    scores, labels = np.array([[1.0, 0.0, np.nan]]), np.array([[2.0, 1.0, np.nan]])
    valid = np.array([[1.0, 1.0, 0.0]])
    assert stats.pairwise_accuracy(scores, labels, valid) == (1.0, 1.0)


def test_pairwise_accuracy_without_an_ordered_pair_has_no_weight():
    assert stats.pairwise_accuracy(np.ones((2, 3)), np.ones((2, 3))) == (0.0, 0.0)


def test_pitfall_39_pairs_of_completions_with_the_same_tokens_do_not_count():
    # Labels 2 > 1 > 0, the first two have the same tokens: pairs 0-2 and 1-2 are left, by 1 - 3 and
    # 5 - 3.
    scores, labels, same = (
        np.array([[1.0, 5.0, 3.0]]),
        np.array([[2.0, 1.0, 0.0]]),
        np.array([[0, 0, 2]]),
    )
    assert stats.margins(scores, labels, None, same).tolist() == [-2.0, 2.0]
    assert stats.pairwise_accuracy(scores, labels, np.ones((1, 3)), same) == (1.0, 2.0)
    assert stats.length_accuracy(np.array([[9, 9, 1]]), labels, None, same) == (
        2.0,
        2.0,
    )
    assert stats.length_baseline(np.array([[9, 9, 1]]), labels, None, same) == 1.0


def test_length_baseline_takes_the_better_direction():
    lengths, labels = (
        np.array([[9, 5, 1]]),
        np.array([[0.0, 1.0, 2.0]]),
    )  # shorter is better, always
    assert stats.length_accuracy(lengths, labels) == (0.0, 3.0)
    assert stats.length_baseline(lengths, labels) == 1.0
    assert stats.length_baseline(lengths, np.zeros((1, 3))) == 0.5


def test_margins_are_better_minus_worse():
    scores, labels = np.array([[1.0, 4.0, 2.5]]), np.array([[2.0, 1.0, 0.0]])
    assert sorted(stats.margins(scores, labels)) == [-3.0, -1.5, 1.5]


def test_calibration_by_hand():
    # Confidence 0.75 (m = ln 3): right 3 of 4 times, exactly calibrated. Confidence 0.9 (m = ln 9):
    # right 1 of 2.
    margin = np.log(np.array([3.0, 3.0, 3.0, 1 / 3, 9.0, 1 / 9]))
    got = stats.calibration(margin, bins=4)
    np.testing.assert_allclose(got.confidence, [0.75, 0.9])
    np.testing.assert_allclose(got.accuracy, [0.75, 0.5])
    assert got.count == (4, 2)
    assert got.ece == pytest.approx(2 / 6 * 0.4)
    assert got.as_dict()["count"] == [4, 2]


def test_calibration_of_true_bradley_terry_labels_is_near_zero():
    rng = np.random.default_rng(0)
    difference = rng.normal(size=50_000) * 2
    won = rng.random(50_000) < 1 / (1 + np.exp(-difference))
    margin = np.where(won, difference, -difference)
    assert stats.calibration(margin).ece < 0.01
    assert (
        stats.calibration(3 * margin).ece > 0.05
    )  # the same ranking, stated too confidently


def test_calibration_holds_extremes():
    got = stats.calibration(np.array([0.0, 1e4, -1e4]))
    assert got.confidence == (0.5, 1.0)
    assert got.accuracy == (0.5, 0.5)
    assert stats.calibration(np.array([])).ece == 0.0


def test_best_of_n_kl_by_hand():
    assert stats.best_of_n_kl(1) == 0.0
    assert stats.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
