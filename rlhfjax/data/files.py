"""Records that are spans of files, by index: their offsets are in memory, their bytes are not.

`Files` is for files of moderate size. `indexed.Indexed` is for large and for compressed ones.
"""

import abc
import codecs
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedIOBase
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
    line: int  # first line, or number of the row, from 1
    check: int  # CRC-32 of its bytes


class Damaged(Exception):
    """Why no more records can be read from a file.

    Args:
      place: what stands between the file's name and the reason in the error, such as ":3".
    """

    def __init__(self, reason: str, place: str = ""):
        super().__init__(reason)
        self.place = place


class Reader(abc.ABC):
    """Cuts files of one format into records."""

    hint = ""  # see Records
    in_place = True  # a record is a span of its file; False: `scan` makes its bytes
    is_text = True  # the files are UTF-8
    unit = ":"  # what stands between the file and `Span.line` in errors

    @abc.abstractmethod
    def scan(self, number: int, file: BufferedIOBase) -> Iterator[tuple[Span, bytes]]:
        """Yields the spans of the records in file `number`, with their bytes.

        Raises:
          Damaged: the rest of the file cannot be read.
        """

    @abc.abstractmethod
    def record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        """Returns the record of some bytes. Raises BadRow."""

    def essence(self, content: bytes) -> bytes:
        """Returns the bytes that decide the split of a malformed record."""
        return content

    def key_of(self, content: bytes, span: Span, key: Key) -> str | bytes:
        """Returns what decides the split of a record."""
        content = self.essence(content)
        try:
            return key(self.record(content, span))
        except BadRow:
            return content


class Spans(abc.ABC):
    """Records that are spans of files.

    Args:
      names: the files, for errors.
      local: the local files that the spans are in, one per name.
    """

    hint = ""

    def __init__(
        self,
        names: Sequence[paths.Path],
        local: Sequence[paths.Path],
        reader: Reader,
    ):
        self.paths = names
        self.reader = reader
        self._local = local

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def span(self, index: int) -> Span: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        span = self.span(index)
        return self.reader.record(self.content(index, span), span)

    def content(self, index: int, span: Span) -> bytes:
        """Returns the bytes of a record. Raises DataError if they have changed."""
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
        return content

    def locate(self, index: int) -> str:
        span = self.span(index)
        return f"{self.paths[span.file]}{self.reader.unit}{span.line}"


class Files(Spans):
    """Records whose offsets are in memory: 40 bytes each.

    Args:
      split: one of SPLITS, by a stable hash of each record's key; None: all records.
      key: see `rows.split_key`. The key of a record without one (BadRow) is its bytes.
    """

    def __init__(
        self,
        names: Sequence[paths.Path],
        reader: Reader,
        split: str | None,
        key: Key,
    ):
        super().__init__(names, downloaded(names), reader)
        # Five numbers per record, end to end: 40 bytes, where a tuple takes 240.
        self._spans = array("q")
        for number, name in enumerate(names):
            try:
                self._read(number, key, split)
            except OSError as error:
                raise DataError(f"{name}: {error.strerror}") from None
            except Damaged as error:
                raise DataError(f"{name}{error.place}: {error}") from None
        self.hint = split_hint(split) + reader.hint

    def _read(self, number: int, key: Key, split: str | None) -> None:
        """Adds the spans of file `number`, of one split or of all."""
        whole = split is None
        with open(self._local[number], "rb") as file:
            if self.reader.is_text:
                validate_text(file.peek(json_text.OPENING), self.paths[number])
            for span, content in self.reader.scan(number, file):
                if whole or split_of(self.reader.key_of(content, span, key)) == split:
                    self._spans.extend(span)

    def __len__(self) -> int:
        return len(self._spans) // len(Span._fields)

    def span(self, index: int) -> Span:
        start = len(Span._fields) * index
        return Span(*self._spans[start : start + len(Span._fields)])


def validate_text(opening: bytes, name: paths.Path) -> None:
    """Raises DataError if a file's first bytes are certainly not those of UTF-8 text."""
    if other := json_text.other_format(opening):
        raise DataError(f"{name}: it is {other}; expected UTF-8 text")


def downloaded(names: Sequence[paths.Path]) -> list[paths.Path]:
    """Returns local paths of files; those in a bucket are downloaded."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(paths.local, names))


def split_hint(split: str | None) -> str:
    """Returns the end of the error for a source without rows."""
    if split is None:
        return ""
    return (
        "; rows are split 90/5/5 by a hash of their text or first user turn, which "
        "needs a few hundred different ones; "
        "or put {split} into the glob to name files by split"
    )


def files_of(
    spec: str, pattern: str, split: str
) -> tuple[list[paths.Path], str | None]:
    """Returns the files of a source, and the split that is taken of their rows; None: all rows.

    Args:
      spec: the source, for errors.
      pattern: glob of the files; {split} in it is replaced by the split.
      split: one of SPLITS, or "all"; if the glob has {split}, any name.
    """
    named = "{split}" in pattern and not _exists(pattern)
    if not named and split not in (*SPLITS, "all"):
        raise ConfigError(
            f"source {spec!r}: split {split!r} is none of {', '.join(SPLITS)}, all"
        )
    pattern = pattern.replace("{split}", split) if named else pattern
    found = matching(pattern, f"source {spec!r}")
    return found, None if named or split == "all" else split


def read_text(path: paths.Path) -> str:
    """Returns the text of a file, without a byte-order mark.

    Raises:
      DataError: it cannot be read, or is no UTF-8 text.
    """
    content = paths.read(path)
    validate_text(content, path)
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


class JsonLines(Reader):
    """One JSON object per line; empty lines are skipped."""

    def scan(self, number: int, file: BufferedIOBase) -> Iterator[tuple[Span, bytes]]:
        start = 0
        for line, content in enumerate(file, 1):
            if content.strip():
                yield spanned(number, start, content, line)
            start += len(content)

    def record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        try:
            return parse_row(content.rstrip(), first=span.line == 1)
        except json_text.NotJson as error:
            raise BadRow(str(error)) from None

    def essence(self, content: bytes) -> bytes:
        return content.strip()


class TextFiles(Reader):
    """Plain text. A row is a file, a paragraph (separated by empty lines) or a line."""

    def __init__(self, spec: str, documents: str):
        if documents not in ("file", "paragraph", "line"):
            raise ConfigError(
                f"source {spec!r}: documents must be file, paragraph or line, got {documents!r}"
            )
        self._documents = documents
        self.hint = f"; documents={documents!r}"

    def scan(self, number: int, file: BufferedIOBase) -> Iterator[tuple[Span, bytes]]:
        if self._documents == "file":
            yield spanned(number, 0, file.read(), 1)
            return
        start, first, block = 0, 1, b""  # of the row being read
        for line, content in enumerate(file, 1):
            blank = not content.strip()
            if block and (blank or self._documents == "line"):
                yield spanned(number, start, block, first)
                start += len(block)
                block = b""
            if blank:
                start += len(content)
                continue
            first = first if block else line
            block += content
        if block:
            yield spanned(number, start, block, first)

    def record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        text = _decoded(content, span)
        if self._documents == "file":
            return {"text": text}
        text = text.rstrip("\r\n")
        if span.line == 1 and "\r" in text and "\n" not in text:
            raise BadRow("lines end in CR, expected LF")
        return {"text": text}


def spanned(number: int, start: int, content: bytes, line: int) -> tuple[Span, bytes]:
    """Returns a record's span, with its bytes."""
    return Span(number, start, len(content), line, zlib.crc32(content)), content


def _decoded(content: bytes, span: Span) -> str:
    """Returns the text of a record. A byte-order mark at the start of the file is skipped."""
    if span.line == 1:  # only the first record of a file begins there
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
