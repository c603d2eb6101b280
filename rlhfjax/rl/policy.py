"""The Stage around an algorithm's step: initial state, data, and the models that it leaves."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.interop import store
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.held_out import make_evals
from rlhfjax.rl.iteration import NEXT_ROLLOUT, STORED_FIELDS
from rlhfjax.rl.prompts import batch_shapes, policy_batches, prompt_batches
from rlhfjax.rl.task import Task
from rlhfjax.roles import Loaded
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from rlhfjax.types import PyTree


class ExtraModels(NamedTuple):
    """Models that are trained beside the policy, such as a value function.

    init: key -> fresh trainable parameters by role.
    axes: their logical axes.
    load: state -> the state with pretrained values in those parameters.
    saved: state -> the models to save, by folder.
    """

    init: Callable[[jax.Array], dict[str, PyTree]] = lambda key: {}
    axes: Mapping[str, PyTree] = {}
    load: Callable[[TrainState], TrainState] = lambda state: state
    saved: Callable[[TrainState], dict[str, store.SavedModel]] = lambda state: {}


NO_EXTRA_MODELS = ExtraModels()


def policy_stage(
    config: PolicyConfig,
    task: Task,
    tx: optax.GradientTransformation,
    step: Callable[..., Any],
    *,
    extra_models: ExtraModels = NO_EXTRA_MODELS,
    extra_state: Mapping[str, Any] | None = None,
) -> Stage:
    """Returns the Stage of an algorithm that trains a policy.

    Args:
      extra_state: what the state carries besides the KL coefficient and the EMA weights.
    """
    policy, episodes = task.policy, config.episodes

    def open_data() -> Data:
        prompts = prompt_batches(config.prompts, task.tokenizer, config)
        batches = policy_batches(
            config.ptx, prompts, task.tokenizer, config, task.layout
        )
        return Data(batches, make_evals(config, task), finish)

    def finish(state: TrainState) -> Finished:
        trained = state.extra["ema"]["policy"] if config.ema else state.params["policy"]
        models = {store.FOLDER: policy.saved(trained), **extra_models.saved(state)}
        return Finished(models, {}, {}, policy.adapters(trained))

    def init_params(key: jax.Array) -> dict[str, PyTree]:
        others = extra_models.init(key)
        return {"policy": policy.model.init_trained(key), **others}

    def start(state: TrainState) -> TrainState:
        return extra_models.load(_load_policy(config, policy, state))

    axes = {"policy": policy.model.trained_axes(), **extra_models.axes}
    if config.one_step_off:
        axes[NEXT_ROLLOUT] = dict.fromkeys(STORED_FIELDS, ("batch", None))
    shapes = batch_shapes(config.ptx, episodes, config.prompt_length)
    return Stage(
        init=initial_state(config, tx, init_params, extra_state),
        axes=axes,
        start=start,
        step=step,
        batch=lambda _: shapes,
        open=open_data,
        units=episodes * config.max_new_tokens,
        samples=task.samples,
    )


def _load_policy(config: PolicyConfig, policy: Loaded, state: TrainState) -> TrainState:
    """Returns a fresh state with the pretrained policy in it, and in the EMA weights."""
    params = state.params | {"policy": policy.start(state.params["policy"])}
    extra = dict(state.extra)
    if config.ema:
        extra["ema"] = {"policy": policy.start(extra["ema"]["policy"])}
    return state.replace(params=params, extra=extra)


def initial_state(
    config: PolicyConfig,
    tx: optax.GradientTransformation,
    init_params: Callable[[jax.Array], dict[str, PyTree]],
    extra_state: Mapping[str, Any] | None = None,
) -> Callable[[jax.Array], TrainState]:
    """Returns a function key -> the state before pretrained parameters are loaded.

    Args:
      init_params: key -> fresh trainable parameters by role, the policy among them.
      extra_state: what the state carries besides the KL coefficient and the EMA weights.
    """

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        extra = {"kl_coefficient": jnp.float32(config.kl.coefficient)}
        extra |= extra_state or {}
        if config.ema:
            extra["ema"] = {"policy": jax.tree.map(jnp.array, params["policy"])}
        if config.one_step_off:
            extra[NEXT_ROLLOUT] = _empty_rollout(config)
        return TrainState.create(params, tx, **extra)

    return init


def _empty_rollout(config: PolicyConfig) -> dict[str, jax.Array]:
    """Returns zeros with the shapes of an iteration's rollout, before there is one."""
    length = config.prompt_length + config.max_new_tokens
    tokens = jnp.zeros((config.episodes, length), jnp.int32)
    mask = jnp.zeros((config.episodes, config.max_new_tokens))
    arrays = (tokens, jnp.zeros_like(tokens), mask, jnp.zeros_like(mask))
    return dict(zip(STORED_FIELDS, arrays, strict=True))
