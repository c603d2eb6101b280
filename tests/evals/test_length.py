"""The win rate at equal length and the correlation with length, against numbers by hand."""

import math

import numpy as np
import pytest
import scipy.optimize

from rlhfjax.evals.length import correlation, length_controlled_win_rate
from rlhfjax.evals.stats import win_rate


def test_with_two_lengths_the_rate_is_the_mean_of_two_logits():
    """4 longer responses win 3 times, 4 shorter ones twice: theta = (log 3 + log 1) / 2.

    sigmoid(log(3) / 2) = sqrt 3 / (1 + sqrt 3). The penalty, switched off here, would shrink phi.
    """
    policy = np.array([1, 1, 1, 0, 1, 1, 0, 0])
    baseline = 1 - policy
    longer = np.array([7, 7, 7, 7, -7, -7, -7, -7])
    rate = length_controlled_win_rate(policy, baseline, longer, ridge=0.0)
    assert rate.value == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)), abs=1e-9)
    # The variance of each logit is 1 / (n p (1 - p)): 4/3 and 1; that of their mean is 7/12.
    half = 1.959963984540054 * math.sqrt(7 / 12)
    logit = math.log(3) / 2
    expected = [1 / (1 + math.exp(-x)) for x in (logit - half, logit + half)]
    assert [rate.low, rate.high] == pytest.approx(expected, abs=1e-9)
    assert rate.method == "Wald"


def test_it_is_the_minimum_of_the_penalized_likelihood():
    """By scipy's general optimizer, with ties and lengths of all sizes."""
    rng = np.random.default_rng(0)
    longer = rng.normal(3, 20, 60)
    policy = np.round(rng.normal(0.03 * longer, 1))
    baseline = np.zeros(60)
    y, x = (np.sign(policy) + 1) / 2, np.tanh(longer / longer.std())

    def loss(weights):
        z = weights[0] + weights[1] * x
        return np.sum(np.logaddexp(0, z) - y * z) + 0.5 * weights[1] ** 2

    theta, phi = scipy.optimize.minimize(loss, [0, 0], tol=1e-12).x
    assert phi > 0.3
    rate = length_controlled_win_rate(policy, baseline, longer, ridge=1.0)
    assert rate.value == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-6)


def test_where_length_decides_everything_the_models_are_equal():
    """The longer response always wins: a finite phi, and half of the wins at equal length."""
    longer = np.array([5.0, 3.0, -5.0, -3.0] * 10)
    rate = length_controlled_win_rate(longer, np.zeros(40), longer)
    assert rate.value == pytest.approx(0.5)
    assert np.isfinite([rate.low, rate.high]).all()
    assert win_rate(longer[:30], np.zeros(30)).value > 0.5


@pytest.mark.parametrize(
    ("policy", "longer"),
    [
        ([1, 1, 1], [1, 2, 3]),
        ([0, 0, 0], [1, 2, 3]),
        ([1, 0, 1], [4, 4, 4]),
        ([1], [2]),
    ],
)
def test_without_anything_to_regress_it_is_the_win_rate(policy, longer):
    scores = np.array(policy), np.full(len(policy), 0.5)
    expected = win_rate(*scores)
    assert length_controlled_win_rate(*scores, np.array(longer)) == expected


def test_a_policy_that_wins_by_length_alone_loses_its_lead():
    rng = np.random.default_rng(1)
    longer = rng.normal(10, 20, 500)
    policy = 0.1 * longer + rng.normal(size=500)
    plain = win_rate(policy, np.zeros(500)).value
    fair = length_controlled_win_rate(policy, np.zeros(500), longer)
    assert plain > 0.6
    assert fair.low < 0.5 < fair.high


def test_correlation_by_hand():
    """x = 1 2 3 4, y = 1 3 2 4: r = 4 / 5; Fisher's half width is 1.96 / sqrt(4 - 3)."""
    r = correlation(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4]))
    assert r is not None
    assert r.value == pytest.approx(0.8)
    z = 1.959963984540054
    ends = [math.tanh(math.atanh(0.8) - z), math.tanh(math.atanh(0.8) + z)]
    assert [r.low, r.high] == pytest.approx(ends)
    assert correlation(np.array([1, 2, 3, 4]), np.ones(4)) is None
    assert correlation(np.arange(3), np.arange(3)) is None
    straight = correlation(np.arange(5), 2.0 * np.arange(5))
    assert straight is not None and straight.value == pytest.approx(1)
