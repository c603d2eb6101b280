"""Reads files of one JSON array, element by element: memory holds one part of the file."""

import codecs
import re
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from typing import Any

from rlhfjax import json_text
from rlhfjax.data.files import Damaged, Reader, Span, spanned
from rlhfjax.data.rows import BadRow
from rlhfjax.jsonl import parse_row

LARGEST = 2**28  # bytes of an element
_PART = 2**20  # bytes to read at a time
# A whole string, the quote of one that is not whole yet, or what separates values.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
_BLANK = b" \t\r\n"


class JsonArray(Reader):
    """One array of objects per file. The number of a row is that of its element, from 1."""

    unit = ": row "

    def scan(self, number: int, file: BufferedIOBase) -> Iterator[tuple[Span, bytes]]:
        for row, (start, content) in enumerate(elements(file), 1):
            yield spanned(number, start, content, row)

    def record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        try:
            return parse_row(content, first=False)
        except json_text.NotJson as error:
            reason = str(error).replace("one object per line", "an object")
            raise BadRow(reason) from None


def elements(file: BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Yields the elements of the array in a file, each with its first byte.

    An element may be no JSON; brackets and quotes that do not match end the array.

    Raises:
      Damaged: the file holds no whole array.
    """
    cursor = _Cursor(file)
    cursor.open()
    count = 0
    while True:
        start, content, is_last = cursor.element(count)
        begin = len(content) - len(content.lstrip(_BLANK))
        content = content.strip(_BLANK)
        if content or not is_last or count:
            yield start + begin, content
        if is_last:
            break
        count += 1
    cursor.close()


class _Cursor:
    """A place in a file that is read part by part."""

    def __init__(self, file: BufferedIOBase):
        self._file = file
        self._buffer = b""
        self._at = 0  # place in the buffer
        self._before = 0  # bytes of the file before the buffer

    def open(self) -> None:
        """Goes behind the bracket that opens the array."""
        self._more()
        self._at = len(codecs.BOM_UTF8) * self._buffer.startswith(codecs.BOM_UTF8)
        first = self._skip_blank()
        if first == b"[":
            self._at += 1
            return
        found = (
            "an empty file" if not first else json_text.shown(first.decode("latin-1"))
        )
        hint = "; jsonl:FILE reads one object per line" if first == b"{" else ""
        raise Damaged(f"expected a JSON array of objects, it begins with {found}{hint}")

    def element(self, count: int) -> tuple[int, bytes, bool]:
        """Returns the first byte of the next element, its bytes, and whether it is the last.

        Args:
          count: number of elements before it, for errors.
        """
        start, depth = self._at, 0
        while True:
            token = _TOKEN.search(self._buffer, self._at)
            if token is None or token[0] == b'"':
                self._at = len(self._buffer) if token is None else token.start()
                self._at -= start
                self._drop(start)
                start = 0
                self._read_on(count)
                continue
            self._at = token.end()
            if depth == 0 and token[0] in b",]":
                content = self._buffer[start : token.start()]
                return self._before + start, content, token[0] == b"]"
            depth += _STEP.get(token[0], 0)

    def close(self) -> None:
        """Raises Damaged if something follows the array."""
        if self._skip_blank():
            place = self._before + self._at
            raise Damaged(f"byte {place}: text after the end of the array")

    def _read_on(self, count: int) -> None:
        if len(self._buffer) > LARGEST:
            raise Damaged(
                f"row {count + 1} is larger than {LARGEST >> 20} MB;"
                " is a quote or a bracket missing?"
            )
        if not self._more():
            raise Damaged(
                f"the array does not end: it is cut in row {count + 1},"
                " or a quote or a bracket is missing there"
            )

    def _drop(self, count: int) -> None:
        """Forgets the first bytes of the buffer."""
        self._buffer = self._buffer[count:]
        self._before += count

    def _more(self) -> bool:
        """Reads a part, as large as the buffer: each byte is searched a few times at most."""
        part = self._file.read(max(_PART, len(self._buffer)))
        self._buffer += part
        return bool(part)

    def _skip_blank(self) -> bytes:
        """Returns the next byte that is not blank, b"" at the end of the file."""
        while True:
            rest = self._buffer[self._at :].lstrip(_BLANK)
            self._at = len(self._buffer) - len(rest)
            if rest:
                return rest[:1]
            self._drop(self._at)
            self._at = 0
            if not self._more():
                return b""
