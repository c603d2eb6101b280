"""The parts of a policy stage's iteration that no algorithm has to itself.

They are the jitted programs, log-probabilities, and rollouts that are one iteration old.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.data.batches import PromptBatch
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, STATE, WHOLE, Program, host_value, small
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.rollout import Rollout, response_outputs
from rlhfjax.state import TrainState
from rlhfjax.streams import FIRST_ROLLOUT
from rlhfjax.types import Metrics, PyTree


def stream_key(key: Any, stream: int) -> Any:
    """Returns the key of one of an iteration's random streams."""
    return small(jax.random.fold_in)(key, stream)


# ------------------------------------------------------------------ programs


class ForwardOutputs(NamedTuple):
    """What forward passes over a rollout return before it has a score, all [b, r]."""

    logprobs: Any  # log pi_old, 0 outside of the response
    ref_logprobs: Any  # log pi_ref; None until it comes from another mesh
    values: Any = None  # of the value function, if there is one


class Programs(NamedTuple):
    """The jitted functions of an iteration, and the loss that `update` minimizes."""

    # (params, reference, rollout) -> ForwardOutputs
    forward: Program
    # (reference, rollout) -> [b, r]
    ref_logprobs: Program
    # (state, ForwardOutputs, rollout, scores) -> (experience, metrics)
    make_experience: Program
    # (state, experience, text, metrics, key, frozen) -> (state, metrics)
    update: Program
    # (params, minibatch, key, beta) -> (scalar, metrics)
    loss: Callable[..., Any]
    # minibatch -> minibatch
    whiten: Callable[..., Any]
    tx: optax.GradientTransformation


def jit_programs(
    *,
    rollout_logprobs: Callable[..., Any],
    forward: Callable[..., ForwardOutputs],
    make_experience: Callable[..., Any],
    update: Callable[..., Any],
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    whiten: Callable[..., Any] = lambda batch: batch,
) -> Programs:
    """Jits the functions of an iteration; each gets its name and the axes of its outputs."""
    experience_and_metrics, state_and_metrics = [ROWS, WHOLE], [STATE, WHOLE]
    make_experience = jax.jit(make_experience)
    update = jax.jit(update, donate_argnums=0)
    return Programs(
        forward=Program("know", jax.jit(forward), ROWS),
        ref_logprobs=Program("ref_logprobs", jax.jit(rollout_logprobs), ROWS),
        make_experience=Program("prepare", make_experience, experience_and_metrics),
        update=Program("update", update, state_and_metrics),
        loss=loss,
        whiten=whiten,
        tx=tx,
    )


# ------------------------------------------------------------------ forward passes


def make_rollout_logprobs(config: PolicyConfig, model: Model) -> Callable[..., Any]:
    """Returns a function (params, rollout) -> log pi [b, r] of its responses."""

    def rollout_logprobs(params: PyTree, rollout: Rollout) -> jax.Array:
        return response_outputs(config, model, params, rollout).logprobs

    return rollout_logprobs


def make_forward_passes(
    config: PolicyConfig,
    rollout_logprobs: Callable[..., Any],
    compute_values: Callable[..., Any] | None = None,
) -> Callable[..., ForwardOutputs]:
    """Returns a function (params, reference, rollout) -> the outputs of passes that need no score.

    If the reference lives on another mesh, pass None; `ref_logprobs` computes it there.

    Args:
      compute_values: (params, rollout) -> values [b, r]; None: there is no value function.
    """

    def forward(
        params: PyTree, reference: PyTree | None, rollout: Rollout
    ) -> ForwardOutputs:
        values, ref_logprobs = None, None
        if compute_values is not None:
            values = compute_values(params, rollout) * rollout.mask
        if reference is not None:
            ref_logprobs = rollout_logprobs(reference, rollout)
        # Sampler and training differ in bfloat16: the first ratio is exactly 1 only with `forward`.
        logprobs = rollout.logprobs
        if config.behavior_logprobs == "forward":
            logprobs = rollout_logprobs(params["policy"], rollout) * rollout.mask
        return ForwardOutputs(logprobs, ref_logprobs, values)

    return forward


# ------------------------------------------------------------------ stale rollouts

NEXT_ROLLOUT = "ahead"  # key of `TrainState.extra`, as checkpoints have it
STORED_FIELDS = ("tokens", "segments", "mask", "logprobs")  # of a Rollout, likewise


class Rollouts(NamedTuple):
    """The rollout that an iteration learns from and, with one_step_off, that of the next one."""

    current: Rollout
    next_rollout: Rollout | None
    staleness: int  # iterations between the policy that sampled and the one that learns


def sample_rollouts(
    config: PolicyConfig,
    sampler: Callable[..., Rollout],
    state: TrainState,
    policy: PyTree,
    prompts: PromptBatch,
    key: Any,
) -> Rollouts:
    """Samples responses to a batch of prompts with the policy's parameters.

    With one_step_off the new rollout is for the next iteration, and this one learns from the
    rollout in the state; the first iteration has none yet and samples twice.
    """
    new = sampler(policy, prompts.tokens, prompts.attention_mask, key)
    if not config.one_step_off:
        return Rollouts(new, None, staleness=0)
    if host_value(state.step, planned=1) == 0:
        first_key = stream_key(key, FIRST_ROLLOUT)
        first = sampler(policy, prompts.tokens, prompts.attention_mask, first_key)
        return Rollouts(first, new, staleness=0)
    stored = state.extra[NEXT_ROLLOUT]
    stale_rollout = Rollout(*(stored[name] for name in STORED_FIELDS))
    return Rollouts(stale_rollout, new, staleness=1)


def drop_next_rollout(state: TrainState) -> TrainState:
    """Returns the state without the rollout that it carries, as programs take it."""
    extra = {name: x for name, x in state.extra.items() if name != NEXT_ROLLOUT}
    return state.replace(extra=extra)


def store_next_rollout(
    state: TrainState, rollouts: Rollouts
) -> tuple[TrainState, Metrics]:
    """Returns the state with the next rollout, if there is one, and the staleness of this one."""
    if rollouts.next_rollout is None:
        return state, {}
    stored = dict(zip(STORED_FIELDS, rollouts.next_rollout, strict=True))
    state = state.replace(extra={**state.extra, NEXT_ROLLOUT: stored})
    staleness = small(lambda: (jnp.float32(rollouts.staleness), jnp.ones(())))()
    return state, {"staleness": staleness}
