"""Masked reductions, each once. A mask is float, 0 where an entry does not count, 1 (or a weight) where it does.

Masked entries never reach a result, NaN and infinity included; an all-zero mask gives 0, not NaN.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.types import Metric


def divide(total: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """total / weight, and 0 where weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def masked_sum(
    x: Float[Array, "*n"], mask: Float[Array, "*n"], axis: int | None = None
) -> Float[Array, "..."]:
    """sum_i m_i x_i, over `axis` or over everything."""
    return jnp.sum(jnp.where(mask > 0, x, 0) * mask, axis=axis)


def masked_mean(
    x: Float[Array, "*n"], mask: Float[Array, "*n"], axis: int | None = None
) -> Float[Array, "..."]:
    """sum_i m_i x_i / sum_i m_i, over `axis` or over everything; 0 where nothing counts."""
    return divide(masked_sum(x, mask, axis), jnp.sum(mask, axis=axis))


def masked_var(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """sum_i m_i (x_i - mean)^2 / sum_i m_i: the *biased* variance (divided by n, not n - 1), over everything.

    tf.nn.moments, which lm-human-preferences whitens with, is biased too; torch.var is not. One entry has variance 0.
    """
    x = jnp.where(
        mask > 0, x, 0
    )  # before squaring: behind the mask, infinity would have a NaN gradient
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_std(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """The square root of `masked_var` (biased)."""
    return jnp.sqrt(masked_var(x, mask))


def masked_max(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """max of x_i over m_i > 0; 0 where nothing counts."""
    return jnp.where(
        jnp.any(mask > 0), jnp.max(jnp.where(mask > 0, x, -jnp.inf)), 0
    ).astype(x.dtype)


def whiten(
    x: Float[Array, "*n"], mask: Float[Array, "*n"], *, eps: float = 1e-8
) -> Float[Array, "*n"]:
    """(x - mean) / sqrt(var + eps) over the masked entries, 0 elsewhere: what PPO does to *advantages*.

    Args:
      x: values, any shape; all masked entries share one mean and one (biased) variance.
      mask: same shape.
      eps: added to the variance, so that one entry, or equal ones, give 0.

    Source: lm-human-preferences, utils/core.py `whiten(shift_mean=True)`; "N implementation details", policy detail 9.
    """
    x = jnp.where(mask > 0, x, 0)
    mean = masked_mean(x, mask)
    return jnp.where(mask > 0, (x - mean) * lax.rsqrt(masked_var(x, mask) + eps), 0)


def whiten_keep_mean(
    x: Float[Array, "*n"], mask: Float[Array, "*n"], *, eps: float = 1e-8
) -> Float[Array, "*n"]:
    """(x - mean) / sqrt(var + eps) + mean over the masked entries, 0 elsewhere: what PPO does to *rewards*.

    Shifting the mean of rewards would change what is optimal (the return of a longer response would change by its
    length times the mean), hence the mean stays.

    Source: lm-human-preferences, utils/core.py `whiten(shift_mean=False)`; "N implementation details", policy detail 9.
    """
    return jnp.where(mask > 0, whiten(x, mask, eps=eps) + masked_mean(x, mask), 0)


def last_token(mask: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """1 at the last counted slot of each row, 0 elsewhere; all 0 for a row without any."""
    slots = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask > 0, slots, -1), axis=1, keepdims=True)
    return (slots == last).astype(mask.dtype)


def token_mean(x: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Metric:
    """(sum, weight) of the mean over all counted tokens: long rows count more. PPO, language modeling, DAPO."""
    return masked_sum(x, mask), jnp.sum(mask)


def sequence_mean(x: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Metric:
    """(sum, weight) of the mean over rows of the *sum* over their tokens. A row without tokens has no weight."""
    return masked_sum(x, mask), jnp.sum(jnp.any(mask > 0, axis=1).astype(x.dtype))


def sequence_token_mean(x: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Metric:
    """(sum, weight) of the mean over rows of the *mean* over their tokens: GRPO's 1/G sum_i 1/|o_i| sum_t."""
    return jnp.sum(masked_mean(x, mask, axis=1)), jnp.sum(
        jnp.any(mask > 0, axis=1).astype(x.dtype)
    )
