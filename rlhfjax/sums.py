"""Checksums of the small files that a folder's reader depends on: checksums.json.

Weights have separate checksums, see `checkpoint`. The config of a model is kept as a copy
instead, because it is the same with an option at its default and without it.
"""

import functools
import hashlib
import logging
from collections.abc import Iterable
from typing import Any, NotRequired

from typing_extensions import TypedDict

from rlhfjax import hosts, json_text, paths
from rlhfjax.errors import CheckpointError
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
FILE = "checksums.json"
RESTORE = "restore the folder from a copy"


class Sums(TypedDict):
    """The content of checksums.json."""

    sha256: dict[str, str]  # by the name of the file
    model: NotRequired[json_text.Object]  # a copy of a saved model's config.json


def write(folder: Path, names: Iterable[str], model: Any = None) -> None:
    """Writes the checksums of files that are in a folder, on the first host.

    Args:
      model: the content of a model's config.json; None for other folders.
    """
    if not hosts.first():
        return
    sums: dict[str, Any] = {
        "sha256": {name: _sum(paths.read(folder / name)) for name in sorted(names)}
    }
    if model is not None:
        sums["model"] = model
    text = json_text.encode(sums, folder / FILE, indent=2, sort_keys=True)
    paths.write(folder / FILE, text + "\n")


def read(folder: Path, *, expected: bool = True) -> Sums | None:
    """Returns the checksums of a folder; None if it has none, as in older versions.

    Args:
      expected: log a warning if there are none, once per folder.

    Raises:
      CheckpointError: the file is damaged.
    """
    try:
        sums = json_text.read_if_there(folder / FILE, Sums, error=CheckpointError)
    except CheckpointError as error:
        remedy = f"{RESTORE}, or delete this file to load it unverified"
        raise CheckpointError(f"{error}; {remedy}") from None
    if sums is None and expected:
        _warn(str(folder))
    return sums


def verify(
    folder: Path, names: Iterable[str], remedy: str = RESTORE, *, expected: bool = True
) -> None:
    """Validates that files are those whose checksums a folder has.

    Args:
      names: files that a reader is about to read, if they are there. A file that was saved has to
        be there.
      expected: as in `read`.

    Raises:
      CheckpointError: a file is missing, was changed, or was not there when the folder was saved.
    """
    sums = read(folder, expected=expected)
    if sums is None:
        return
    for name in names:
        content = paths.read_if_there(folder / name, CheckpointError)
        saved = sums["sha256"].get(name)
        problem = ""
        if content is None:
            problem = "is missing" if saved else ""
        elif saved is None:
            problem = "was not there when the folder was saved"
        elif saved != _sum(content):
            problem = f"differs from the file that was saved (by {FILE})"
        if problem:
            raise CheckpointError(f"{folder / name}: {problem}; {remedy}")


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _warn(folder: str) -> None:
    log.warning(
        "%s: it has no %s, as in older versions: its files are not verified",
        folder,
        FILE,
    )
