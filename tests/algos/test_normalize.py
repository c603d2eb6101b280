import jax.numpy as jnp
import numpy as np

from rlhfjax.algos import normalize
from tests.jitted import jitted

normalize = jitted(normalize)

REWARDS = jnp.array([1.0, 3.0, 5.0, 100.0])
MASK = jnp.array([1.0, 1.0, 1.0, 0.0])


def test_gain_and_bias_by_hand():
    # Mean 3, biased std sqrt(8/3) = 1.632993: g = 1 / 1.632993 = 0.612372, b = 0 - 0.612372 * 3.
    gain, bias = normalize.gain_and_bias(REWARDS, MASK, mean=0.0, std=1.0)
    np.testing.assert_allclose([gain, bias], [0.6123724, -1.8371173], rtol=1e-5)


def test_normalized_rewards_have_the_target_moments():
    rewards = jnp.array(np.random.default_rng(12).gamma(2, 3, 50), jnp.float32)
    gain, bias = normalize.gain_and_bias(rewards, jnp.ones(50), mean=0.5, std=2.0)
    scaled = np.array(gain * rewards + bias, np.float64)
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0.5, 2.0], rtol=1e-5)


def test_pitfall_12_equal_rewards_are_shifted_and_not_divided():
    gain, bias = normalize.gain_and_bias(
        jnp.full(3, 7.0), jnp.ones(3), mean=0.0, std=1.0
    )
    np.testing.assert_allclose([gain, bias], [1, -7])


def test_centring_bias():
    np.testing.assert_allclose(normalize.centring_bias(REWARDS, MASK), -3.0)
    np.testing.assert_allclose(normalize.centring_bias(REWARDS, MASK, mean=0.5), -2.5)


def test_ensembles_by_hand():
    # Models say 1, 3 (std 1) and 2, 2 (std 0) of the two responses.
    rewards = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(normalize.ensemble_mean(rewards), [2, 2])
    np.testing.assert_allclose(normalize.ensemble_worst(rewards), [1, 2])
    np.testing.assert_allclose(normalize.ensemble_disagreement(rewards), [1, 0])
    np.testing.assert_allclose(
        normalize.ensemble_pessimistic(rewards, coefficient=0.5), [1.5, 2]
    )
    # 1 and 4 have mean 2.5 and std 1.5, not 2.25: 2.5 - 2 * 1.5.
    spread = jnp.array([[1.0], [4.0]])
    np.testing.assert_allclose(normalize.ensemble_disagreement(spread), [1.5])
    pessimistic = normalize.ensemble_pessimistic(spread, coefficient=2.0)
    np.testing.assert_allclose(pessimistic, [-0.5], rtol=1e-6)
