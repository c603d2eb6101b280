import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import policy, value
from tests.jitted import jitted

policy, value = map(jitted, (policy, value))


def random_batch(shape=(5, 7)):
    rng = np.random.default_rng(3)
    old = rng.normal(size=shape).astype(np.float32)
    mask = (rng.random(shape) < 0.6).astype(np.float32)
    return (
        old + 0.5 * rng.normal(size=shape).astype(np.float32),
        old,
        rng.normal(size=shape).astype(np.float32),
        mask,
    )


def loop_clipped(values, old_values, returns, mask, clip):
    loss = clipped = count = 0.0
    for v, o, r, m in zip(
        values.flat, old_values.flat, returns.flat, mask.flat, strict=True
    ):
        if m:
            bounded = min(max(float(v), float(o) - clip), float(o) + clip)
            plain, other = (float(v) - float(r)) ** 2, (bounded - float(r)) ** 2
            loss += 0.5 * max(plain, other)
            clipped += other > plain
            count += 1
    return loss / count, clipped / count


def test_clipped_by_hand():
    # Old value 0, clip 0.2.
    # V 1, R 2:   max((1 - 2)^2, (0.2 - 2)^2) = 3.24, clipped
    # V 1, R 0:   max(1, 0.04)                = 1
    # V 0.1, R 1: max(0.81, 0.81)             = 0.81
    # 1/2 (3.24 + 1 + 0.81) / 3 = 0.841667; the fourth is padding.
    loss, metrics = value.clipped_value_loss(
        jnp.array([[1.0, 1.0, 0.1, 8.0]]),
        jnp.zeros((1, 4)),
        jnp.array([[2.0, 0.0, 1.0, 0.0]]),
        jnp.array([[1.0, 1.0, 1.0, 0.0]]),
        clip=0.2,
    )
    np.testing.assert_allclose(loss, 0.8416667, rtol=1e-5)
    total, weight = metrics["value_clip_fraction"]
    np.testing.assert_allclose(total / weight, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["value_error"][0], 1 + 1 + 0.81, rtol=1e-5
    )  # unclipped, without the half
    np.testing.assert_allclose(metrics["value"][0], 2.1, rtol=1e-5)


@pytest.mark.parametrize("clip", [0.05, 0.2, 100.0])
def test_clipped_equals_the_loop(clip):
    batch = random_batch()
    loss, metrics = value.clipped_value_loss(*map(jnp.array, batch), clip=clip)
    expected, fraction = loop_clipped(*batch, clip)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["value_clip_fraction"][0] / metrics["value_clip_fraction"][1], fraction
    )


def test_without_a_binding_clip_it_is_the_squared_loss():
    values, old, returns, mask = map(jnp.array, random_batch())
    clipped, _ = value.clipped_value_loss(values, old, returns, mask, clip=1e6)
    np.testing.assert_allclose(
        value.value_loss(values, returns, mask)[0], clipped, rtol=1e-6
    )


def test_squared_by_hand():
    # 1/2 (9 + 1) / 2 = 2.5
    loss, _ = value.value_loss(
        jnp.array([[3.0, 1.0, 5.0]]),
        jnp.array([[0.0, 2.0, jnp.nan]]),
        jnp.array([[1.0, 1.0, 0.0]]),
    )
    np.testing.assert_allclose(loss, 2.5)


def test_pitfall_18_value_and_policy_losses_are_normalized_alike():
    # Every counted token has policy loss -1 and value loss 1/2 (3 - 1)^2 = 2, in rows of 3, 1 and 0
    # tokens.
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    zeros, ones = jnp.zeros((3, 3)), jnp.ones((3, 3))
    policy_loss, policy_metrics = policy.ppo_loss(zeros, zeros, ones, mask, clip=0.2)
    for loss, metrics in (
        value.clipped_value_loss(3 * ones, 3 * ones, ones, mask, clip=0.2),
        value.value_loss(3 * ones, ones, mask),
    ):
        assert (float(policy_loss), float(loss)) == (-1, 2)
        assert float(policy_metrics["loss"][1]) == float(metrics["loss"][1]) == 4


def test_returns_and_old_values_are_constants():
    values, old, returns, mask = map(jnp.array, random_batch())
    gradients = jax.grad(
        lambda o, r: value.clipped_value_loss(values, o, r, mask, clip=0.2)[0],
        argnums=(0, 1),
    )(old, returns)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_explained_variance_by_hand():
    # Returns 1, 2, 3 (variance 2/3). Errors 1/2, -1/2, 0 have variance 1/6: 1 - 1/4. A constant
    # offset costs nothing.
    returns, mask = (
        jnp.array([[1.0, 2.0, 3.0, 50.0]]),
        jnp.array([[1.0, 1.0, 1.0, 0.0]]),
    )
    values = jnp.array([[0.5, 2.5, 3.0, 0.0]])
    assert value.explained_variance(returns, returns, mask) == (1, 1)
    np.testing.assert_allclose(
        value.explained_variance(values, returns, mask)[0], 0.75, rtol=1e-5
    )
    np.testing.assert_allclose(
        value.explained_variance(values + 9, returns, mask)[0], 0.75, rtol=1e-4
    )
    np.testing.assert_allclose(
        value.explained_variance(jnp.zeros((1, 4)), returns, mask)[0], 0, atol=1e-6
    )


def test_explained_variance_of_nothing_is_zero():
    ones = jnp.ones((1, 4))
    assert value.explained_variance(ones * 2, ones, ones) == (0, 1)
    assert value.explained_variance(ones * 2, ones, ones * 0) == (0, 0)
