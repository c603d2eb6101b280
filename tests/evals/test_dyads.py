"""Intervals of means over pairs that share members."""

import itertools

import numpy as np
import pytest

from rlhfjax.errors import DataError
from rlhfjax.evals.dyads import pair_mean
from rlhfjax.evals.stats import wilson


def every_pair(n):
    pairs = np.array(list(itertools.combinations(range(n), 2)))
    return pairs[:, 0], pairs[:, 1]


def test_the_mean_is_that_of_the_pairs_and_the_ends_are_of_plain_loops():
    first, second = np.array([4, 4, 9]), np.array([7, 9, 7])
    values = np.array([1.0, 0.0, 0.5])
    result = pair_mean(values, first, second, resamples=200, seed=3)
    generator = np.random.default_rng(3)
    means = []
    for _ in range(200):
        drawn = generator.integers(3, size=3).tolist()  # 0, 1, 2 are members 4, 7, 9
        total = count = 0.0
        for a, b in itertools.product(drawn, drawn):
            pair = {(0, 1): 1.0, (0, 2): 0.0, (1, 2): 0.5}.get((a, b))
            if pair is not None:
                total += pair
                count += 1
        if count:
            means.append(total / count)
    assert result.value == pytest.approx(0.5)
    assert result.low == pytest.approx(np.quantile(means, 0.025))
    assert result.high == pytest.approx(np.quantile(means, 0.975))


def test_names_and_order_of_members_do_not_matter():
    rng = np.random.default_rng(0)
    first, second = every_pair(12)
    values = rng.integers(0, 2, size=len(first)).astype(float)
    plain = pair_mean(values, first, second, resamples=300)
    named = pair_mean(values, first * 5 + 2, second * 5 + 2, resamples=300)
    turned = pair_mean(values, second, first, resamples=300)
    assert plain == named == turned


@pytest.mark.parametrize("n", [40])
def test_it_covers_the_truth_where_counting_pairs_does_not(n):
    # Member i adds u_i to each of its pairs: n numbers decide all n (n - 1) / 2 outcomes.
    first, second = every_pair(n)
    rng = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(60):
        effect = rng.normal(size=n)
        noise = rng.normal(scale=0.1, size=len(first))
        values = (effect[first] + effect[second] + noise > 0).astype(float)
        interval = pair_mean(values, first, second, resamples=200)
        covered += interval.low <= 0.5 <= interval.high
        counted = wilson(float(values.sum()), len(values))
        naive += counted.low <= 0.5 <= counted.high
    assert covered >= 52 and naive <= 30


def test_pairs_without_common_members_have_the_width_of_independent_ones():
    rng = np.random.default_rng(2)
    pairs = np.arange(800).reshape(2, 400)
    values = rng.integers(0, 2, size=400).astype(float)
    interval = pair_mean(values, pairs[0], pairs[1], resamples=500)
    independent = 2 * 1.96 * np.sqrt(values.var() / 400)
    # A pair is drawn if both members are: its weight varies three times as much.
    assert 1.4 < (interval.high - interval.low) / independent < 2.1


def test_bad_pairs_are_errors():
    one = np.array([0])
    with pytest.raises(ValueError, match="two members"):
        pair_mean(np.array([1.0]), one, one)
    with pytest.raises(ValueError, match="at least one pair"):
        pair_mean(np.array([]), np.array([], int), np.array([], int))
    with pytest.raises(DataError, match="mean over pairs"):
        pair_mean(np.array([np.nan]), one, one + 1)
