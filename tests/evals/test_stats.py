"""Comparisons: hand-computed numbers, a plain-loop reference, and exact binomial limits."""

import math

import numpy as np
import pytest

from rlhfjax.evals import stats


def test_win_rate_counts_ties_as_half():
    rate = stats.win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0]))
    assert rate.value == (1 + 0.5 + 0 + 1) / 4


def test_win_rate_of_a_policy_against_itself_is_exactly_half():
    scores = np.random.default_rng(0).normal(size=100)
    assert stats.win_rate(scores, scores) == (0.5, 0.5, 0.5)


def test_win_rates_of_two_policies_against_each_other_add_to_one():
    a, b = np.random.default_rng(0).integers(0, 4, size=(2, 50))
    assert stats.win_rate(a, b).value + stats.win_rate(b, a).value == pytest.approx(1.0)


def test_bootstrap_interval_agrees_with_the_binomial_quantiles():
    # 140 wins of 200: a resampled count is Binomial(200, 0.7), whose 2.5 % and 97.5 % quantiles are 127 and 153.
    n, p = 200, 0.7
    pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    low, high = (int(np.searchsorted(np.cumsum(pmf), q)) / n for q in (0.025, 0.975))
    got = stats.win_rate(np.arange(200.0), np.where(np.arange(200) < 140, -1.0, 500.0), resamples=40_000)
    assert got.value == 0.7
    assert got.low == pytest.approx(low, abs=1 / n)
    assert got.high == pytest.approx(high, abs=1 / n)


def test_bootstrap_is_seeded_and_does_not_depend_on_the_order():
    values = np.random.default_rng(1).normal(size=60)
    assert stats.bootstrap_mean(values, seed=3) == stats.bootstrap_mean(values[::-1].copy(), seed=3)
    assert stats.bootstrap_mean(values, seed=3) != stats.bootstrap_mean(values, seed=4)
    narrow, wide = stats.bootstrap_mean(values, level=0.5), stats.bootstrap_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_bootstrap_of_distinct_values_has_the_right_width():
    values = np.random.default_rng(1).normal(size=400)
    got = stats.bootstrap_mean(values)
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)


def test_bootstrap_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        stats.bootstrap_mean(np.array([]))


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
    # Labels 3 > 2 = 2: two pairs count. Scores put the best first in one of them and level in the other.
    scores, labels = np.array([[1.0, 0.0, 1.0]]), np.array([[3.0, 2.0, 2.0]])
    assert stats.pairwise_accuracy(scores, labels) == (1.5, 2.0)


def test_pairwise_accuracy_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, size=(2, 30, 4))
    valid = rng.integers(0, 2, size=(30, 4))
    assert stats.pairwise_accuracy(scores, labels, valid) == loop_accuracy(scores, labels, valid)


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
    assert stats.length_accuracy(np.array([[9, 9, 1]]), labels, None, same) == (2.0, 2.0)
    assert stats.length_baseline(np.array([[9, 9, 1]]), labels, None, same) == 1.0


def test_length_baseline_takes_the_better_direction():
    lengths, labels = np.array([[9, 5, 1]]), np.array([[0.0, 1.0, 2.0]])  # shorter is better, always
    assert stats.length_accuracy(lengths, labels) == (0.0, 3.0)
    assert stats.length_baseline(lengths, labels) == 1.0
    assert stats.length_baseline(lengths, np.zeros((1, 3))) == 0.5


def test_margins_are_better_minus_worse():
    scores, labels = np.array([[1.0, 4.0, 2.5]]), np.array([[2.0, 1.0, 0.0]])
    assert sorted(stats.margins(scores, labels)) == [-3.0, -1.5, 1.5]


def test_calibration_by_hand():
    # Confidence 0.75 (m = ln 3): right 3 of 4 times, exactly calibrated. Confidence 0.9 (m = ln 9): right 1 of 2.
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
    assert stats.calibration(3 * margin).ece > 0.05  # the same ranking, stated too confidently


def test_calibration_holds_extremes():
    got = stats.calibration(np.array([0.0, 1e4, -1e4]))
    assert got.confidence == (0.5, 1.0)
    assert got.accuracy == (0.5, 0.5)
    assert stats.calibration(np.array([])).ece == 0.0


def test_best_of_n_kl_by_hand():
    assert stats.best_of_n_kl(1) == 0.0
    assert stats.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
