"""TAMER: a human's scalar feedback, given a moment late, as a reward to be learnt by regression; and TAMER+RL.

Times are seconds; step i lasts from starts[i] to ends[i]; feedback f is given at times[f].
"""

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammainc, gammaincc
from jaxtyping import Float, Int

from rlhfjax.algos.masked import divide, masked_sum
from rlhfjax.types import Loss, Scalar


def uniform_credit(
    starts: Float[Array, "t"],
    ends: Float[Array, "t"],
    times: Float[Array, "f"],
    *,
    low: float,
    high: float,
) -> Float[Array, "f t"]:
    """c_{f,i} = share of the delays in [low, high] that point into step i: human reaction is uniformly late.

    c_{f,i} = |[starts_i, ends_i] and [times_f - high, times_f - low]| / (high - low)

    Source: Knox & Stone 2009 (0.2 to 0.8 s).
    """
    first = jnp.maximum(starts[None, :], times[:, None] - high)
    last = jnp.minimum(ends[None, :], times[:, None] - low)
    return jnp.maximum(last - first, 0) / (high - low)


def gamma_credit(
    starts: Float[Array, "t"],
    ends: Float[Array, "t"],
    times: Float[Array, "f"],
    *,
    shape: float,
    scale: float,
) -> Float[Array, "f t"]:
    """c_{f,i} = F(times_f - starts_i) - F(times_f - ends_i), F the CDF of a Gamma(shape, scale) delay.

    Past the mean delay it is a difference of 1 - F: of two numbers near 1 nothing would be left.

    Source: Knox & Stone 2009.
    """
    longest = jnp.maximum(times[:, None] - starts[None, :], 0) / scale
    shortest = jnp.maximum(times[:, None] - ends[None, :], 0) / scale
    early = gammainc(shape, longest) - gammainc(shape, shortest)
    late = gammaincc(shape, shortest) - gammaincc(shape, longest)
    return jnp.where(shortest > shape, late, early)


def tamer_loss(
    predictions: Float[Array, "t"],
    credit: Float[Array, "f t"],
    feedback: Float[Array, "f"],
    weight: Float[Array, "f"],
) -> Loss:
    """(h_f - sum_i c_{f,i} H(s_i, a_i))^2, mean over feedback: one signal is explained by the credited steps together.

    Args:
      predictions: H(s_i, a_i) of each step.
      credit: c from `uniform_credit` or `gamma_credit`.
      feedback: h, the human's scalar.
      weight: 1 on feedback that exists.

    Source: Knox & Stone 2009.
    """
    error = feedback - credit @ predictions
    total, count = masked_sum(error**2, weight), jnp.sum(weight)
    return divide(total, count), {
        "loss": (total, count),
        "error": (masked_sum(jnp.abs(error), weight), count),
    }


def deep_tamer_loss(
    predictions: Float[Array, "t"],
    credit: Float[Array, "f t"],
    feedback: Float[Array, "f"],
    weight: Float[Array, "f"],
) -> Loss:
    """sum_{f,i} c_{f,i} (H(s_i, a_i) - h_f)^2 / sum_{f,i} c_{f,i}: every credited step is worth the signal on its own.

    Source: Warnell et al. 2018 (Deep TAMER).
    """
    credit = credit * weight[:, None]
    error = predictions[None, :] - feedback[:, None]
    total, count = masked_sum(error**2, credit), jnp.sum(credit)
    return divide(total, count), {
        "loss": (total, count),
        "error": (masked_sum(jnp.abs(error), credit), count),
    }


def reward_addition(
    reward: Float[Array, "..."], human: Float[Array, "..."], *, weight: Scalar
) -> Float[Array, "..."]:
    """R'(s, a) = R(s, a) + weight H(s, a): TAMER+RL, method 1; the weight is annealed to 0.

    Source: Knox & Stone 2010.
    """
    return reward + weight * human


def annealed(
    weight: Scalar, *, factor: Scalar, iteration: Int[Array, ""] | int
) -> Scalar:
    """weight factor^iteration: multiplied by `factor` (0.98 and the like) once per iteration.

    Source: Knox & Stone 2010, who anneal per episode.
    """
    return weight * factor**iteration
