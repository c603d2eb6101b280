"""From logits to a token, by a draw from the inverse CDF.

Before it come the repetition penalty, temperature, top-k, top-p and min-p.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.mesh import constrain, shards
from rlhfjax.sampling.config import Sampling

REMOVED = -jnp.inf
BLOCK = 64  # tokens per block of the two-level inverse CDF


def choose(
    logits: Float[Array, "b v"],
    u: Float[Array, " b"],
    sampling: Sampling,
    seen: Bool[Array, "b v"] | None = None,
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Draws a token per row and returns it with its logprob.

    The logprob is under the distribution drawn from: the repetition penalty, then temperature, then
    top-k, then top-p, then min-p. Temperature 0 takes the most likely token (the first of equals),
    with its logprob at temperature 1.

    Args:
      seen: ids that came before, which the repetition penalty needs; None if it is off.
    """
    if seen is not None:
        logits = penalize_seen(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = logits.argmax(1).astype(jnp.int32)
    else:
        logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
        logits = keep_top_p(logits, sampling.top_p)
        logits = keep_min_p(logits, sampling.min_p)
        token = inverse_cdf(logits, u)
    picked = pick(logits, token)
    log_normalizer = jax.nn.logsumexp(logits, axis=1)
    logprob = picked - log_normalizer
    return token, logprob


def penalize_seen(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float
) -> Float[Array, "b v"]:
    """Divides the positive logits of seen tokens by the penalty and multiplies negative ones.

    A penalty above 1 makes these tokens less likely, whatever the sign of their logits.

    Source: Keskar et al. 2019 (CTRL), section 4.1, which divides negative logits too; multiplied as
    in transformers' RepetitionPenaltyLogitsProcessor.
    """
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def none_seen(sampling: Sampling, n: int, vocab_size: int) -> Bool[Array, "n v"] | None:
    """Returns that no row has seen an id; None if the repetition penalty is off."""
    if sampling.repetition_penalty == 1:
        return None
    return jnp.zeros((n, vocab_size), bool)


def seen_in(
    sampling: Sampling,
    tokens: Int[Array, "b p"],
    attention_mask: Int[Array, "b p"],
    vocab_size: int,
) -> Bool[Array, "b v"] | None:
    """Returns which ids each prompt has; None if the repetition penalty is off."""
    none = none_seen(sampling, tokens.shape[0], vocab_size)
    if none is None:
        return None
    rows = jnp.arange(tokens.shape[0])[:, None]
    return constrain(none.at[rows, tokens].max(attention_mask > 0), ("batch", "vocab"))


def also_seen(
    seen: Bool[Array, "b v"] | None, token: Int[Array, " b"]
) -> Bool[Array, "b v"] | None:
    """Returns which ids each row has, one token later."""
    if seen is None:
        return None
    return seen.at[jnp.arange(token.shape[0]), token].set(True)


def keep_top_k(logits: Float[Array, "b v"], top_k: int) -> Float[Array, "b v"]:
    """Removes all but the k largest logits; ties with the k-th stay, and 0 keeps all.

    Source: Fan et al. 2018.
    """
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    least = threshold(logits, lambda above: above.sum(1) < top_k)
    return jnp.where(logits < least, REMOVED, logits)


def keep_top_p(logits: Float[Array, "b v"], top_p: float) -> Float[Array, "b v"]:
    """Keeps the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.

    A token stays if and only if the tokens more likely than it sum to less than top_p. So the most
    likely token always stays, and ties stay together.

    Source: Holtzman et al. 2020, eq. 2.
    """
    if top_p >= 1.0:
        return logits
    p = jax.nn.softmax(logits, axis=1)
    least = threshold(logits, lambda above: jnp.where(above, p, 0.0).sum(1) < top_p)
    return jnp.where(logits < least, REMOVED, logits)


def threshold(
    logits: Float[Array, "b v"],
    holds: Callable[[Bool[Array, "b v"]], Bool[Array, " b"]],
) -> Float[Array, "b 1"]:
    """Returns the least threshold t of each row such that holds(logits > t).

    It holds at the largest logit, and above every t at which it holds. The floats are bisected in
    their order, so that the result is exact after 32 passes; a sort takes far longer.
    """
    largest = logits.max(1, keepdims=True)
    lowest = jnp.full_like(largest, -jnp.inf)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without an overflow
        is_high = holds(logits > _float_at(middle))[:, None]
        low, high = jnp.where(is_high, low, middle), jnp.where(is_high, middle, high)
        return low, high

    bounds = _place_of(lowest), _place_of(largest)
    return _float_at(jax.lax.fori_loop(0, 32, halve, bounds)[1])


def _place_of(x: Float[Array, "b 1"]) -> Int[Array, "b 1"]:
    """Returns integers in the order of the floats."""
    return _mirrored(jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32))


def _float_at(place: Int[Array, "b 1"]) -> Float[Array, "b 1"]:
    return jax.lax.bitcast_convert_type(_mirrored(place), jnp.float32)


def _mirrored(bits: Int[Array, "b 1"]) -> Int[Array, "b 1"]:
    """Returns the bits of floats as integers in their order, and the reverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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
    rest -= jnp.where(has_previous, pick(ends, previous), 0.0)
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


def pick(rows: Float[Array, "b n"], index: Int[Array, " b"]) -> Float[Array, " b"]:
    """Returns one value per row."""
    picked = jnp.take_along_axis(rows, index[:, None], axis=1)
    return picked[:, 0]
