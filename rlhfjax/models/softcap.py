"""Soft caps of attention scores and logits: c tanh(x / c), as in Gemma 2."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def capped(x: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """Returns cap tanh(x / cap), or x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def slope(y: Float[Array, "*b"], cap: float) -> Float[Array, "*b"]:
    """Returns the derivative of y = capped(x, cap) by x, which is 1 - tanh^2(x / cap)."""
    return 1 - jnp.square(y / cap)
