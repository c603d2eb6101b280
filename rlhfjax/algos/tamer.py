"""TAMER and TAMER+RL: a reward model learned by regression on a human's delayed scalar feedback.

Times are in seconds. Step i lasts from starts[i] to ends[i]; feedback f is given at times[f].
"""

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammainc, gammaincc
from jaxtyping import Float, Int

from rlhfjax.algos.masked import divide, masked_sum, weighted_mean
from rlhfjax.types import Loss, Scalar


def uniform_credit(
    starts: Float[Array, "t"],
    ends: Float[Array, "t"],
    times: Float[Array, "f"],
    *,
    low: float,
    high: float,
) -> Float[Array, "f t"]:
    """Returns the credit c_{f,i} of step i for feedback f, with a uniform delay in [low, high].

      c_{f,i} = |[starts_i, ends_i] intersected with [times_f - high, times_f - low]| / (high - low)

    It is the share of the delays that point into step i.

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
    """Returns the credit c_{f,i} of step i for feedback f, with a Gamma(shape, scale) delay.

      c_{f,i} = F(times_f - starts_i) - F(times_f - ends_i),   F the CDF of the delay

    Past the mean delay it is computed as a difference of 1 - F. The difference of two F near 1
    would lose all digits.

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
    """Returns the TAMER loss, (h_f - sum_i c_{f,i} H(s_i, a_i))^2, mean over feedback.

    The credited steps together explain one feedback signal.

    Args:
      predictions: H(s_i, a_i) of each step.
      credit: c from `uniform_credit` or `gamma_credit`.
      feedback: h, the human's scalar.
      weight: 1 on feedback that exists.

    Returns:
      mean over feedback; metrics loss, error (mean of |h - sum c H|).

    Source: Knox & Stone 2009.
    """
    error = feedback - credit @ predictions
    return _squared_error(error, weight)


def deep_tamer_loss(
    predictions: Float[Array, "t"],
    credit: Float[Array, "f t"],
    feedback: Float[Array, "f"],
    weight: Float[Array, "f"],
) -> Loss:
    """Returns the Deep TAMER loss: each credited step alone predicts the feedback.

      sum_{f,i} c_{f,i} (H(s_i, a_i) - h_f)^2 / sum_{f,i} c_{f,i}

    Arguments are those of `tamer_loss`; metrics loss, error (mean of |H - h|, weight: credit).

    Source: Warnell et al. 2018 (Deep TAMER).
    """
    credit = credit * weight[:, None]
    error = predictions[None, :] - feedback[:, None]
    return _squared_error(error, credit)


def _squared_error(error: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Loss:
    total, count = weighted_mean(error**2, weight)
    mean = divide(total, count)
    absolute = masked_sum(jnp.abs(error), weight)
    return mean, {"loss": (total, count), "error": (absolute, count)}


def reward_addition(
    reward: Float[Array, "..."],
    human: Float[Array, "..."],
    *,
    weight: Scalar,
) -> Float[Array, "..."]:
    """Returns R'(s, a) = R(s, a) + weight H(s, a), method 1 of TAMER+RL.

    The weight is annealed to 0, see `annealed`.

    Source: Knox & Stone 2010.
    """
    return reward + weight * human


def annealed(
    weight: Scalar,
    *,
    factor: Scalar,
    iteration: Int[Array, ""] | int,
) -> Scalar:
    """Returns weight factor^iteration: it is multiplied by `factor` (such as 0.98) per iteration.

    Source: Knox & Stone 2010, who anneal per episode.
    """
    return weight * factor**iteration
