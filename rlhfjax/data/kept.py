"""What is kept on disk about the records of large files, so that a second start is quick.

The folder is `data_dir` of the source, else $RLHFJAX_DATA_CACHE, else ~/.cache/rlhfjax/data. In it
a folder per set of files has a name that follows from the files' names, sizes, modification times
and samples of their content: nothing that is kept is taken for that of a file that has changed.
"""

import abc
import contextlib
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import rlhfjax
from rlhfjax import json_text, paths
from rlhfjax.data.dataset_folders import locked
from rlhfjax.errors import ConfigError, DataError, first_line
from rlhfjax.progress import about

log = logging.getLogger("rlhfjax")
VARIABLE = "RLHFJAX_DATA_CACHE"
SMALL = 2**25
"""Bytes of files up to which nothing is kept: they are read anew at every start."""
EVERY = 10.0  # seconds between two lines of progress
FORMAT = 1  # of what is kept; part of the name of a folder
# The modules of this folder whose code decides what is found out about rows.
_CODE = (
    *("accepted", "chat", "columns", "examples", "form_readers", "forms", "loader"),
    *(
        "mismatched",
        "prompts",
        "rows",
        "sources",
        "template",
        "thoughts",
        "tools",
        "turns",
    ),
    *("unpaired", "verdicts"),
)
_SAMPLES, _SAMPLE = 64, 4096  # parts of a file that its key depends on, and their bytes


class Kept(abc.ABC):
    """Records about which something may be kept in a folder.

    Args:
      folder: where.
      context: the records, for the log.
    """

    split: str | None = None  # the split that is to be taken of them by a hash

    def __init__(self, folder: paths.Path, context: str):
        self.folder = folder
        self._context = context

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Any: ...

    @abc.abstractmethod
    def essence(self, index: int) -> bytes:
        """Returns the bytes that decide the split of a malformed record."""

    def remembered(
        self, settings: Any, count: int, dtype: Any, measure: Callable[[int], int]
    ) -> np.ndarray:
        """Returns [measure(0), …, measure(count - 1)], from the cache if it was computed before.

        Args:
          settings: JSON value that, with the records and the package's version, determines it.
        """
        known = [FORMAT, rlhfjax.__version__, _code(), str(np.dtype(dtype)), settings]
        text = json_text.encode(known, "scan", sort_keys=True)
        name = f"scan-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        size = count * np.dtype(dtype).itemsize
        with writing(self.folder), exclusive(self.folder, self.folder / name):
            content = paths.read_if_there(self.folder / name)
            if content is None or len(content) != size:
                numbers = self._computed(count, dtype, measure)
                paths.make_folder(self.folder)
                paths.write(self.folder / name, numbers.tobytes())
                return numbers
        return np.frombuffer(content, dtype)

    def _computed(
        self, count: int, dtype: Any, measure: Callable[[int], int]
    ) -> np.ndarray:
        numbers = np.zeros(count, dtype)
        progress = Progress(f"reading {count:,} rows of {self._context}, once", count)
        for i in range(count):
            numbers[i] = measure(i)
            progress.at(i)
        return numbers


class Progress:
    """Logs how far a long piece of work is, and how long it still takes."""

    def __init__(self, what: str, total: int):
        self._what = what
        self._total = max(1, total)
        self._start = self._last = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < EVERY:
            return
        self._last = now
        share = min(1.0, done / self._total)
        left = (now - self._start) * (1 - share) / max(share, 1e-9)
        log.info("data: %s: %.0f %%, %s left", self._what, 100 * share, about(left))


def cache_folder(data_dir: str | os.PathLike | None = None) -> paths.Path:
    """Returns the folder of all indexes.

    Raises:
      ConfigError: it is in a bucket.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    default = os.environ.get(VARIABLE) or os.path.join(home, "rlhfjax", "data")
    folder = paths.path(data_dir or default)
    if paths.remote(folder):
        raise ConfigError(
            f"data_dir={folder}: an index of files needs a folder on a local disk"
        )
    return folder


def total_size(names: Sequence[paths.Path]) -> int:
    """Returns the number of bytes of files."""
    return sum(map(paths.size, names))


def kept_folder(names: Sequence[paths.Path], options: Any) -> paths.Path | None:
    """Returns the folder for what is kept about records in files; None for small files."""
    is_small = total_size(names) <= SMALL
    return None if is_small else cache_folder() / key_of(names, options)


@contextlib.contextmanager
def writing(folder: paths.Path) -> Iterator[None]:
    """Raises DataError in place of an error of the disk that a folder is on."""
    try:
        yield
    except OSError as error:
        why = error.strerror or first_line(error)
        raise DataError(
            f"{error.filename or folder}: {why}; ${VARIABLE} or data_dir chooses another"
            " folder for indexes"
        ) from None


@contextlib.contextmanager
def exclusive(folder: paths.Path, wanted: paths.Path) -> Iterator[None]:
    """Holds the lock of a folder, unless what it would be held for is there already."""
    if wanted.exists():
        yield
        return
    paths.make_folder(folder.parent)
    with locked(paths.lock_file(folder.with_name(f".{folder.name}.lock"))):
        yield


def key_of(names: Sequence[paths.Path], options: Any) -> str:
    """Returns the name of the folder of some files.

    Args:
      options: JSON value: what decides, beside the files, what is kept.
    """
    identity = [FORMAT, options, [_identity(name) for name in names]]
    text = json_text.encode(identity, "index", sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identity(name: paths.Path) -> list[Any]:
    """Returns what changes when a file does."""
    if paths.remote(name):
        return [str(name), paths.version(name)]
    status = os.stat(name)
    total = 0
    with open(name, "rb", buffering=0) as file:
        for i in range(_SAMPLES):
            file.seek(max(0, status.st_size - _SAMPLE) * i // (_SAMPLES - 1))
            total = zlib.crc32(file.read(_SAMPLE), total)
    place = json_text.unicode(str(paths.absolute(name)))
    return [place, status.st_size, status.st_mtime_ns, total]


def _code() -> int:
    """Returns a checksum of the code that decides what is found out about rows."""
    total = 0
    for name in _CODE:
        file = paths.path(__file__).with_name(f"{name}.py")
        total = zlib.crc32(paths.read(file), total)
    return total
