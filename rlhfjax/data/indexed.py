"""Records of large files and of files without random access, by an index that is kept on disk.

    FOLDER/KEY/index      five 64-bit integers per record, see `files.Span`
    FOLDER/KEY/records    the records one after the other; absent if the files themselves are read
    FOLDER/KEY/scan-*     what was found out about every record: one number each
    FOLDER/KEY/about.json what was indexed; written last, a folder without it counts as absent

FOLDER and KEY are those of `kept`. Index and records are read by `pread`: memory holds neither.
Measured beside ArrayRecord and Arrow files with batches of 64 rows (1,000,000 rows of 200 bytes,
one core): 4 us per random row; ArrayRecord without compression 2,400, Arrow 9, Arrow with zstd 125,
which needs half the disk.
"""

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from io import BufferedIOBase, BufferedWriter
from typing import Any

import pyarrow as pa

from rlhfjax import json_text, paths
from rlhfjax.data import kept
from rlhfjax.data.compressed import decompressed, is_compressed
from rlhfjax.data.files import (
    Damaged,
    Reader,
    Span,
    Spans,
    downloaded,
    split_hint,
    validate_text,
)
from rlhfjax.errors import DataError, first_line

log = logging.getLogger("rlhfjax")
ABOUT, INDEX, RECORDS = "about.json", "index", "records"
_SPAN = struct.Struct("<5q")


class Indexed(Spans, kept.Kept):
    """Records whose offsets and bytes are on disk."""

    def __init__(
        self,
        folder: paths.Path,
        names: Sequence[paths.Path],
        reader: Reader,
        split: str | None,
    ):
        stored = folder / RECORDS
        copied = stored.exists()
        local = [stored] * len(names) if copied else downloaded(names)
        Spans.__init__(self, names, local, reader)
        kept.Kept.__init__(self, folder, str(names[0]))
        self.split = split
        self.hint = split_hint(split) + reader.hint
        self._index = os.open(folder / INDEX, os.O_RDONLY)
        self._count = os.fstat(self._index).st_size // _SPAN.size

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._index)

    def essence(self, index: int) -> bytes:
        return self.reader.essence(self.content(index, self.span(index)))

    def span(self, index: int) -> Span:
        if not 0 <= index < self._count:
            raise IndexError(index)
        content = os.pread(self._index, _SPAN.size, index * _SPAN.size)
        return Span(*_SPAN.unpack(content))


def needs_index(names: Sequence[paths.Path], reader: Reader) -> bool:
    """Returns whether the records cannot be read from the files by offsets in memory."""
    copied = not reader.in_place or any(map(is_compressed, names))
    return copied or kept.total_size(names) > kept.SMALL


def folder_to_write(
    names: Sequence[paths.Path],
    reader: Reader,
    options: Any,
    data_dir: str | os.PathLike | None,
) -> paths.Path | None:
    """Returns the folder that opening the files would write and keep; None if there is none."""
    if not needs_index(names, reader) or kept.total_size(names) <= kept.SMALL:
        return None
    folder = kept.cache_folder(data_dir) / kept.key_of(names, options)
    return None if (folder / ABOUT).exists() else folder


def open_indexed(
    names: Sequence[paths.Path],
    reader: Reader,
    options: Any,
    split: str | None,
    data_dir: str | os.PathLike | None,
) -> Indexed:
    """Returns the records of files, which are indexed unless they have been before.

    A second process waits instead of doing the same work. What a killed process left behind is
    removed by the next one.

    Args:
      options: JSON value: the format and what else decides what the records are.
      split: see `Files`.
    Raises:
      DataError: a file is damaged, or the folder cannot be written.
    """
    is_small = kept.total_size(names) <= kept.SMALL
    root = paths.scratch() / "data" if is_small else kept.cache_folder(data_dir)
    folder = root / kept.key_of(names, options)
    with kept.writing(folder), kept.exclusive(folder, folder / ABOUT):
        if not (folder / ABOUT).exists():
            _index(folder, names, reader, quiet=is_small)
    return Indexed(folder, names, reader, split)


# ------------------------------------------------------------------ indexing


def _index(
    folder: paths.Path, names: Sequence[paths.Path], reader: Reader, quiet: bool
) -> None:
    """Writes the folder of some files."""
    size = kept.total_size(names)
    copy = not reader.in_place or any(map(is_compressed, names))
    work = "converting" if copy else "indexing"
    what = f"{work} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
    if not quiet:
        log.info("data: %s (%.1f GB) in %s, once", what, size / 1e9, folder)
    progress = kept.Progress(what, size)
    local = downloaded(names)
    with paths.replacing(folder, ABOUT) as new:
        with contextlib.ExitStack() as stack:
            index = stack.enter_context(open(new / INDEX, "wb"))
            records = stack.enter_context(open(new / RECORDS, "wb")) if copy else None
            writer = _Writer(index, records, progress)
            for number, name in enumerate(names):
                writer.add(number, name, local[number], reader)
        described = {"files": [str(name) for name in names], "rows": writer.rows}
        text = json_text.encode(described, folder, indent=1)
        paths.write(paths.path(new / ABOUT), text)
    if not quiet:
        log.info("data: %s: %s rows", what, f"{writer.rows:,}")


class _Writer:
    """Appends the spans of files to an index, and their records to a file unless that is None."""

    def __init__(
        self,
        index: BufferedWriter,
        records: BufferedWriter | None,
        progress: kept.Progress,
    ):
        self.rows = 0
        self._index = index
        self._records = records
        self._progress = progress
        self._stored = 0  # bytes
        self._read = 0  # bytes of the files before

    def add(
        self, number: int, name: paths.Path, local: paths.Path, reader: Reader
    ) -> None:
        """Adds one file. Raises DataError if it is damaged."""
        copy_in = None if reader.is_text else os.path.dirname(self._index.name)
        try:
            with decompressed(local, copy_in) as (file, position):
                if reader.is_text:
                    validate_text(_opening(file), name)
                for span, content in reader.scan(number, file):
                    self._append(span, content)
                    self._progress.at(self._read + position())
        except Damaged as error:
            raise DataError(f"{name}{error.place}: {error}") from None
        except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
            if (
                getattr(error, "errno", None) is not None
            ):  # the disk's, not the content's
                raise
            raise DataError(
                f"{name}: not a whole compressed file, after row {self.rows}:"
                f" {first_line(error)}"
            ) from None
        self._read += paths.size(name)

    def _append(self, span: Span, content: bytes) -> None:
        if self._records is not None:
            span = span._replace(start=self._stored)
            self._stored += self._records.write(content)
        self._index.write(_SPAN.pack(*span))
        self.rows += 1


def _opening(file: BufferedIOBase) -> bytes:
    return file.peek(json_text.OPENING)  # pyright: ignore[reportAttributeAccessIssue]
