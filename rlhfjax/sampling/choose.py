"""From logits to a token: temperature, top-k, top-p and a draw by inverse CDF."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import constrain, shards

REMOVED = -jnp.inf
BLOCK = 64  # tokens a block of the two-level inverse CDF


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ConfigError unless temperature >= 0, top_k >= 0 and 0 < top_p <= 1."""
    if not temperature >= 0:
        raise ConfigError(
            f"temperature is {temperature}: it must be 0 (greedy) or above"
        )
    if isinstance(top_k, bool) or int(top_k) != top_k or top_k < 0:
        raise ConfigError(
            f"top_k is {top_k}: it must be 0 (off) or a positive whole number"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}: it must be above 0 and at most 1 (off)")


def keep_top_k(logits: Float[Array, "b v"], top_k: int) -> Float[Array, "b v"]:
    """Remove all but the k largest logits (ties with the k-th stay); 0 keeps all. Fan et al. 2018."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    return jnp.where(logits < least, REMOVED, logits)


def keep_top_p(logits: Float[Array, "b v"], top_p: float) -> Float[Array, "b v"]:
    """Keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.

    A token stays iff the tokens more likely than it sum to less than top_p, so the first one always stays and ties
    stay together. Source: Holtzman et al. 2020, eq. 2.
    """
    if top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    p = jax.nn.softmax(ordered, axis=-1)
    above = jnp.cumsum(p, axis=-1) - p
    least = jnp.where(above < top_p, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < least, REMOVED, logits)


def inverse_cdf(logits: Float[Array, "b v"], u: Float[Array, " b"]) -> Int[Array, " b"]:
    """The token at which the CDF of softmax(logits) passes u in [0, 1): the first i with sum_{j<=i} p_j > u.

    Two levels, the block of tokens and then the token within it, so that one uniform number and one exp a token
    serve for a draw. A token of probability 0 is never drawn, whatever the rounding.
    """
    b, v = logits.shape
    n = shards("vocab")
    blocks = (
        -(-v // (n * BLOCK)) * n
    )  # as many on each device: logits that are split stay so
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - v)))
    weights = constrain(weights, ("batch", "vocab")).reshape(b, blocks, BLOCK)
    ends = jnp.cumsum(weights.sum(-1), axis=-1)
    rest = u * ends[:, -1]
    block = _first_above(ends, rest)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    rest -= jnp.where(
        block > 0,
        jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0],
        0.0,
    )
    return block * BLOCK + _first_above(jnp.cumsum(inside, axis=-1), rest)


def _first_above(ends, x):
    """First index of each non-decreasing row whose value is above x; where none is, the last that adds anything."""
    return jnp.minimum(
        (ends <= x[:, None]).sum(-1), (ends < ends[:, -1:]).sum(-1)
    ).astype(jnp.int32)


def choose(
    logits: Float[Array, "b v"],
    u: Float[Array, " b"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """A token a row and its logprob under the distribution drawn from (temperature, then top-k, then top-p).

    temperature 0 takes the most likely token (the first of equals) and gives its logprob at temperature 1.
    """
    if temperature == 0:
        token = logits.argmax(-1).astype(jnp.int32)
    else:
        logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
        token = inverse_cdf(logits, u)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, picked - jax.nn.logsumexp(logits, axis=-1)
