"""Best-of-n sampling and the tilt, from a pool: their rewards, and their KL to the policy."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

_STEEPEST = 2.0**40  # of 1 / beta


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


def tilt_at_kl(
    rewards: Float[np.ndarray, "p N"], kl: float
) -> Float[np.ndarray, "p N"] | None:
    """Returns the weights of the tilt pi ∝ rho exp(r / beta) that has a KL to rho, for p prompts.

    It is the policy of the highest reward at its KL, E[r] - beta KL. From N samples of rho per
    prompt,
      w_i = exp(r_i / beta) / sum_j exp(r_j / beta),    KL = sum_i w_i log(N w_i),
    with one beta for all prompts, at which the mean of their KL is the given one. E[f] under the
    tilt is sum_i w_i f_i. The estimate is too low where the KL is near log N; up to log N - 3 it
    can be used.

    Args:
      kl: nats, mean over prompts, at least 0.
    Returns:
      The weights; they sum to 1 per prompt. None if no beta has that KL: too few samples, or too
      many equal rewards.
    Raises:
      ValueError: kl is below 0.

    Source: Ziegler et al. 2019, section 2.2.
    """
    if kl < 0:
        raise ValueError(f"kl={kl}: must be >= 0")
    centered = np.asarray(rewards, np.float64)
    centered = centered - centered.max(axis=1, keepdims=True)

    def weights(scale):  # scale = 1 / beta
        tilted = np.exp(scale * centered)
        return tilted / tilted.sum(axis=1, keepdims=True)

    def kl_of(w):
        logs = np.log(np.where(w > 0, w * w.shape[1], 1))
        return np.mean(np.sum(w * logs, axis=1))

    low, high = 0.0, 1.0
    while kl_of(weights(high)) < kl:
        low, high = high, 2 * high
        if high > _STEEPEST:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kl_of(weights(middle)) >= kl else (middle, high)
    return weights(low)
