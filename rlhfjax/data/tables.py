"""Reads CSV, Parquet and Arrow. Their rows are copied as JSON objects, which are read by index."""

import contextlib
import csv
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedIOBase
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet

from rlhfjax import json_text
from rlhfjax.data.files import Damaged, Reader, Span, spanned
from rlhfjax.data.rows import BadRow
from rlhfjax.errors import first_line

log = logging.getLogger("rlhfjax")
BATCH = 64  # rows that are in memory as Python objects
LONGEST_FIELD = 2**24  # characters of a CSV field
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
csv.field_size_limit(LONGEST_FIELD)


class _Copied(Reader):
    """Rows whose bytes are JSON that `scan` makes: an object, or a text that says what is wrong."""

    in_place = False

    def record(self, content: bytes, span: Span) -> Mapping[str, Any]:
        row = json_text.parse(content)
        if isinstance(row, str):
            raise BadRow(row)
        return row


def _copied(number: int, row: int, value: Any) -> tuple[Span, bytes]:
    return spanned(number, 0, json_text.foreign(value), row)


class Csv(_Copied):
    """Rows of text columns. The first row has their names; fields are quoted as in RFC 4180."""

    def __init__(self, delimiter: str):
        self._delimiter = delimiter

    def scan(self, number: int, file: BufferedIOBase) -> Iterator[tuple[Span, bytes]]:
        text = io.TextIOWrapper(
            cast(Any, file), "utf-8-sig", errors="surrogateescape", newline=""
        )
        rows = csv.reader(text, delimiter=self._delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        for fields in _fields(rows):
            if header is None and fields != []:
                header = _header(fields, line)
            elif header is not None and fields != []:
                yield _copied(number, line, _row(header, fields))
            line = rows.line_num + 1
        text.detach()  # the caller closes the file


def _fields(rows: Any) -> Iterator[list[str] | str]:
    """Yields the fields of the rows, or what is wrong with one.

    Raises:
      Damaged: a quote has no end, so that no row follows.
    """
    while True:
        line = rows.line_num + 1
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error) or "unexpected end" in str(error):
                raise Damaged(
                    f"a quoted field without an end ({error});"
                    ' a quote within quotes is written twice: ""',
                    f":{line}",
                ) from None
            yield f"{error}; expected fields as in RFC 4180"


def _header(fields: list[str] | str, line: int) -> list[str]:
    if isinstance(fields, str):
        raise Damaged(fields, f":{line}")
    for field in fields:
        if _is_bad(field) or fields.count(field) > 1:
            raise Damaged(
                f"{json_text.shown(field)} names no column, or two;"
                " the first row must hold the names of the columns",
                f":{line}",
            )
    return fields


def _row(header: list[str], fields: list[str] | str) -> dict[str, str] | str:
    """Returns a row by the names of its columns, or what is wrong with it."""
    if isinstance(fields, str):
        return fields
    if len(fields) != len(header):
        return f"{len(fields)} fields for the {len(header)} columns of the first row"
    row = dict(zip(header, fields, strict=True))
    bad = [name for name, field in row.items() if _is_bad(field)]
    return f"column {bad[0]!r}: invalid UTF-8" if bad else row


def _is_bad(field: str) -> bool:
    """Returns whether a field had bytes that are no UTF-8."""
    return any("\udc80" <= char <= "\udcff" for char in field) if field else False


# ------------------------------------------------------------------ Parquet and Arrow


_DAMAGED = (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError)


class _Batches(_Copied):
    """Rows of Arrow's record batches."""

    is_text = False
    unit = ": row "
    format_name = ""

    def batches(self, file: BufferedIOBase) -> Iterable[pa.RecordBatch]:
        """Yields the batches of a file."""
        raise NotImplementedError

    def scan(self, number: int, file: BufferedIOBase) -> Iterator[tuple[Span, bytes]]:
        writer = _Writer()
        row = 0
        try:
            for batch in self.batches(file):
                for value in writer.rows(batch):
                    row += 1
                    yield spanned(number, 0, value, row)
        except _DAMAGED as error:
            raise Damaged(
                f"not a whole {self.format_name} file ({first_line(error, kind=True)})",
                f": after row {row}" if row else "",
            ) from None


class Parquet(_Batches):
    format_name = "Parquet"

    def batches(self, file: BufferedIOBase) -> Iterable[pa.RecordBatch]:
        # Pages are read as they are needed: a row group may be as large as the file.
        options = {"memory_map": False, "buffer_size": 2**20, "pre_buffer": False}
        opened = pyarrow.parquet.ParquetFile(file, **options)
        yield from opened.iter_batches(batch_size=BATCH, use_threads=False)


class Arrow(_Batches):
    """Files and streams of Arrow's IPC format."""

    format_name = "Arrow"

    def batches(self, file: BufferedIOBase) -> Iterable[pa.RecordBatch]:
        clipped: Any = _Clipped(file)
        opening = clipped.read(6)
        clipped.seek(-len(_END_OF_STREAM), io.SEEK_END)
        end = clipped.read()
        clipped.seek(0)
        if opening == b"ARROW1":
            with pa.ipc.open_file(clipped) as reader:
                for i in range(reader.num_record_batches):
                    yield _validated(reader.get_batch(i))
            return
        if end != _END_OF_STREAM:
            raise pa.ArrowInvalid("the stream has no end: it is cut")
        with pa.ipc.open_stream(clipped) as reader:
            yield from map(_validated, reader)


class _Clipped:
    """A file of which no more is asked for than it has.

    A damaged length may be gigabytes, and Python makes room for what it is asked for.
    """

    def __init__(self, file: BufferedIOBase):
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if count < 0 else min(count, left))


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns a batch whose lengths and offsets are within its buffers.

    Arrow trusts the offsets in a file and crashes if they lead outside of its buffers. Invalid
    UTF-8 remains: it is a malformed row and not a damaged file.

    Raises:
      ArrowInvalid: the batch is damaged.
    """
    for column in batch.columns:
        _validate(column)
    return batch


def _validate(array: pa.Array) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        for child in _children(array):  # of which those after the text are not checked
            _validate(child)


def _children(array: pa.Array) -> list[pa.Array]:
    """Returns the arrays that an array is made of."""
    if pa.types.is_struct(array.type):
        return [array.field(i) for i in range(array.type.num_fields)]
    if pa.types.is_map(array.type):
        return [array.keys, array.items]
    if pa.types.is_dictionary(array.type):
        return [array.dictionary]
    return [array.values] if hasattr(array, "values") else []


class _Writer:
    """Makes JSON of the rows of batches, without the columns that JSON cannot hold."""

    def __init__(self) -> None:
        self._left_out: set[str] = set()

    def rows(self, batch: pa.RecordBatch) -> Iterator[bytes]:
        """Yields the rows as JSON objects, or JSON texts that say what is wrong."""
        for start in range(0, batch.num_rows, BATCH):
            yield from self._rows(batch.slice(start, BATCH))

    def _rows(self, batch: pa.RecordBatch) -> Iterator[bytes]:
        try:
            rows = batch.to_pylist()
        except ValueError:  # also UnicodeDecodeError; one row at a time
            for i in range(batch.num_rows):
                yield self._single(batch.slice(i, 1))
            return
        yield from map(self._encoded, rows)

    def _single(self, batch: pa.RecordBatch) -> bytes:
        try:
            return self._encoded(batch.to_pylist()[0])
        except UnicodeDecodeError as error:
            return json_text.foreign(f"invalid UTF-8 at byte {error.start}")
        except ValueError as error:
            return json_text.foreign(first_line(error))

    def _encoded(self, row: Mapping[str, Any]) -> bytes:
        with contextlib.suppress(ValueError):
            return json_text.foreign(row)
        kept = {}
        for column, value in row.items():
            try:
                json_text.foreign(value)
            except ValueError as error:
                self._warn(column, error)
            else:
                kept[column] = value
        return json_text.foreign(kept)

    def _warn(self, column: str, error: ValueError) -> None:
        if column not in self._left_out:
            self._left_out.add(column)
            log.warning(
                "column %r is left out of rows where JSON cannot hold it (%s)",
                column,
                first_line(error),
            )
