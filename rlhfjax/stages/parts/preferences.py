"""Ranked answers for the stages that learn from them: where they come from, and what a policy thinks of them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhfjax import paths
from rlhfjax.algos.preference import untied_pairs
from rlhfjax.data import examples
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source, open_source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.models.transformer import Model
from rlhfjax.stages import Pairs

PyTree = Any


def open_preferences(names: tuple[str, ...], split: str, stage: str = "reward") -> Source:
    """Rankings of all folders and `jsonl:` globs, as one source.

    Raises:
      ConfigError: none is named.
    """
    if not names:
        raise ConfigError(f"{stage}.preferences: at least one folder or jsonl: glob is needed")
    parts = [
        read_preferences(name, split)
        if ":" not in name or paths.remote(name)
        else open_source(name, kind="preferences", split=split)
        for name in names
    ]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def response_slots(segments: Int[Array, "n t"], lengths: Int[Array, " n"]) -> Float[Array, "n s"]:
    """1 at slots 0 .. t - 2 whose *next* token is the response's, its eos included: the last `lengths` real tokens."""
    end = jnp.sum((segments > 0).astype(jnp.int32), axis=1, keepdims=True)
    slot = jnp.arange(1, segments.shape[1])
    return ((slot >= end - lengths[:, None]) & (slot < end)).astype(jnp.float32)


def completion_logprobs(
    model: Model, params: PyTree, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> tuple[Float[Array, "n s"], Float[Array, "n s"]]:
    """log pi(y_t | x, y_<t) of every completion, and the mask of its tokens; n = b k rows, s = t - 1.

    Args:
      batch: of `loader.preference_batches`: tokens, segments [b, k, t], lengths [b, k].
      key: turns dropout on.
    """
    tokens, segments = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "segments"))
    hidden = model.hidden(params, tokens, segments=segments, key=key)
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    return logprobs, response_slots(segments, batch["lengths"].reshape(-1))


def truncation_metrics(batch: Mapping[str, Any]) -> Pairs:
    """Returns what cutting did to a batch of `loader.preference_batches` (arrays of numpy or jax).

    rows_cut: share of the completions that lost tokens, of themselves or of their prompt.
    pairs_dropped: share of the pairs ordered by labels whose completions have the same tokens; they
      weigh 0.
    """
    labels, valid, same = (jnp.asarray(batch[name]) for name in ("scores", "valid", "same"))
    labelled = jnp.sum(untied_pairs(labels, valid))
    return {
        "rows_cut": (jnp.sum(batch["cut"] * valid), jnp.sum(valid)),
        "pairs_dropped": (labelled - jnp.sum(untied_pairs(labels, valid, same)), labelled),
    }


class Mismatched:
    """Every row's prompt with the completions of another prompt, which KTO estimates its KL with.

    The donor is the prompt half of the distinct prompts away, in the order in which they first
    appear: it is never the same prompt, however often a prompt stands in the data, and neighbours
    are often prefixes of one conversation. The n-th row of a prompt takes the n-th row of the
    donor, in turn where the donor has fewer. Donors depend on the data and not on the batch, so
    that an estimate over a batch does not depend on how it is cut, and reference log-probabilities
    can be precomputed.

    Raises:
      DataError: all rows have one prompt.
    """

    kind = "preferences"

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.skipped, self._source, self._tokenizer = source.skipped, source, tokenizer
        self._donors = _donors([_prompt_key(source[i]) for i in range(len(source))])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        donor = self._source[self._donors[index]]
        prompt, _ = examples.native(self._tokenizer, self._source[index])
        _, completions = examples.native(self._tokenizer, donor)
        return donor | {
            "prompt_tokens": np.array(prompt, np.int32),
            "completion_tokens": [np.array(ids, np.int32) for ids in completions],
        }

    def where(self, index: int) -> str:
        return f"{self._source.where(index)} with another prompt's answers"


def _prompt_key(row: Row) -> Hashable:
    """Equal for equal prompts, as text or as one user turn."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return tuple((turn["role"], turn["content"]) for turn in messages)


def _donors(keys: Sequence[Hashable]) -> list[int]:
    """For each row the row whose completions it takes; see `Mismatched`. Rows with equal keys have
    one prompt."""
    rows_of: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    groups = list(rows_of.values())
    if len(groups) < 2:
        raise DataError(f"kto: all {len(keys)} rows have one prompt; answers to another are needed")
    donors = [0] * len(keys)
    for number, rows in enumerate(groups):
        others = groups[(number + len(groups) // 2) % len(groups)]
        for n, row in enumerate(rows):
            donors[row] = others[n % len(others)]
    return donors
