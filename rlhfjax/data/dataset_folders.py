"""Folders of datasets that TFDS wrote, without importing TFDS, and locks on folders."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from rlhfjax import paths

INFO = "dataset_info.json"  # a folder with this file is a whole dataset


def is_dataset(name: str | os.PathLike) -> bool:
    """Returns whether a name is that of a folder that holds a whole dataset."""
    if paths.remote(name):
        return (paths.path(name) / INFO).is_file()
    return os.path.isfile(os.path.join(name, INFO))


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an advisory lock on a file; the system releases it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
