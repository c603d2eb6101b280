"""Reads and writes JSON. All JSON of the package, our own or foreign, goes through this file.

Reading is strict (RFC 8259): UTF-8, no NaN, no infinity, no lone surrogates, no number that a
float64 cannot hold, at most 200 levels of nesting. `parse` returns the value or raises `NotJson`;
`decode` and `read` raise one of our errors, which names the file and the place in it.

JSON has no NaN and no infinity. Python's encoder writes them nevertheless, and most other parsers
cannot read them. Therefore:

- A metric that is not finite is written as null (`null_nonfinite`); `nan_for_null` reads it back.
- Any other number that is not finite is an error that names its place (`encode`).
"""

import codecs
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pydantic
import pydantic_core

from rlhfjax import paths
from rlhfjax.errors import DataError, UserError, cut
from rlhfjax.paths import Path

Object = dict[str, Any]
"""A JSON object of any content."""

# Openings of files that are not UTF-8 text: (bytes, what the file is).
_OTHER_FORMATS = (
    (codecs.BOM_UTF32_LE, "UTF-32 (iconv -f UTF-32 -t UTF-8 converts it)"),
    (codecs.BOM_UTF32_BE, "UTF-32 (iconv -f UTF-32 -t UTF-8 converts it)"),
    (codecs.BOM_UTF16_LE, "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"),
    (codecs.BOM_UTF16_BE, "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"),
    (b"\x1f\x8b", "compressed by gzip (gunzip decompresses it)"),
    (b"BZh", "compressed by bzip2 (bunzip2 decompresses it)"),
    (b"\xfd7zXZ\0", "compressed by xz (unxz decompresses it)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd (unzstd decompresses it)"),
    (b"\x04\x22\x4d\x18", "compressed by lz4 (unlz4 decompresses it)"),
    (b"PK\x03\x04", "a zip archive (unzip extracts its files)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive (7z x extracts its files)"),
    (b"PAR1", "Parquet (pandas.read_parquet and to_json(lines=True) convert it)"),
    (b"ARROW1\0\0", "Arrow (pandas.read_feather and to_json(lines=True) convert it)"),
    (b"\xff\xff\xff\xff", "Arrow (pyarrow.ipc.open_stream reads it)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"GGUF", "a GGUF model"),
    (b"%PDF-", "a PDF"),
)
_OPENINGS = tuple(opening for opening, _ in _OTHER_FORMATS)
OPENING = 512
"""Bytes of a file that `other_format` needs."""
# A number beyond float64 has 200 digits, or an exponent of three. This search is for bytes, with 0
# for every digit: a regular expression takes ten times as long.
_AS_ZEROS = bytes.maketrans(b"0123456789E", b"0000000000e")
_HUGE, _EXPONENT, _POSITIVE_EXPONENT = b"0" * 200, b"0e000", b"0e+000"
_MOST = sys.float_info.max


class NotJson(ValueError):
    """Why a text is not JSON that we accept, and the line and column of the mistake."""


def parse(text: bytes | str) -> Any:
    """Returns the value of a JSON text. A byte-order mark of UTF-8 is skipped.

    Raises:
      NotJson: the text is not strict JSON; see the module.
    """
    try:
        content = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise NotJson(f"lone surrogate at character {error.start}") from None
    if other := other_format(content):
        raise NotJson(f"it is {other}; expected UTF-8 text")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        value = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise NotJson(str(error)) from None
    if _may_be_huge(content) and _is_huge(value):
        _validate_range(value)
    return value


def _may_be_huge(content: bytes) -> bool:
    """Returns whether a JSON text may have a number beyond float64."""
    digits = content.translate(_AS_ZEROS)
    return _HUGE in digits or _EXPONENT in digits or _POSITIVE_EXPONENT in digits


def other_format(content: bytes) -> str | None:
    """Returns what a file is by its first bytes, if it is certainly no UTF-8 text; else None."""
    if not content.startswith(_OPENINGS) or _is_text(content[:OPENING]):
        return None
    return next(name for opening, name in _OTHER_FORMATS if content.startswith(opening))


def _is_text(opening: bytes) -> bool:
    """Returns whether the first bytes of a file may be those of UTF-8 text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(opening)
    except UnicodeDecodeError:
        return False
    return b"\0" not in opening


def _is_huge(value: Any) -> bool:
    """Returns whether a number of a JSON value may be beyond float64; fast, without its place."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, int | float) and not -_MOST <= part <= _MOST:
            return True
    return False


def _validate_range(value: Any, place: str = "") -> None:
    """Raises NotJson if a number of a JSON value is beyond the range of float64."""
    if isinstance(value, int | float):
        try:
            huge = not math.isfinite(value)  # int: OverflowError
        except OverflowError:
            huge = True
        if huge:
            raise NotJson(f"{place or 'a number'} is beyond the range of float64")
    for inner, part in parts(value, place):
        _validate_range(part, inner)


def decode(
    text: bytes | str,
    context: Any,
    hint: Any = Any,
    *,
    error: type[UserError] = DataError,
) -> Any:
    """Returns the value of a JSON text.

    Args:
      context: where the text is from, such as FILE or FILE:LINE, for errors.
      hint: the type that the value must have, such as `Object`, `dict[str, float]` or a TypedDict.
        It is checked strictly: a bool is no number, and a string is no number.
      error: class of the error.

    Raises:
      UserError: of the given class, one line: the context, the place in the value, what is
        accepted.
    """
    try:
        value = parse(text)
    except NotJson as mistake:
        raise error(f"{context}: not JSON: {mistake}") from None
    return validate(value, context, hint, error=error)


def validate(
    value: Any, context: Any, hint: Any, *, error: type[UserError] = DataError
) -> Any:
    """Returns a JSON value if it has a type, as `decode` does."""
    try:
        return _adapter(hint).validate_python(value, strict=True)
    except pydantic.ValidationError as mistakes:
        first = mistakes.errors(include_url=False)[0]
        place = ""
        for part in first["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}"
        place = f"{place.removeprefix('.')}: " if place else ""
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        raise error(f"{context}: {place}{message}{got}") from None


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(hint)


def shown(value: Any, most: int = 60) -> str:
    """Returns a value for an error message: its repr, cut to a length."""
    return cut(repr(value), most)


def named(name: str, most: int = 100) -> str:
    """Returns a name for an error message: its repr, cut, if it is long or has line breaks."""
    return name if len(name) <= most and name.isprintable() else shown(name, most)


def read(path: Path, hint: Any = Any, *, error: type[UserError] = DataError) -> Any:
    """Returns the value of a JSON file. Arguments and errors are those of `decode`.

    Raises:
      UserError: also if the file is missing, a folder, or cannot be read.
    """
    return decode(paths.read(path, error), path, hint, error=error)


def read_object(path: Path, *, error: type[UserError] = DataError) -> Object:
    """Returns the object in a JSON file. Raises the errors of `read`."""
    return as_object(read(path, error=error), path, error=error)


def as_object(
    value: Any, context: Any, *, error: type[UserError] = DataError
) -> Object:
    """Returns a JSON value if it is an object. `context` says where it stands, for errors."""
    if not isinstance(value, dict):
        raise error(f"{context}: expected a JSON object, got {shown(value)}")
    return value


def read_if_there(
    path: Path, hint: Any = Any, *, error: type[UserError] = DataError
) -> Any:
    """Returns the value of a JSON file as `read` does; None if there is no file of this name."""
    content = paths.read_if_there(path, error)
    return None if content is None else decode(content, path, hint, error=error)


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


def foreign(value: Any) -> bytes:
    """Returns a value of another library as JSON: bytes as text, times as ISO 8601, NaN as null.

    Raises:
      ValueError: JSON cannot hold it, such as bytes that are not UTF-8.
    """
    return pydantic_core.to_json(value, inf_nan_mode="null", bytes_mode="utf8")


def unicode(name: str) -> str:
    """Returns a name with U+FFFD in place of bytes that are not UTF-8, which JSON cannot hold."""
    return name.encode(errors="surrogatepass").decode(errors="replace")


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


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Returns {place: leaf} of a JSON value: `a.b[0].c` is a place, an empty array a leaf."""
    found: dict[str, Any] = {}
    for inner, part in parts(value, place):
        found |= leaves(part, inner)
    return found or {place: value}


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
