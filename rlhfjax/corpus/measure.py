"""Measures rows one by one, in any process: language, score, hashes and MinHash signature.

What is measured of a part of the corpus is a dict of arrays, one value per row, and a file that a
run which was killed need not compute again.
"""

import dataclasses
import io
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhfjax import paths
from rlhfjax.corpus import evaluation, language, near, quality
from rlhfjax.corpus.options import REMOVED_BY, Filters
from rlhfjax.corpus.rows import Item
from rlhfjax.corpus.words import digest, text_hash, words
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

Arrays = dict[str, np.ndarray]
# Names, types and numbers of dimensions of the arrays.
COLUMNS = {
    "removed": (np.uint8, 1),  # an index of REMOVED_BY
    "language": (np.str_, 1),  # "" if it is not looked at
    "probability": (np.float32, 1),  # of the language
    "score": (np.float32, 1),  # of quality; NaN if it is not looked at
    "words": (np.int64, 1),
    "digest": (np.uint8, 2),  # [n, 16]
    "prefix": (np.uint64, 1),
    "user": (np.uint64, 1),
    "signature": (np.uint32, 2),  # [n, permutations]
    "hit_count": (np.int64, 1),  # evaluation n-grams of the row
    "hits": (np.int64, 1),  # of all rows, one after the other
}


@dataclasses.dataclass(frozen=True)
class Tools:
    """What rows are measured with."""

    filters: Filters
    classifier: quality.Classifier | None
    table: np.ndarray  # uint64 [n], hashes of the evaluation's n-grams


def measure(tools: Tools, items: Sequence[Item]) -> Arrays:
    """Returns what is measured of some rows."""
    rows = [_measure_one(tools, item) for item in items]
    hits = [row.pop("hits") for row in rows]
    arrays = {
        name: np.array([row[name] for row in rows], dtype)
        for name, (dtype, _) in COLUMNS.items()
        if name not in ("hits", "hit_count")
    }
    arrays["hit_count"] = np.array([len(found) for found in hits], np.int64)
    arrays["hits"] = np.concatenate([np.zeros(0, np.int64), *hits])
    return arrays


def _measure_one(tools: Tools, item: Item) -> dict[str, Any]:
    """Returns what is measured of one row; of one that is removed, no more than counts."""
    filters = tools.filters
    row = _unmeasured(item, filters)
    if filters.language.keep:
        found = language.identify(item.text)
        row["language"], row["probability"] = found
        is_wanted = found.code in filters.language.keep
        if not is_wanted or found.probability < filters.language.probability:
            row["removed"] = REMOVED_BY.index("language")
            return row
    if tools.classifier is not None:
        row["score"] = quality.score(tools.classifier, item.text)
        alpha, seed = filters.quality.alpha, filters.seed
        if not quality.is_kept(item.text, row["score"], alpha, seed):
            row["removed"] = REMOVED_BY.index("quality")
            return row
    if filters.near.threshold:
        ngram, permutations = filters.near.ngram, filters.near.permutations
        row["signature"] = near.signature(item.text, ngram, permutations)
    row["hits"] = evaluation.hits(item.text, tools.table, filters.evaluation.ngram)
    return row


def _unmeasured(item: Item, filters: Filters) -> dict[str, Any]:
    permutations = filters.near.permutations if filters.near.threshold else 0
    return {
        "removed": 0,
        "language": "",
        "probability": np.nan,
        "score": np.nan,
        "words": len(words(item.text)),
        "digest": np.frombuffer(digest(item.identity), np.uint8),
        "prefix": text_hash(item.prompt[: filters.prompts.prefix]),
        "user": text_hash(item.user),
        "signature": np.zeros(permutations, np.uint32),
        "hits": np.zeros(0, np.int64),
    }


def write(path: Path, arrays: Arrays) -> None:
    """Writes what was measured, completely or not at all."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    paths.write(path, file.getvalue())


def read(path: Path) -> Arrays:
    """Returns what was measured of a part.

    Raises:
      DataError: the file is damaged.
    """
    content = paths.read(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in COLUMNS}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from None
    except Exception as error:  # zlib's and NumPy's parsers raise many kinds
        raise _damaged(path, type(error).__name__) from None
    _validate(path, arrays)
    return arrays


def _validate(path: Path, arrays: Arrays) -> None:
    n = len(arrays["removed"]) if arrays["removed"].ndim else -1
    for name, (dtype, dimensions) in COLUMNS.items():
        array = arrays[name]
        fits = array.ndim == dimensions and np.issubdtype(array.dtype, dtype)
        if not fits or (name != "hits" and len(array) != n):
            raise _damaged(path, f"{name} has another form")
    counts = arrays["hit_count"]
    has_all = counts.min(initial=0) >= 0 and counts.sum() == len(arrays["hits"])
    if not has_all or arrays["removed"].max(initial=0) >= len(REMOVED_BY):
        raise _damaged(path, "its counts do not fit together")


def _damaged(path: Path, why: str) -> DataError:
    reason = " ".join(why.split())[:100]
    return DataError(f"{path}: damaged ({reason}); delete it to measure its rows again")


def concatenated(parts: Iterable[Arrays], threshold: float) -> Arrays:
    """Returns the arrays of several parts, end to end, with `bands` in place of `signature`.

    Args:
      threshold: of near-duplicates, see `near.bands_of`; 0: there are no bands.
    """
    smaller = [_with_bands(part, threshold) for part in parts]
    return {
        name: np.concatenate([part.pop(name) for part in smaller])
        for name in list(smaller[0])
    }


def _with_bands(part: Arrays, threshold: float) -> Arrays:
    signatures = part.pop("signature")
    return part | {"bands": near.bands_of(signatures, threshold)} if threshold else part


class Signatures:
    """The signatures of rows, read from the files of their parts when they are asked for.

    Args:
      files: what was measured of each part.
      ends: index after the last row of each part.
    """

    def __init__(self, files: Sequence[Path], ends: Sequence[int]):
        self._files = files
        self._ends = ends

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the signatures of some rows in order, uint32 [n, permutations]."""
        found = []
        start = 0
        for file, end in zip(self._files, self._ends, strict=True):
            low, high = np.searchsorted(rows, (start, end))
            if low < high or not found:  # the first part tells their size
                found.append(read(file)["signature"][rows[low:high] - start])
            start = end
        return np.concatenate(found)
