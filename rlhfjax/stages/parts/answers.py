"""Every prompt of a source answered by a policy, batch by batch: what collection and recentring have in common."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.stages.parts.policy_config import TruncateConfig
from rlhfjax.stages.parts.rollout import Rollout, cut, sample


class Sampling(NamedTuple):
    """How answers are drawn."""

    prompt_length: int
    max_new: int
    temperature: float
    batch_size: int  # prompts at a time
    each: int = 1  # answers a prompt, in rows that follow each other
    slots: int = 0  # answers decoded at a time, 0: all of a batch
    stop_at_eos: bool = True
    truncate: TruncateConfig = TruncateConfig()


def answers(
    source: Source,
    policy: store.SavedModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    key: jax.Array,
    layout: Layout,
) -> Iterator[tuple[Rollout, np.ndarray]]:
    """Rollouts of `each` rows a prompt, with the prompts' indices [batch_size], -1 where one only fills the batch.

    Batch i is drawn with fold_in(key, i), so that the same key gives the same answers.
    """
    stop = tokenizer.token_id(sampling.truncate.token) if sampling.truncate.token else None
    eos = tokenizer.eos_id if sampling.stop_at_eos else -1
    options = {"batch_size": sampling.batch_size, "length": sampling.prompt_length}
    limits = {"max_new": sampling.max_new, "eos_id": eos, "pad_id": tokenizer.pad_id}
    limits |= {"each": sampling.each, "slots": sampling.slots}
    for i, batch in enumerate(loader.prompt_batches(source, tokenizer, train=False, **options)):
        placed = layout.put({k: np.repeat(batch[k], sampling.each, axis=0) for k in ("prompts", "segments")})
        rows: tuple[Any, ...] = (placed["prompts"], placed["segments"], jax.random.fold_in(key, i))
        rollout = sample(policy.model, policy.params, *rows, temperature=sampling.temperature, **limits)
        if stop is not None:
            rollout = cut(rollout, stop, sampling.truncate.after, tokenizer.pad_id)
        yield rollout, batch["index"]
