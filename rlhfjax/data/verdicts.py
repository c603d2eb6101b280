"""What is found out about every row of a source. Of an index it is kept: see `indexed`.

A verdict is one byte: the number of the row's split in SPLITS, and whether it is malformed or has
too few turns.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlhfjax.data import kept
from rlhfjax.data.rows import SPLITS, BadRow, Row, split_key, split_of

_SPLIT, _BAD, _SHORT = 3, 4, 8
Measure = Callable[[int, Row], int]
"""Takes the place of a row among some chosen ones, and the row."""


@runtime_checkable
class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def of_rows(
    records: kept.Kept,
    settings: Mapping[str, Any],
    to_row: Callable[[Mapping[str, Any]], Row],
) -> np.ndarray:
    """Returns the verdicts about records: uint8 [n].

    Args:
      settings: JSON value that decides what `to_row` does, with the rows' kind and min_turns.
      to_row: makes a row of a record. Raises BadRow.
    """

    def measure(index: int) -> int:
        try:
            row = to_row(records[index])
        except BadRow:
            return SPLITS.index(split_of(records.essence(index))) | _BAD
        is_short = len(row.get("messages", ())) < settings["min_turns"]
        split = split_of(split_key(settings["kind"], row))
        return SPLITS.index(split) | _SHORT * is_short

    return records.remembered(dict(settings), len(records), np.uint8, measure)


def in_split(verdicts: np.ndarray, split: str | None) -> np.ndarray:
    """Returns which rows are in a split, bool [n]; None: all rows."""
    if split is None:
        return np.ones(len(verdicts), bool)
    return (verdicts & _SPLIT) == SPLITS.index(split)


def is_bad(verdicts: np.ndarray) -> np.ndarray:
    """Returns which rows are malformed, bool [n]."""
    return (verdicts & _BAD) > 0


def is_short(verdicts: np.ndarray) -> np.ndarray:
    """Returns which rows have too few turns, bool [n]."""
    return (verdicts & _SHORT) > 0


def per_row(
    source: _Rows, name: str, dtype: Any, measure: Callable[[Row], int]
) -> np.ndarray:
    """Returns `measure(row)` for every row of a source. Of an index it is computed once.

    Args:
      name: with the row, determines the number.
    """
    everything = np.arange(len(source))
    return of_chosen(source, everything, name, dtype, lambda _, row: measure(row))


def of_chosen(
    source: _Rows, indices: np.ndarray, name: str, dtype: Any, measure: Measure
) -> np.ndarray:
    """Returns `measure(k, source[indices[k]])` for every k. Of an index it is computed once.

    A source that is made from another one passes this on, with the indices of that one.

    Args:
      indices: int [n], in order; one may stand there several times.
      name: with k and the row, determines the number.
    """
    if parts := getattr(source, "sources", None):
        return _of_parts(parts, indices, name, dtype, measure)
    if passed_on := getattr(source, "of_chosen", None):
        return passed_on(indices, name, dtype, measure)
    return computed(source, indices, dtype, measure)


def _of_parts(
    parts: Sequence[_Rows],
    indices: np.ndarray,
    name: str,
    dtype: Any,
    measure: Measure,
) -> np.ndarray:
    """Returns what `of_chosen` does, of sources that stand one after the other."""
    numbers = []
    first = 0
    for part in parts:
        low, high = np.searchsorted(indices, (first, first + len(part)))

        def measure_part(k: int, row: Row, low: int = int(low)) -> int:
            return measure(low + k, row)

        own = indices[low:high] - first
        numbers.append(of_chosen(part, own, name, dtype, measure_part))
        first += len(part)
    return np.concatenate(numbers)


def computed(
    source: _Rows, indices: np.ndarray, dtype: Any, measure: Measure
) -> np.ndarray:
    """Returns what `of_chosen` does, from the rows."""
    numbers = np.zeros(len(indices), dtype)
    for k, index in enumerate(indices):
        numbers[k] = measure(k, source[int(index)])
    return numbers


def digest(numbers: np.ndarray) -> str:
    """Returns a text that tells some whole numbers from others."""
    content = np.ascontiguousarray(numbers, np.int64)
    return hashlib.blake2b(content.tobytes(), digest_size=16).hexdigest()
