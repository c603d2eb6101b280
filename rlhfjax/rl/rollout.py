"""Responses sampled from a policy, as every policy stage, collection and evaluation needs them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlhfjax.algos.shaping import truncate_mask
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.mesh import in_use
from rlhfjax.models.experts import Routing
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.sampling.config import Sampling, SamplingConfig
from rlhfjax.sampling.generate import generate
from rlhfjax.types import PyTree


class Rollout(NamedTuple):
    """Prompts (left-padded) and responses (right-padded): the sampled ids, never re-encoded."""

    tokens: Int[Array, "b p_r"]
    attention_mask: Int[Array, "b p_r"]  # 1 on real tokens, 0 on padding
    mask: Float[Array, "b r"]  # 1 on response tokens, the eos included
    logprobs: Float[Array, "b r"]  # nats, under the distribution sampled from

    @property
    def responses(self) -> Any:
        """Ids [b, r], of numpy or jax as `tokens` are."""
        return self.tokens[:, -self.mask.shape[1] :]


class TokenIds(NamedTuple):
    """The token ids that sampling and scoring need."""

    eos_id: int
    pad_id: int
    stop_id: int | None = None  # the token of `truncate`, if that is on
    extra_eos_ids: tuple[int, ...] = ()  # other ids that end a response


def find_token_ids(config: PolicyConfig, tokenizer: Tokenizer) -> TokenIds:
    """Returns the ids that a policy stage needs."""
    token = config.truncate.token
    stop_id = tokenizer.token_id(token) if token else None
    return TokenIds(
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        stop_id=stop_id,
        extra_eos_ids=tokenizer.extra_eos_ids,
    )


# ------------------------------------------------------------------ sampling


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def _sample(
    model: Model,
    params: PyTree,
    prompts: Int[Array, "b p"],
    attention_mask: Int[Array, "b p"],
    key: Key[Array, ""],
    *,
    sampling: Sampling,
) -> Rollout:
    """Samples a response to each row; `samples_per_prompt` consecutive rows share a prompt."""
    keys = row_keys(key, prompts.shape[0])
    first_rows = slice(None, None, sampling.samples_per_prompt)
    samples = generate(
        model, params, prompts[first_rows], attention_mask[first_rows], keys, sampling
    )
    tokens = jnp.concatenate([prompts, samples.tokens], axis=1)
    response_mask = samples.mask.astype(attention_mask.dtype)
    return Rollout(
        tokens=tokens,
        attention_mask=jnp.concatenate([attention_mask, response_mask], axis=1),
        mask=samples.mask,
        logprobs=samples.logprobs,
    )


def row_keys(key: Key[Array, ""], n: int) -> Key[Array, " n"]:
    """Returns one key per row, so that a response does not depend on the other rows."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))


def _rollout_shapes(
    model: Model,
    params: PyTree,
    prompts: Any,
    attention_mask: Any,
    key: Any,
    *,
    sampling: Sampling,
) -> Rollout:
    """Returns the shapes of a rollout; tracing the sampler would take as long as all the rest."""
    sharding = in_use().sharding("batch")
    b, p = prompts.shape
    r = sampling.max_new_tokens

    def array(length: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((b, length), dtype, sharding=sharding)

    return Rollout(
        tokens=array(p + r, np.int32),
        attention_mask=array(p + r, np.int32),
        mask=array(r, np.float32),
        logprobs=array(r, np.float32),
    )


sample = Program("rollout", _sample, _rollout_shapes)
"""(model, params, prompts [b, p], attention_mask [b, p], key, *, sampling) -> Rollout."""


# ------------------------------------------------------------------ truncation


@functools.partial(jax.jit, static_argnames=("token_id", "after", "pad_id"))
def truncate_at(rollout: Rollout, token_id: int, after: int, pad_id: int) -> Rollout:
    """Returns responses up to the first `token_id` at or after response position `after`.

    The rest of a response becomes padding. A response without the token stays whole.
    """
    mask, _ = truncate_mask(
        rollout.responses, rollout.mask, token_id=token_id, after=after
    )
    p = rollout.tokens.shape[1] - mask.shape[1]
    responses = jnp.where(mask > 0, rollout.responses, pad_id)
    tokens = jnp.concatenate([rollout.tokens[:, :p], responses], axis=1)
    prompt_mask = rollout.attention_mask[:, :p]
    response_mask = mask.astype(prompt_mask.dtype)
    return Rollout(
        tokens=tokens,
        attention_mask=jnp.concatenate([prompt_mask, response_mask], axis=1),
        mask=mask,
        logprobs=rollout.logprobs * mask,
    )


_TRUNCATE = Program("truncate", truncate_at, ROWS)


def truncate_responses(
    config: PolicyConfig, ids: TokenIds, rollout: Rollout
) -> Rollout:
    """Returns what the reward scores: with `truncate`, the responses up to the stop token."""
    if ids.stop_id is None:
        return rollout
    return _TRUNCATE(rollout, ids.stop_id, config.truncate.after, ids.pad_id)


# ------------------------------------------------------------------ forward passes


class ResponseOutputs(NamedTuple):
    """What a forward pass over prompts and responses computes."""

    hidden: Float[Array, "b r d"]
    logprobs: Float[Array, "b r"]  # log pi(y_t | x, y_<t), nats
    entropy: Float[Array, "b r"]  # nats
    routing: Routing | None  # of a mixture of experts


def response_hidden(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "b p_r"],
    attention_mask: Int[Array, "b p_r"],
    r: int,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "b r d"], Routing | None]:
    """Returns the hidden states at the position *before* each of the r response tokens.

    They predict the token, and they are the state that a value function values. The second result
    is the routing of a mixture of experts.
    """
    hidden, routing = model.hidden_and_routing(
        params, tokens, segment_ids=attention_mask, key=key
    )
    return hidden[:, -r - 1 : -1], routing


def response_outputs(
    config: SamplingConfig, model: Model, params: PyTree, batch: Any
) -> ResponseOutputs:
    """Returns hidden states, log-probabilities and entropy of a batch's responses.

    Log-probabilities are at the sampling temperature, as those of the sampler are.

    Args:
      batch: a Rollout or a minibatch, with tokens, attention_mask and mask.
    """
    r = batch.mask.shape[1]
    hidden, routing = response_hidden(
        model, params, batch.tokens, batch.attention_mask, r
    )
    responses = batch.tokens[:, -r:]
    logprobs, entropy = model.logprobs(params, hidden, responses, config.temperature)
    return ResponseOutputs(hidden, logprobs, entropy, routing)


def response_logprobs(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "b p_r"],
    attention_mask: Int[Array, "b p_r"],
    r: int,
    temperature: float,
) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """Returns log pi(y_t | x, y_<t) and the entropy per response token, nats, at a temperature."""
    hidden, _ = response_hidden(model, params, tokens, attention_mask, r)
    return model.logprobs(params, hidden, tokens[:, -r:], temperature)
