"""Removes evaluation text from documents: word n-grams that both have.

    1. n-grams of an evaluation text that more than `common` documents have are ignored: phrases.
    2. Of a document with another one, the n-gram and `window` characters on both sides of it are
       cut out. Pieces below `window` characters are discarded.
    3. A document that falls into more than `most_pieces` pieces is removed.

Source: Brown et al. 2020 (GPT-3), appendix C: 13-grams, 200 characters, 10 documents, 10 pieces.
"""

from collections.abc import Iterable

import numpy as np

from rlhfjax.corpus.words import Span, ngram_hashes, spans, words


def table_of(texts: Iterable[str], ngram: int) -> np.ndarray:
    """Returns the hashes of all n-grams of some texts, uint64 [n], sorted; none twice."""
    parts = [np.zeros(0, np.uint64)]
    for text in texts:
        hashes = ngram_hashes(words(text), ngram)
        parts.append(np.unique(hashes))
    return np.unique(np.concatenate(parts))


def hits(text: str, table: np.ndarray, ngram: int) -> np.ndarray:
    """Returns which n-grams of a table a text has, as indices, int64 [h], sorted; none twice."""
    hashes = ngram_hashes(words(text), ngram)
    hashes = np.unique(hashes)
    if not len(table):
        return np.zeros(0, np.int64)
    places = np.searchsorted(table, hashes)
    places = np.minimum(places, len(table) - 1)
    is_there = table[places] == hashes
    return places[is_there]


def pieces(
    text: str, hashes: np.ndarray, *, ngram: int, window: int, most_pieces: int
) -> list[str]:
    """Returns what is left of a document without some n-grams; [] if it is removed.

    Args:
      hashes: uint64 [h], of the n-grams to cut out, each with `window` characters on both sides.
    """
    windows = _windows(text, hashes, ngram, window)
    starts = [0, *(span.end for span in windows)]
    ends = [*(span.start for span in windows), len(text)]
    if len(starts) > most_pieces:
        return []
    left = []
    for start, end in zip(starts, ends, strict=True):
        piece = text[start:end]
        if len(piece) >= window and piece.strip():
            left.append(piece)
    return left


def overlap(text: str, hashes: np.ndarray, ngram: int) -> str:
    """Returns the first of some n-grams in a text, as it stands there; "" if it has none."""
    windows = _windows(text, hashes, ngram, 0)
    if not windows:
        return ""
    start, end = windows[0]
    return text[start:end]


def _windows(text: str, hashes: np.ndarray, ngram: int, window: int) -> list[Span]:
    """Returns the pieces to cut out, in order; those that touch are one."""
    places = spans(text)
    is_found = np.isin(ngram_hashes(words(text), ngram), hashes)
    merged: list[Span] = []
    for first in np.flatnonzero(is_found).tolist():
        last = first + ngram - 1
        start = max(0, places[first].start - window)
        end = min(len(text), places[last].end + window)
        if merged and start <= merged[-1].end:
            previous = merged.pop()
            start = previous.start
        merged.append(Span(start, end))
    return merged
