"""From the score of a response to the rewards of its tokens.

The order is: truncate -> score -> missing EOS and rejection -> clip -> token_rewards -> whiten. A
penalty added after whitening would have other units than the rewards.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from rlhfjax.algos.masked import last_token
from rlhfjax.types import Scalar


def token_rewards(
    score: Float[Array, "b"],
    kl: Float[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    beta: Scalar,
) -> Float[Array, "b t"]:
    """Returns r_t = -beta kl_t + [t is the last response token] score.

    Args:
      score: of the whole response, in reward units.
      kl: per-token estimate of KL(policy || reference), nats; normally k1, whose sum is log pi/rho
        of the response.
      mask: 1 on response tokens.
      beta: reward units per nat.

    Returns:
      rewards, 0 where the mask is 0. A row without response tokens has only zeros.

    Source: Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2.
    """
    return jnp.where(mask > 0, score[:, None] * last_token(mask) - beta * kl, 0)


def is_any(tokens: Int[Array, "*n"], ids: tuple[int, ...]) -> Bool[Array, "*n"]:
    """Returns whether each token is one of the ids, of which there is at least one."""
    first, *others = ids
    found = tokens == first
    for token_id in others:
        found |= tokens == token_id
    return found


def has_token(
    tokens: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    *token_ids: int,
) -> Bool[Array, "b"]:
    """Returns whether one of `token_ids` is among the counted tokens of each row.

    With the ids that end a response it is whether the response ended.
    """
    return jnp.any(is_any(tokens, token_ids) & (mask > 0), axis=1)


def replace_missing_eos(
    score: Float[Array, "b"],
    ended: Bool[Array, "b"],
    *,
    value: Scalar,
) -> Float[Array, "b"]:
    """Returns score if the response ended, `value` (-1 in the paper) if it hit the length limit.

    Source: Huang et al. 2024 (N+ details), detail 23: the "EOS trick".
    """
    return jnp.where(ended, score, value)


def penalize_missing_eos(
    score: Float[Array, "b"],
    ended: Bool[Array, "b"],
    *,
    penalty: Scalar,
) -> Float[Array, "b"]:
    """Returns score if the response ended, score - penalty if it hit the length limit.

    Source: TRL's `missing_eos_penalty`.
    """
    return jnp.where(ended, score, score - penalty)


def clip_score(score: Float[Array, "b"], *, limit: Scalar) -> Float[Array, "b"]:
    """Returns min(max(score, -limit), limit)."""
    return jnp.clip(score, -limit, limit)


def truncate_mask(
    tokens: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    token_id: int,
    after: int,
) -> tuple[Float[Array, "b t"], Bool[Array, "b"]]:
    """Ends each response after the first `token_id` at response position >= `after` (from 0).

    The reward model scores the truncated response; Ziegler's policy loss is of all sampled tokens.

    Returns:
      the mask of the truncated response, and whether such a token was found.

    Source: Ziegler et al. 2019, section 2.2; lm-human-preferences `postprocess_fn_from_hparams`
    (token 13, after 16).
    """
    position = jnp.cumsum(mask > 0, axis=1) - 1
    stop = (tokens == token_id) & (mask > 0) & (position >= after)
    passed = jnp.cumsum(stop, axis=1) - stop
    return jnp.where(passed > 0, 0, mask), jnp.any(stop, axis=1)


def reject(
    score: Float[Array, "b"],
    accepted: Bool[Array, "b"],
    *,
    value: Scalar,
) -> Float[Array, "b"]:
    """Returns score if the response is accepted, the fixed `value` (-1) if not.

    In the paper a response without a full stop in 16..24 scores -1, whatever its text is.

    Source: Ziegler et al. 2019, section 2.2; lm-human-preferences `penalty_reward_value`.
    """
    return jnp.where(accepted, score, value)


def overlong_penalty(
    mask: Float[Array, "b t"],
    *,
    limit: int,
    soft: int,
) -> Float[Array, "b"]:
    """Returns the length penalty that is added to the score.

    It is 0 up to limit - soft tokens, then falls linearly to -1 at limit, and stays -1 beyond.

    Source: Yu et al. 2025 (DAPO), eq. 13 (limit 20480, soft 4096).
    """
    length = jnp.sum(mask > 0, axis=1)
    penalty = jnp.clip((limit - soft - length) / soft, -1, 0)
    return penalty.astype(mask.dtype)
