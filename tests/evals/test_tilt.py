"""The tilt: hand-made pools, and no policy of the same KL that is better."""

import numpy as np
import pytest

from rlhfjax.evals.tilt import tilt_at_kl


def test_the_tilt_of_a_distribution_is_that_of_its_samples():
    """A pool in which outcome i comes N p_i times has the tilt of p: p_i exp(r_i / beta) / Z."""
    counts, rewards, beta = np.array([[5, 3, 2]]), np.array([1.0, -0.5, 2.0]), 0.7
    p = counts[0] / 10
    expected = p * np.exp(rewards / beta)
    expected /= expected.sum()
    kl = np.sum(expected * np.log(expected / p))
    pool = np.repeat(rewards, counts[0])[None]
    weights = tilt_at_kl(pool, kl)
    found = [weights[pool == reward].sum() for reward in rewards]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_tilt_is_the_highest_reward_at_its_kl():
    """No mixture with another distribution of the same KL has more reward."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(3, 40))
    weights = tilt_at_kl(rewards, 0.8)

    def kl(w):
        return np.mean(np.sum(w * np.log(40 * w), axis=1))

    assert kl(weights) == pytest.approx(0.8, abs=1e-9)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    best = np.mean(np.sum(weights * rewards, axis=1))
    for _ in range(200):
        others = rng.normal(scale=rng.uniform(0.1, 3), size=rewards.shape)
        scale = rng.uniform(0, 3)
        other = np.exp(scale * rewards + others)
        other /= other.sum(axis=1, keepdims=True)
        low, high = (
            0.0,
            1.0,
        )  # mixed with the uniform distribution to the same KL, if it has more
        if kl(other) < 0.8:
            continue
        for _ in range(60):
            middle = (low + high) / 2
            mixed = middle * other + (1 - middle) / 40
            low, high = (middle, high) if kl(mixed) < 0.8 else (low, middle)
        mixed = low * other + (1 - low) / 40
        assert np.mean(np.sum(mixed * rewards, axis=1)) < best


def test_a_kl_of_zero_is_the_policy_itself():
    np.testing.assert_allclose(tilt_at_kl(np.array([[1.0, 2.0, 7.0]]), 0.0), 1 / 3)


def test_no_tilt_where_the_pool_does_not_reach_the_kl():
    """Two of four samples are the best: the KL is below log 2."""
    pool = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert tilt_at_kl(pool, 0.7) is None
    assert tilt_at_kl(pool, 0.69) is not None
    assert tilt_at_kl(np.zeros((2, 8)), 0.1) is None
    with pytest.raises(ValueError, match="must be >= 0"):
        tilt_at_kl(pool, -0.1)
