"""Masked reductions. A mask is float: 0 where an entry does not count, else 1 (or a weight).

Masked entries never reach a result, even if they are NaN or infinite. An all-zero mask gives 0.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

Mean = tuple[Float[Array, ""], Float[Array, ""]]
"""(sum, weight), the `Metric` of a mean."""


def divide(total: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns total / weight, and 0 where weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def masked_sum(
    x: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    axis: int | None = None,
) -> Float[Array, "..."]:
    """Returns sum_i m_i x_i over `axis`, or over all entries."""
    return jnp.sum(jnp.where(mask > 0, x, 0) * mask, axis=axis)


def masked_mean(
    x: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    axis: int | None = None,
) -> Float[Array, "..."]:
    """Returns sum_i m_i x_i / sum_i m_i over `axis` or all entries; 0 where nothing counts."""
    total = masked_sum(x, mask, axis)
    return divide(total, jnp.sum(mask, axis=axis))


def masked_var(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Returns sum_i m_i (x_i - mean)^2 / sum_i m_i over all entries: the *biased* variance.

    It is divided by n and not by n - 1, like tf.nn.moments, with which lm-human-preferences
    whitens, and unlike torch.var. The variance of one entry is 0.
    """
    # Masked before squaring: an infinite masked entry would have a NaN gradient.
    x = jnp.where(mask > 0, x, 0)
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_std(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Returns the square root of `masked_var`."""
    return jnp.sqrt(masked_var(x, mask))


def masked_max(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Returns the maximum of x_i over m_i > 0; 0 if nothing counts."""
    any_counted = jnp.any(mask > 0)
    largest = jnp.max(jnp.where(mask > 0, x, -jnp.inf))
    return jnp.where(any_counted, largest, 0).astype(x.dtype)


def whiten(
    x: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    *,
    eps: float = 1e-8,
) -> Float[Array, "*n"]:
    """Returns (x - mean) / sqrt(var + eps) of the masked entries, 0 elsewhere.

    PPO whitens its *advantages* with it.

    Args:
      x: values of any shape; all masked entries share one mean and one (biased) variance.
      mask: the same shape.
      eps: added to the variance, so that one entry, or equal ones, give 0.

    Source: lm-human-preferences, utils/core.py `whiten(shift_mean=True)`; "N implementation
    details", policy detail 9.
    """
    x = jnp.where(mask > 0, x, 0)
    mean = masked_mean(x, mask)
    return jnp.where(mask > 0, (x - mean) * lax.rsqrt(masked_var(x, mask) + eps), 0)


def whiten_keep_mean(
    x: Float[Array, "*n"],
    mask: Float[Array, "*n"],
    *,
    eps: float = 1e-8,
) -> Float[Array, "*n"]:
    """Returns (x - mean) / sqrt(var + eps) + mean of the masked entries, 0 elsewhere.

    PPO whitens its *rewards* with it. Shifting the mean of rewards would change the optimum: the
    return of a longer response would change by its length times the mean.

    Source: lm-human-preferences, utils/core.py `whiten(shift_mean=False)`; "N implementation
    details", policy detail 9.
    """
    return jnp.where(mask > 0, whiten(x, mask, eps=eps) + masked_mean(x, mask), 0)


def last_token(mask: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Returns 1 at the last counted token of each row, 0 elsewhere; all 0 for an empty row."""
    index = jnp.arange(mask.shape[1])
    counted = jnp.where(mask > 0, index, -1)
    last = jnp.max(counted, axis=1, keepdims=True)
    return (index == last).astype(mask.dtype)


def weighted_mean(x: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Mean:
    """Returns (sum, weight) of the mean over all entries."""
    return masked_sum(x, weight), jnp.sum(weight)


def token_mean(x: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Mean:
    """Returns (sum, weight) of the mean over all counted tokens: long rows count more.

    PPO, language modeling and DAPO average in this way.
    """
    return weighted_mean(x, mask)


def sequence_mean(x: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Mean:
    """Returns (sum, weight) of the mean over rows of the *sum* over their tokens.

    A row without tokens has no weight.
    """
    total = masked_sum(x, mask)
    nonempty = jnp.any(mask > 0, axis=1)
    return total, jnp.sum(nonempty.astype(x.dtype))


def sequence_token_mean(x: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Mean:
    """Returns (sum, weight) of the mean over rows of the *mean* over their tokens.

    This is GRPO's 1/G sum_i 1/|o_i| sum_t. A row without tokens has no weight.
    """
    total = jnp.sum(masked_mean(x, mask, axis=1))
    nonempty = jnp.any(mask > 0, axis=1)
    return total, jnp.sum(nonempty.astype(x.dtype))
