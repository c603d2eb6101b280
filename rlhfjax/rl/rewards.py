"""What a rollout is worth: shaped rewards, the KL to the reference, annealed human reward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.algos import kl, shaping, tamer
from rlhfjax.programs import ROWS, WHOLE, small
from rlhfjax.rl.config import HumanConfig, KLConfig, PolicyConfig
from rlhfjax.rl.rollout import Rollout, Tokens
from rlhfjax.types import Metrics


def shape_rewards(
    config: PolicyConfig, tokens: Tokens, scores: Float[Array, "b"], rollout: Rollout
) -> tuple[Float[Array, "b"], Bool[Array, "b"], Metrics]:
    """Returns scores after missing-EOS, rejection and clipping, in this order; whether each response
    ended; metrics."""
    mask, metrics = rollout.mask, {}
    ended = shaping.has_token(rollout.responses, mask, tokens.eos)
    if config.missing_eos == "penalty":
        scores = shaping.penalize_missing_eos(
            scores, ended, penalty=config.missing_eos_value
        )
    elif config.missing_eos == "replace":
        scores = shaping.replace_missing_eos(
            scores, ended, value=config.missing_eos_value
        )
    if tokens.stop is not None:
        after = config.truncate.after
        _, found = shaping.truncate_mask(
            rollout.responses, mask, token_id=tokens.stop, after=after
        )
        scores = shaping.reject(scores, found, value=config.truncate.value)
        metrics["accepted"] = (
            found.astype(jnp.float32).sum(),
            jnp.float32(found.shape[0]),
        )
    if config.score_clip:
        scores = shaping.clip_score(scores, limit=config.score_clip)
    return scores, ended, metrics


def rollout_metrics(
    scores: Float[Array, "b"],
    shaped: Float[Array, "b"],
    beta: Float[Array, ""],
    sequence_kl: Float[Array, "b"],
    ended: Bool[Array, "b"],
    mask: Float[Array, "b r"],
) -> dict[str, Any]:
    """Returns what every policy stage logs of a rollout, means over responses."""
    n = jnp.float32(mask.shape[0])
    return {
        "score": (scores.sum(), n),
        "reward": ((shaped - beta * sequence_kl).sum(), n),
        "kl": (sequence_kl.sum(), n),
        "response_length": (mask.sum(), n),
        "eos_rate": (ended.astype(jnp.float32).sum(), n),
    }


def kl_penalty(
    config: KLConfig,
    logprobs: Float[Array, "b r"],
    ref_logprobs: Float[Array, "b r"],
    mask: Float[Array, "b r"],
) -> tuple[Float[Array, "b r"], Float[Array, "b"]]:
    """Returns the penalty per token (0 where it is in the loss), and log pi(y|x) / pi_ref(y|x) per
    response.

    The second is what is logged and what a controller gets, whichever estimator the penalty has.
    """
    log_ratio = kl.k1(logprobs, ref_logprobs) * mask
    if config.place == "loss":
        return jnp.zeros_like(log_ratio), kl.sequence_kl(log_ratio, mask)
    per_token = getattr(kl, config.estimator)(logprobs, ref_logprobs) * mask
    return per_token, kl.sequence_kl(log_ratio, mask)


def kl_loss(
    config: KLConfig, logprobs: Float[Array, "b r"], batch: Any
) -> tuple[jax.Array, Metrics]:
    """Returns the KL to the reference as a loss, and kl_clamped where its estimator has a clamp.

    The loss's weight is the number of responses for `sequence`, of tokens for others.
    """
    old, ref, mask = batch.logprobs, batch.ref_logprobs, batch.mask
    losses = {
        "k1": lambda: kl.kl_loss_k1(logprobs, old, ref, mask),
        "k2": lambda: kl.kl_loss_k2(logprobs, ref, mask),
        "k3": lambda: kl.kl_loss_k3(logprobs, old, ref, mask),
        "sequence": lambda: kl.kl_loss_sequence(logprobs, ref, mask),
    }
    scalar, metrics = losses[config.estimator]()
    return scalar, {name: pair for name, pair in metrics.items() if name != "kl"}


def with_human(
    config: HumanConfig, scores: Any, human: Any, step: Any
) -> tuple[Any, Metrics]:
    """Returns R + w H of every response, w annealed by the iteration; the mean of H and w as metrics."""
    return small(functools.partial(_with_human, config), [ROWS, WHOLE])(
        scores, human, step
    )


def _with_human(
    config: HumanConfig, scores: Any, human: Any, step: jax.Array
) -> tuple[jax.Array, Metrics]:
    first, factor = jnp.float32(config.weight), jnp.float32(config.factor)
    weight = tamer.annealed(first, factor=factor, iteration=step)
    human = jnp.asarray(human, jnp.float32)
    metrics = {
        "human": (human.sum(), jnp.float32(human.size)),
        "human_weight": (weight, jnp.ones(())),
    }
    total = tamer.reward_addition(
        jnp.asarray(scores, jnp.float32), human, weight=weight
    )
    return total, metrics
