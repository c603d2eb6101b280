"""Policy gradients without a value function: K samples a prompt are each other's baseline.

Advantages come from `rewards` [p, k] (one per response), losses take one advantage per response,
[b] with b = p k.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from rlhfjax.algos.kl import k3
from rlhfjax.algos.log_ratios import clamped
from rlhfjax.algos.masked import divide, sequence_mean, sequence_token_mean, token_mean
from rlhfjax.algos.policy import log_ratio, ratio_metrics
from rlhfjax.types import Loss, Scalar


def _group_size(rewards: Float[Array, "p k"]) -> int:
    if rewards.shape[1] < 2:
        raise ValueError("a group baseline needs at least 2 responses a prompt, got 1")
    return rewards.shape[1]


def _deviations(rewards: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """r_i - mean_j r_j, exactly 0 for equal rewards: a rounded mean would leave 1e-7 r, which GRPO divides by eps."""
    rewards = rewards - rewards[:, :1]
    return rewards - jnp.mean(rewards, axis=1, keepdims=True)


def rloo_advantages(rewards: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """A_i = r_i - mean_{j != i} r_j = k / (k - 1) (r_i - mean_j r_j): REINFORCE, leave-one-out.

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
    """A_i = (r_i - mean_j r_j) / (std_j r_j + eps) - (c_i - mean_j c_j).

    The std is that of the task's reward alone. With the KL in it, a group of equal rewards would
    have unit advantages from whatever its KLs are.

    Args:
      rewards: r, without a KL.
      penalties: c, beta times the KL of each response, in units of the advantage, where a KL is in
        the reward; None: there is none.
      eps: added to the std. The paper does not say which std; this is the unbiased one (k - 1) of
        TRL and veRL, eps as in TRL.

    Source: Shao et al. 2024, section 4.1.2; the paper has the KL in the loss.
    """
    _group_size(rewards)
    deviations = _deviations(rewards)
    advantages = deviations / (jnp.std(deviations, axis=1, keepdims=True, ddof=1) + eps)
    return advantages if penalties is None else advantages - _deviations(penalties)


def dr_grpo_advantages(rewards: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """A_i = r_i - mean_j r_j: without the std, which gives easy and hard prompts (small std) more weight.

    Source: Liu et al. 2025, "Understanding R1-Zero-like training".
    """
    _group_size(rewards)
    return _deviations(rewards)


def moving_baseline(
    baseline: Scalar, rewards: Float[Array, "b"], *, decay: Scalar
) -> Float[Array, ""]:
    """b <- decay b + (1 - decay) mean r: REINFORCE's baseline, to be subtracted from the *next* batch's rewards.

    Source: Williams 1992 (reinforcement comparison).
    """
    return decay * baseline + (1 - decay) * jnp.mean(rewards)


def informative(rewards: Float[Array, "p k"]) -> Bool[Array, "p"]:
    """Prompts whose K rewards are not all equal: DAPO's dynamic sampling keeps only these (the others give A = 0).

    Rewards are without a KL, which differs between any two responses and makes neither the better.

    Source: Yu et al. 2025 (DAPO), eq. 11.
    """
    return jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)


def rloo_loss(
    logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    mask: Float[Array, "b t"],
) -> Loss:
    """-A_i log pi(y_i | x), the *sum* over the response's tokens, mean over responses.

    A response is one action of a bandit; with `moving_baseline` for the group's mean, this is REINFORCE with baseline.

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
    """-min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i), and 1 where the clipped term is the active one."""
    ratio = jnp.exp(log_ratios)
    advantages = lax.stop_gradient(advantages)[:, None]
    plain, clipped = (
        -advantages * ratio,
        -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high),
    )
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
    """mean_i 1/|o_i| sum_t ( -min(rho_t A_i, clip(rho_t, 1 -+ clip) A_i) + beta k3_t ).

    k3 is differentiated as it stands, as the paper does: on-policy its gradient is that of KL(rho || pi), not of
    KL(pi || rho). `kl_loss_k3`, added to `dapo_loss`, has the latter.

    Args:
      logprobs: of the policy that is trained; old_logprobs: of the one that sampled; ref_logprobs: of the reference.
      advantages: one a response, a constant.
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
    kept, ref_kept = (
        jnp.where(mask > 0, logprobs, 0),
        jnp.where(mask > 0, ref_logprobs, 0),
    )
    kl = k3(kept, ref_kept)
    total, weight = sequence_token_mean(surrogate + beta * kl, mask)
    metrics = {
        "loss": (total, weight),
        "kl": token_mean(kl, mask),
        "kl_clamped": clamped(jnp.minimum(kept - ref_kept, 0), mask),
        "clip_fraction": token_mean(clipped, mask),
        **ratio_metrics(log_ratios, mask),
    }
    return divide(total, weight), metrics


def dr_grpo_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b"],
    mask: Float[Array, "b t"],
    *,
    clip: float,
    length: int,
) -> Loss:
    """mean_i 1/length sum_t -min(rho_t A_i, clip(rho_t, 1 -+ clip) A_i), length a constant (the sampler's limit).

    Dividing by |o_i| instead, as GRPO does, makes long wrong answers cheap.

    Source: Liu et al. 2025, "Understanding R1-Zero-like training".
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    surrogate, clipped = clipped_surrogate(
        log_ratios, advantages, clip_low=clip, clip_high=clip
    )
    total, responses = sequence_mean(surrogate, mask)
    metrics = {
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
    """-min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i), mean over *tokens* of all responses.

    clip_high (0.28) above clip_low (0.2) leaves rare tokens room to become likely. No KL term.

    Source: Yu et al. 2025 (DAPO), eq. 8.
    """
    log_ratios = log_ratio(logprobs, old_logprobs, mask)
    surrogate, clipped = clipped_surrogate(
        log_ratios, advantages, clip_low=clip_low, clip_high=clip_high
    )
    total, weight = token_mean(surrogate, mask)
    metrics = {
        "loss": (total, weight),
        "clip_fraction": token_mean(clipped, mask),
        **ratio_metrics(log_ratios, mask),
    }
    return divide(total, weight), metrics
