"""Values of columns: each is validated and brought into one type, or refused with `BadRow`."""

from typing import Any

import numpy as np

from rlhfjax import json_text

_MOST_ID = int(np.iinfo(np.int32).max)
# Types of whole numbers; a bool is none.
_WHOLE = frozenset(
    [int, *(kind for kind in np.sctypeDict.values() if issubclass(kind, np.integer))]
)
_MOST_SCORE = float(np.finfo(np.float32).max)


class BadRow(Exception):
    """Why a row cannot be used; the source adds where the row stands."""


def plain(value: Any) -> Any:
    """Returns text where TFDS has bytes, and any other value as it is."""
    if not isinstance(value, bytes | np.bytes_):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start}") from error


def string(value: Any, column: str, empty: bool = False) -> str:
    """Returns a text.

    Args:
      empty: accept a text without a single visible character.
    """
    if type(value) is not str:
        value = plain(value)
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} must be text, got {type(value).__name__}")
    if not empty and not value.strip():
        raise BadRow(f"column {column!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise BadRow(
            f"column {column!r} has a lone surrogate at character {error.start}"
        ) from error
    return value


def as_list(value: Any, column: str) -> list:
    """Returns a list, given as such or as an array."""
    is_list = isinstance(value, list | tuple)
    if not is_list and not (isinstance(value, np.ndarray) and value.ndim):
        raise BadRow(f"column {column!r} must be a list, got {type(value).__name__}")
    return list(value)


def number(value: Any, column: str = "scores") -> float:
    """Returns a number that float32 can hold."""
    real = int | float | np.integer | np.floating
    numeric = isinstance(value, real) and not isinstance(value, bool)
    # False for NaN too.
    if not numeric or not -_MOST_SCORE <= value <= _MOST_SCORE:
        raise BadRow(
            f"column {column!r} must hold finite numbers in the range of float32,"
            f" got {json_text.shown(value)}"
        )
    return float(value)


def whole_numbers(value: Any, column: str) -> np.ndarray:
    """Returns whole numbers as int32 [n]."""
    low, high = 0, 0
    if isinstance(value, np.ndarray):
        # NumPy gives an empty list the type of floats.
        whole = value.ndim == 1 and (value.dtype.kind in "iu" or not value.size)
        if whole and value.size:
            low, high = value.min(), value.max()
    else:
        value = as_list(value, column)
        whole = _WHOLE.issuperset(map(type, value))
        if whole and value:
            low, high = min(value), max(value)
    if not whole or low < 0 or high > _MOST_ID:
        raise BadRow(
            f"column {column!r} must hold non-negative integers of 32 bits,"
            f" got {json_text.shown(value)}"
        )
    return np.array(value, np.int32)


def flag(value: Any, column: str) -> bool:
    """Returns a yes or no, given as such or as 1 or 0."""
    is_flag = isinstance(value, bool | np.bool_)
    is_digit = isinstance(value, int | float | np.number) and value in (0, 1)
    if not is_flag and not is_digit:
        raise BadRow(
            f"column {column!r} must be true or false, got {json_text.shown(value)}"
        )
    return bool(value)
