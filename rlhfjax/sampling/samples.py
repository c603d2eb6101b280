"""The sampler's result, and the random numbers that it draws tokens with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Samples(NamedTuple):
    """Responses, right-padded."""

    tokens: Int[Array, "b r"]  # pad_id after the end
    mask: Float[Array, "b r"]  # 1 on response tokens, the eos included
    # Nats, under the distribution sampled from; 0 where the mask is 0.
    logprobs: Float[Array, "b r"]

    @classmethod
    def empty(cls, b: int, r: int, pad_id: int) -> "Samples":
        """Returns responses of no token: what the decoding loop starts from."""
        tokens = jnp.full((b, r), pad_id, jnp.int32)
        return cls(tokens=tokens, mask=jnp.zeros((b, r)), logprobs=jnp.zeros((b, r)))


def uniforms(keys: Key[Array, " b"], steps: int) -> Float[Array, "r b"]:
    """Returns u[i, row] = uniform(fold_in(keys[row], i)), the number that draws token i of a row.

    It depends on the row's own key and the step alone, not on the other rows.
    """

    def draw(i, key):
        return jax.random.uniform(jax.random.fold_in(key, i))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(jnp.arange(steps), keys)
