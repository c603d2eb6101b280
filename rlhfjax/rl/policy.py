"""The Stage around an algorithm's step: how its state starts, its data, what it leaves."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhfjax.interop import store
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.held_out import held_out
from rlhfjax.rl.prompts import batch_shapes, policy_batches, prompt_batches
from rlhfjax.rl.rollout import AHEAD, Rollout
from rlhfjax.rl.task import Task
from rlhfjax.roles import Loaded
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from rlhfjax.types import PyTree


def policy_stage(
    config: PolicyConfig,
    task: Task,
    tx: optax.GradientTransformation,
    step: Callable[..., Any],
    *,
    init_others: Callable[[jax.Array], dict[str, PyTree]] = lambda key: {},
    axes: Mapping[str, PyTree] | None = None,
    start: Callable[[TrainState], TrainState] = lambda state: state,
    extra: Mapping[str, Any] | None = None,
    also: Callable[[TrainState], dict[str, Any]] = lambda state: {},
) -> Stage:
    """Returns the Stage of an algorithm that trains a policy.

    Args:
      init_others: key -> fresh parameters that are trained beside the policy, and `axes` their logical axes.
      start: puts pretrained values into them.
      extra: what the state carries besides the KL coefficient and the average.
      also: state -> further models to keep, by folder.
    """
    model, episodes = task.policy.model, config.episodes

    def open_data() -> Data:
        prompts = prompt_batches(config.prompts, task.tokenizer, config)
        batches = policy_batches(
            config.ptx, prompts, task.tokenizer, config, task.layout
        )
        return Data(batches, held_out(config, task, task.layout), finish)

    def finish(state: TrainState) -> Finished:
        trained = state.extra["ema"]["policy"] if config.ema else state.params["policy"]
        models = {store.FOLDER: task.policy.saved(trained), **also(state)}
        return Finished(models, {}, {}, task.policy.adapters(trained))

    rows = (
        {AHEAD: dict.fromkeys(Rollout._fields, ("batch", None))}
        if config.one_step_off
        else {}
    )
    shapes = batch_shapes(config.ptx, episodes, config.prompt_length)

    def init_params(key: jax.Array) -> dict[str, PyTree]:
        others = init_others(key)
        return {"policy": model.init_trained(key), **others}

    return Stage(
        init=fresh_state(config, tx, init_params, extra),
        axes={"policy": model.trained_axes(), **(axes or {}), **rows},
        start=lambda state: start(_with_policy(config, task.policy, state)),
        step=step,
        batch=lambda _: shapes,
        open=open_data,
        units=episodes * config.max_new_tokens,
    )


def _with_policy(config: PolicyConfig, policy: Loaded, state: TrainState) -> TrainState:
    """Returns a fresh state with the pretrained policy in it, and in the average."""
    params = state.params | {"policy": policy.start(state.params["policy"])}
    extra = dict(state.extra)
    if config.ema:
        extra["ema"] = {"policy": policy.start(extra["ema"]["policy"])}
    return state.replace(params=params, extra=extra)


def fresh_state(
    config: PolicyConfig,
    tx: optax.GradientTransformation,
    init_params: Callable[[jax.Array], dict[str, PyTree]],
    extra: Mapping[str, Any] | None = None,
) -> Callable[[jax.Array], TrainState]:
    """Returns a function key -> the state before anything is loaded.

    Args:
      init_params: key -> what is trained, "policy" among it.
      extra: what the state carries besides the KL coefficient and the average.
    """

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        own = {"kl_coefficient": jnp.float32(config.kl.coefficient), **(extra or {})}
        if config.ema:
            own["ema"] = {"policy": jax.tree.map(jnp.array, params["policy"])}
        if config.one_step_off:
            own[AHEAD] = _empty_rollout(config)
        return TrainState.create(params, tx, **own)

    return init


def _empty_rollout(config: PolicyConfig) -> dict[str, jax.Array]:
    """Returns arrays with the shapes of an iteration's rollout, before there is one."""
    b, t = config.episodes, config.prompt_length + config.max_new_tokens
    ids, row = jnp.zeros((b, t), jnp.int32), jnp.zeros((b, config.max_new_tokens))
    return Rollout(ids, jnp.zeros_like(ids), row, jnp.zeros_like(row))._asdict()
