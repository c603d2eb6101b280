import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import best_of_n


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_estimate_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(11)
    proxy, gold = (
        rng.normal(size=7).astype(np.float32),
        rng.normal(size=7).astype(np.float32),
    )
    best = [
        gold[max(subset, key=lambda i: proxy[i])]
        for subset in itertools.combinations(range(7), n)
    ]
    estimate = best_of_n.best_of_n_reward(jnp.array(proxy), jnp.array(gold), n=n)
    np.testing.assert_allclose(estimate, np.mean(best, dtype=np.float64), rtol=1e-5)


def test_estimate_by_hand():
    # Pool 1, 2, 3, n = 2: the best of (1,2), (1,3), (2,3) is 2, 3, 3.
    x = jnp.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(best_of_n.best_of_n_reward(x, x, n=2), 8 / 3, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 64, 1000])
def test_estimate_of_a_large_pool(n):
    # The expected largest of n of the ranks 1..N is n (N + 1) / (n + 1).
    ranks = jnp.arange(1, 20001, dtype=jnp.float32)
    np.testing.assert_allclose(
        best_of_n.best_of_n_reward(ranks, ranks, n=n), n * 20001 / (n + 1), rtol=1e-5
    )


@pytest.mark.parametrize("n", [0, 4])
def test_n_is_within_the_pool(n):
    with pytest.raises(ValueError, match=r"1\.\.3"):
        best_of_n.best_of_n_reward(jnp.ones(3), jnp.ones(3), n=n)


@pytest.mark.parametrize(
    "n, nats",
    [(1, 0), (2, 0.193), (4, 0.636), (64, 3.175), (256, 4.549), (60000, 10.00)],
)
def test_kl_formula_has_the_papers_values(n, nats):
    np.testing.assert_allclose(best_of_n.best_of_n_kl(n), nats, atol=3e-3)


@pytest.mark.parametrize("rewards", [[1.0, 2.0, 3.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_distribution_equals_enumeration_of_all_draws(rewards, n):
    p = [0.5, 0.3, 0.2]
    q = np.zeros(3)
    for draws in itertools.product(range(3), repeat=n):
        best = max(rewards[i] for i in draws)
        ties = [i for i in draws if rewards[i] == best]
        for i in ties:
            q[i] += math.prod(p[j] for j in draws) / len(ties)
    found = best_of_n.best_of_n_distribution(jnp.array(p), jnp.array(rewards), n=n)
    np.testing.assert_allclose(found, q, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 64, 60_000])
def test_pitfall_34_the_distribution_of_many_unlikely_outcomes(n):
    """q / p = (F^n - G^n) / (F - G) in float64, where F and G are apart; there are ties."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(500, 0.3)).astype(np.float32)
    rewards = np.round(rng.normal(size=500), 2).astype(np.float32)
    counted, gains = p > 1e-7, []
    for reward in rewards:
        up_to = np.sum(p[rewards <= reward], dtype=np.float64)
        below = np.sum(p[rewards < reward], dtype=np.float64)
        gains.append((up_to**n - below**n) / (up_to - below))
    found = best_of_n.best_of_n_distribution(jnp.array(p), jnp.array(rewards), n=n)
    found, expected = np.asarray(found, np.float64), np.array(gains)
    np.testing.assert_allclose(
        (found / p)[counted], expected[counted], rtol=1e-5, atol=1e-20
    )
    np.testing.assert_allclose(found.sum(), 1, atol=1e-6)


def exact_kl(m, n):
    q = np.array(
        best_of_n.best_of_n_distribution(
            jnp.full(m, 1 / m), jnp.arange(m, dtype=jnp.float32), n=n
        ),
        float,
    )
    q = q[q > 0]
    return float(np.sum(q * np.log(q * m)))


def test_kl_formula_is_the_limit_of_many_outcomes_and_a_bound_with_few():
    np.testing.assert_allclose(exact_kl(1000, 4), best_of_n.best_of_n_kl(4), atol=2e-3)
    # 32 equally likely outcomes, n = 64: 3.02 instead of 3.175 nats.
    np.testing.assert_allclose(exact_kl(32, 64), 3.02, atol=5e-3)
