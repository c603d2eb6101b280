import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos.advantages import gae, reinforce_pp

jit_gae = jax.jit(lambda r, v, m, gamma, lam: gae(r, v, m, gamma=gamma, lam=lam))
jit_reinforce_pp = jax.jit(reinforce_pp)
MASKS = st.lists(st.booleans(), min_size=18, max_size=18).map(
    lambda m: np.array(m, np.float32).reshape(3, 6)
)


def loop_gae(rewards, values, mask, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} on the counted tokens alone: the definition, not the
    recurrence.
    """
    advantages = np.zeros(rewards.shape, np.float64)
    for i in range(rewards.shape[0]):
        columns = [j for j in range(rewards.shape[1]) if mask[i, j] > 0]
        r = [float(rewards[i, j]) for j in columns]
        v = [float(values[i, j]) for j in columns] + [0.0]
        delta = [r[n] + gamma * v[n + 1] - v[n] for n in range(len(columns))]
        for n, j in enumerate(columns):
            advantages[i, j] = sum(
                (gamma * lam) ** (m - n) * delta[m] for m in range(n, len(columns))
            )
    return advantages


def random_inputs(shape=(3, 6)):
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(
        np.float32
    )


def test_by_hand():
    # gamma = 1, lam = 1/2, V = 1/2 everywhere, reward 1 at the end (third) token, a padded fourth.
    # delta_3 = 1 + 0 - 1/2 = 1/2, delta_2 = delta_1 = 0 + 1/2 - 1/2 = 0.
    # A_3 = 1/2, A_2 = 0 + 1/2 * 1/2 = 1/4, A_1 = 1/8; R = A + 1/2.
    advantages, returns = gae(
        jnp.array([[0.0, 0.0, 1.0, 0.0]]),
        jnp.full((1, 4), 0.5),
        jnp.array([[1.0, 1.0, 1.0, 0.0]]),
        gamma=1.0,
        lam=0.5,
    )
    np.testing.assert_allclose(advantages, [[0.125, 0.25, 0.5, 0.0]])
    np.testing.assert_allclose(returns, [[0.625, 0.75, 1.0, 0.0]])


@hypothesis.given(MASKS, st.floats(0, 1), st.floats(0, 1))
@hypothesis.settings(max_examples=40, deadline=None)
def test_equals_the_definition_on_any_mask(mask, gamma, lam):
    rewards, values = random_inputs()
    advantages, returns = jit_gae(
        jnp.array(rewards), jnp.array(values), jnp.array(mask), gamma, lam
    )
    expected = loop_gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        returns, (expected + values) * mask, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("garbage", [np.nan, 1e30, -7.0])
def test_pitfall_13_what_stands_in_padding_and_holes_does_not_matter(garbage):
    rewards, values = random_inputs()
    mask = np.array(
        [[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], np.float32
    )
    expected = loop_gae(rewards, values, mask, 0.99, 0.95)
    spoilt = [
        jnp.array(np.where(mask > 0, x, garbage), jnp.float32)
        for x in (rewards, values)
    ]
    advantages, returns = jit_gae(*spoilt, jnp.array(mask), 0.99, 0.95)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        returns, (expected + values) * mask, rtol=1e-4, atol=1e-5
    )


def test_pitfall_13_a_hole_is_no_step():
    # With lam = 0, A_1 = r_1 + gamma V_3 - V_1: the token after the hole, discounted once.
    advantages, _ = gae(
        jnp.array([[1.0, 50.0, 0.0]]),
        jnp.array([[2.0, 70.0, 4.0]]),
        jnp.array([[1.0, 0.0, 1.0]]),
        gamma=0.5,
        lam=0.0,
    )
    np.testing.assert_allclose(advantages, [[1 + 0.5 * 4 - 2, 0.0, 0 - 4]])


def test_pitfall_13_no_bootstrap_past_the_end():
    # The value of the padding after the last token (9) and of the last token of a full row are not
    # continued from.
    values = jnp.array([[1.0, 2.0, 9.0], [1.0, 2.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    advantages, _ = gae(jnp.zeros((2, 3)), values, mask, gamma=1.0, lam=0.0)
    np.testing.assert_allclose(advantages, [[1, -2, 0], [1, 7, -9]])


@pytest.mark.parametrize("left, right", [(0, 4), (3, 2)])
def test_padding_columns_change_nothing(left, right):
    rewards, values = random_inputs()
    mask = np.array(
        [[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], np.float32
    )
    plain = jit_gae(jnp.array(rewards), jnp.array(values), jnp.array(mask), 0.9, 0.8)
    pad = [(0, 0), (left, right)]
    inputs = [
        jnp.array(np.pad(x, pad, constant_values=c))
        for x, c in ((rewards, 3), (values, 5), (mask, 0))
    ]
    padded = jit_gae(*inputs, 0.9, 0.8)
    for a, b in zip(plain, padded, strict=True):
        np.testing.assert_allclose(a, b[:, left : left + 6], rtol=1e-6)


def test_lambda_1_is_the_monte_carlo_return():
    # gamma = 1/2: G_3 = 4, G_2 = 2 + 2 = 4, G_1 = 1 + 2 = 3.
    rewards, mask = jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[1.0, 1.0, 1.0, 0.0]])
    values = jnp.array([[5.0, -3.0, 2.0, 1.0]])
    _, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    np.testing.assert_allclose(returns, [[3.0, 4.0, 4.0, 0.0]], rtol=1e-6)


# ------------------------------------------------------------------ REINFORCE++


def test_reinforce_pp_by_hand():
    """Returns 6, 5, 3, 4: mean 4.5, variance (2 x 1.5^2 + 2 x 0.5^2) / 4 = 1.25."""
    rewards = jnp.array([[1.0, 2.0, 3.0], [4.0, 9.0, jnp.nan]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    expected = np.array([[1.5, 0.5, -1.5], [-0.5, 0.0, 0.0]]) / np.sqrt(1.25)
    np.testing.assert_allclose(reinforce_pp(rewards, mask), expected, rtol=1e-6)


@hypothesis.settings(deadline=None)
@hypothesis.given(mask=MASKS)
def test_reinforce_pp_equals_the_loop_on_any_mask(mask):
    """Also past holes; nothing where nothing counts."""
    rewards = np.random.default_rng(3).normal(size=mask.shape).astype(np.float32)
    to_come = np.zeros(mask.shape)
    for i in range(len(mask)):
        for t in range(mask.shape[1]):
            to_come[i, t] = sum(
                rewards[i, s] for s in range(t, mask.shape[1]) if mask[i, s]
            )
    counted = to_come[mask > 0]
    spread = np.sqrt(counted.var() + 1e-8) if counted.size else 1.0
    mean = counted.mean() if counted.size else 0.0
    expected = np.where(mask > 0, (to_come - mean) / spread, 0)
    np.testing.assert_allclose(
        jit_reinforce_pp(rewards, mask), expected, rtol=1e-4, atol=1e-4
    )


def test_reinforce_pp_normalizes_over_the_whole_batch():
    """Not over a row: rows that differ by a constant keep the difference."""
    rewards = jnp.array([[0.0, 1.0], [0.0, 3.0]])
    advantages = reinforce_pp(rewards, jnp.ones((2, 2)))
    np.testing.assert_allclose(advantages, [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-6)
