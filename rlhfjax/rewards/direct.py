"""The losses of the direct stage by name: a policy from ranked completions, without a reward model.

All untied pairs of a prompt count together as one: each has the weight 1 / (pairs of the prompt),
so that a loss is a mean over prompts. The equations stand in `algos/direct.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from rlhfjax.algos import direct, dpo_variants
from rlhfjax.algos.masked import divide
from rlhfjax.algos.preference import pair_metrics, reward_differences, untied_pairs
from rlhfjax.data.batches import DirectBatch, PreferenceBatch
from rlhfjax.models.experts import Routing
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import Finite, NonNegative, Positive, ShareBelowHalf
from rlhfjax.types import Loss, PyTree

WITHOUT_REFERENCE = ("orpo", "simpo")
BETAS = {"simpo": 2.0, "dpo_norm": 5.0, "dpop": 0.3}
"""Default betas of the papers, where they are not 0.1."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """A loss and its hyperparameters. Hyperparameters of other losses are ignored."""

    name: Literal[
        "dpo",
        "cdpo",
        "robust",
        "dpo_norm",
        "irpo",
        "dpop",
        "ipo",
        "kto",
        "orpo",
        "simpo",
    ] = "dpo"
    """Name of the loss."""
    beta: Positive | None = None
    """Strength of the KL constraint; IPO's tau and ORPO's lambda; None: 0.1, of SimPO 2.0, of
    dpo_norm 5.0, of DPOP 0.3."""
    smoothing: ShareBelowHalf = 0.1
    """Probability that a label is wrong; cDPO and robust DPO only."""
    nll: NonNegative = 1.0
    """Weight alpha of the chosen response's negative log-likelihood per token; irpo only."""
    drop_penalty: NonNegative = 50.0
    """Weight lambda of a chosen response's drop below the reference; dpop only."""
    margin: NonNegative = 1.0
    """Gamma in units of reward; SimPO only. The paper's gamma / beta is 0.3 to 1.6."""
    desirable_weight: NonNegative = 1.0
    """Weight lambda_D of desirable completions; KTO only."""
    undesirable_weight: NonNegative = 1.0
    """Weight lambda_U of undesirable completions; KTO only."""
    desirable_above: Finite | None = None
    """Score above which a completion is desirable; KTO only; None: by the pairs of a prompt."""

    @property
    def strength(self) -> float:
        """beta, or the default of the loss."""
        if self.beta is not None:
            return self.beta
        return BETAS.get(self.name, 0.1)

    @property
    def needs_reference(self) -> bool:
        return self.name not in WITHOUT_REFERENCE


@dataclasses.dataclass(frozen=True)
class Completions:
    """The inputs of a loss: log-probabilities and scores of p prompts' k completions."""

    total: Float[Array, "p k"]  # log pi(y | x), nats
    mean: Float[Array, "p k"]  # 1/|y| log pi(y | x), nats per token
    reference: Float[Array, "p k"]  # log rho(y | x), nats; 0 where a loss has none
    scores: Float[Array, "p k"]  # a higher score is better
    valid: Float[Array, "p k"]  # 1 on completions that exist
    kl: Float[Array, ""]  # KTO's estimate over the whole batch, nats
    same: Int[Array, "p k"] | None = None  # equal where tokens are the same
    lengths: Num[Array, "p k"] | None = None  # tokens |y|, for dpo_norm


def make_loss(config: LossConfig) -> Callable[[Completions], Loss]:
    """Returns the loss that a config names, in nats per prompt.

    Among the metrics of every loss are loss, accuracy and margin, of the implicit rewards, with the
    same weights of pairs as the loss.
    """
    return functools.partial(_LOSSES[config.name], config)


def completions_of(
    batch: DirectBatch, total: jax.Array, mean: jax.Array
) -> Completions:
    """Returns the inputs of a loss.

    Args:
      total, mean: what `completion_logprobs` returns.
    """
    # A completion without tokens has log-probability 0, whatever the policy is.
    valid = batch.valid * (batch.lengths > 0)
    reference = jnp.zeros_like(total) if batch.reference is None else batch.reference
    kl = jnp.zeros(()) if batch.kl is None else batch.kl[0]
    return Completions(
        total=total,
        mean=mean,
        reference=reference,
        scores=batch.scores,
        valid=valid,
        kl=kl,
        same=batch.same,
        lengths=batch.lengths,
    )


def implicit_rewards(
    config: LossConfig, completions: Completions
) -> Float[Array, "p k"]:
    """Returns the rewards that the policy is optimal for.

    They are beta log pi/rho; dpo_norm: that per token; SimPO: beta log pi / |y|; ORPO: beta log
    odds.
    """
    if config.name == "simpo":
        return config.strength * completions.mean
    if config.name == "orpo":
        mean = jnp.where(completions.valid > 0, completions.mean, -1.0)
        odds = direct.log_odds(mean.ravel()).reshape(mean.shape)
        return config.strength * odds
    rewards = config.strength * (completions.total - completions.reference)
    if config.name == "dpo_norm":
        return rewards / jnp.maximum(_lengths(completions), 1)
    return rewards


# ------------------------------------------------------------------ losses


def pair_weights(completions: Completions) -> Float[Array, "p k k"]:
    """Returns 1 / (untied pairs of prompt p) at [p, w, l] where w is better than l, else 0."""
    pairs = untied_pairs(completions.scores, completions.valid, completions.same)
    count = pairs.sum((1, 2), keepdims=True)
    return divide(pairs, jnp.broadcast_to(count, pairs.shape))


def _pairs(
    values: Float[Array, "p k"],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Returns the values of the better and of the worse completion of all n = p k k pairs."""
    shape = (*values.shape, values.shape[1])
    better, worse = values[:, :, None], values[:, None, :]
    better, worse = jnp.broadcast_to(better, shape), jnp.broadcast_to(worse, shape)
    return better.ravel(), worse.ravel()


def _with_reference(completions: Completions) -> tuple[Float[Array, " n"], ...]:
    return (
        *_pairs(completions.total),
        *_pairs(completions.reference),
        pair_weights(completions).ravel(),
    )


def _dpo(config: LossConfig, completions: Completions) -> Loss:
    return direct.dpo_loss(*_with_reference(completions), beta=config.strength)


def _cdpo(config: LossConfig, completions: Completions) -> Loss:
    return direct.cdpo_loss(
        *_with_reference(completions), beta=config.strength, smoothing=config.smoothing
    )


def _robust(config: LossConfig, completions: Completions) -> Loss:
    return dpo_variants.robust_dpo_loss(
        *_with_reference(completions), beta=config.strength, smoothing=config.smoothing
    )


def _dpo_norm(config: LossConfig, completions: Completions) -> Loss:
    chosen, rejected = _pairs(completions.total)
    ref_chosen, ref_rejected = _pairs(completions.reference)
    chosen_length, rejected_length = _pairs(_lengths(completions))
    return dpo_variants.dpo_norm_loss(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        weight=pair_weights(completions).ravel(),
        beta=config.strength,
    )


def _lengths(completions: Completions) -> Float[Array, "p k"]:
    assert completions.lengths is not None  # `completions_of` has them
    return completions.lengths.astype(completions.total.dtype)


def _irpo(config: LossConfig, completions: Completions) -> Loss:
    chosen, rejected = _pairs(completions.total)
    ref_chosen, ref_rejected = _pairs(completions.reference)
    chosen_mean, _ = _pairs(completions.mean)
    return dpo_variants.irpo_loss(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_mean=chosen_mean,
        weight=pair_weights(completions).ravel(),
        beta=config.strength,
        alpha=config.nll,
    )


def _dpop(config: LossConfig, completions: Completions) -> Loss:
    return dpo_variants.dpop_loss(
        *_with_reference(completions),
        beta=config.strength,
        penalty=config.drop_penalty,
    )


def _ipo(config: LossConfig, completions: Completions) -> Loss:
    return direct.ipo_loss(*_with_reference(completions), beta=config.strength)


def _orpo(config: LossConfig, completions: Completions) -> Loss:
    chosen, rejected = _pairs(completions.mean)
    weight = pair_weights(completions).ravel()
    return direct.orpo_loss(chosen, rejected, weight, beta=config.strength)


def _simpo(config: LossConfig, completions: Completions) -> Loss:
    weight = pair_weights(completions).ravel()
    chosen, rejected = _pairs(completions.mean)
    return direct.simpo_loss(
        chosen, rejected, weight, beta=config.strength, margin=config.margin
    )


def _kto(config: LossConfig, completions: Completions) -> Loss:
    """Takes every completion twice, as desirable and as undesirable, with both weights."""
    good, bad = _desirability(config, completions)
    loss, metrics = direct.kto_loss(
        jnp.tile(completions.total.ravel(), 2),
        jnp.tile(completions.reference.ravel(), 2),
        jnp.concatenate([jnp.ones(good.size), jnp.zeros(bad.size)]),
        jnp.concatenate([good.ravel(), bad.ravel()]),
        kl=completions.kl,
        beta=config.strength,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    rewards = implicit_rewards(config, completions)
    differences = reward_differences(rewards, completions.valid)
    metrics |= pair_metrics(differences, pair_weights(completions))
    metrics["kl"] = (completions.kl, jnp.ones(()))
    return loss, metrics


def _desirability(
    config: LossConfig, completions: Completions
) -> tuple[Float[Array, "p k"], Float[Array, "p k"]]:
    """Returns how much each completion counts as desirable and as undesirable.

    By pairs, as the paper makes labels of preferences, the better completion of a pair is desirable
    and the worse is not, so that a completion in the middle is some of both. By a threshold every
    completion is one or the other, with weight 1.
    """
    if config.desirable_above is None:
        weights = pair_weights(completions)
        return weights.sum(2), weights.sum(1)
    above = completions.scores > config.desirable_above
    return completions.valid * above, completions.valid * ~above


_LOSSES = {
    "dpo": _dpo,
    "cdpo": _cdpo,
    "robust": _robust,
    "dpo_norm": _dpo_norm,
    "irpo": _irpo,
    "dpop": _dpop,
    "ipo": _ipo,
    "kto": _kto,
    "orpo": _orpo,
    "simpo": _simpo,
}


# ------------------------------------------------------------------ log-probabilities


def completion_logprobs(
    model: Model, params: PyTree, batch: PreferenceBatch, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns log pi(y | x) of all completions, and its mean over tokens, both [b, k].

    Args:
      key: turns dropout on.
    """
    total, mean, _ = logprobs_and_routing(model, params, batch, key)
    return total, mean


def logprobs_and_routing(
    model: Model, params: PyTree, batch: PreferenceBatch, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Routing | None]:
    """Returns `completion_logprobs`, and the routing of a mixture of experts, for training."""
    logprobs, mask, routing = token_logprobs(model, params, batch, key)
    shape = batch.lengths.shape
    total = direct.sequence_logprobs(logprobs, mask).reshape(shape)
    mean = direct.mean_logprobs(logprobs, mask).reshape(shape)
    return total, mean, routing


def token_logprobs(
    model: Model, params: PyTree, batch: PreferenceBatch, key: jax.Array | None = None
) -> tuple[Float[Array, "n s"], Float[Array, "n s"], Routing | None]:
    """Returns log pi(y_t | x, y_<t) of n = b k sequences, and the mask of their completions.

    The third result is the routing of a mixture of experts. Position i of the s = t - 1 positions
    is about token i + 1 of the sequence.

    Args:
      key: turns dropout on.
    """
    length = batch.tokens.shape[-1]
    tokens = batch.tokens.reshape(-1, length)
    attention_mask = batch.attention_mask.reshape(-1, length)
    hidden, routing = model.hidden_and_routing(
        params, tokens, segment_ids=attention_mask, key=key
    )
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    mask = completion_mask(attention_mask, batch.lengths.reshape(-1))
    return logprobs, mask, routing


def completion_mask(
    attention_mask: Int[Array, "n t"], lengths: Int[Array, " n"]
) -> Float[Array, "n s"]:
    """Returns 1 at positions 0 to t - 2 whose next token is one of the last `lengths` real tokens.

    These are the tokens of the completion, with its eos.
    """
    end = jnp.sum((attention_mask > 0).astype(jnp.int32), axis=1, keepdims=True)
    position = jnp.arange(1, attention_mask.shape[1])
    inside = (position >= end - lengths[:, None]) & (position < end)
    return inside.astype(jnp.float32)


def logprobs_in_microbatches(
    model: Model, params: PyTree, batch: PreferenceBatch, microbatches: int
) -> tuple[jax.Array, jax.Array]:
    """Returns `completion_logprobs` without gradient or dropout, one microbatch at a time."""
    inputs = dataclasses.replace(
        jax.tree.map(lambda _: None, batch),
        tokens=batch.tokens,
        attention_mask=batch.attention_mask,
        lengths=batch.lengths,
    )
    if microbatches == 1:
        return completion_logprobs(model, params, inputs)
    # Rows go to the same microbatches as in `state.gradients`.
    inputs = jax.tree.map(
        lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), inputs
    )
    results = jax.lax.map(lambda part: completion_logprobs(model, params, part), inputs)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)
