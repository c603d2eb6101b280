"""From logits to tokens for lanes that each have their own settings, which are arrays.

A token is the one that `choose` takes with the same settings and the same uniform number. What no
lane asks for is not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from rlhfjax.sampling.choose import REMOVED, inverse_cdf, pick, threshold

WORD = 32  # ids per word of a vocabulary mask


class Settings(NamedTuple):
    """How each of l lanes samples."""

    seed: UInt32[Array, " l"]
    temperature: Float[Array, " l"]  # 0: greedy
    top_k: Int[Array, " l"]  # 0: off
    top_p: Float[Array, " l"]  # 1: off
    log_min_p: Float[Array, " l"]  # -inf: off
    wants_top: Bool[Array, " l"]  # whether alternatives are asked for


class Drawn(NamedTuple):
    """Tokens with their log-probabilities under the model, at temperature 1."""

    token: Int[Array, " l"]
    logprob: Float[Array, " l"]
    top: Int[Array, "l a"]  # the likeliest ids, in their order
    top_logprob: Float[Array, "l a"]


def words(vocab_size: int) -> int:
    """Returns the number of words of a vocabulary mask."""
    return -(-vocab_size // WORD)


def draw(
    logits: Float[Array, "l v"],
    index: Int[Array, " l"],
    settings: Settings,
    mask: UInt32[Array, "l w"],
    alternatives: int,
) -> Drawn:
    """Draws a token per lane, by u = uniform(fold_in(key(seed), index)).

    Args:
      index: how many tokens of the lane's response were drawn before.
      mask: bit i % 32 of word i // 32 is 1 if id i may be drawn.
      alternatives: number a of them; zeros if no lane wants any.
    """
    u = jax.vmap(_uniform)(settings.seed, index)
    masked = jnp.where(_unpacked(mask, logits.shape[1]), logits, REMOVED)
    token = jax.lax.cond(
        (settings.temperature > 0).any(),
        lambda: _choose(masked, u, settings),
        lambda: _likeliest(masked),
    )
    return look_up(logits, token, settings.wants_top.any(), alternatives)


def look_up(
    logits: Float[Array, "l v"],
    token: Int[Array, " l"],
    wants_top: Bool[Array, ""],
    alternatives: int,
) -> Drawn:
    """Returns the log-probabilities of given tokens, and the likeliest ones if they are wanted."""
    log_normalizer = jax.nn.logsumexp(logits, axis=1)

    def some() -> tuple[jax.Array, jax.Array]:
        top, ids = jax.lax.top_k(logits, alternatives)
        return ids, top - log_normalizer[:, None]

    def none() -> tuple[jax.Array, jax.Array]:
        shape = (logits.shape[0], alternatives)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

    top, top_logprob = jax.lax.cond(wants_top, some, none)
    return Drawn(token, pick(logits, token) - log_normalizer, top, top_logprob)


def _uniform(seed, index):
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), index))


def _unpacked(mask, vocab_size):
    bits = (mask[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab_size] > 0


def _likeliest(logits):
    return logits.argmax(1).astype(jnp.int32)


def _choose(logits, u, s):
    """Returns the tokens of `choose`: temperature, top-k, top-p, min-p, and the inverse CDF."""
    is_greedy = s.temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, s.temperature)[:, None]
    for is_on, least in (
        (s.top_k > 0, lambda x: _least_of_top_k(x, s.top_k)),
        (s.top_p < 1, lambda x: _least_of_top_p(x, s.top_p)),
        (
            s.log_min_p > -jnp.inf,
            lambda x: x.max(1, keepdims=True) + _column(s.log_min_p),
        ),
    ):
        scaled = _keep(scaled, is_on, least)
    return jnp.where(is_greedy, _likeliest(logits), inverse_cdf(scaled, u))


def _keep(logits, is_on, least):
    """Removes the logits below `least` in the lanes in which it is on."""

    def some():
        is_removed = _column(is_on) & (logits < least(logits))
        return jnp.where(is_removed, REMOVED, logits)

    return jax.lax.cond(is_on.any(), some, lambda: logits)


def _least_of_top_k(logits, top_k):
    return threshold(logits, lambda above: above.sum(1) < jnp.maximum(top_k, 1))


def _least_of_top_p(logits, top_p):
    p = jax.nn.softmax(logits, axis=1)
    return threshold(logits, lambda above: jnp.where(above, p, 0.0).sum(1) < top_p)


def _column(x):
    return x[:, None]
