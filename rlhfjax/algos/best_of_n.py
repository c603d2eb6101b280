"""Best-of-n sampling: its reward, and its KL to the policy that is sampled."""

import itertools
import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def best_of_n_reward(
    proxy: Float[Array, "N"],
    gold: Float[Array, "N"],
    *,
    n: int,
) -> Float[Array, ""]:
    """Returns an unbiased estimate of E[gold of the best of n by proxy] for one prompt.

    From a pool of N >= n samples, sorted by proxy with S_1 the worst, it is the mean over all
    subsets of size n:
      sum_{i=n}^{N} C(i-1, n-1) / C(N, n) gold(S_i)
    With proxy = gold it estimates the best reward itself. Equal proxies keep the pool's order.

    Raises:
      ValueError: n is not in 1..N.

    Source: Nakano et al. 2021 (WebGPT), appendix I.
    """
    pool = proxy.shape[0]
    if not 1 <= n <= pool:
        raise ValueError(f"best of {n} from a pool of {pool}: n must be in 1..{pool}")
    weights = jnp.asarray(_subset_weights(pool, n), gold.dtype)
    return jnp.dot(weights, gold[jnp.argsort(proxy)])


def _subset_weights(pool: int, n: int) -> list[float]:
    """Returns w_i = C(i-1, n-1) / C(N, n), i = 1 .. N, in Python's doubles: N may be 60,000."""

    def previous(weight, i):
        """w_{i-1} from w_i."""
        return weight * max(i - n, 0) / (i - 1)

    from_the_top = itertools.accumulate(range(pool, 1, -1), previous, initial=n / pool)
    return list(from_the_top)[::-1]


def best_of_n_kl(n: int) -> float:
    """Returns KL(best-of-n || policy) = log n - (n - 1) / n, nats.

    It is exact without ties, and an upper bound with them.

    Source: Stiennon et al. 2020, table 10; Gao et al. 2022, section 2.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(
    p: Float[Array, "m"],
    rewards: Float[Array, "m"],
    *,
    n: int,
) -> Float[Array, "m"]:
    """Returns q_i, the probability that outcome i is the best of n draws from p.

    Ties are broken at random. With F_i = P(r <= r_i), t_i = P(r = r_i), G_i = F_i - t_i:
      q_i = p_i (F_i^n - G_i^n) / t_i = p_i F_i^n (1 - (1 - t_i / F_i)^n) / t_i
    The second form is computed. It subtracts no nearly equal powers if an outcome is one of many.
    The exact KL of best-of-n is sum_i q_i log q_i / p_i.
    """
    others = rewards[None, :]
    own = rewards[:, None]

    def mass(counted):
        return jnp.sum(jnp.where(counted, p[None, :], 0), axis=1)

    above = mass(others > own)
    tied = mass(others == own)
    up_to = mass(others <= own)
    # F^n. Near 1, in float32, F is computed more precisely from the mass above it.
    log_power = n * jnp.where(up_to < 0.5, jnp.log(up_to), jnp.log1p(-above))
    tied_share = jnp.minimum(tied / up_to, 1)
    lost = -jnp.expm1(n * jnp.log1p(-tied_share))
    return jnp.where(tied > 0, p * jnp.exp(log_power) * lost / tied, 0)
