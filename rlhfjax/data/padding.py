"""Rows of token ids, padded to one length."""

from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[int] | np.ndarray]
Padded = tuple[np.ndarray, np.ndarray]


def pad_left(rows: Rows, *, length: int, pad_id: int) -> Padded:
    """Returns tokens, each row's ids at its end, and segments, 0 on padding; int32 [b, length]."""
    starts = [length - len(ids) for ids in rows]
    return _padded(rows, starts, length, pad_id)


def pad_right(rows: Rows, *, length: int, pad_id: int) -> Padded:
    """Returns tokens, each row's ids at its start, and segments as `pad_left` does."""
    return _padded(rows, [0] * len(rows), length, pad_id)


def _padded(rows: Rows, starts: Sequence[int], length: int, pad_id: int) -> Padded:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for i, (start, ids) in enumerate(zip(starts, rows, strict=True)):
        place = slice(start, start + len(ids))
        tokens[i, place] = ids
        segments[i, place] = 1
    return tokens, segments
