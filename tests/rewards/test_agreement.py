"""Agreement of labelers: by hand, against a loop, and against Fleiss' formulas on his table."""

import itertools
import math

import numpy as np
import pytest

from rlhfjax.rewards.agreement import (
    agreement,
    fleiss_kappa,
    opinions,
    pair_agreement,
    untied_agreement,
)

NAN = float("nan")


def test_opinions_by_hand():
    scores = np.array([[1.0, 2.0, 2.0], [0.5, NAN, 0.1]])
    np.testing.assert_array_equal(opinions(scores), [-1, -1, 0, NAN, 1, NAN])


def test_pair_agreement_by_hand():
    a = np.array([1.0, 1.0, 0.0, -1.0, NAN, 0.0])
    b = np.array([1.0, 0.0, 0.0, 1.0, 1.0, NAN])
    assert pair_agreement(a, b) == (1 + 0.5 + 1 + 0, 4)
    assert untied_agreement(a, b) == (1, 2)


def loop_kappa(labels):
    """Every pair of raters on every pair of completions, in both orders: no symmetry by hand."""
    judged = []
    for p in range(labels.shape[1]):
        for i, j in itertools.permutations(range(labels.shape[2]), 2):
            votes = [
                np.sign(x[p, i] - x[p, j])
                for x in labels
                if not np.isnan(x[p, i] - x[p, j])
            ]
            if len(votes) > 1:
                judged.append(votes)
    same = [
        sum(a == b for a, b in itertools.permutations(v, 2)) / (len(v) * (len(v) - 1))
        for v in judged
    ]
    everything = [vote for v in judged for vote in v]
    chance = sum((everything.count(c) / len(everything)) ** 2 for c in (-1, 0, 1))
    return (np.mean(same) - chance) / (1 - chance)


def test_kappa_does_not_depend_on_which_completion_stands_first():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(12, 4))
    labels = np.round(truth[None] + rng.normal(size=(3, 12, 4)) * 0.7)
    labels[1, 3] = labels[2, 5, :2] = NAN
    np.testing.assert_allclose(
        agreement(list(labels))["agreement_kappa"], loop_kappa(labels), rtol=1e-12
    )
    order = rng.permuted(np.tile(np.arange(4), (12, 1)), axis=1)
    shuffled = np.take_along_axis(labels, np.tile(order, (3, 1, 1)), axis=2)
    for name, value in agreement(list(shuffled)).items():
        assert value == pytest.approx(agreement(list(labels))[name], rel=1e-12)


def test_kappa_of_two_raters_by_hand():
    """10 pairs: 6 alike (4 "first", 2 "second"), 2 opposite, 2 a tie against "first"."""
    counts = np.array(
        [[2, 0, 0]] * 2 + [[0, 0, 2]] * 4 + [[1, 0, 1]] * 2 + [[0, 1, 1]] * 2
    )
    tie = 2 / 20
    chance = tie**2 + 2 * ((1 - tie) / 2) ** 2
    assert fleiss_kappa(counts) == pytest.approx(
        (0.6 - chance) / (1 - chance), rel=1e-12
    )


def test_perfect_agreement_opposite_labelers_and_chance():
    rng = np.random.default_rng(1)
    one = rng.normal(size=(400, 4))
    same = agreement({"a": one, "b": 2 * one + 1})
    assert same["agreement"] == same["agreement_untied"] == same["agreement_kappa"] == 1
    assert agreement([one, -one])["agreement"] == 0
    chance = agreement([one, rng.normal(size=(400, 4))])
    assert abs(chance["agreement"] - 0.5) < 0.05
    assert abs(chance["agreement_kappa"]) < 0.1


def test_what_nobody_judged_together_has_no_agreement():
    a, b = np.array([[1.0, 2.0], [NAN, NAN]]), np.array([[NAN, NAN], [1.0, 2.0]])
    assert agreement([a, b]) == {"agreement_pairs": 0.0}
    assert math.isnan(fleiss_kappa(np.zeros((3, 3), int)))
