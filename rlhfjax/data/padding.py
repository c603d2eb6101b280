"""Pads rows of token ids to one length."""

from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[int] | np.ndarray]
Padded = tuple[np.ndarray, np.ndarray]


def pad_left(rows: Rows, *, length: int, pad_id: int) -> Padded:
    """Returns tokens and attention_mask, int32 [b, length], with the ids at the end of rows."""
    starts = [length - len(ids) for ids in rows]
    return _pad(rows, starts, length, pad_id)


def pad_right(rows: Rows, *, length: int, pad_id: int) -> Padded:
    """Returns tokens and attention_mask, int32 [b, length], with the ids at the start of rows."""
    return _pad(rows, [0] * len(rows), length, pad_id)


def _pad(rows: Rows, starts: Sequence[int], length: int, pad_id: int) -> Padded:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    attention_mask = np.zeros_like(tokens)
    for i, (start, ids) in enumerate(zip(starts, rows, strict=True)):
        place = slice(start, start + len(ids))
        tokens[i, place] = ids
        attention_mask[i, place] = 1
    return tokens, attention_mask
