"""Prompts that are cut from conversations."""

import hashlib
from typing import Any

import numpy as np

from rlhfjax.data import verdicts
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source, merged_turns
from rlhfjax.errors import ConfigError

_INT32 = np.iinfo(np.int32).max


class Prompts:
    """A source of prompts: prefixes of conversations that end with a user turn.

    Args:
      source: rows of kind messages.
      per_conversation: the largest number of prefixes of one conversation, which a hash of the seed
        chooses; None: all.
    """

    kind = "prompt"

    def __init__(
        self, source: Source, *, per_conversation: int | None = 1, seed: int = 0
    ):
        if source.kind != "messages":
            raise ConfigError(
                f"prompts are cut from rows of kind messages, not {source.kind}"
            )
        self.source = source
        self.skipped = source.skipped
        self.merged = merged_turns(source)
        self.on_bad_row = getattr(source, "on_bad_row", "error")
        self._seed = seed
        self._most = per_conversation
        counts = verdicts.per_row(source, "user turns", np.int32, _count_user_turns)
        # Index of the first prompt of each row, and the number of prompts: [rows + 1].
        self._starts = np.zeros(len(source) + 1, np.int64)
        most = _INT32 if per_conversation is None else per_conversation
        np.cumsum(np.minimum(counts, most), out=self._starts[1:])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        number = self._row_of(index)
        return self._prompt(index, self.source[number])

    def locate(self, index: int) -> str:
        number = self._row_of(index)
        end = len(self[index]["messages"])
        return f"{self.source.locate(number)}, first {end} turns"

    def of_chosen(
        self, indices: np.ndarray, name: str, dtype: Any, measure: verdicts.Measure
    ) -> np.ndarray:
        """Returns what `verdicts.of_chosen` does."""
        if hasattr(
            self.source, "sources"
        ):  # a row's prompts depend on its place in all
            return verdicts.computed(self, indices, dtype, measure)

        def measure_prompt(k: int, row: Row) -> int:
            return measure(k, self._prompt(int(indices[k]), row))

        which = verdicts.digest(np.concatenate([self._starts, indices]))
        name = f"{name} of prompts, seed {self._seed}, {which}"
        rows = np.searchsorted(self._starts, indices, "right") - 1
        return verdicts.of_chosen(self.source, rows, name, dtype, measure_prompt)

    def _row_of(self, index: int) -> int:
        """Returns the index of the row that a prompt is cut from."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def _prompt(self, index: int, row: Row) -> Row:
        """Returns a prompt as a row, cut from a conversation."""
        number = self._row_of(index)
        messages = row["messages"]
        ends = [i + 1 for i, turn in enumerate(messages) if turn["role"] == "user"]
        ends.sort(key=lambda end: _digest(f"{self._seed}/{number}/{end}"))
        chosen = sorted(ends[: self._most])
        return {"messages": messages[: chosen[index - int(self._starts[number])]]}


def _count_user_turns(row: Row) -> int:
    return sum(turn["role"] == "user" for turn in row["messages"])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
