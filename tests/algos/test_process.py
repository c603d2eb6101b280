"""Process rewards by hand and by loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import process
from tests.jitted import jitted

process = jitted(process)
# Two solutions of three and two steps, and a row without any.
ENDS = np.array([[0, 1, 0, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], np.float32)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5)).astype(np.float32) * 3
LABELS = np.array([[0, 1, 0, 0.3, 1], [1, 0, 0, 0, 0], [0] * 5], np.float32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_step_loss_by_hand():
    # -log sigmoid(ln 3) = -log 3/4 for a right step; for a wrong one -log 1/4.
    z = jnp.log(jnp.array([[3.0, 3.0, 9.0]]))
    labels, weight = jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[1.0, 1.0, 0.0]])
    loss, metrics = process.step_loss(z, labels, weight)
    np.testing.assert_allclose(loss, (math.log(4 / 3) + math.log(4)) / 2, rtol=1e-6)
    found = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert (found["accuracy"], found["positive"]) == (0.5, 0.5)


def test_step_loss_equals_the_loop():
    losses = []
    for place in zip(*np.nonzero(ENDS), strict=True):
        p, y = sigmoid(float(LOGITS[place])), float(LABELS[place])
        losses.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
    loss, metrics = process.step_loss(*map(jnp.array, (LOGITS, LABELS, ENDS)))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert float(metrics["loss"][1]) == 5


def test_a_certain_step_keeps_its_digits():
    one = jnp.ones((1, 1))
    loss, _ = process.step_loss(40 * one, one, one)
    np.testing.assert_allclose(loss, math.exp(-40), rtol=1e-5)
    loss, _ = process.step_loss(-1e4 * one, one, one)
    np.testing.assert_allclose(loss, 1e4)


@pytest.mark.parametrize(("combine", "of"), [("product", math.prod), ("minimum", min)])
def test_scores_of_solutions_equal_the_loop(combine, of):
    expected = []
    for row, ends in zip(LOGITS, ENDS, strict=True):
        steps = [sigmoid(float(z)) for z, end in zip(row, ends, strict=True) if end]
        expected.append(of(steps) if steps else 0)
    logits = jnp.where(ENDS > 0, LOGITS, jnp.nan)
    found = process.solution_scores(logits, jnp.array(ENDS), combine=combine)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_solution_is_right_if_no_counted_step_is_wrong():
    # The third label is wrong and does not count; the last solution has no label that counts.
    labels = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0] * 3])
    weight = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0] * 3])
    scores = jnp.array([0.6, 0.6, 0.4, 0.9])
    metrics = process.solution_metrics(scores, labels, weight)
    assert [float(x) for x in metrics["solution_accuracy"]] == [2, 3]
    assert [float(x) for x in metrics["solution_positive"]] == [1, 3]


def test_the_gradient_is_sigmoid_minus_the_label_at_the_ends_of_steps():
    arrays = tuple(map(jnp.array, (LABELS, ENDS)))
    gradient = jax.grad(lambda z: process.step_loss(z, *arrays)[0])(jnp.array(LOGITS))
    expected = (1 / (1 + np.exp(-LOGITS)) - LABELS) * ENDS / 5
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
