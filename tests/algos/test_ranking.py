import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import preference, ranking
from tests.jitted import jitted

preference, ranking = map(jitted, (preference, ranking))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def random_pairs(n=6):
    rng = np.random.default_rng(5)
    weight = np.array([1, 1, 0, 1, 1, 0], np.float32)[:n]
    return [rng.normal(size=n).astype(np.float32) for _ in range(2)] + [
        rng.random(n).astype(np.float32),
        weight,
    ]


def loop_pairs(function, *columns, weight):
    losses = [
        function(*map(float, row))
        for row, w in zip(zip(*columns, strict=True), weight, strict=True)
        if w
    ]
    return sum(losses) / len(losses)


def test_bradley_terry_by_hand():
    # d = 1 and -1: (0.313262 + 1.313262) / 2 = 0.813262, one of two right; the third pair is
    # padding.
    loss, metrics = ranking.bradley_terry_loss(
        jnp.array([1.0, 0.0, jnp.nan]),
        jnp.array([0.0, 1.0, 0.0]),
        jnp.array([1.0, 1.0, 0.0]),
    )
    np.testing.assert_allclose(loss, 0.8132617, rtol=1e-6)
    assert [float(x) for x in metrics["accuracy"]] == [1, 2]


def test_pair_losses_equal_their_loops():
    a, b, p, weight = random_pairs()
    arrays = [jnp.array(x) for x in (a, b, p, weight)]
    cases = {
        "bradley_terry": (
            ranking.bradley_terry_loss(arrays[0], arrays[1], arrays[3]),
            lambda a, b, p: -log_sigmoid(a - b),
        ),
        "margin": (
            ranking.margin_loss(*arrays),
            lambda a, b, p: -log_sigmoid(a - b - p),
        ),
        "smoothed": (
            ranking.smoothed_loss(arrays[0], arrays[1], arrays[3], smoothing=0.1),
            lambda a, b, p: -0.9 * log_sigmoid(a - b) - 0.1 * log_sigmoid(b - a),
        ),
        "soft": (
            ranking.soft_label_loss(*arrays),
            lambda a, b, p: -p * log_sigmoid(a - b) - (1 - p) * log_sigmoid(b - a),
        ),
    }
    for name, ((loss, _), function) in cases.items():
        np.testing.assert_allclose(
            loss, loop_pairs(function, a, b, p, weight=weight), rtol=1e-5, err_msg=name
        )


def test_soft_labels_at_0_and_1_are_bradley_terry_and_a_tie_pulls_together():
    a, b, _, weight = map(jnp.array, random_pairs())
    ones = jnp.ones_like(a)
    np.testing.assert_allclose(
        ranking.soft_label_loss(a, b, ones, weight)[0],
        ranking.bradley_terry_loss(a, b, weight)[0],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        ranking.soft_label_loss(a, b, 0 * ones, weight)[0],
        ranking.bradley_terry_loss(b, a, weight)[0],
        rtol=1e-6,
    )
    gradient = jax.grad(
        lambda x: ranking.soft_label_loss(
            x, jnp.zeros(1), jnp.full(1, 0.5), jnp.ones(1)
        )[0]
    )
    assert gradient(jnp.array([2.0])) > 0 > gradient(jnp.array([-2.0]))
    np.testing.assert_allclose(gradient(jnp.zeros(1)), 0, atol=1e-7)


def test_soft_labels_ties_are_in_no_accuracy():
    _, metrics = ranking.soft_label_loss(
        jnp.array([1.0, 1.0, 1.0]),
        jnp.array([0.0, 0.0, 0.0]),
        jnp.array([0.9, 0.5, 0.2]),
        jnp.ones(3),
    )
    assert [float(x) for x in metrics["accuracy"]] == [1, 2]
    assert [float(x) for x in metrics["margin"]] == [0, 2]  # 1 and -1


def test_smoothing_has_its_minimum_at_the_log_odds():
    # With eps = 0.1 the best difference is log(0.9 / 0.1): no run-away rewards.
    gradient = jax.grad(
        lambda x: ranking.smoothed_loss(x, jnp.zeros(1), jnp.ones(1), smoothing=0.1)[0]
    )
    np.testing.assert_allclose(gradient(jnp.array([math.log(9)])), 0, atol=1e-6)


@pytest.mark.parametrize("difference, eta", [(0.0, 0.5), (1.3, 0.2), (-2.0, 1.0)])
def test_rao_kupper_probabilities_by_the_papers_form(difference, eta):
    # P(a) = e^a / (e^a + theta e^b), P(b) = e^b / (e^b + theta e^a), P(tie) = 1 - both, theta =
    # e^eta.
    a, b, theta = 0.4 + difference, 0.4, math.exp(eta)
    wins = math.exp(a) / (math.exp(a) + theta * math.exp(b))
    loses = math.exp(b) / (math.exp(b) + theta * math.exp(a))
    for outcome, probability in ((1.0, wins), (0.0, loses), (0.5, 1 - wins - loses)):
        loss, _ = ranking.rao_kupper_loss(
            jnp.array([a], jnp.float32),
            jnp.array([b], jnp.float32),
            jnp.array([outcome]),
            jnp.ones(1),
            eta=eta,
        )
        np.testing.assert_allclose(loss, -math.log(probability), rtol=1e-5)


def test_rao_kupper_without_ties_is_bradley_terry():
    a, b, _, weight = map(jnp.array, random_pairs())
    loss, _ = ranking.rao_kupper_loss(a, b, jnp.ones_like(a), weight, eta=0.0)
    np.testing.assert_allclose(
        loss, ranking.bradley_terry_loss(a, b, weight)[0], rtol=1e-6
    )


def test_best_of_k_by_hand():
    # Prompt 1: e^2 / (e^2 + e^0 + e^1) = 0.665241 -> 0.407606. Prompt 2, K = 2: 1/2 -> 0.693147.
    # Prompt 3 has one completion, prompt 4 a best that is not there: no weight. Argmax right in 1
    # (and in 2 by order).
    rewards = jnp.array(
        [[2.0, 0.0, 1.0], [1.0, 1.0, jnp.nan], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    )
    valid = jnp.array(
        [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    )
    best = jnp.array([0, 0, 0, 2])
    (loss, metrics), gradient = jax.value_and_grad(
        ranking.best_of_k_loss, has_aux=True
    )(rewards, best, valid)
    np.testing.assert_allclose(loss, (0.407606 + 0.693147) / 2, rtol=1e-5)
    assert [float(x) for x in metrics["accuracy"]] == [2, 2]
    # softmax - onehot, over 2 prompts.
    e = np.exp([2.0, 0.0, 1.0])
    np.testing.assert_allclose(gradient[0], (e / e.sum() - [1, 0, 0]) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        gradient[1:], [[-0.25, 0.25, 0], [0, 0, 0], [0, 0, 0]], rtol=1e-5
    )


def loop_plackett_luce(rewards, labels, valid):
    losses = []
    for r, s, v in zip(rewards, labels, valid, strict=True):
        there = [i for i in range(len(r)) if v[i]]
        order = sorted(there, key=lambda i: -s[i])
        if len({s[i] for i in order}) < 2:
            continue
        loss = 0.0
        for i in order:
            rest = [i] + [j for j in order if s[j] < s[i]]
            loss -= float(r[i]) - math.log(sum(math.exp(float(r[j])) for j in rest))
        losses.append(loss)
    return sum(losses) / len(losses)


def test_plackett_luce_by_hand():
    # r = (log 1, log 2, log 3) ranked 2, 0, 1: 3/6 * 1/3 * 1 = 1/6.
    loss, metrics = ranking.plackett_luce_loss(
        jnp.log(jnp.array([[1.0, 2.0, 3.0]])),
        jnp.array([[5.0, 1.0, 9.0]]),
        jnp.ones((1, 3)),
    )
    np.testing.assert_allclose(loss, math.log(6), rtol=1e-6)
    assert [float(x) for x in metrics["accuracy"]] == [2, 3]


@pytest.mark.parametrize("ties", [False, True])
def test_plackett_luce_equals_the_loop(ties):
    rng = np.random.default_rng(6)
    rewards, valid = (
        rng.normal(size=(8, 5)).astype(np.float32),
        (rng.random((8, 5)) < 0.8).astype(np.float32),
    )
    labels = (rng.integers(0, 3, (8, 5)) if ties else rng.random((8, 5))).astype(
        np.float32
    )
    loss, _ = ranking.plackett_luce_loss(*map(jnp.array, (rewards, labels, valid)))
    np.testing.assert_allclose(
        loss, loop_plackett_luce(rewards, labels, valid), rtol=1e-5
    )


def test_the_probabilities_of_all_rankings_add_up_to_1():
    import itertools

    rewards = jnp.array([[0.3, -1.0, 2.0]])
    total = sum(
        math.exp(
            -ranking.plackett_luce_loss(
                rewards, jnp.array([order], jnp.float32), jnp.ones((1, 3))
            )[0]
        )
        for order in itertools.permutations(range(3))
    )
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_with_two_completions_all_likelihoods_agree():
    rewards, labels, ones = (
        jnp.array([[0.7, -0.4], [0.1, 0.5]]),
        jnp.array([[1.0, 0.0], [1.0, 0.0]]),
        jnp.ones((2, 2)),
    )
    expected = ranking.bradley_terry_loss(rewards[:, 0], rewards[:, 1], jnp.ones(2))[0]
    for loss, _ in (
        preference.kwise_loss(rewards, labels, ones),
        ranking.plackett_luce_loss(rewards, labels, ones),
        ranking.best_of_k_loss(rewards, jnp.zeros(2, jnp.int32), ones),
    ):
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
