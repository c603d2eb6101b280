"""Answers sampled from a policy, as every policy-optimising stage, collection and evaluation needs them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlhfjax.algos.shaping import truncate_mask
from rlhfjax.models.transformer import Model
from rlhfjax.sampling.generate import generate

PyTree = Any


class Rollout(NamedTuple):
    """Prompts (left-padded) with their responses (right-padded); native ids, never text encoded anew."""

    tokens: Int[Array, "b p_r"]
    segments: Int[Array, "b p_r"]  # 1 on real tokens, 0 on padding
    mask: Float[Array, "b r"]  # 1 on response tokens, the eos included
    logprobs: Float[Array, "b r"]  # of the distribution sampled from, nats

    @property
    def responses(self) -> Int[Array | np.ndarray, "b r"]:
        return self.tokens[:, -self.mask.shape[1] :]


def row_keys(key: Key[Array, ""], n: int) -> Key[Array, " n"]:
    """One key a row, so that what a row samples does not depend on its neighbours or on their number."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))


@functools.partial(jax.jit, static_argnames=("model", "max_new", "eos_id", "pad_id", "temperature", "each", "slots"))
def sample(
    model: Model,
    params: PyTree,
    prompts: Int[Array, "b p"],
    segments: Int[Array, "b p"],
    key: Key[Array, ""],
    *,
    max_new: int,
    eos_id: int,
    pad_id: int,
    temperature: float,
    each: int = 1,
    slots: int = 0,
) -> Rollout:
    """Samples a response to each row from softmax(logits / temperature), without top-k or top-p.

    Args:
      each: so many rows that follow each other have one prompt, which is then run through the model once.
      slots: so many rows are decoded at a time, 0: all of them; see `generate`. It changes no response.
    """
    keys = row_keys(key, prompts.shape[0])
    limits = {"max_new": max_new, "eos_id": eos_id, "pad_id": pad_id}
    limits |= {"each": each, "slots": slots}
    out = generate(model, params, prompts[::each], segments[::each], keys, temperature=temperature, **limits)
    tokens = jnp.concatenate([prompts, out.tokens], axis=1)
    return Rollout(tokens, jnp.concatenate([segments, out.mask.astype(segments.dtype)], axis=1), out.mask, out.logprobs)


@functools.partial(jax.jit, static_argnames=("token_id", "after", "pad_id"))
def cut(rollout: Rollout, token_id: int, after: int, pad_id: int) -> Rollout:
    """Responses up to the first `token_id` at or after response position `after`; what follows it becomes padding."""
    mask, _ = truncate_mask(rollout.responses, rollout.mask, token_id=token_id, after=after)
    p = rollout.tokens.shape[1] - mask.shape[1]
    responses = jnp.where(mask > 0, rollout.responses, pad_id)
    tokens = jnp.concatenate([rollout.tokens[:, :p], responses], axis=1)
    segments = jnp.concatenate([rollout.segments[:, :p], mask.astype(rollout.segments.dtype)], axis=1)
    return Rollout(tokens, segments, mask, rollout.logprobs * mask)


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
    model: Model, params: PyTree, tokens: Int[Array, "b p_r"], segments: Int[Array, "b p_r"], r: int, temperature: float
) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """log pi(y_t | x, y_<t) and the entropy at each response slot, nats, at the sampling temperature."""
    hidden = response_hidden(model, params, tokens, segments, r)
    return model.logprobs(params, hidden, tokens[:, -r:], temperature)
