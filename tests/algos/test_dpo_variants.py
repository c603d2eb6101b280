"""Variants of DPO by hand, by loops in float64, and where they are DPO itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import direct, dpo_variants
from tests.jitted import jitted

direct, dpo_variants = jitted(direct), jitted(dpo_variants)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def random_pairs(n=6):
    rng = np.random.default_rng(9)
    columns = [-rng.gamma(3, 4, n).astype(np.float32) for _ in range(4)]
    lengths = [rng.integers(1, 20, n).astype(np.float32) for _ in range(2)]
    return columns, lengths, np.array([1, 1, 0, 1, 1, 0], np.float32)


def found(metrics):
    return {name: float(total / weight) for name, (total, weight) in metrics.items()}


# One pair: chosen fell by 2 nats over 4 tokens, rejected by 5 nats over 10 tokens.
FELL = [jnp.array([x]) for x in (-12.0, -10.0, -10.0, -5.0)]
ONE = jnp.ones(1)


def test_dpo_norm_by_hand():
    # beta 4: rewards 4 * -2 / 4 = -2 and 4 * -5 / 10 = -2; margin 0.
    loss, metrics = dpo_variants.dpo_norm_loss(
        *FELL, jnp.array([4.0]), jnp.array([10.0]), ONE, beta=4.0
    )
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    assert found(metrics)["chosen_reward"] == found(metrics)["rejected_reward"] == -2


def test_irpo_by_hand():
    # beta 1/2: rewards -1 and -2.5, margin 1.5; 12 nats over 4 tokens are 3 per token.
    loss, metrics = dpo_variants.irpo_loss(
        *FELL, jnp.array([-3.0]), ONE, beta=0.5, alpha=2.0
    )
    np.testing.assert_allclose(loss, 0.2014133 + 2 * 3, rtol=1e-6)
    assert found(metrics)["nll"] == 3
    assert found(metrics)["margin"] == 1.5


def test_dpop_by_hand():
    # beta 1/2, lambda 5: the chosen fell by 2 nats, 1.5 - 0.5 * 5 * 2 = -3.5.
    loss, metrics = dpo_variants.dpop_loss(*FELL, ONE, beta=0.5, penalty=5.0)
    np.testing.assert_allclose(loss, -log_sigmoid(-3.5), rtol=1e-6)
    assert found(metrics)["chosen_drop"] == 2
    assert found(metrics)["margin"] == 1.5  # the rewards have no penalty


def test_robust_by_hand():
    # eps 1/4: (0.75 * 0.2014133 - 0.25 * 1.7014133) / 0.5 = -0.5485867
    loss, metrics = dpo_variants.robust_dpo_loss(*FELL, ONE, beta=0.5, smoothing=0.25)
    np.testing.assert_allclose(loss, -0.5485867, rtol=1e-5)
    assert found(metrics)["accuracy"] == 1


LOOPS = {
    "dpo_norm": (
        lambda c, n, w: dpo_variants.dpo_norm_loss(*c, *n, w, beta=5.0),
        lambda w, l, rw, rl, n, m: -log_sigmoid(5 * (w - rw) / n - 5 * (l - rl) / m),
    ),
    "irpo": (
        lambda c, n, w: dpo_variants.irpo_loss(*c, c[0] / n[0], w, beta=0.2, alpha=0.7),
        lambda w, l, rw, rl, n, m: -log_sigmoid(0.2 * (w - rw - l + rl)) - 0.7 * w / n,
    ),
    "dpop": (
        lambda c, n, w: dpo_variants.dpop_loss(*c, w, beta=0.2, penalty=5.0),
        lambda w, l, rw, rl, n, m: (
            -log_sigmoid(0.2 * (w - rw - l + rl - 5 * max(0, rw - w)))
        ),
    ),
    "robust": (
        lambda c, n, w: dpo_variants.robust_dpo_loss(*c, w, beta=0.2, smoothing=0.1),
        lambda w, l, rw, rl, n, m: (
            (
                -0.9 * log_sigmoid(0.2 * (w - rw - l + rl))
                + 0.1 * log_sigmoid(-0.2 * (w - rw - l + rl))
            )
            / 0.8
        ),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_equals_the_loop(name):
    function, of_pair = LOOPS[name]
    columns, lengths, weight = random_pairs()
    rows = zip(*columns, *lengths, weight, strict=True)
    losses = [of_pair(*map(float, row[:-1])) for row in rows if row[-1]]
    loss, metrics = function([*map(jnp.array, columns)], lengths, jnp.array(weight))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert float(metrics["loss"][1]) == 4


@pytest.mark.parametrize("name", ["robust", "irpo", "dpop", "dpo_norm"])
def test_without_its_term_a_variant_is_dpo(name):
    """eps = 0, alpha = 0, lambda = 0, or one token per response: loss, metrics and gradient."""
    columns, _, weight = random_pairs()
    weight, one = jnp.array(weight), jnp.ones(6)
    limits = {
        "robust": lambda *c: dpo_variants.robust_dpo_loss(
            *c, weight, beta=0.2, smoothing=0.0
        ),
        "irpo": lambda *c: dpo_variants.irpo_loss(
            *c, c[0] / 3, weight, beta=0.2, alpha=0.0
        ),
        "dpop": lambda *c: dpo_variants.dpop_loss(*c, weight, beta=0.2, penalty=0.0),
        "dpo_norm": lambda *c: dpo_variants.dpo_norm_loss(
            *c, one, one, weight, beta=0.2
        ),
    }
    both = [
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(*map(jnp.array, columns))
        for f in (limits[name], lambda *c: direct.dpo_loss(*c, weight, beta=0.2))
    ]
    ((loss, metrics), gradients), ((dpo, dpo_metrics), dpo_gradients) = both
    np.testing.assert_allclose(loss, dpo, rtol=1e-6)
    for ours, theirs in zip(gradients, dpo_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for metric in dpo_metrics:
        np.testing.assert_allclose(metrics[metric], dpo_metrics[metric], rtol=1e-6)


@pytest.mark.parametrize("eps", [0.1, 0.4])
def test_robust_dpo_is_unbiased_under_flipped_labels_and_cdpo_is_not(eps):
    """(1 - eps) L(w, l) + eps L(l, w) is the DPO loss of the right labels, with its gradient."""
    columns, _, weight = random_pairs()
    weight = jnp.array(weight)

    def expected(loss, w, l, ref_w, ref_l):
        right, _ = loss(w, l, ref_w, ref_l, weight, beta=0.2, smoothing=eps)
        wrong, _ = loss(l, w, ref_l, ref_w, weight, beta=0.2, smoothing=eps)
        return (1 - eps) * right + eps * wrong

    def both(loss):
        return jax.value_and_grad(lambda *c: expected(loss, *c))(
            *map(jnp.array, columns)
        )

    clean, clean_gradient = jax.value_and_grad(
        lambda *c: direct.dpo_loss(*c, weight, beta=0.2)[0]
    )(*map(jnp.array, columns))
    robust, gradient = both(dpo_variants.robust_dpo_loss)
    np.testing.assert_allclose(robust, clean, rtol=1e-5)
    np.testing.assert_allclose(gradient, clean_gradient, rtol=1e-4, atol=1e-6)
    conservative, _ = both(direct.cdpo_loss)
    assert abs(float(conservative - clean)) > 0.01


def test_dpop_has_a_gradient_on_a_chosen_response_that_fell():
    # d loss / d log pi(y_w) = -beta (1 + lambda) sigmoid(-margin) where it fell, else without
    # lambda.
    fell, rose = jnp.array([-12.0, -8.0]), jnp.array([-10.0, -10.0])
    same = jnp.array([-5.0, -5.0])

    def loss(chosen):
        return dpo_variants.dpop_loss(
            chosen, same, rose, same, jnp.ones(2), beta=0.5, penalty=3.0
        )[0]

    margins = np.array([0.5 * (-2 - 3 * 2), 0.5 * 2])
    slopes = -0.5 * np.array([1 + 3, 1]) / (1 + np.exp(margins)) / 2
    np.testing.assert_allclose(jax.grad(loss)(fell), slopes, rtol=1e-5)
