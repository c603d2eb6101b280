"""The state of policy stages: what it carries besides parameters, how it starts, what it leaves."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.programs import host_value, small
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.rollout import Rollout
from rlhfjax.stage import Metrics
from rlhfjax.state import TrainState

PyTree = Any
AHEAD = "ahead"  # in a state: the rollout that the next iteration learns from
UPDATE, FIRST = 1, 2  # random streams of an iteration; the rollout's is the iteration's key itself


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
    b, t = config.episodes, config.prompt_length + config.max_new
    ids, row = jnp.zeros((b, t), jnp.int32), jnp.zeros((b, config.max_new))
    return Rollout(ids, jnp.zeros_like(ids), row, jnp.zeros_like(row))._asdict()


class Drawn(NamedTuple):
    """The rollout that an iteration learns from; with one_step_off the next one's is sampled too."""

    rollout: Rollout
    next_rollout: Rollout | None
    staleness: int  # iterations between the policy that sampled and the one that learns


def draw(
    config: PolicyConfig,
    sample: Callable[..., Rollout],
    state: TrainState,
    policy: PyTree,
    batch: Mapping[str, Any],
    key: Any,
) -> Drawn:
    """Samples responses to a batch of prompts with the policy's parameters."""
    prompts, segments = batch["prompts"], batch["segments"]
    new = sample(policy, prompts, segments, key)
    if not config.one_step_off:
        return Drawn(new, None, 0)
    if host_value(state.step, planned=1) == 0:
        first = sample(policy, prompts, segments, stream(key, FIRST))
        return Drawn(first, new, 0)
    return Drawn(Rollout(**state.extra[AHEAD]), new, 1)


def stream(key: Any, number: int) -> Any:
    """Returns the key of one of an iteration's random streams."""
    return small(jax.random.fold_in)(key, number)


def without_next(state: TrainState) -> TrainState:
    """Returns the state without a rollout that it carries, as programs take it."""
    return state.replace(extra={name: x for name, x in state.extra.items() if name != AHEAD})


def with_next(state: TrainState, drawn: Drawn) -> tuple[TrainState, Metrics]:
    """Returns the state with the next rollout, where there is one, and how stale this one was."""
    if drawn.next_rollout is None:
        return state, {}
    carried = state.replace(extra={**state.extra, AHEAD: drawn.next_rollout._asdict()})
    staleness = small(lambda: (jnp.float32(drawn.staleness), jnp.ones(())))()
    return carried, {"staleness": staleness}
