"""The rewards of a rollout: shaped scores, the KL to the reference, an annealed human reward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.algos import kl, shaping, tamer
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, WHOLE, small
from rlhfjax.rl.config import HumanConfig, KLConfig, PolicyConfig
from rlhfjax.rl.rollout import (
    Rollout,
    TokenIds,
    response_hidden,
    response_outputs,
)
from rlhfjax.sampling.config import SamplingConfig, end_ids
from rlhfjax.types import Loss, Metrics, PyTree


def shape_rewards(
    config: PolicyConfig, ids: TokenIds, scores: Float[Array, "b"], rollout: Rollout
) -> tuple[Float[Array, "b"], Bool[Array, "b"], Metrics]:
    """Returns shaped scores, whether each response ended with an eos, and metrics.

    The order is: missing eos, rejection of responses without the stop token, clipping.
    """
    mask = rollout.mask
    metrics: Metrics = {}
    ended = shaping.has_token(rollout.responses, mask, *end_ids(ids))
    value = config.missing_eos_value
    if config.missing_eos == "penalty":
        scores = shaping.penalize_missing_eos(scores, ended, penalty=value)
    elif config.missing_eos == "replace":
        scores = shaping.replace_missing_eos(scores, ended, value=value)
    if ids.stop_id is not None:
        _, accepted = shaping.truncate_mask(
            rollout.responses,
            mask,
            token_id=ids.stop_id,
            after=config.truncate.after,
        )
        scores = shaping.reject(scores, accepted, value=config.truncate.value)
        total = accepted.astype(jnp.float32).sum()
        metrics["accepted"] = (total, jnp.float32(accepted.shape[0]))
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
) -> Metrics:
    """Returns the metrics of a rollout that every policy stage logs, means over responses."""
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
    """Returns the penalty per token, and log pi(y|x) / pi_ref(y|x) per response.

    The penalty is 0 if the KL is in the loss. The log-ratio is what is logged and what an adaptive
    coefficient is steered by, whatever the estimator of the penalty.
    """
    log_ratio = kl.k1(logprobs, ref_logprobs) * mask
    if config.place == "loss":
        return jnp.zeros_like(log_ratio), kl.sequence_kl(log_ratio, mask)
    per_token = getattr(kl, config.estimator)(logprobs, ref_logprobs) * mask
    return per_token, kl.sequence_kl(log_ratio, mask)


def reference_kl(
    config: SamplingConfig, model: Model, reference: PyTree, rollout: Rollout
) -> Float[Array, "b"]:
    """Returns log pi(y|x) / pi_ref(y|x) per response, nats, given the reference's parameters."""
    ref_logprobs = response_outputs(config, model, reference, rollout).logprobs
    return kl.sequence_kl(kl.k1(rollout.logprobs, ref_logprobs), rollout.mask)


def vocabulary_kl(
    config: SamplingConfig,
    model: Model,
    params: PyTree,
    reference: PyTree,
    rollout: Rollout,
) -> Float[Array, "b"]:
    """Returns sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)) per response, nats.

    Each term is exact: a sum over the vocabulary at the sampling temperature, in float32. Of a
    policy's own responses it has the expectation of `reference_kl`, with less variance.
    """
    rows = (rollout.tokens, rollout.attention_mask, rollout.mask.shape[1])
    hidden, _ = response_hidden(model, params, *rows)
    ref_hidden, _ = response_hidden(model, reference, *rows)
    per_token = model.vocabulary_kl(
        params, hidden, reference, ref_hidden, config.temperature
    )
    return kl.sequence_kl(per_token, rollout.mask)


def kl_loss(config: KLConfig, logprobs: Float[Array, "b r"], batch: Any) -> Loss:
    """Returns the KL to the reference as a loss, with kl_clamped if its estimator has a clamp.

    The weight of the loss is the number of responses for `sequence`, of tokens for the others.
    """
    old, ref, mask = batch.logprobs, batch.ref_logprobs, batch.mask
    losses = {
        "k1": lambda: kl.kl_loss_k1(logprobs, old, ref, mask),
        "k2": lambda: kl.kl_loss_k2(logprobs, ref, mask),
        "k3": lambda: kl.kl_loss_k3(logprobs, old, ref, mask),
        "sequence": lambda: kl.kl_loss_sequence(logprobs, ref, mask),
    }
    scalar, metrics = losses[config.estimator]()
    return scalar, {name: metric for name, metric in metrics.items() if name != "kl"}


def add_human_reward(
    config: HumanConfig, scores: Any, human: Any, step: Any
) -> tuple[Any, Metrics]:
    """Returns R + w H per response, with w annealed by the iteration; and the means of H and w."""
    add = functools.partial(_add_human_reward, config)
    return small(add, [ROWS, WHOLE])(scores, human, step)


def _add_human_reward(
    config: HumanConfig, scores: Any, human: Any, step: jax.Array
) -> tuple[jax.Array, Metrics]:
    weight = tamer.annealed(
        jnp.float32(config.weight), factor=jnp.float32(config.factor), iteration=step
    )
    scores = jnp.asarray(scores, jnp.float32)
    human = jnp.asarray(human, jnp.float32)
    metrics = {
        "human": (human.sum(), jnp.float32(human.size)),
        "human_weight": (weight, jnp.ones(())),
    }
    return tamer.reward_addition(scores, human, weight=weight), metrics
