"""Decides which rows are left where rows depend on each other: in source order, the first stays."""

from typing import NamedTuple

import numpy as np

from rlhfjax.corpus import near
from rlhfjax.corpus.measure import Arrays
from rlhfjax.corpus.options import REMOVED_BY, Filters


class Decision(NamedTuple):
    """What becomes of each of n rows."""

    removed: np.ndarray  # uint8 [n], an index of REMOVED_BY
    like: np.ndarray  # int64 [n], the earlier row that it repeats; -1: none
    starts: np.ndarray  # int64 [n + 1], into `hits`
    hits: np.ndarray  # int64 [h], n-grams of evaluation text to remove from each row
    ignored: int  # n-grams that too many documents have
    similarity: np.ndarray  # float32 [n], of a row to the one that it nearly repeats

    def hits_of(self, row: int) -> np.ndarray:
        """Returns the evaluation n-grams to remove from a row, indices of the table."""
        return self.hits[self.starts[row] : self.starts[row + 1]]


def decide(measured: Arrays, filters: Filters, signatures: near.Signatures) -> Decision:
    """Returns what becomes of each row. `evaluation` is decided by `hits`, on the row itself.

    Args:
      measured: see `measure.concatenated`.
      signatures: of rows, by their indices.
    """
    rows = _Rows(measured["removed"])
    if filters.exact:
        rows.remove_repeated(_as_keys(measured["digest"]), "exact")
    if filters.near.threshold:
        rows.remove_similar(measured["bands"], signatures, filters.near.threshold)
    if filters.prompts.prefix:
        rows.remove_repeated(measured["prefix"], "prefix")
    if filters.prompts.per_user:
        rows.limit_users(measured["user"], filters.prompts.per_user)
    is_left = rows.removed == 0
    counts = np.where(is_left, measured["hit_count"], 0)
    is_of_left = np.repeat(is_left, measured["hit_count"])
    hits, starts, ignored = _without_common(
        measured["hits"][is_of_left], counts, filters.evaluation.common
    )
    return Decision(
        removed=rows.removed,
        like=rows.like,
        starts=starts,
        hits=hits,
        ignored=ignored,
        similarity=rows.similarity,
    )


class _Rows:
    """Which rows are removed so far."""

    def __init__(self, removed: np.ndarray):
        self.removed = removed.copy()
        self.like = np.full(len(removed), -1, np.int64)
        self.similarity = np.full(len(removed), np.nan, np.float32)

    def remove_repeated(self, keys: np.ndarray, name: str) -> None:
        """Removes rows whose key an earlier row that is left has."""
        left = self._left()
        _, first, number = np.unique(keys[left], return_index=True, return_inverse=True)
        earlier = first[number]
        is_repeated = earlier != np.arange(len(left))
        self._remove(left[is_repeated], name, left[earlier[is_repeated]])

    def remove_similar(
        self, bands: np.ndarray, signatures: near.Signatures, threshold: float
    ) -> None:
        """Removes rows that are nearly equal to an earlier one that is left."""
        left = self._left()
        repeats = near.duplicates_of(
            bands[left], lambda rows: signatures(left[rows]), threshold
        )
        self.similarity[left] = repeats.similarity
        is_repeated = repeats.of >= 0
        self._remove(left[is_repeated], "near", left[repeats.of[is_repeated]])

    def limit_users(self, users: np.ndarray, most: int) -> None:
        """Removes all but the first `most` rows of each user."""
        left = self._left()
        # A stable order: the rows of a user follow each other, as they came.
        order = left[np.argsort(users[left], kind="stable")]
        position = np.arange(len(order))
        is_first = np.ones(len(order), bool)
        is_first[1:] = users[order[1:]] != users[order[:-1]]
        start = np.maximum.accumulate(np.where(is_first, position, 0))
        is_beyond = position - start >= most
        self._remove(order[is_beyond], "user", -1)

    def _left(self) -> np.ndarray:
        return np.flatnonzero(self.removed == 0)

    def _remove(self, rows: np.ndarray, name: str, like: np.ndarray | int) -> None:
        self.removed[rows] = REMOVED_BY.index(name)
        self.like[rows] = like


def _as_keys(digests: np.ndarray) -> np.ndarray:
    """Returns digests [n, 16] as one value per row."""
    contiguous = np.ascontiguousarray(digests)
    return contiguous.view(np.dtype((np.void, digests.shape[1]))).ravel()


def _without_common(
    hits: np.ndarray, counts: np.ndarray, common: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the n-grams to remove, where those of each row start, and how many are ignored."""
    _, number, documents = np.unique(hits, return_inverse=True, return_counts=True)
    is_common = documents > common
    stays = ~is_common[number]
    rows = np.repeat(np.arange(len(counts)), counts)
    left = np.bincount(rows[stays], minlength=len(counts))
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(left, out=starts[1:])
    return hits[stays], starts, int(is_common.sum())
