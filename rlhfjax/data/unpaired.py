"""Rows with one labeled response, as preferences with a single completion: what KTO learns from."""

from typing import Any

import numpy as np

from rlhfjax.data import verdicts
from rlhfjax.data.chat import to_text
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source, merged_turns

DESIRABLE_ABOVE = 0.5
"""Between the scores of an undesirable and of a desirable response, 0 and 1."""


class AsPreferences:
    """Rows of kind `unpaired` as rows of kind `preferences`, each with one completion.

    A desirable response has score 1, an undesirable one 0.
    """

    kind = "preferences"

    def __init__(self, source: Source):
        self.skipped = source.skipped
        self.merged = merged_turns(source)
        self.on_bad_row = getattr(source, "on_bad_row", "error")
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        return as_preference(self._source[index])

    def locate(self, index: int) -> str:
        return self._source.locate(index)

    def of_chosen(
        self, indices: np.ndarray, name: str, dtype: Any, measure: verdicts.Measure
    ) -> np.ndarray:
        """Returns what `verdicts.of_chosen` does."""

        def measure_unpaired(k: int, row: Row) -> int:
            return measure(k, as_preference(row))

        name = f"{name} as preferences"
        return verdicts.of_chosen(self._source, indices, name, dtype, measure_unpaired)


def as_preference(row: Row) -> Row:
    """Returns a row of kind `unpaired` as a row of kind `preferences`."""
    row = dict(row)
    response, desirable = row.pop("response"), row.pop("desirable")
    return row | {
        "prompt": to_text(row["messages"]),
        "completions": [response],
        "scores": [float(desirable)],
    }
