"""Files and folders of this machine's disks and of buckets (gs://): every difference between the two is in this file.

A local name is a `pathlib.Path` and a bucket's an `epath.Path`; the methods that both have do the same. A bucket cannot
append to a file, rename a folder or lock one, and most libraries cannot open what lies in it: for these there is a
function here, which does at once what it does for a local path.
"""

import contextlib
import errno
import functools
import glob as globs
import hashlib
import os
import pathlib
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
from etils import epath

from rlhfjax.errors import ConfigError, first_line

Path = pathlib.Path | epath.Path  # for annotations: `path` makes one
SCHEME = "gs://"


def path(name: str | os.PathLike) -> Path:
    """A path from its name.

    Raises:
      ConfigError: it is of a store that we do not know, or one in a bucket, and gcsfs is not installed.
    """
    name = os.fspath(name)
    if not remote(name):
        return pathlib.Path(name)
    if not name.startswith(SCHEME):
        raise ConfigError(
            f"{name}: accepted are paths of this machine and {SCHEME} of Google Cloud Storage"
        )
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{name}: gcsfs is not installed; pip install 'rlhfjax[gcs]'"
        ) from None
    # Of the two that epath reads buckets with, the one that we use too, where TensorFlow is installed as well. It would
    # remember listings; but TensorStore and other processes write there.
    os.environ.setdefault("EPATH_USE_TF", "false")
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def remote(name: str | os.PathLike) -> bool:
    """Whether a name is of a bucket."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(name)) is not None


def absolute(path: Path) -> Path:
    """The path whatever the current folder is, without links."""
    return path if remote(path) else path.resolve()


def _store() -> Any:
    """What reads and writes buckets, many files at once; it keeps one of itself."""
    return fsspec.filesystem("gcs")


# ------------------------------------------------------------------ what is there


def children(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing where there is no folder.

    (A path's `is_dir` will not do: where a bucket cannot be reached it says no.)
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def files(folder: Path) -> list[Path]:
    """The files in a folder and in all folders in it, by name."""
    if remote(folder):
        return [epath.Path(SCHEME + name) for name in sorted(_listed(folder))]
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _listed(source: Path) -> dict[str, dict[str, Any]]:
    """{bucket/name: what the bucket says of it} of a file, or of all files in a folder."""
    found = _store().find(str(source), detail=True)
    return {name: about for name, about in found.items() if about["type"] == "file"}


def glob(pattern: str) -> list[Path]:
    """The files whose names match, by name; `**` stands for any folders, also none."""
    if remote(pattern):
        path(pattern)
        found = _store().glob(pattern, detail=True)
        return [
            epath.Path(SCHEME + name)
            for name in sorted(found)
            if found[name]["type"] == "file"
        ]
    names = globs.glob(os.path.expanduser(pattern), recursive=True)
    return [pathlib.Path(name) for name in sorted(names) if os.path.isfile(name)]


def relative(name: str, folder: Path) -> str:
    """A name as a file in `folder` keeps it, so that both can be moved together; `within` is the inverse.

    A name of nothing that is there, or of another kind of place than the folder, stays as it is.
    """
    together = remote(name) == remote(folder) and path(name).exists()
    return os.path.relpath(name, folder) if together else name


def within(folder: Path, name: str) -> Path:
    """folder / name, without any `..`: to a bucket that is a name like others."""
    joined = name if remote(name) else os.path.join(folder, name)
    if not remote(joined):
        return pathlib.Path(joined)
    return path(SCHEME + posixpath.normpath(joined.removeprefix(SCHEME)))


# ------------------------------------------------------------------ writing


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it; in a bucket a folder is there once it holds something."""
    if not remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all, and returns its path.

    Raises:
      ConfigError: there is no such bucket.
    """
    content = content.encode() if isinstance(content, str) else content
    if remote(path):
        try:
            _store().pipe_file(str(path), content)
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such bucket") from None
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def replacing(folder: Path, last: str) -> Iterator[pathlib.Path]:
    """An empty folder of this machine, the content of which becomes `folder`, all of it or nothing.

    One process at a time; what one that was killed has left is removed.

    Args:
      last: the file without which the folder does not count: in a bucket it is removed first and written last.
    """
    if remote(folder):
        with tempfile.TemporaryDirectory(prefix="rlhfjax-") as temporary:
            yield pathlib.Path(temporary)
            _upload(pathlib.Path(temporary), folder, last)
        return
    make_folder(folder.parent)
    for leftover in folder.parent.glob(f".{globs.escape(folder.name)}.tmp-*"):
        shutil.rmtree(leftover)
    temporary, older = (
        folder.with_name(f".{folder.name}.tmp-{os.getpid()}{end}")
        for end in ("", "-older")
    )
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, older)
        os.replace(temporary, folder)
    finally:
        remove(temporary)
        remove(older)


def _upload(source: pathlib.Path, folder: Path, last: str) -> None:
    (folder / last).unlink(missing_ok=True)
    remove(folder)
    some = [file for file in files(source) if file != source / last]
    _store().put(
        list(map(str, some)), [str(folder / file.relative_to(source)) for file in some]
    )
    write(folder / last, (source / last).read_bytes())


def remove(folder: Path) -> None:
    """Removes a folder and all that is in it; nothing where there is none."""
    if remote(folder):
        with contextlib.suppress(FileNotFoundError):
            _store().rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move(folder: Path, target: Path) -> None:
    """Gives a folder another name; in a bucket it is under both for a while."""
    make_folder(target.parent)
    if remote(folder):
        names = files(folder)
        _store().copy(
            list(map(str, names)),
            [str(target / name.relative_to(folder)) for name in names],
        )
        remove(folder)
    else:
        os.replace(folder, target)


# ------------------------------------------------------------------ a local stand-in


def local(source: Path) -> pathlib.Path:
    """The same file or folder on this machine, for what can open no other: from a bucket it is downloaded, once.

    Raises:
      FileNotFoundError: it is in a bucket, and is not there.
    """
    if not remote(source):
        return source
    if not (found := _listed(source)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    version = repr(sorted((name, about["generation"]) for name, about in found.items()))
    target = scratch() / hashlib.sha256(version.encode()).hexdigest()[:32] / source.name
    if not target.exists():
        root = str(source).removeprefix(SCHEME)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=scratch()), source.name)
        _store().get(
            list(found), [str(temporary) + name.removeprefix(root) for name in found]
        )
        with contextlib.suppress(OSError):  # another thread was faster
            os.replace(temporary.parent, target.parent)
    return target


@functools.cache
def scratch() -> pathlib.Path:
    """A folder of this process on this machine's disks, for what goes when it ends."""
    scratch.kept = tempfile.TemporaryDirectory(prefix="rlhfjax-")
    return pathlib.Path(scratch.kept.name)


class Mirror:
    """A folder of this machine that stands for one in a bucket, for files that are appended to; else the folder itself.

    `folder` is where to write. A bucket has what `sync` has brought there.
    """

    def __init__(self, target: Path, names: Iterable[str] = ()):
        """Takes over from the bucket those of the named files that are there."""
        self._target, self._temporary = target, None
        self._sent: dict[
            pathlib.Path, tuple[int, int]
        ] = {}  # size and time of what the bucket has
        self._synced = time.monotonic()
        self.folder = target
        if remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="rlhfjax-")
            self.folder = pathlib.Path(self._temporary.name)
            for name in names:
                if (target / name).exists():
                    make_folder((self.folder / name).parent)
                    (self.folder / name).write_bytes((target / name).read_bytes())

    def sync(self, every: float = 0.0) -> None:
        """Uploads the files that have changed, unless it has done so in the last `every` seconds."""
        if self._temporary is None or time.monotonic() - self._synced < every:
            return
        for file in files(self.folder):
            with contextlib.suppress(
                FileNotFoundError
            ):  # who writes here may remove too
                state = file.stat().st_size, file.stat().st_mtime_ns
                if not file.is_symlink() and self._sent.get(file) != state:
                    write(
                        self._target / file.relative_to(self.folder), file.read_bytes()
                    )
                    self._sent[file] = state
        self._synced = time.monotonic()

    def close(self) -> None:
        """Uploads what is left to be."""
        self.sync()
        if self._temporary is not None:
            self._temporary.cleanup()


# ------------------------------------------------------------------ locks and refusals


def lock_file(path: Path) -> pathlib.Path:
    """Where a lock lies: at its path, or for one in a bucket, which has none, in this machine's temporary folder."""
    if not remote(path):
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir(), f"rlhfjax-{os.getuid()}-{name}.lock")


def refusal(error: BaseException | None) -> str:
    """Why a bucket cannot be used (rights, credentials, network), in one line; nothing for another kind of error."""
    while error is not None:
        if type(error).__module__.partition(".")[0] in ("gcsfs", "google", "aiohttp"):
            return f"Google Cloud Storage: {first_line(error, kind=True)}"
        error = error.__cause__ or error.__context__
    return ""
