"""Prompts beside the completions of other prompts, for KTO's estimate of a KL (Ethayarajh et al. 2024)."""

from collections.abc import Hashable, Sequence

import numpy as np

from rlhfjax.data import examples
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError


class Mismatched:
    """Every row's prompt with the completions of another prompt, which KTO estimates its KL with.

    The donor is the prompt half of the distinct prompts away, in the order in which they first
    appear: it is never the same prompt, however often a prompt stands in the data, and neighbors
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

    def locate(self, index: int) -> str:
        return f"{self._source.locate(index)} with another prompt's answers"


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
        raise DataError(
            f"kto: all {len(keys)} rows have one prompt; answers to another are needed"
        )
    donors = [0] * len(keys)
    for number, rows in enumerate(groups):
        others = groups[(number + len(groups) // 2) % len(groups)]
        for n, row in enumerate(rows):
            donors[row] = others[n % len(others)]
    return donors
