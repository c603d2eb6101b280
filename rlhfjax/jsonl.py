"""Reads and writes files of JSON lines: one JSON object per line."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhfjax import hosts, json_text, paths
from rlhfjax.errors import DataError
from rlhfjax.paths import Path


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Returns the objects of a file that a run appends to; [] if the file does not exist.

    A half-written last line is left out. Any other line that is not an object raises DataError.
    """
    path = paths.path(path)
    return (
        [row for _, row in located_rows(path, unfinished=True)] if path.exists() else []
    )


def located_rows(path: Path, *, unfinished: bool = False) -> Iterator[tuple[str, dict]]:
    """Yields the objects of a file, each with its place, FILE:LINE. Blank lines are skipped.

    Args:
      unfinished: whether the last line may be half-written; it is then left out.
    Raises:
      DataError: the file cannot be read, or a line is not a JSON object.
    """
    lines = paths.read(path).splitlines()
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
