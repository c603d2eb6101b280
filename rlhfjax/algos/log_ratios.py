"""Log ratios of probabilities, clamped before they are exponentiated: float32 ends at e^88.7.

A clamp has no gradient beyond its limit. Every loss with a clamp has a metric with the share of
clamped tokens.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from rlhfjax.algos.masked import token_mean
from rlhfjax.types import Metric

LIMIT = 80.0
"""Nats. e^80 = 5.5e34 leaves room for an advantage and for a sum over some thousand tokens."""


def clamp(
    log_ratios: Float[Array, "*n"],
    *,
    limit: float = LIMIT,
) -> Float[Array, "*n"]:
    """Returns min(max(x, -limit), limit).

    Within the limit x keeps its bits and has gradient 1; beyond it the gradient is 0.
    """
    return jnp.clip(log_ratios, -limit, limit)


def clamped(log_ratios: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Metric:
    """Returns the share of counted tokens whose log ratio is at or beyond LIMIT."""
    at_limit = jnp.abs(log_ratios) >= LIMIT
    return token_mean(at_limit.astype(mask.dtype), mask)
