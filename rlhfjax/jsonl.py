"""Reads and writes files of JSON lines: one JSON object per line."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhfjax import hosts, json_text, paths
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

REMEDY = "restore the file from a copy, or delete this line"


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
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json_text.parse(line)
        except json_text.NotJson as mistake:
            if unfinished and number == len(lines):
                return
            raise DataError(f"{place}: not a JSON object ({mistake})") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{place}: expected a JSON object, got {type(row).__name__}"
            )
        yield place, row


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
