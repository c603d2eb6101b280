"""Reads and writes files of JSON lines: one JSON object per line."""

import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhfjax import hosts, json_text, paths
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

REMEDY = "restore the file from a copy, or delete this line"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_A_NUMBER = re.compile(rb"[:,\[]\s*-?(NaN|Infinity)\b")


class NotAnObject(json_text.NotJson):
    """The line is JSON, but not an object."""


def read_jsonl(
    path: str | os.PathLike, hint: Any = json_text.Object, remedy: str = ""
) -> list[dict]:
    """Returns the objects of a file that a run appends to; [] if the file does not exist.

    A half-written last line is left out: a killed process leaves one, and a machine that lost its
    power leaves zero bytes.

    Args:
      hint: the type of a line, see `json_text.decode`.
      remedy: what to do about a damaged line, for the error.

    Raises:
      DataError: any other line is damaged; the message names it.
    """
    path = paths.path(path)
    content = paths.read_if_there(path)
    if content is None:
        return []
    try:
        located = list(_objects(path, content.rstrip(b"\0\r\n"), unfinished=True))
        for place, row in located:
            json_text.validate(row, place, hint)
    except DataError as error:
        raise DataError(f"{error}; {remedy}" if remedy else str(error)) from None
    return [row for _, row in located]


def located_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the objects of a file, each with its place, FILE:LINE. Blank lines are skipped.

    Raises:
      DataError: the file cannot be read, or a line is not a JSON object.
    """
    yield from _objects(path, paths.read(path))


def _objects(
    path: Path, content: bytes, unfinished: bool = False
) -> Iterator[tuple[str, dict]]:
    """Yields objects with their places; `unfinished`: the last line may be half-written."""
    lines = content.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = parse_row(line, first=number == 1)
        except json_text.NotJson as mistake:
            is_last = number == len(lines)
            if unfinished and is_last and not isinstance(mistake, NotAnObject):
                return
            raise DataError(f"{place}: {mistake}") from None
        yield place, row


def parse_row(line: bytes, *, first: bool) -> json_text.Object:
    """Returns the object on one line of a file.

    Args:
      first: whether the line is the file's first, before which a byte-order mark may stand.
    Raises:
      NotJson: the line is not a JSON object.
    """
    if not first and line.startswith(codecs.BOM_UTF8):
        raise json_text.NotJson("a byte-order mark in the middle of the file")
    try:
        row = json_text.parse(line)
    except json_text.NotJson as mistake:
        reason = _reason(line.strip(), str(mistake))
        raise json_text.NotJson(f"not a JSON object ({reason})") from None
    if not isinstance(row, dict):
        hint = "; one object per line is expected" if first else ""
        raise NotAnObject(f"expected a JSON object, got {type(row).__name__}{hint}")
    return row


def _reason(line: bytes, mistake: str) -> str:
    """Returns why a line is not JSON, given the parser's message."""
    if json_text.other_format(line):
        return mistake
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}"
    mistake = mistake.replace(" at line 1 column ", " at column ")
    if b"\r" in line:
        return f"{mistake}; lines end in CR, expected LF"
    if "hex escape" in mistake and _SURROGATE.search(line):
        mistake += ", a lone surrogate"
    elif _NOT_A_NUMBER.search(line):
        mistake += "; JSON has no NaN and no infinity"
    return f"{mistake}; expected one object per line"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, on the first host; the file is complete or absent.

    Raises:
      DataError: a row holds NaN or an infinity; the message names file, line and column.
    """
    if hosts.first():
        lines = [
            json_text.encode(row, f"{path}:{i}") + "\n"
            for i, row in enumerate(rows, start=1)
        ]
        paths.write(path, "".join(lines))
