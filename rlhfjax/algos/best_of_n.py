"""Best-of-n sampling: how good, and how far from the policy that was sampled."""

import itertools
import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def best_of_n_reward(
    proxy: Float[Array, "N"], gold: Float[Array, "N"], *, n: int
) -> Float[Array, ""]:
    """Unbiased estimate of E[gold of the best of n by proxy], from a pool of N >= n samples of one prompt.

    With the pool sorted by proxy, S_1 worst: sum_{i=n}^{N} C(i-1, n-1) / C(N, n) gold(S_i), the mean over all subsets
    of size n. With proxy = gold, of the best reward itself. Equal proxies are ordered as in the pool.

    Raises:
      ValueError: n is not in 1..N.

    Source: Nakano et al. 2021 (WebGPT), appendix I.
    """
    pool = proxy.shape[0]
    if not 1 <= n <= pool:
        raise ValueError(f"best of {n} from a pool of {pool}: n must be in 1..{pool}")
    # From the top: w_N = n / N, w_{i-1} = w_i (i - n) / (i - 1). In Python's doubles: N is static and may be 60,000.
    weights = itertools.accumulate(
        range(pool, 1, -1), lambda w, i: w * max(i - n, 0) / (i - 1), initial=n / pool
    )
    return jnp.dot(
        jnp.asarray(list(weights), gold.dtype)[::-1], gold[jnp.argsort(proxy)]
    )


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || policy) = log n - (n - 1) / n, nats: exact without ties, an upper bound with them.

    Source: Stiennon et al. 2020, table 10; Gao et al. 2022, section 2.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(
    p: Float[Array, "m"], rewards: Float[Array, "m"], *, n: int
) -> Float[Array, "m"]:
    """q_i, the probability that outcome i is the best of n draws from p; ties are broken at random.

    With F_i = P(r <= r_i), t_i = P(r = r_i), G_i = F_i - t_i:
      q_i = p_i (F_i^n - G_i^n) / t_i = p_i F_i^n (1 - (1 - t_i / F_i)^n) / t_i
    The second form subtracts no nearly equal powers, where an outcome is one of many.
    Its exact KL is sum_i q_i log q_i / p_i.
    """
    others, own = rewards[None, :], rewards[:, None]

    def mass(counted):
        return jnp.sum(jnp.where(counted, p[None, :], 0), axis=1)

    above, tied, up_to = mass(others > own), mass(others == own), mass(others <= own)
    # F^n: near 1, in float32, F is told best by what lies above it.
    log_power = n * jnp.where(up_to < 0.5, jnp.log(up_to), jnp.log1p(-above))
    lost = -jnp.expm1(n * jnp.log1p(-jnp.minimum(tied / up_to, 1)))
    return jnp.where(tied > 0, p * jnp.exp(log_power) * lost / tied, 0)
