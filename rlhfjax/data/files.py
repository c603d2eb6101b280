"""Records in files of JSON lines and of plain text, by index. Memory holds only their offsets."""

import abc
import codecs
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rlhfjax import paths
from rlhfjax.data.rows import SPLITS, BadRow, split_of
from rlhfjax.errors import ConfigError, DataError

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
        named = "{split}" in pattern
        if not named and split not in (*SPLITS, "all"):
            raise ConfigError(
                f"source {spec!r}: split {split!r} is none of {', '.join(SPLITS)}, all"
            )
        pattern = pattern.replace("{split}", split)
        self.paths = paths.glob(pattern)
        if not self.paths:
            raise DataError(f"source {spec!r}: no file matches {pattern}")
        with ThreadPoolExecutor(16) as pool:  # downloads files that are in a bucket
            self._local = list(pool.map(paths.local, self.paths))
        # Four numbers per record, end to end: 32 bytes, where a tuple takes 200.
        self._spans = array("q")
        whole = named or split == "all"
        for number in range(len(self.paths)):
            for span, content in self._scan(number):
                if whole or split_of(self._key_of(span, content, key)) == split:
                    self._spans.extend(span)
        if not whole:
            self.hint = (
                "; rows are split 90/5/5 by a hash of their text or first user turn, "
                "put {split} into the glob to name files by split"
            )

    @abc.abstractmethod
    def _scan(self, number: int) -> Iterator[tuple[Span, bytes]]:
        """Yields the spans of the records in file `number`, with their bytes."""

    @abc.abstractmethod
    def _record(self, content: str) -> Mapping[str, Any]:
        """Returns the record in a span of a file. Raises BadRow."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        span = self._span(index)
        with open(self._local[span.file], "rb") as file:
            file.seek(span.start)
            return self._record(_decoded(file.read(span.size), span))

    def _key_of(self, span: Span, content: bytes, key: Key) -> str | bytes:
        try:
            return key(self._record(_decoded(content, span)))
        except BadRow:
            return content

    def __len__(self) -> int:
        return len(self._spans) // 4

    def _span(self, index: int) -> Span:
        return Span(*self._spans[4 * index : 4 * index + 4])

    def locate(self, index: int) -> str:
        span = self._span(index)
        return f"{self.paths[span.file]}:{span.line}"


def _decoded(content: bytes, span: Span) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = span.line + content[: error.start].count(b"\n")
        raise BadRow(f"invalid UTF-8 on line {line}") from error


class JsonLines(_Files):
    """One JSON object per line; empty lines are skipped."""

    def _scan(self, number: int) -> Iterator[tuple[Span, bytes]]:
        start = 0
        with open(self._local[number], "rb") as file:
            for line, content in enumerate(file, 1):
                if content.strip():
                    yield Span(number, start, len(content), line), content.strip()
                start += len(content)

    def _record(self, content: str) -> Mapping[str, Any]:
        try:
            record = json.loads(content.rstrip())
        except json.JSONDecodeError as error:
            raise BadRow(f"bad JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise BadRow(f"expected a JSON object, got {type(record).__name__}")
        return record


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

    def _scan(self, number: int) -> Iterator[tuple[Span, bytes]]:
        with open(self._local[number], "rb") as file:
            if self._documents == "file":
                content = file.read()
                yield Span(number, 0, len(content), 1), content
                return
            start, first, block = 0, 1, b""  # of the row being read
            for line, content in enumerate(file, 1):
                blank = not content.strip()
                if block and (blank or self._documents == "line"):
                    yield Span(number, start, len(block), first), block
                    start += len(block)
                    block = b""
                if blank:
                    start += len(content)
                    continue
                first = first if block else line
                block += content
            if block:
                yield Span(number, start, len(block), first), block

    def _record(self, content: str) -> Mapping[str, Any]:
        whole = self._documents == "file"
        return {"text": content if whole else content.rstrip("\r\n")}
