"""What a sampler returns, and the random numbers that it draws with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Samples(NamedTuple):
    """Responses, right-padded."""

    tokens: Int[Array, "b r"]  # pad_id after the end
    mask: Float[Array, "b r"]  # 1 on response tokens, the eos included
    logprobs: Float[
        Array, "b r"
    ]  # nats, of the distribution sampled from; 0 where the mask is 0

    @classmethod
    def empty(cls, b: int, r: int, pad_id: int) -> "Samples":
        return cls(
            jnp.full((b, r), pad_id, jnp.int32), jnp.zeros((b, r)), jnp.zeros((b, r))
        )


def uniforms(keys: Key[Array, " b"], steps: int) -> Float[Array, "r b"]:
    """u[i, row] = uniform(fold_in(keys[row], i)): a row's draws depend on its own key and the step alone."""

    def draw(i, key):
        return jax.random.uniform(jax.random.fold_in(key, i))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(jnp.arange(steps), keys)
