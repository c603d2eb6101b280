"""Writes the rows that are left, part by part, split by split."""

from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from rlhfjax import json_text, paths
from rlhfjax.corpus import evaluation
from rlhfjax.corpus.decide import Decision
from rlhfjax.corpus.options import EvaluationConfig
from rlhfjax.corpus.parts import Corpus, Part
from rlhfjax.corpus.rows import Item, as_json, item_of, split_of_row
from rlhfjax.corpus.words import digest, words
from rlhfjax.data.rows import Row
from rlhfjax.errors import DataError
from rlhfjax.jsonl import write_jsonl
from rlhfjax.paths import Path
from rlhfjax.ranges import Count

BINS = 32
"""Bins of a histogram of lengths: bin b has the lengths from 2^(b - 1) to 2^b - 1, bin 0 has 0."""


class Shares(NamedTuple):
    """Shares of the rows that are held out."""

    validation: float
    test: float


class Written(TypedDict):
    """What was written of a part."""

    rows: dict[str, Count]  # by split
    words: dict[str, Count]  # by split
    lengths: list[Count]  # rows by words, in BINS bins
    cut: list[Count]  # rows that lost evaluation text
    removed: list[Count]  # rows of which nothing was left


class Writer:
    """Writes parts of a corpus.

    Args:
      folder: workdir of the stage.
      table: hashes of the evaluation's n-grams.
      digests: uint8 [n, 16], of all rows as they were measured.
    """

    def __init__(
        self,
        corpus: Corpus,
        decision: Decision,
        digests: np.ndarray,
        table: np.ndarray,
        options: EvaluationConfig,
        shares: Shares,
        folder: Path,
    ):
        self._corpus = corpus
        self._decision = decision
        self._digests = digests
        self._table = table
        self._options = options
        self._shares = shares
        self._folder = folder

    def write(self, part: Part) -> Written:
        """Writes one part; returns what was written.

        Raises:
          DataError: a row is not the one that was measured.
        """
        written = Written(rows={}, words={}, lengths=[0] * BINS, cut=[], removed=[])
        splits: dict[str, list[dict]] = {}
        for index in range(part.start, part.end):
            if self._decision.removed[index]:
                continue
            row, item = self._row(index)
            left = self._without_evaluation(index, row, item)
            if not left:
                written["removed"].append(index)
            elif left[0] is not row:
                written["cut"].append(index)
            split = split_of_row(self._corpus.kind, row, *self._shares)
            for one in left:
                self._count(written, split, one)
                splits.setdefault(split, []).append(as_json(self._corpus.kind, one))
        for split, rows in splits.items():
            path = self._folder / part.file(split)
            paths.make_folder(path.parent)
            write_jsonl(path, rows)
        return written

    def _count(self, written: Written, split: str, row: Row) -> None:
        size = len(words(item_of(self._corpus.kind, row).text))
        written["lengths"][min(size.bit_length(), BINS - 1)] += 1
        for counts, more in ((written["rows"], 1), (written["words"], size)):
            counts[split] = counts.get(split, 0) + more

    def _row(self, index: int) -> tuple[Row, Item]:
        row = self._corpus[index]
        item = item_of(self._corpus.kind, row)
        if digest(item.identity) != self._digests[index].tobytes():
            raise DataError(
                f"{self._corpus.locate(index)}: the row has changed since it was measured;"
                f" delete {self._folder} to begin again"
            )
        return row, item

    def _without_evaluation(self, index: int, row: Row, item: Item) -> list[Row]:
        """Returns what is left of a row; the row itself if it has no evaluation text."""
        hits = self._decision.hits_of(index)
        if not len(hits):
            return [row]
        if self._corpus.kind != "text" or self._options.remove == "row":
            return []
        left = evaluation.pieces(
            item.text,
            self._table[hits],
            ngram=self._options.ngram,
            window=self._options.window,
            most_pieces=self._options.most_pieces,
        )
        return [row | {"text": piece} for piece in left]


def read(path: Path) -> Written | None:
    """Returns what was written of a part; None if it was not. Raises DataError."""
    return json_text.read_if_there(path, Written)
