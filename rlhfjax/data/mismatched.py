"""Prompts with the completions of other prompts, for KTO's KL (Ethayarajh et al. 2024)."""

import hashlib

import numpy as np

from rlhfjax import json_text
from rlhfjax.data import examples, verdicts
from rlhfjax.data.accepted import validate_preference
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError


class Mismatched:
    """A source with the prompt of every row and the completions of another prompt.

    With n distinct prompts, ordered by first appearance, the completions are those of the prompt
    n / 2 places further. This is never the same prompt, however often a prompt appears, and unlike
    a neighbor it is rarely a prefix of the same conversation. The i-th row of a prompt takes the
    i-th row of the other prompt, in turn if that has fewer rows.

    The choice depends on the data and not on the batch. An estimate over a batch is therefore
    independent of how the batch is divided, and reference log-probabilities can be precomputed.

    Raises:
      DataError: all rows have the same prompt.
    """

    kind = "preferences"

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.skipped, self.merged = 0, 0  # `source` counts them
        self.accepted_by = (tokenizer, validate_preference)  # if `source` was
        self._source = source
        self._tokenizer = tokenizer
        keys = verdicts.per_row(source, "prompt", np.uint64, _prompt_key)
        self._donors = _donors(keys)
        counts = verdicts.per_row(source, "completions", np.int32, _completions)
        self.most_completions = int(counts[self._donors].max())

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        donor = self._source[int(self._donors[index])]
        prompt, _ = examples.preference_ids(self._tokenizer, self._source[index])
        _, completions = examples.preference_ids(self._tokenizer, donor)
        return donor | {
            "prompt_tokens": np.array(prompt, np.int32),
            "completion_tokens": [np.array(ids, np.int32) for ids in completions],
        }

    def locate(self, index: int) -> str:
        return f"{self._source.locate(index)} with the completions of another prompt"


def _completions(row: Row) -> int:
    return len(row["completions"])


def _prompt_key(row: Row) -> int:
    """Returns a hash of 64 bits that is equal for equal prompts, as text or as one user turn."""
    messages = examples.prompt_of(row)
    turns = [[turn["role"], turn["content"]] for turn in messages]
    text = json_text.encode(turns, "prompt")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _donors(keys: np.ndarray) -> np.ndarray:
    """Returns for each row the row whose completions it takes, see `Mismatched`: int64 [n].

    Args:
      keys: uint64 [n], equal for rows with the same prompt.
    """
    _, first, prompts = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) < 2:
        raise DataError(
            f"kto: all {len(keys)} rows have one prompt; completions of another are needed"
        )
    # Prompts are numbered by first appearance.
    numbers = np.argsort(np.argsort(first))[prompts]
    by_prompt = np.argsort(numbers, kind="stable")
    counts = np.bincount(numbers)
    starts = np.cumsum(counts) - counts
    # A row is the i-th one of its prompt.
    places = np.empty(len(keys), np.int64)
    places[by_prompt] = np.arange(len(keys)) - np.repeat(starts, counts)
    others = (numbers + len(first) // 2) % len(first)
    return by_prompt[starts[others] + places % counts[others]]
