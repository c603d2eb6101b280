"""The rows of some sources, in parts that are measured and written one at a time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlhfjax.corpus.rows import KINDS, Item, item_of
from rlhfjax.data.config import SourceConfig
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.errors import ConfigError


class Part(NamedTuple):
    """Consecutive rows of one source, which are one file."""

    number: int
    source: int
    start: int  # index of the first row, over all sources
    end: int  # index after the last row

    def file(self, split: str) -> str:
        """Returns the name of the file with the rows of a split, in the order of rows."""
        return f"{split}/{self.source:02d}-{self.number:06d}.jsonl"


class Corpus:
    """The rows of all sources, one source after the other.

    Raises:
      ConfigError: there is no source, or their kinds differ or cannot be filtered.
    """

    def __init__(self, configs: Sequence[SourceConfig], rows_per_file: int):
        if not configs:
            raise ConfigError("prepare.sources: at least one source is needed")
        self.sources: list[Source] = [config.open() for config in configs]
        self.kind = self.sources[0].kind
        for config, source in zip(configs, self.sources, strict=True):
            if source.kind not in KINDS or source.kind != self.kind:
                expected = self.kind if self.kind in KINDS else ", ".join(KINDS)
                raise ConfigError(
                    f"prepare.sources: {config.spec} has rows of kind {source.kind};"
                    f" expected {expected}"
                )
        self._ends: list[int] = []
        for source in self.sources:
            self._ends.append(len(self) + len(source))
        self.parts = list(self._parts(rows_per_file))

    def _parts(self, rows_per_file: int) -> Iterator[Part]:
        number, first = 0, 0
        for i, end in enumerate(self._ends):
            for start in range(first, end, rows_per_file):
                yield Part(number, i, start, min(end, start + rows_per_file))
                number += 1
            first = end

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        source, local = self._find(index)
        return source[local]

    def item(self, index: int) -> Item:
        """Returns a row as filters see it."""
        return item_of(self.kind, self[index])

    def locate(self, index: int) -> str:
        """Returns where a row stands."""
        source, local = self._find(index)
        return source.locate(local)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        source = self.sources[number]
        return source, index - self._ends[number] + len(source)

    def plan(self) -> dict[str, Any]:
        """Returns what has to be the same when a run that was killed continues."""
        return {"rows": [len(source) for source in self.sources], "kind": self.kind}
