"""Rows as examples, each encoded when it is first asked for."""

from collections.abc import Callable
from typing import Any

import jax

from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.errors import DataError

MOST_ITEMS = 2**25
"""128 MiB of numbers of 32 bits: data of any size takes no more than that."""
OVERHEAD = 64
"""What Python keeps beside an array, in numbers of 32 bits."""


class Encoded:
    """A sequence of encoded rows, each encoded once.

    Args:
      encode: takes the index of a row and the row, and returns a tree of arrays.
      max_items: numbers that are kept in memory; what does not fit is encoded anew. An array counts
        as OVERHEAD more.
      first: the index that `encode` takes for the first row.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[int, Row], Any],
        max_items: int = MOST_ITEMS,
        first: int = 0,
    ):
        self.source = source
        self._first = first
        self._encode = encode
        self._room = max_items
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        if index in self._kept:
            return self._kept[index]
        try:
            value = self._encode(self._first + index, self.source[index])
        except DataError as error:
            where = f"{self.source.locate(index)}: "
            raise DataError(where + str(error).removeprefix(where)) from None
        size = sum(array.size + OVERHEAD for array in jax.tree.leaves(value))
        if size <= self._room:
            self._room -= size
            self._kept[index] = value
        return value
