"""Minibatch epochs over an iteration's experience: what PPO and the group estimators share."""

from collections.abc import Callable
from typing import Any

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
from rlhfjax.types import Metrics, PyTree

Loss = Callable[..., tuple[jax.Array, Metrics]]


def minibatch_epochs(
    config: PolicyConfig,
    tx: optax.GradientTransformation,
    model: Model,
    loss: Loss,
    state: states.TrainState,
    experience: PyTree,
    text: TokenBatch | None,
    key: jax.Array,
    prepare: Callable[[PyTree], PyTree] = lambda batch: batch,
    frozen: PyTree | None = None,
) -> tuple[states.TrainState, Metrics]:
    """Every epoch visits every episode once, in minibatches of a fresh order, with one update each.

    Args:
      loss: (params, batch, key) -> (scalar, pairs), with approx_kl and ratio_max among the pairs.
      experience: arrays [episodes, ...] that do not change over the epochs.
      text: pretraining text [episodes * ptx.ratio, ...]; a minibatch gets its share of it.
      prepare: minibatch -> minibatch, before the gradient (whitening).
      frozen: what the loss's params have besides the state's, "policy" among it; None: nothing.

    With target_kl, the first minibatch whose mean approx_kl (nats a token from the policy that sampled) exceeds it is
    not applied, and neither are those after it: schedules do not count them either. `updated` is the share applied.
    """
    b = jax.tree.leaves(experience)[0].shape[0]
    orders = jax.vmap(lambda k: jax.random.permutation(k, b))(
        jax.random.split(key, config.epochs)
    )
    orders = orders.reshape(config.epochs * config.minibatches, b // config.minibatches)
    texts = jax.tree.map(lambda x: _cycle(x, config.minibatches, config.epochs), text)

    def measure(state: states.TrainState, inputs: Any) -> tuple[PyTree, Metrics]:
        rows, some_text = inputs
        batch = prepare(jax.tree.map(lambda x: _shared(x[rows]), experience))
        options = {"microbatches": config.microbatches, "frozen": frozen}
        grads, pairs = states.gradients(loss, state.params, batch, None, **options)
        if config.ptx.coefficient:
            base = (frozen or {}).get("policy")
            grads, pairs = _add_ptx(
                config, model, state.params["policy"], base, grads, pairs, some_text
            )
        return grads, pairs

    def apply(
        state: states.TrainState, grads: PyTree, pairs: Metrics
    ) -> tuple[states.TrainState, Metrics]:
        norms = {
            f"{k}_grad_norm": (optax.global_norm(g), jnp.ones(()))
            for k, g in grads.items()
        }
        state, more = states.apply_gradients(
            state, grads, tx, skip_nonfinite=config.on_nonfinite == "skip"
        )
        return state, merge(pairs, more, norms)

    def minibatch(
        state: states.TrainState, inputs: Any
    ) -> tuple[states.TrainState, Metrics]:
        return apply(state, *measure(state, inputs))

    if config.target_kl:
        body = _unless_too_far(measure, apply, config.target_kl)
        (state, _), stacked = jax.lax.scan(
            body, (state, jnp.array(False)), (orders, texts)
        )
    else:
        state, stacked = jax.lax.scan(minibatch, state, (orders, texts))
    pairs = jax.tree.map(lambda x: x.sum(0), stacked)
    pairs["first_ratio_max"] = jax.tree.map(lambda x: x[0], stacked["ratio_max"])
    return state, pairs


def _unless_too_far(
    measure: Callable[..., Any], apply: Callable[..., Any], target_kl: float
) -> Callable[..., Any]:
    """A minibatch with early stopping, as a scan has it: ((state, stopped), inputs) -> the same two, pairs."""

    def minibatch(
        carry: tuple[states.TrainState, jax.Array], inputs: Any
    ) -> tuple[Any, Metrics]:
        state, stopped = carry

        def idle(
            state: states.TrainState,
        ) -> tuple[states.TrainState, jax.Array, Metrics]:
            shapes = jax.eval_shape(lambda s: apply(s, *measure(s, inputs))[1], state)
            return (
                state,
                jnp.array(True),
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            )

        def go_on(
            state: states.TrainState,
        ) -> tuple[states.TrainState, jax.Array, Metrics]:
            grads, pairs = measure(state, inputs)
            total, weight = pairs["approx_kl"]
            too_far = total > target_kl * weight
            moved, pairs = apply(state, grads, pairs)
            return (
                jax.tree.map(lambda a, b: jnp.where(too_far, a, b), state, moved),
                too_far,
                pairs,
            )

        state, stopped, pairs = jax.lax.cond(stopped, idle, go_on, state)
        return (state, stopped), {**pairs, "updated": (1.0 - stopped, jnp.ones(()))}

    return minibatch


def _add_ptx(
    config: PolicyConfig,
    model: Model,
    params: PyTree,
    frozen: PyTree | None,
    grads: PyTree,
    pairs: Metrics,
    text: TokenBatch,
) -> tuple[PyTree, Metrics]:
    """Adds coefficient x the gradient of the pretraining loss; the two are accumulated, not averaged."""
    c, options = config.ptx, {"microbatches": config.microbatches, "frozen": frozen}
    more, parts = states.gradients(_text_loss(model), params, text, None, **options)
    scale = c.coefficient * (
        parts["loss"][1] / text.mask.shape[0] if c.unit == "sequence" else 1.0
    )
    policy_grads = jax.tree.map(lambda g, m: g + scale * m, grads["policy"], more)
    return {**grads, "policy": policy_grads}, {**pairs, "ptx_loss": parts["loss"]}


def _text_loss(model: Model) -> Loss:
    """Returns a function (params, batch, key) -> mean negative log-likelihood, nats per token."""

    def loss(params: PyTree, batch: TokenBatch, key: None) -> tuple[jax.Array, Metrics]:
        hidden = model.hidden(
            params, batch.tokens, batch.positions, batch.segment_ids, key
        )
        nll, weight = model.cross_entropy(params, hidden, batch.targets, batch.mask)
        return nll / jnp.maximum(weight, 1.0), {"loss": (nll, weight)}

    return loss


def _cycle(x: jax.Array, minibatches: int, epochs: int) -> jax.Array:
    """Rows of pretraining text [n, ...] to [epochs * minibatches, n / minibatches, ...], the same text every epoch."""
    return jnp.tile(
        _shared(x.reshape(minibatches, -1, *x.shape[1:]), 1), (epochs,) + (1,) * x.ndim
    )


def _shared(x: jax.Array, axis: int = 0) -> jax.Array:
    """Every minibatch lies over all devices. Left to itself the partitioner splits minibatches too, and devices that
    have parts of several look up, and sum the gradients of, embeddings for each other."""
    return constrain(x, tuple("batch" if i == axis else None for i in range(x.ndim)))


def end_iteration(
    config: PolicyConfig, state: states.TrainState, pairs: Metrics
) -> states.TrainState:
    """Counts the step; the KL coefficient by the iteration's mean sequence KL; the average of the weights."""
    extra, kls = dict(state.extra), pairs["kl"]
    if config.kl.target:
        extra["kl_coefficient"] = kl.adaptive_kl(
            extra["kl_coefficient"],
            kls[0] / kls[1],
            target=config.kl.target,
            horizon=float(config.kl.horizon),
            episodes=config.episodes,
        )
    if config.ema:
        extra["ema"] = {
            "policy": ema.ema_update(
                extra["ema"]["policy"], state.params["policy"], decay=config.ema
            )
        }
    return state.replace(step=state.step + 1, extra=extra)
