"""Policy gradients without a value function: the K responses to a prompt are each other's baseline.

Advantages come from `rewards` [p, k], one per response. Losses take one advantage per response, [b]
with b = p k.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from rlhfjax.algos.kl import k3
from rlhfjax.algos.log_ratios import clamped
from rlhfjax.algos.masked import divide, sequence_mean, sequence_token_mean, token_mean
from rlhfjax.algos.policy import log_ratio, ratio_metrics, surrogate_loss
from rlhfjax.types import Loss, Metrics, Scalar


def rloo_advantages(rewards: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """Returns the advantages of REINFORCE leave-one-out (RLOO).

      A_i = r_i - mean_{j != i} r_j = k / (k - 1) (r_i - mean_j r_j)

    The baseline does not depend on response i, so that the gradient is unbiased.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (whose r_i includes -beta times the sequence KL).
    """
    k = _group_size(rewards)
    return k / (k - 1) * _deviations(rewards)


def grpo_advantages(
    rewards: Float[Array, "p k"],
    penalties: Float[Array, "p k"] | None = None,
    *,
    eps: float = 1e-4,
) -> Float[Array, "p k"]:
    """Returns the advantages of group relative policy optimization (GRPO).

      A_i = (r_i - mean_j r_j) / (std_j r_j + eps) - (c_i - mean_j c_j)

    The std is that of the task's reward only. With the KL in it, a group of equal rewards would
    have unit advantages from its KLs.

    Args:
      rewards: r, without a KL.
      penalties: c, beta times the KL of each response, in units of the advantage, if the KL is in
        the reward; else None.
      eps: added to the std. The paper does not define its std; this is the unbiased one (k - 1) of
        TRL and veRL, with TRL's eps.

    Source: Shao et al. 2024, section 4.1.2; the paper has the KL in the loss.
    """
    _group_size(rewards)
    deviations = _deviations(rewards)
    advantages = deviations / (jnp.std(deviations, axis=1, keepdims=True, ddof=1) + eps)
    return advantages if penalties is None else advantages - _deviations(penalties)


def dr_grpo_advantages(rewards: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """Returns the advantages of Dr. GRPO, A_i = r_i - mean_j r_j.

    GRPO's division by the std gives more weight to easy and hard prompts, whose std is small.

    Source: Liu et al. 2025, "Understanding R1-Zero-like training".
    """
    _group_size(rewards)
    return _deviations(rewards)


def _group_size(rewards: Float[Array, "p k"]) -> int:
    size = rewards.shape[1]
    if size < 2:
        raise ValueError(
            "a group baseline needs at least 2 responses per prompt, got 1"
        )
    return size


def _deviations(rewards: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """Returns r_i - mean_j r_j, exactly 0 for equal rewards.

    A rounded mean would leave 1e-7 r, which GRPO divides by eps.
    """
    rewards = rewards - rewards[:, :1]
    return rewards - jnp.mean(rewards, axis=1, keepdims=True)


def moving_baseline(
    baseline: Scalar,
    rewards: Float[Array, "b"],
    *,
    decay: Scalar,
) -> Float[Array, ""]:
    """Returns decay b + (1 - decay) mean r, the baseline of REINFORCE for the *next* batch.

    Source: Williams 1992 (reinforcement comparison).
    """
    return decay * baseline + (1 - decay) * jnp.mean(rewards)


def informative(rewards: Float[Array, "p k"]) -> Bool[Array, "p"]:
    """Returns whether the K rewards of each prompt are not all equal.

    DAPO's dynamic sampling keeps only these prompts; the others have A = 0. Rewards are without a
    KL, which differs between any two responses and makes neither the better.

    Source: Yu et al. 2025 (DAPO), eq. 11.
    """
    return jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)


def rloo_loss(
    logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    mask: Float[Array, "b t"],
) -> Loss:
    """Returns -A_i log pi(y_i | x), the *sum* over a response's tokens, mean over responses.

    A response is one action of a bandit. With `moving_baseline` in place of the group's mean this
    is REINFORCE with a baseline.

    Source: Ahmadian et al. 2024.
    """
    advantages = lax.stop_gradient(advantages)[:, None]
    total, weight = sequence_mean(-advantages * jnp.where(mask > 0, logprobs, 0), mask)
    return divide(total, weight), {"loss": (total, weight)}


def clipped_surrogate(
    log_ratios: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns the clipped surrogate per token, and 1 where the clipped term is the active one.

    -min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i)
    """
    ratio = jnp.exp(log_ratios)
    advantages = lax.stop_gradient(advantages)[:, None]
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.maximum(plain, clipped), (clipped > plain).astype(ratio.dtype)


def grpo_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    mask: Float[Array, "b t"],
    *,
    clip: float,
    beta: Scalar,
) -> Loss:
    """Returns the GRPO loss: clipped surrogate plus KL, averaged over tokens, then responses.

      mean_i 1/|o_i| sum_t ( -min(rho_t A_i, clip(rho_t, 1 -+ clip) A_i) + beta k3_t )

    k3 is differentiated as it stands, like in the paper: on-policy its gradient is that of
    KL(rho || pi), not of KL(pi || rho). `kl_loss_k3`, added to `dapo_loss`, has the latter.

    Args:
      logprobs: of the policy that is trained.
      old_logprobs: of the policy that sampled.
      ref_logprobs: of the reference.
      advantages: one per response, a constant.
      mask: 1 on response tokens; |o_i| is their number.
      clip: epsilon, not stated in the paper (0.2 in TRL).
      beta: KL coefficient, 0.04.

    Returns:
      mean over responses; metrics loss (weight: responses), kl (k3), kl_clamped (share of tokens
      where k3 is clamped), clip_fraction and those of `ratio_metrics`.

    Source: Shao et al. 2024, eq. 3 and 4.
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    surrogate, clipped = clipped_surrogate(
        log_ratios, advantages, clip_low=clip, clip_high=clip
    )
    logprobs = jnp.where(mask > 0, logprobs, 0)
    ref_logprobs = jnp.where(mask > 0, ref_logprobs, 0)
    kl = k3(logprobs, ref_logprobs)
    total, weight = sequence_token_mean(surrogate + beta * kl, mask)
    kl_metrics: Metrics = {
        "kl": token_mean(kl, mask),
        "kl_clamped": clamped(jnp.minimum(logprobs - ref_logprobs, 0), mask),
    }
    mean, metrics = surrogate_loss(total, weight, clipped, log_ratios, mask)
    return mean, metrics | kl_metrics


def dr_grpo_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    mask: Float[Array, "b t"],
    *,
    clip: float,
    length: int,
) -> Loss:
    """Returns the Dr. GRPO loss: clipped surrogate, divided by a constant length.

      mean_i 1/length sum_t -min(rho_t A_i, clip(rho_t, 1 -+ clip) A_i)

    length is the sampler's limit. Dividing by |o_i|, as GRPO does, makes long wrong responses
    cheap.

    Source: Liu et al. 2025, "Understanding R1-Zero-like training".
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    surrogate, clipped = clipped_surrogate(
        log_ratios, advantages, clip_low=clip, clip_high=clip
    )
    total, responses = sequence_mean(surrogate, mask)
    metrics: Metrics = {
        "loss": (total, responses * length),
        "clip_fraction": token_mean(clipped, mask),
        **ratio_metrics(log_ratios, mask),
    }
    return divide(total, responses * length), metrics


def dapo_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    mask: Float[Array, "b t"],
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """Returns the DAPO loss: clipped surrogate, mean over the *tokens* of all responses.

      -min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i)

    clip_high (0.28) above clip_low (0.2) leaves rare tokens room to become likely. There is no KL
    term.

    Source: Yu et al. 2025 (DAPO), eq. 8.
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    surrogate, clipped = clipped_surrogate(
        log_ratios, advantages, clip_low=clip_low, clip_high=clip_high
    )
    total, weight = token_mean(surrogate, mask)
    return surrogate_loss(total, weight, clipped, log_ratios, mask)
