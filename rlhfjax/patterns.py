"""Local files that match a glob. `paths.glob` takes buckets too."""

import contextlib
import glob
import itertools
import os
from collections.abc import Iterator

from rlhfjax.errors import DataError, cut

MOST_FOLDERS = 10_000
"""Folders that a pattern looks into at most: `/**/x` would walk over the whole disk."""
Identity = tuple[int, int]  # device and inode of a folder


def matching_files(pattern: str) -> list[str]:
    """Returns the names of the files that match, sorted.

    `**` stands for any number of folders. Every part of the pattern that exists as it is written is
    taken literally, so that folders may be named `runs[1]` or `what?`. Folders whose names begin
    with a dot are found only if the pattern spells the dot.

    Raises:
      DataError: it looks into more than MOST_FOLDERS folders.
    """
    walk = _Walk(pattern)
    pattern = os.path.expanduser(pattern)
    names = {os.sep if pattern.startswith(os.sep) else ""}
    parts = pattern.lstrip(os.sep).split(os.sep)
    # One `**` stands for all that follow each other.
    parts = [part for part, _ in itertools.groupby(parts)] if "**" in parts else parts
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        names = {
            found for name in names for found in _matching(walk, name, part, is_last)
        }
    return sorted(filter(os.path.isfile, names))


class _Walk:
    """The folders that a pattern has looked into."""

    def __init__(self, pattern: str):
        self._pattern = pattern
        self._folders = 0

    def enter(self) -> None:
        """Counts a folder. Raises DataError if there are too many."""
        self._folders += 1
        if self._folders > MOST_FOLDERS:
            raise DataError(
                f"{cut(repr(self._pattern))}: more than {MOST_FOLDERS:,} folders to look into;"
                " begin the glob with the folder that the files are in"
            )


def _matching(walk: _Walk, folder: str, part: str, is_last: bool) -> Iterator[str]:
    """Yields the names in a folder that match one part of a pattern."""
    name = os.path.join(folder, part)
    if part == "**":
        for inner in _folders(folder):
            walk.enter()
            yield inner
            if is_last:
                files = glob.glob("*", root_dir=inner or None)
                yield from (os.path.join(inner, file) for file in files)
    elif os.path.lexists(name):
        yield name
    elif glob.has_magic(part):
        walk.enter()
        found = glob.glob(part, root_dir=folder or None)
        yield from (os.path.join(folder, file) for file in found)


def _folders(top: str) -> Iterator[str]:
    """Yields a folder and all folders in it, however deep.

    A link to a folder is followed, but not to one that it is in, and to no folder twice: loops and
    chains of links would have no end.
    """
    linked: set[Identity] = set()
    waiting: list[tuple[str, frozenset[Identity]]] = [(top, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        yield folder
        with contextlib.suppress(OSError):  # it may not be read, or is gone
            above |= {_identity(os.stat(folder or os.curdir))}
            entries = os.scandir(folder or os.curdir)
            for entry in sorted(entries, key=lambda entry: entry.name):
                if _is_entered(entry, linked, above):
                    waiting.append((os.path.join(folder, entry.name), above))


def _is_entered(
    entry: os.DirEntry[str], linked: set[Identity], above: frozenset[Identity]
) -> bool:
    """Returns whether to look into an entry of a folder; adds to `linked` where links lead to."""
    try:
        if entry.name.startswith(".") or not entry.is_dir():
            return False
        identity = _identity(entry.stat())
    except OSError:  # a loop of links
        return False
    if identity in above or (entry.is_symlink() and identity in linked):
        return False
    if entry.is_symlink():
        linked.add(identity)
    return True


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
