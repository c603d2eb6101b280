"""Measures of a language model."""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from rlhfjax.algos.masked import divide


def bits_per_byte(nll: Float[Array, ""], n_bytes: Float[Array, ""]) -> Float[Array, ""]:
    """sum of -log pi over a text (nats) / (ln 2 * its UTF-8 bytes): comparable between tokenizers."""
    return divide(jnp.asarray(nll), jnp.asarray(n_bytes)) / math.log(2)
