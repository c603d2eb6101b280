"""Responses sampled from a policy, as every policy stage, collection and evaluation needs them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from rlhfjax import state as states
from rlhfjax.algos.shaping import truncate_mask
from rlhfjax.data.batches import PromptBatch
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.mesh import Layout, in_use, make_layout
from rlhfjax.models.transformer import Model
from rlhfjax.programs import (
    ROWS,
    STATE,
    WHOLE,
    Program,
    host_value,
    recording,
    reshard,
    small,
)
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.sampling.generate import generate
from rlhfjax.state import TrainState
from rlhfjax.streams import FIRST_ROLLOUT
from rlhfjax.types import Metrics, PyTree

AHEAD = "ahead"  # in a state: the rollout that the next iteration learns from


class Rollout(NamedTuple):
    """Prompts (left-padded) with their responses (right-padded); native ids, never text encoded anew."""

    tokens: Int[Array, "b p_r"]
    segments: Int[Array, "b p_r"]  # 1 on real tokens, 0 on padding
    mask: Float[Array, "b r"]  # 1 on response tokens, the eos included
    logprobs: Float[Array, "b r"]  # of the distribution sampled from, nats

    @property
    def responses(self) -> Int[Array | np.ndarray, "b r"]:
        return self.tokens[:, -self.mask.shape[1] :]


class Forward(NamedTuple):
    """What forward passes give of a rollout before it has a score, all [b, r]."""

    logprobs: Any  # log pi_old, 0 outside the response
    ref_logprobs: Any  # None until it comes from another mesh
    values: Any = None  # where there is a value function


class Programs(NamedTuple):
    """The jitted functions of an iteration, and the loss of a minibatch."""

    forward: Program  # (params, reference, rollout) -> Forward
    ref_logprobs: Program  # (reference, rollout) -> [b, r]
    make_experience: (
        Program  # (state, Forward, rollout, scores) -> (experience, metrics)
    )
    update: (
        Program  # (state, experience, text, metrics, key, frozen) -> (state, metrics)
    )
    loss: Callable[..., Any]  # (params, minibatch, key, beta) -> (scalar, metrics)
    whiten: Callable[..., Any]  # minibatch -> minibatch
    tx: optax.GradientTransformation


def programs_of(
    logprobs_of: Callable[..., Any],
    forward: Callable[..., Forward],
    make_experience: Callable[..., Any],
    update: Callable[..., Any],
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    whiten: Callable[..., Any] = lambda batch: batch,
) -> Programs:
    """Returns an iteration's functions jitted, each with its name and the axes of its outputs."""
    return Programs(
        forward=Program("know", jax.jit(forward), ROWS),
        ref_logprobs=Program("ref_logprobs", jax.jit(logprobs_of), ROWS),
        make_experience=Program("prepare", jax.jit(make_experience), [ROWS, WHOLE]),
        update=Program("update", jax.jit(update, donate_argnums=0), [STATE, WHOLE]),
        loss=loss,
        whiten=whiten,
        tx=tx,
    )


class Tokens(NamedTuple):
    """The token ids that sampling and scoring know by name."""

    eos: int
    pad: int
    stop: int | None = None  # where truncate is on: its token


def tokens_of(config: PolicyConfig, tokenizer: Tokenizer) -> Tokens:
    """Returns the ids that a policy stage needs."""
    stop = tokenizer.token_id(config.truncate.token) if config.truncate.token else None
    return Tokens(tokenizer.eos_id, tokenizer.pad_id, stop)


def row_keys(key: Key[Array, ""], n: int) -> Key[Array, " n"]:
    """One key a row, so that what a row samples does not depend on its neighbors or on their number."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "eos_id",
        "pad_id",
        "temperature",
        "samples_per_prompt",
        "decode_batch",
    ),
)
def sample(
    model: Model,
    params: PyTree,
    prompts: Int[Array, "b p"],
    segments: Int[Array, "b p"],
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float,
    samples_per_prompt: int = 1,
    decode_batch: int = 0,
) -> Rollout:
    """Samples a response to each row from softmax(logits / temperature), without top-k or top-p.

    Args:
      each: number of consecutive rows that share a prompt, which is prefilled once.
      slots: number of rows decoded at a time, 0: all; see `generate`. It changes no response.
    """
    keys = row_keys(key, prompts.shape[0])
    limits = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id}
    limits |= {"samples_per_prompt": samples_per_prompt, "decode_batch": decode_batch}
    out = generate(
        model,
        params,
        prompts[::samples_per_prompt],
        segments[::samples_per_prompt],
        keys,
        temperature=temperature,
        **limits,
    )
    tokens = jnp.concatenate([prompts, out.tokens], axis=1)
    return Rollout(
        tokens,
        jnp.concatenate([segments, out.mask.astype(segments.dtype)], axis=1),
        out.mask,
        out.logprobs,
    )


def _shapes(
    model: Model, params: PyTree, prompts: Any, *_: Any, max_new_tokens: int, **__: Any
) -> Rollout:
    """Returns the shapes of a rollout: tracing its unrolled layers takes as long as all the rest."""
    rows = in_use().sharding("batch")
    b, p = prompts.shape

    def array(time: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, time), dtype, sharding=rows)

    return Rollout(
        tokens=array(p + max_new_tokens, np.int32),
        segments=array(p + max_new_tokens, np.int32),
        mask=array(max_new_tokens, np.float32),
        logprobs=array(max_new_tokens, np.float32),
    )


_SAMPLE = Program("rollout", sample, _shapes)


def make_sampler(
    config: PolicyConfig, layout: Layout, model: Model, tokens: Tokens
) -> Callable[..., Rollout]:
    """Returns a function (params, prompts, segments, key) -> a response to every row.

    With `rollout_mesh` the policy's weights are laid out anew, from devices to devices, before
    every rollout, and the responses come back in the layout of training.

    Raises:
      ConfigError: the rollout's batch does not go over that mesh.
    """
    here = functools.partial(
        sampled, config, model, tokens, samples_per_prompt=config.samples_per_prompt
    )
    if config.rollout_mesh is None:
        return here
    there = make_layout(config.rollout_mesh, list(layout.mesh.devices.flat))
    there.check_batch(config.episodes, f"{config.stage}.batch_size, over rollout_mesh,")
    axes = model.axes()

    def sample_there(params: PyTree, prompts: Any, segments: Any, key: Any) -> Rollout:
        rows = reshard((prompts, segments), there.sharding("batch"))
        params = reshard(params, states.shardings(params, axes, there))
        if recording():  # a key's array goes to any mesh, its shape has one
            key = reshard(key, there.replicated)
        with there.use():
            rollout = here(params, *rows, key)
        return reshard(rollout, layout.sharding("batch"))

    return sample_there


def sampled(
    config: PolicyConfig,
    model: Model,
    tokens: Tokens,
    params: PyTree,
    prompts: Any,
    segments: Any,
    key: Any,
    samples_per_prompt: int = 1,
) -> Rollout:
    """Samples a response to every row: prompts and segments [b, p].

    Args:
      each: number of consecutive rows that share a prompt, which is prefilled once.
    """
    return _SAMPLE(
        model,
        params,
        prompts,
        segments,
        key,
        max_new_tokens=config.max_new_tokens,
        eos_id=tokens.eos if config.stop_at_eos else -1,
        pad_id=tokens.pad,
        temperature=config.temperature,
        samples_per_prompt=samples_per_prompt,
        decode_batch=config.decode_batch,
    )


@functools.partial(jax.jit, static_argnames=("token_id", "after", "pad_id"))
def cut(rollout: Rollout, token_id: int, after: int, pad_id: int) -> Rollout:
    """Responses up to the first `token_id` at or after response position `after`; what follows it becomes padding."""
    mask, _ = truncate_mask(
        rollout.responses, rollout.mask, token_id=token_id, after=after
    )
    p = rollout.tokens.shape[1] - mask.shape[1]
    responses = jnp.where(mask > 0, rollout.responses, pad_id)
    tokens = jnp.concatenate([rollout.tokens[:, :p], responses], axis=1)
    segments = jnp.concatenate(
        [rollout.segments[:, :p], mask.astype(rollout.segments.dtype)], axis=1
    )
    return Rollout(tokens, segments, mask, rollout.logprobs * mask)


_CUT = Program("truncate", cut, ROWS)


def truncated(config: PolicyConfig, tokens: Tokens, rollout: Rollout) -> Rollout:
    """Returns what the reward scores: the responses up to the stop token, where truncate is on."""
    if tokens.stop is None:
        return rollout
    return _CUT(rollout, tokens.stop, config.truncate.after, tokens.pad)


def response_hidden(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "b p_r"],
    segments: Int[Array, "b p_r"],
    r: int,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b r d"]:
    """Hidden states of the slots *before* each response token: what predicts it, and the state it is valued in."""
    return model.hidden(params, tokens, segments=segments, key=key)[:, -r - 1 : -1]


def response_logprobs(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "b p_r"],
    segments: Int[Array, "b p_r"],
    r: int,
    temperature: float,
) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """log pi(y_t | x, y_<t) and the entropy at each response slot, nats, at the sampling temperature."""
    hidden = response_hidden(model, params, tokens, segments, r)
    return model.logprobs(params, hidden, tokens[:, -r:], temperature)


def logprobs_with(config: PolicyConfig, model: Model) -> Callable[..., Any]:
    """Returns a function (params, rollout) -> log pi of its responses [b, r], as the sampler has them."""

    def logprobs_of(params: PyTree, rollout: Rollout) -> jax.Array:
        rows = (
            rollout.tokens,
            rollout.segments,
            rollout.mask.shape[1],
            config.temperature,
        )
        return response_logprobs(model, params, *rows)[0]

    return logprobs_of


def behavior_logprobs(
    config: PolicyConfig,
    logprobs_of: Callable[..., Any],
    policy: PyTree,
    rollout: Rollout,
) -> jax.Array:
    """Returns log pi_old of the response tokens, 0 elsewhere: the sampler's, or a forward pass's."""
    if config.behavior_logprobs == "sampler":
        return rollout.logprobs
    return logprobs_of(policy, rollout) * rollout.mask


# ------------------------------------------------------------------ off-policy rollouts


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
    prompts: PromptBatch,
    key: Any,
) -> Drawn:
    """Samples responses to a batch of prompts with the policy's parameters."""
    new = sample(policy, prompts.tokens, prompts.attention_mask, key)
    if not config.one_step_off:
        return Drawn(new, None, 0)
    if host_value(state.step, planned=1) == 0:
        first = sample(
            policy, prompts.tokens, prompts.attention_mask, stream(key, FIRST_ROLLOUT)
        )
        return Drawn(first, new, 0)
    return Drawn(Rollout(**state.extra[AHEAD]), new, 1)


def stream(key: Any, number: int) -> Any:
    """Returns the key of one of an iteration's random streams."""
    return small(jax.random.fold_in)(key, number)


def without_next(state: TrainState) -> TrainState:
    """Returns the state without a rollout that it carries, as programs take it."""
    return state.replace(
        extra={name: x for name, x in state.extra.items() if name != AHEAD}
    )


def with_next(state: TrainState, drawn: Drawn) -> tuple[TrainState, Metrics]:
    """Returns the state with the next rollout, where there is one, and how stale this one was."""
    if drawn.next_rollout is None:
        return state, {}
    carried = state.replace(extra={**state.extra, AHEAD: drawn.next_rollout._asdict()})
    staleness = small(lambda: (jnp.float32(drawn.staleness), jnp.ones(())))()
    return carried, {"staleness": staleness}
