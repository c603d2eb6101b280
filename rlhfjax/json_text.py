"""Encodes JSON text. Every JSON file of the package is written with this encoder.

JSON has no NaN and no infinity. Python's encoder writes them nevertheless, and most other parsers
cannot read them. Therefore:

- A metric that is not finite is written as null (`null_nonfinite`); `nan_for_null` reads it back.
- Any other number that is not finite is an error that names its place (`encode`).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhfjax.errors import DataError


def encode(
    value: Any,
    context: Any,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Returns a value as JSON text. Floats are written such that they read back exactly.

    Args:
      value: a value of JSON types, or of types that `default` converts.
      context: the file, for error messages.
      indent, sort_keys, ensure_ascii, default: as `json.dumps` takes them.

    Raises:
      DataError: a number is NaN or infinite.
    """
    options = {"indent": indent, "sort_keys": sort_keys, "ensure_ascii": ensure_ascii}
    try:
        return json.dumps(value, default=default, allow_nan=False, **options)
    except ValueError:
        validate_finite(value, context)
        raise


def validate_finite(value: Any, context: Any) -> None:
    """Raises DataError if a number of a JSON value is NaN or infinite."""
    if found := first_nonfinite(value):
        place, number = found
        raise DataError(
            f"{context}: {place or 'the value'} is {number}; JSON has no such number"
        )


def first_nonfinite(value: Any, place: str = "") -> tuple[str, float] | None:
    """Returns the place (`a.b[0]`) and value of the first number that is not finite, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (place, value)
    for inner, part in parts(value, place):
        if found := first_nonfinite(part, inner):
            return found
    return None


def parts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, member) for the members of an object or array; nothing for other values."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield (f"{place}.{key}" if place else str(key)), part
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield f"{place}[{i}]", part


def null_nonfinite(value: Any) -> Any:
    """Returns a JSON value with None in place of every number that is NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: null_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [null_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_for_null(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Returns metrics that were read from a file, with NaN in place of null."""
    return {
        name: math.nan if value is None else value for name, value in metrics.items()
    }
