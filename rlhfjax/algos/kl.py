"""KL to the reference: estimators from samples, losses with the KL's gradient, and a controller.

Throughout, tokens are sampled from the policy pi. `logprobs` are log pi(y_t | x, y_<t) and
`ref_logprobs` those of the reference rho, both at the sampling temperature.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from rlhfjax.algos.log_ratios import LIMIT, clamp
from rlhfjax.algos.masked import divide, masked_sum, token_mean
from rlhfjax.types import Loss, Metrics, Scalar


def k1(
    logprobs: Float[Array, "*n"],
    ref_logprobs: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Returns k1 = log pi/rho. E_pi[k1] = KL(pi || rho); it may be negative; high variance.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return _log_ratio(logprobs, ref_logprobs)


def k2(
    logprobs: Float[Array, "*n"],
    ref_logprobs: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Returns k2 = (log pi/rho)^2 / 2. It is never negative and biased.

    In expectation its *gradient* is that of the KL.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return _log_ratio(logprobs, ref_logprobs) ** 2 / 2


def k3(
    logprobs: Float[Array, "*n"],
    ref_logprobs: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Returns k3 = rho/pi - 1 - log rho/pi. E_pi[k3] = KL(pi || rho).

    It is never negative and has low variance. log pi/rho below -80 counts as -80, so that rho/pi is
    finite; the gradient there is 0.

    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024 (GRPO), eq. 4.
    """
    return _k3(_log_ratio(logprobs, ref_logprobs), LIMIT)


def _log_ratio(
    logprobs: Float[Array, "*n"],
    ref_logprobs: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Returns log pi/rho.

    Raises:
      TypeError: logprobs are in half precision, with 3 significant digits: their difference is
        noise.
    """
    for x in (logprobs, ref_logprobs):
        if jnp.finfo(x.dtype).bits < 32:
            raise TypeError(f"KL needs logprobs in float32 or wider, got {x.dtype}")
    return logprobs - ref_logprobs


def _k3(log_ratio: Float[Array, "*n"], limit: float) -> Float[Array, "*n"]:
    # Only the negative side is clamped; the other is linear and keeps its gradient.
    log_ratio = jnp.maximum(log_ratio, -limit)
    return jnp.expm1(-log_ratio) + log_ratio


def sequence_kl(
    kl: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, "b"]:
    """Returns sum_t kl_t over the response, nats; of k1, log pi(y|x)/rho(y|x).

    Its mean is the input of `adaptive_kl`.
    """
    return masked_sum(kl, mask, axis=1)


def adaptive_kl(
    beta: Scalar,
    mean_sequence_kl: Scalar,
    *,
    target: float,
    horizon: float,
    episodes: int,
    limit: float = 0.2,
) -> Float[Array, ""]:
    """Returns the next KL coefficient of the adaptive controller.

      beta <- beta (1 + clip(KL / target - 1, -limit, limit) episodes / horizon)

    Args:
      beta: the KL coefficient so far.
      mean_sequence_kl: mean over the batch of `sequence_kl` to the *reference*, nats; not a mean
        over tokens, and not the approximate KL between two PPO iterates.
      target: nats per sequence.
      horizon: episodes over which beta can change by about the factor e^limit. The paper's K_beta
        is episodes / horizon (0.1), so scale it with the batch: 10 to 20 batches.
      episodes: in this batch.
      limit: of the relative error.

    Source: Ziegler et al. 2019, section 2.2; lm-human-preferences `AdaptiveKLController.update`.
    """
    error = jnp.clip(jnp.asarray(mean_sequence_kl) / target - 1, -limit, limit)
    return beta * (1 + error * episodes / horizon)


def kl_loss_k1(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns the mean over tokens of (pi/pi_old) k1, whose gradient is that of the KL.

      E[(k1 + 1) grad log pi] = grad KL

    Differentiating k1 alone gives E[grad log pi] = 0: no penalty at all. The ratio, 1 in value at
    pi = pi_old, carries the score-function term, and off-policy the importance weight. The gradient
    is that of the token-level KL at the visited states; see `kl_loss_sequence` for the effect on
    later states.

    Source: Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL".
    """
    return _ratio_weighted(
        lambda log_ratio: log_ratio, logprobs, old_logprobs, ref_logprobs, mask
    )


def kl_loss_k2(
    logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns the mean over tokens of k2, whose on-policy gradient is that of the KL.

      E[log(pi/rho) grad log pi] = grad KL

    Its *value* is not the KL; the metric "kl" is (k1).

    Source: Schulman 2020; Tang & Munos 2025.
    """
    logprobs = jnp.where(mask > 0, logprobs, 0)
    ref_logprobs = jnp.where(mask > 0, ref_logprobs, 0)
    total, weight = token_mean(k2(logprobs, ref_logprobs), mask)
    mean = divide(total, weight)
    kl = token_mean(k1(logprobs, ref_logprobs), mask)
    return mean, {"loss": (total, weight), "kl": kl}


def kl_loss_k3(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns the mean over tokens of (pi/pi_old) k3, whose gradient is that of the KL.

    It has less variance than `kl_loss_k1`. k3 differentiated alone, as GRPO does, has on-policy the
    gradient of the *other* KL(rho || pi): see `grpo_loss`.

    Source: DeepSeek-V3.2 (2025), "unbiased KL estimate"; Tang & Munos 2025.
    """
    estimator = functools.partial(_k3, limit=HALF)
    return _ratio_weighted(
        estimator, logprobs, old_logprobs, ref_logprobs, mask, lowest=-HALF
    )


# Nats. Where a ratio multiplies another, each has half of the exponent.
HALF = LIMIT / 2


def _ratio_weighted(
    estimator: Callable[[Array], Array],
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    lowest: float = -jnp.inf,
) -> Loss:
    """Returns the mean over tokens of (pi/pi_old) estimator(log pi/rho).

    Metrics loss, kl (the estimate alone), kl_clamped (share of tokens with a clamp in either).

    Args:
      lowest: where the estimator clamps log pi/rho.
    """
    logprobs, old_logprobs, ref_logprobs = (
        jnp.where(mask > 0, x, 0) for x in (logprobs, old_logprobs, ref_logprobs)
    )
    log_ratio = _log_ratio(logprobs, ref_logprobs)
    moved = logprobs - lax.stop_gradient(old_logprobs)
    kl = estimator(log_ratio)
    ratio = jnp.exp(clamp(moved, limit=HALF))
    total, weight = token_mean(ratio * kl, mask)
    is_clamped = (jnp.abs(moved) >= HALF) | (log_ratio <= lowest)
    metrics: Metrics = {
        "loss": (total, weight),
        "kl": token_mean(kl, mask),
        "kl_clamped": token_mean(is_clamped.astype(mask.dtype), mask),
    }
    return divide(total, weight), metrics


def kl_loss_sequence(
    logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns the mean over responses of log pi(y|x)/rho(y|x), the KL of whole sequences.

    Its on-policy gradient is exact:
      grad KL = E[sum_t (sum_{s >= t} k1_s) grad log pi_t]
    Each token is charged for the KL of all later tokens, like by a KL in the reward with gamma = 1.

    Source: the policy-gradient theorem with reward -k1 (Sutton & Barto, 2nd ed., section 13.3).
    """
    logprobs = jnp.where(mask > 0, logprobs, 0)
    kl = k1(logprobs, jnp.where(mask > 0, ref_logprobs, 0)) * mask
    to_go = jnp.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
    score = (logprobs - lax.stop_gradient(logprobs)) * lax.stop_gradient(to_go)
    total = masked_sum(lax.stop_gradient(kl) + score, mask)
    weight = jnp.sum(jnp.any(mask > 0, axis=1).astype(total.dtype))
    return divide(total, weight), {"loss": (total, weight), "kl": (total, weight)}
