"""Measures of a language model."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from rlhfjax.types import Metric


def nats_per_byte(
    nll: Float[Array, ""],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    byte_lengths: Num[Array, "v"],
) -> Metric:
    """Returns the loss per UTF-8 byte of the targets' text, which is comparable between tokenizers.

      sum_t m_t (-log pi(x_t | x_<t)) / sum_t m_t bytes(x_t);   divided by ln 2 it is bits per byte

    Special tokens have no bytes: their loss counts, per byte of the text around them.

    Args:
      nll: sum over the counted targets of -log pi, nats.
      targets: token ids.
      mask: 1 where a target counts.
      byte_lengths: bytes of text per token id, from `Tokenizer.byte_lengths`.

    Returns:
      (nats, bytes).

    Source: Gao et al. 2020, "The Pile", section 3.1 (bits per UTF-8 encoded byte).
    """
    return nll, jnp.sum(byte_lengths[targets] * mask)
