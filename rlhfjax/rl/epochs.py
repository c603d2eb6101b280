"""Minibatch epochs over an iteration's experience, as all policy stages have them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax import state as states
from rlhfjax.algos import ema, kl
from rlhfjax.data.batches import TokenBatch
from rlhfjax.mesh import constrain
from rlhfjax.metrics import merge
from rlhfjax.models.transformer import Model
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.state import TrainState
from rlhfjax.supervised import language_loss
from rlhfjax.types import Loss, Metric, Metrics, PyTree


class Learner(NamedTuple):
    """What an update needs besides the state and the data."""

    config: PolicyConfig
    model: Model  # the policy, for the pretraining loss
    tx: optax.GradientTransformation
    # (params, batch, key) -> (scalar, metrics), with approx_kl and ratio_max among the metrics
    loss: Callable[..., Loss]
    # minibatch -> minibatch, before it is split into microbatches
    whiten: Callable[[PyTree], PyTree] = lambda batch: batch


def minibatch_epochs(
    learner: Learner,
    state: TrainState,
    experience: PyTree,
    text: TokenBatch | None,
    key: jax.Array,
    frozen: PyTree | None = None,
) -> tuple[TrainState, Metrics]:
    """Updates the state on every episode once per epoch, in minibatches of a fresh order.

    With target_kl, the first minibatch whose mean approx_kl (nats per token, to the policy that
    sampled) exceeds it is not applied, and neither are those after it. Schedules do not count them.
    The metric `updated` is the share of minibatches that were applied.

    Args:
      experience: arrays [episodes, ...] that are constant over the epochs.
      text: pretraining text [episodes * ptx.ratio, ...]; every minibatch gets its share of it.
      frozen: parameters that the loss needs besides the state's, by role; None: there are none.
    """
    config = learner.config
    b = jax.tree.leaves(experience)[0].shape[0]
    epoch_keys = jax.random.split(key, config.epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, b))(epoch_keys)
    updates = config.epochs * config.minibatches
    orders = orders.reshape(updates, b // config.minibatches)
    texts = jax.tree.map(lambda x: _cycle(x, config.minibatches, config.epochs), text)

    def gradients(state: TrainState, inputs: Any) -> tuple[PyTree, Metrics]:
        rows, minibatch_text = inputs
        batch = jax.tree.map(lambda x: _on_all_devices(x[rows]), experience)
        grads, metrics = states.gradients(
            learner.loss,
            state.params,
            learner.whiten(batch),
            None,
            microbatches=config.microbatches,
            frozen=frozen,
        )
        if config.ptx.coefficient:
            frozen_policy = (frozen or {}).get("policy")
            policy = state.params["policy"]
            grads["policy"], metrics["ptx_loss"] = _add_ptx(
                learner, grads["policy"], policy, frozen_policy, minibatch_text
            )
        return grads, metrics

    def apply(
        state: TrainState, grads: PyTree, metrics: Metrics
    ) -> tuple[TrainState, Metrics]:
        norms = {
            f"{name}_grad_norm": (optax.global_norm(tree), jnp.ones(()))
            for name, tree in grads.items()
        }
        skip_nonfinite = config.on_nonfinite == "skip"
        state, update_metrics = states.apply_gradients(
            state, grads, learner.tx, skip_nonfinite=skip_nonfinite
        )
        return state, merge(metrics, update_metrics, norms)

    def update(state: TrainState, inputs: Any) -> tuple[TrainState, Metrics]:
        return apply(state, *gradients(state, inputs))

    if config.target_kl:
        update_or_stop = _with_early_stop(gradients, apply, config.target_kl)
        carry = (state, jnp.array(False))
        (state, _), stacked = jax.lax.scan(update_or_stop, carry, (orders, texts))
    else:
        state, stacked = jax.lax.scan(update, state, (orders, texts))
    metrics = jax.tree.map(lambda x: x.sum(0), stacked)
    metrics["first_ratio_max"] = jax.tree.map(lambda x: x[0], stacked["ratio_max"])
    return state, metrics


def _with_early_stop(
    gradients: Callable[..., Any], apply: Callable[..., Any], target_kl: float
) -> Callable[..., Any]:
    """Returns an update that stops at target_kl: ((state, stopped), inputs) -> (carry, metrics)."""

    def update_or_stop(
        carry: tuple[TrainState, jax.Array], inputs: Any
    ) -> tuple[Any, Metrics]:
        def skip(state: TrainState) -> tuple[TrainState, jax.Array, Metrics]:
            stopped = jnp.array(True)
            _, shapes = jax.eval_shape(lambda s: apply(s, *gradients(s, inputs)), state)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return state, stopped, zeros

        def update(state: TrainState) -> tuple[TrainState, jax.Array, Metrics]:
            grads, metrics = gradients(state, inputs)
            total, weight = metrics["approx_kl"]
            too_far = total > target_kl * weight
            updated, metrics = apply(state, grads, metrics)
            state = jax.tree.map(
                lambda old, new: jnp.where(too_far, old, new), state, updated
            )
            return state, too_far, metrics

        state, stopped = carry
        state, stopped, metrics = jax.lax.cond(stopped, skip, update, state)
        metrics = {**metrics, "updated": (1.0 - stopped, jnp.ones(()))}
        return (state, stopped), metrics

    return update_or_stop


def end_iteration(
    config: PolicyConfig, state: TrainState, metrics: Metrics
) -> TrainState:
    """Returns the state after an iteration: step, adaptive KL coefficient, EMA weights."""
    extra = dict(state.extra)
    total_kl, responses = metrics["kl"]
    if config.kl.target:
        extra["kl_coefficient"] = kl.adaptive_kl(
            extra["kl_coefficient"],
            jnp.divide(total_kl, responses),
            target=config.kl.target,
            horizon=float(config.kl.horizon),
            episodes=config.episodes,
        )
    if config.ema:
        policy = ema.ema_update(
            extra["ema"]["policy"], state.params["policy"], decay=config.ema
        )
        extra["ema"] = {"policy": policy}
    return state.replace(step=state.step + 1, extra=extra)


# ------------------------------------------------------------------ minibatches


def _cycle(x: jax.Array, minibatches: int, epochs: int) -> jax.Array:
    """Returns pretraining text [n, ...] as [epochs * minibatches, n / minibatches, ...].

    Every epoch has the same text.
    """
    x = x.reshape(minibatches, -1, *x.shape[1:])
    return jnp.tile(_on_all_devices(x, axis=1), (epochs,) + (1,) * (x.ndim - 1))


def _on_all_devices(x: jax.Array, axis: int = 0) -> jax.Array:
    """Returns x with the rows of an axis split over all devices.

    Left to itself, the partitioner splits minibatches from each other too. Then devices that have
    parts of several minibatches look up embeddings, and sum their gradients, for each other.
    """
    return constrain(x, tuple("batch" if i == axis else None for i in range(x.ndim)))


# ------------------------------------------------------------------ pretraining text (PPO-ptx)


def _add_ptx(
    learner: Learner,
    policy_grads: PyTree,
    params: PyTree,
    frozen: PyTree | None,
    text: TokenBatch,
) -> tuple[PyTree, Metric]:
    """Returns the policy's gradient plus coefficient x that of the pretraining loss, and the loss.

    The two are accumulated, not averaged.
    """
    config = learner.config
    grads, metrics = states.gradients(
        language_loss(learner.model, balanced=True),
        params,
        text,
        None,
        microbatches=config.microbatches,
        frozen=frozen,
    )
    scale = config.ptx.coefficient
    if config.ptx.unit == "sequence":
        sequences = text.mask.shape[0]
        scale = scale * (metrics["loss"][1] / sequences)
    added = jax.tree.map(lambda g, ptx: g + scale * ptx, policy_grads, grads)
    return added, metrics["loss"]
