"""From logits to a token: temperature, top-k, top-p, min-p and a draw by inverse CDF."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.mesh import constrain, shards
from rlhfjax.sampling.config import Sampling

REMOVED = -jnp.inf
BLOCK = 64  # tokens per block of the two-level inverse CDF


def choose(
    logits: Float[Array, "b v"], u: Float[Array, " b"], sampling: Sampling
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Draws a token per row and returns it with its logprob.

    The logprob is under the distribution drawn from: temperature, then top-k, then top-p,
    then min-p. Temperature 0 takes the most likely token (the first of equals), with its logprob at
    temperature 1.
    """
    if sampling.temperature == 0:
        token = logits.argmax(1).astype(jnp.int32)
    else:
        logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
        logits = keep_top_p(logits, sampling.top_p)
        logits = keep_min_p(logits, sampling.min_p)
        token = inverse_cdf(logits, u)
    picked = _pick(logits, token)
    log_normalizer = jax.nn.logsumexp(logits, axis=1)
    logprob = picked - log_normalizer
    return token, logprob


def keep_top_k(logits: Float[Array, "b v"], top_k: int) -> Float[Array, "b v"]:
    """Removes all but the k largest logits; ties with the k-th stay, and 0 keeps all.

    Source: Fan et al. 2018.
    """
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    largest, _ = jax.lax.top_k(logits, top_k)
    least = largest[:, -1:]
    return jnp.where(logits < least, REMOVED, logits)


def keep_top_p(logits: Float[Array, "b v"], top_p: float) -> Float[Array, "b v"]:
    """Keeps the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.

    A token stays if and only if the tokens more likely than it sum to less than top_p. So the most
    likely token always stays, and ties stay together.

    Source: Holtzman et al. 2020, eq. 2.
    """
    if top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=1)
    p = jax.nn.softmax(ordered, axis=1)
    reached = jnp.cumsum(p, axis=1)
    above = reached - p
    kept = jnp.where(above < top_p, ordered, jnp.inf)
    least = kept.min(1, keepdims=True)
    return jnp.where(logits < least, REMOVED, logits)


def keep_min_p(logits: Float[Array, "b v"], min_p: float) -> Float[Array, "b v"]:
    """Removes tokens less than min_p times as likely as the most likely one; 0 keeps all.

    Source: Nguyen et al. 2024 (arXiv 2407.01082).
    """
    if min_p == 0:
        return logits
    least = logits.max(1, keepdims=True) + math.log(min_p)
    return jnp.where(logits < least, REMOVED, logits)


def inverse_cdf(logits: Float[Array, "b v"], u: Float[Array, " b"]) -> Int[Array, " b"]:
    """Returns the token at which the CDF of softmax(logits) passes u in [0, 1).

    That is the first i with sum_{j<=i} p_j > u. It is found on two levels, first the block of
    tokens and then the token within it, so that a draw needs one uniform number and one exp per
    token. A token of probability 0 is never drawn, whatever the rounding.
    """
    b, v = logits.shape
    n = shards("vocab")
    # Every device has the same number of blocks, so that split logits stay split.
    blocks_per_shard = -(-v // (n * BLOCK))
    blocks = blocks_per_shard * n
    largest = logits.max(1, keepdims=True)
    weights = jnp.exp(logits - largest)
    padding = blocks * BLOCK - v
    weights = jnp.pad(weights, ((0, 0), (0, padding)))
    weights = constrain(weights, ("batch", "vocab"))
    weights = weights.reshape(b, blocks, BLOCK)
    # The block in which the CDF passes u ...
    ends = jnp.cumsum(weights.sum(2), axis=1)
    rest = u * ends[:, -1]
    block = _first_above(ends, rest)
    # ... and the token within it, after what the blocks before it add.
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)
    inside = inside[:, 0]
    has_previous = block > 0
    previous = jnp.maximum(block - 1, 0)
    rest -= jnp.where(has_previous, _pick(ends, previous), 0.0)
    first = block * BLOCK
    cdf = jnp.cumsum(inside, axis=1)
    return first + _first_above(cdf, rest)


def _first_above(ends, x):
    """Returns the first index of each non-decreasing row whose value is above x.

    If there is none, it returns the last index at which the row still grew.
    """
    is_below = ends <= x[:, None]
    first = is_below.sum(1)
    is_growing = ends < ends[:, -1:]
    last = is_growing.sum(1)
    index = jnp.minimum(first, last)
    return index.astype(jnp.int32)


def _pick(rows, index):
    """Returns one value per row."""
    picked = jnp.take_along_axis(rows, index[:, None], axis=1)
    return picked[:, 0]
