"""Records in files of JSON lines and of plain text, by index. Memory holds only their offsets."""

import abc
import codecs
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from rlhfjax import json_text, paths
from rlhfjax.data.rows import SPLITS, BadRow, split_of
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import parse_row

# Returns the text that decides a record's split. Raises BadRow.
Key = Callable[[Mapping[str, Any]], str]


@runtime_checkable
class Records(Protocol):
    """Raw records. `records[i]` raises BadRow for one that cannot be read.

    `hint` ends the error for a source without rows; `locate` says where a record stands.
    """

    hint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def locate(self, index: int) -> str: ...


class Span(NamedTuple):
    """Where a record stands."""

    file: int  # index into the sorted files
    start: int  # first byte
    size: int  # bytes
    line: int  # first line, from 1
    check: int  # CRC-32 of its bytes


class _Files(abc.ABC):
    """Records that are spans of files.

    They are split by a stable hash of their key, unless the glob names the split.

    Args:
      spec: the source, for errors.
      pattern: glob of the files; {split} in it is replaced by the split.
      split: one of SPLITS, or "all"; if the glob has {split}, any name.
      key: see `rows.split_key`. The key of a record without one (BadRow) is its bytes.
    """

    hint = ""

    def __init__(self, spec: str, pattern: str, split: str, key: Key):
        named = "{split}" in pattern and not _exists(pattern)
        if not named and split not in (*SPLITS, "all"):
            raise ConfigError(
                f"source {spec!r}: split {split!r} is none of {', '.join(SPLITS)}, all"
            )
        pattern = pattern.replace("{split}", split) if named else pattern
        self.paths = matching(pattern, f"source {spec!r}")
        with ThreadPoolExecutor(16) as pool:  # downloads files that are in a bucket
            self._local = list(pool.map(paths.local, self.paths))
        # Five numbers per record, end to end: 40 bytes, where a tuple takes 240.
        self._spans = array("q")
        whole = named or split == "all"
        for number, name in enumerate(self.paths):
            try:
                self._read(number, key, None if whole else split)
            except OSError as error:
                raise DataError(f"{name}: {error.strerror}") from None
        if not whole:
            self.hint = (
                "; rows are split 90/5/5 by a hash of their text or first user turn, "
                "put {split} into the glob to name files by split"
            )

    def _read(self, number: int, key: Key, split: str | None) -> None:
        """Adds the spans of file `number`, of one split or of all."""
        whole = split is None
        with open(self._local[number], "rb") as file:
            if other := json_text.other_format(file.peek(json_text.OPENING)):
                name = self.paths[number]
                raise DataError(f"{name}: it is {other}; expected UTF-8 text")
            for span, content in self._scan(number, file):
                if whole or split_of(self._key_of(span, content, key)) == split:
                    self._spans.extend(span)

    @abc.abstractmethod
    def _scan(self, number: int, file: BinaryIO) -> Iterator[tuple[Span, bytes]]:
        """Yields the spans of the records in file `number`, with their bytes."""

    @abc.abstractmethod
    def _record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        """Returns the record in a span of a file. Raises BadRow."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        span = self._span(index)
        try:
            # Without a buffer, a read is faster; the system may cut one of gigabytes.
            buffering = 0 if span.size < 2**20 else -1
            with open(self._local[span.file], "rb", buffering) as file:
                file.seek(span.start)
                content = file.read(span.size)
        except OSError as error:
            raise DataError(f"{self.locate(index)}: {error.strerror}") from None
        if zlib.crc32(content) != span.check:
            raise DataError(
                f"{self.locate(index)}: the file has changed since it was opened"
            )
        return self._record(content, span)

    def _key_of(self, span: Span, content: bytes, key: Key) -> str | bytes:
        try:
            return key(self._record(content, span))
        except BadRow:
            return content

    def __len__(self) -> int:
        return len(self._spans) // len(Span._fields)

    def _span(self, index: int) -> Span:
        start = len(Span._fields) * index
        return Span(*self._spans[start : start + len(Span._fields)])

    def locate(self, index: int) -> str:
        span = self._span(index)
        return f"{self.paths[span.file]}:{span.line}"


def read_text(path: paths.Path) -> str:
    """Returns the text of a file, without a byte-order mark.

    Raises:
      DataError: it cannot be read, or is no UTF-8 text.
    """
    content = paths.read(path)
    if other := json_text.other_format(content):
        raise DataError(f"{path}: it is {other}; expected UTF-8 text")
    try:
        return _decoded(content, Span(0, 0, len(content), 1, 0))
    except BadRow as reason:
        raise DataError(f"{path}: {reason}") from None


def matching(pattern: str, context: str) -> list[paths.Path]:
    """Returns the files that match a glob, at least one.

    Args:
      context: what needs the files, for errors.
    Raises:
      DataError: no file matches, or the name is that of a folder or a pipe.
    """
    found = paths.glob(pattern)
    name = json_text.shown(pattern, 200)
    if not found and not paths.remote(pattern):
        try:
            paths.validate_regular(paths.path(pattern))
        except DataError as error:
            raise DataError(f"{context}: {error}, or a glob such as FOLDER/*") from None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise DataError(f"{context}: {name}: {error.strerror}") from None
        except ValueError as error:  # a name with NUL
            raise DataError(f"{context}: {name}: {error}") from None
    if not found:
        raise DataError(f"{context}: no file matches {name}")
    return found


def _exists(name: str) -> bool:
    return not paths.remote(name) and os.path.exists(os.path.expanduser(name))


class JsonLines(_Files):
    """One JSON object per line; empty lines are skipped."""

    def _scan(self, number: int, file: BinaryIO) -> Iterator[tuple[Span, bytes]]:
        start = 0
        for line, content in enumerate(file, 1):
            stripped = content.strip()
            if stripped:
                check = zlib.crc32(content)
                yield Span(number, start, len(content), line, check), stripped
            start += len(content)

    def _record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        try:
            return parse_row(content.rstrip(), first=span.line == 1)
        except json_text.NotJson as error:
            raise BadRow(str(error)) from None


class TextFiles(_Files):
    """Plain text. A row is a file, a paragraph (separated by empty lines) or a line."""

    def __init__(self, spec: str, pattern: str, split: str, key: Key, documents: str):
        if documents not in ("file", "paragraph", "line"):
            raise ConfigError(
                f"source {spec!r}: documents must be file, paragraph or line, got {documents!r}"
            )
        self._documents = documents
        super().__init__(spec, pattern, split, key)
        self.hint += f"; documents={documents!r}"

    def _scan(self, number: int, file: BinaryIO) -> Iterator[tuple[Span, bytes]]:
        if self._documents == "file":
            yield _text_span(number, 0, file.read(), 1)
            return
        start, first, block = 0, 1, b""  # of the row being read
        for line, content in enumerate(file, 1):
            blank = not content.strip()
            if block and (blank or self._documents == "line"):
                yield _text_span(number, start, block, first)
                start += len(block)
                block = b""
            if blank:
                start += len(content)
                continue
            first = first if block else line
            block += content
        if block:
            yield _text_span(number, start, block, first)

    def _record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        text = _decoded(content, span)
        if self._documents == "file":
            return {"text": text}
        text = text.rstrip("\r\n")
        if span.line == 1 and "\r" in text and "\n" not in text:
            raise BadRow("lines end in CR, expected LF")
        return {"text": text}


def _text_span(
    number: int, start: int, content: bytes, line: int
) -> tuple[Span, bytes]:
    return Span(number, start, len(content), line, zlib.crc32(content)), content


def _decoded(content: bytes, span: Span) -> str:
    """Returns the text of a record. A byte-order mark at the start of the file is skipped."""
    if span.start == 0:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = span.line + content[: error.start].count(b"\n")
        raise BadRow(f"invalid UTF-8 on line {line}") from None
    if "\0" in text:
        line = span.line + text[: text.index("\0")].count("\n")
        raise BadRow(f"a NUL byte on line {line}; expected text")
    return text
