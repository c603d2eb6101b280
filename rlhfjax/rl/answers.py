"""Every prompt of a source answered by a policy, batch by batch: for collection, evaluation and recentring."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.batches import repeat
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.rl.config import TruncateConfig
from rlhfjax.rl.rollout import Rollout, cut, sample


class Sampling(NamedTuple):
    """How answers are drawn."""

    prompt_length: int
    max_new_tokens: int
    temperature: float
    batch_size: int  # prompts at a time
    samples_per_prompt: int = 1  # answers a prompt, in rows that follow each other
    decode_batch: int = 0  # answers decoded at a time, 0: all of a batch
    stop_at_eos: bool = True
    truncate: TruncateConfig = TruncateConfig()
    buckets: int = 1  # widths that prompts are padded to, even parts of prompt_length; each is compiled once


def validate_buckets(buckets: int, length: int, stage: str) -> None:
    """Raises ConfigError unless the prompts' width can be cut into so many parts."""
    if buckets > length:
        raise ConfigError(
            f"{stage}.prompt_buckets={buckets}: 1 (one width) to prompt_length={length}"
        )


def bucket(segments: np.ndarray, buckets: int) -> int:
    """The width that left-padded prompts [b, p] need, rounded up to one of `buckets` even parts of p."""
    length = segments.shape[1]
    part = -(-length // buckets)
    longest = max(1, int((segments > 0).sum(1).max()))
    return min(length, -(-longest // part) * part)


@functools.partial(jax.jit, static_argnums=(1, 2))
def widened(rollout: Rollout, more: int, pad_id: int) -> Rollout:
    """The same rollout with `more` slots of padding before its prompts."""
    left = ((0, 0), (more, 0))
    tokens = jnp.pad(rollout.tokens, left, constant_values=pad_id)
    return rollout._replace(tokens=tokens, segments=jnp.pad(rollout.segments, left))


def answers(
    source: Source,
    policy: store.SavedModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    key: jax.Array,
    layout: Layout,
) -> Iterator[tuple[Rollout, np.ndarray, np.ndarray]]:
    """Yields rollouts of `each` rows per prompt, and for their prompts `index` and `cut`,
    [batch_size] each.

    The index is -1 where a prompt only fills the batch; `cut` is 1 where a prompt lost tokens to
    fit. Batch i is drawn with fold_in(key, i), so that the same key gives the same answers.
    """
    stop = (
        tokenizer.token_id(sampling.truncate.token) if sampling.truncate.token else None
    )
    eos = tokenizer.eos_id if sampling.stop_at_eos else -1
    options = {"batch_size": sampling.batch_size, "length": sampling.prompt_length}
    limits = {
        "max_new_tokens": sampling.max_new_tokens,
        "eos_id": eos,
        "pad_id": tokenizer.pad_id,
    }
    limits |= {
        "samples_per_prompt": sampling.samples_per_prompt,
        "decode_batch": sampling.decode_batch,
    }
    for i, batch in enumerate(
        loader.prompt_batches(source, tokenizer, train=False, **options)
    ):
        width = bucket(batch.attention_mask, sampling.buckets)
        prompts = (batch.tokens[:, -width:], batch.attention_mask[:, -width:])
        prompts = layout.put(repeat(prompts, sampling.samples_per_prompt))
        rows: tuple[Any, ...] = (*prompts, jax.random.fold_in(key, i))
        rollout = sample(
            policy.model,
            policy.params,
            *rows,
            temperature=sampling.temperature,
            **limits,
        )
        rollout = widened(rollout, sampling.prompt_length - width, tokenizer.pad_id)
        if stop is not None:
            rollout = cut(rollout, stop, sampling.truncate.after, tokenizer.pad_id)
        yield rollout, batch.index, batch.cut
