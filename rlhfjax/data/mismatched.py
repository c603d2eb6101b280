"""Prompts with the completions of other prompts, for KTO's KL (Ethayarajh et al. 2024)."""

from collections.abc import Hashable, Sequence

import numpy as np

from rlhfjax.data import examples
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
        self.skipped = source.skipped
        self.accepted_by = (tokenizer, validate_preference)  # if `source` was
        self._source = source
        self._tokenizer = tokenizer
        self._donors = _donors([_prompt_key(source[i]) for i in range(len(source))])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        donor = self._source[self._donors[index]]
        prompt, _ = examples.preference_ids(self._tokenizer, self._source[index])
        _, completions = examples.preference_ids(self._tokenizer, donor)
        return donor | {
            "prompt_tokens": np.array(prompt, np.int32),
            "completion_tokens": [np.array(ids, np.int32) for ids in completions],
        }

    def locate(self, index: int) -> str:
        return f"{self._source.locate(index)} with the completions of another prompt"


def _prompt_key(row: Row) -> Hashable:
    """Returns a key that is equal for equal prompts, as text or as one user turn."""
    messages = examples.prompt_of(row)
    return tuple((turn["role"], turn["content"]) for turn in messages)


def _donors(keys: Sequence[Hashable]) -> list[int]:
    """Returns for each row the row whose completions it takes, see `Mismatched`.

    Args:
      keys: equal for rows with the same prompt.
    """
    rows_by_key: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows_by_key.setdefault(key, []).append(row)
    groups = list(rows_by_key.values())
    if len(groups) < 2:
        raise DataError(
            f"kto: all {len(keys)} rows have one prompt; completions of another are needed"
        )
    donors = [0] * len(keys)
    for number, rows in enumerate(groups):
        others = groups[(number + len(groups) // 2) % len(groups)]
        for i, row in enumerate(rows):
            donors[row] = others[i % len(others)]
    return donors
