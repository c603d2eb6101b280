"""Opens files that may be compressed by gzip or zstd, as their names say."""

import contextlib
import gzip
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from typing import Any

import pyarrow as pa

ENDINGS = (".gz", ".zst")
_PART = 2**20


def is_compressed(name: str | os.PathLike) -> bool:
    """Returns whether a file is compressed, by its name."""
    return os.fspath(name).endswith(ENDINGS)


@contextlib.contextmanager
def decompressed(
    name: str | os.PathLike, copy_in: str | None = None
) -> Iterator[tuple[BufferedIOBase, Callable[[], int]]]:
    """Yields the content of a file, and a function that returns how many of its bytes were read.

    Args:
      copy_in: folder for a temporary file with the content, which can be read in any order; None:
        it is read from its beginning to its end.
    """
    with open(name, "rb") as raw, contextlib.ExitStack() as stack:
        file: Any = raw
        if is_compressed(name):
            file = stack.enter_context(_stream(raw, os.fspath(name)))
            if copy_in:
                copy = stack.enter_context(tempfile.TemporaryFile(dir=copy_in))
                shutil.copyfileobj(file, copy, _PART)
                copy.seek(0)
                file = copy
        yield file, raw.tell


def _stream(raw: BufferedIOBase, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    stream: Any = pa.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream, _PART)
