"""A policy's responses to every prompt of a source, for collection, evaluation and recentering."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import loader
from rlhfjax.data.batches import repeat
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.rl.config import TruncateConfig
from rlhfjax.rl.placement import job_placement
from rlhfjax.rl.rollout import Rollout, truncate_at
from rlhfjax.sampling.config import Sampling
from rlhfjax.sampling.stop import cut_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatching:
    """How prompts are put into batches."""

    batch_size: int
    """Prompts per batch."""
    length: int
    """Tokens that prompts are padded to in the result."""
    buckets: int = 1
    """Number of widths that prompts are padded to for sampling, even parts of `length`."""


class Responses(NamedTuple):
    """A batch of prompts with their responses; rows i * K .. (i + 1) * K - 1 belong to prompt i."""

    rollout: Rollout
    index: (
        np.ndarray
    )  # [batch_size] into the source; -1 if a prompt only fills the batch
    cut: np.ndarray  # [batch_size] 1 if a prompt lost tokens to fit
    stopped: np.ndarray  # [batch_size * K] whether a stop text ended the response


def sample_responses(
    source: Source,
    policy: store.SavedModel,
    sampling: Sampling,
    batching: PromptBatching,
    key: jax.Array,
    layout: Layout,
    *,
    truncate: TruncateConfig = TruncateConfig(),
) -> Iterator[Responses]:
    """Yields samples_per_prompt responses to each prompt, batch by batch.

    Batch i is sampled with fold_in(key, i), so that the same key gives the same responses. They end
    before the first text of `sampling.stop`.
    """
    tokenizer = policy.tokenizer
    stop_id = tokenizer.token_id(truncate.token) if truncate.token else None
    batches = loader.prompt_batches(
        source,
        tokenizer,
        train=False,
        batch_size=batching.batch_size,
        length=batching.length,
    )
    rows = batching.batch_size * sampling.samples_per_prompt
    placement = job_placement(layout, policy.model, rows, batching.length, sampling)
    weights = placement.place(policy.params)
    for i, batch in enumerate(batches):
        width = bucket_width(batch.attention_mask, batching.buckets)
        prompts = (batch.tokens[:, -width:], batch.attention_mask[:, -width:])
        tokens, mask = layout.put(repeat(prompts, sampling.samples_per_prompt))
        rollout = placement.sample(
            weights, tokens, mask, jax.random.fold_in(key, i), sampling
        )
        rollout = pad_prompts(rollout, batching.length - width, tokenizer.pad_id)
        if stop_id is not None:
            rollout = truncate_at(rollout, stop_id, truncate.after, tokenizer.pad_id)
        stopped = np.zeros(len(tokens), bool)
        if sampling.stop:
            rollout, stopped = cut_at_stop(rollout, sampling.stop, tokenizer, layout)
        yield Responses(rollout, batch.index, batch.cut, stopped)


def cut_at_stop(
    rollout: Rollout, stop: Sequence[str], tokenizer: Tokenizer, layout: Layout
) -> tuple[Rollout, np.ndarray]:
    """Returns the rollout with responses that end before their first stop text.

    Also returns which responses have one, [b].

    See `sampling.stop.cut_ids`. Padding follows. The log-probabilities of a response that was cut
    are 0, because its last tokens may not have been sampled.
    """
    rollout = hosts.whole(rollout)
    tokens, mask, logprobs = map(
        np.array, (rollout.responses, rollout.mask, rollout.logprobs)
    )
    stopped = np.zeros(len(mask), bool)
    for i, counts in enumerate(mask > 0):
        ids = tokens[i][counts].tolist()
        kept = cut_ids(tokenizer, ids, stop)
        stopped[i] = kept != ids
        if stopped[i]:
            n = min(len(kept), len(counts))
            tokens[i] = [*kept[:n], *[tokenizer.pad_id] * (len(counts) - n)]
            mask[i] = np.arange(len(counts)) < n
            logprobs[i] = 0
    p = rollout.tokens.shape[1] - mask.shape[1]
    prompt_mask = rollout.attention_mask[:, :p]
    response_mask = mask.astype(prompt_mask.dtype)
    rows = {
        "tokens": np.concatenate([rollout.tokens[:, :p], tokens], axis=1),
        "attention_mask": np.concatenate([prompt_mask, response_mask], axis=1),
        "mask": mask,
        "logprobs": logprobs,
    }
    return Rollout(**layout.put(rows)), stopped


def validate_buckets(buckets: int, length: int, stage: str) -> None:
    """Raises ConfigError unless prompts of `length` tokens can have `buckets` widths."""
    if buckets > length:
        raise ConfigError(
            f"{stage}.prompt_buckets={buckets}: must be <= prompt_length={length}"
        )


def bucket_width(attention_mask: np.ndarray, buckets: int) -> int:
    """Returns the width that left-padded prompts [b, p] need, in multiples of p / buckets."""
    length = attention_mask.shape[1]
    part = -(-length // buckets)
    longest = max(1, int((attention_mask > 0).sum(1).max()))
    return min(length, -(-longest // part) * part)


@functools.partial(jax.jit, static_argnums=(1, 2))
def pad_prompts(rollout: Rollout, padding: int, pad_id: int) -> Rollout:
    """Returns the rollout with `padding` more tokens before its prompts."""
    left = ((0, 0), (padding, 0))
    return rollout._replace(
        tokens=jnp.pad(rollout.tokens, left, constant_values=pad_id),
        attention_mask=jnp.pad(rollout.attention_mask, left),
    )
