"""Files and folders on local disks and in buckets (gs://). Only this file knows the difference.

A local name is a `pathlib.Path`, a name in a bucket an `epath.Path`; methods that both have do the
same. A bucket can neither append to a file nor rename or lock a folder, and most libraries cannot
open files in a bucket. For each of these there is a function here that takes both kinds of paths.
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
import stat
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import fsspec
import fsspec.config
from etils import epath

from rlhfjax import network, patterns
from rlhfjax.errors import ConfigError, DataError, UserError, cut, first_line, install

Path = pathlib.Path | epath.Path  # for annotations; `path` creates one
SCHEME = "gs://"
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes; of a path with the NUL that ends it


def path(name: str | os.PathLike) -> Path:
    """Returns the path of a name. `~/` stands for the home folder, as in a shell.

    Raises:
      ConfigError: the scheme is unknown, the name is in a bucket and gcsfs is not installed, or no
        file can have this name.
    """
    name = os.fspath(name)
    if not remote(name):
        _validate_name(name)
        in_home = name == "~" or name.startswith("~/")
        if in_home and not os.path.lexists(name):
            name = os.path.expanduser(name)
        return pathlib.Path(name)
    if not name.startswith(SCHEME):
        raise ConfigError(
            f"{name}: expected a local path or one of Google Cloud Storage ({SCHEME}…)"
        )
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ConfigError(f"{name}: gcsfs is not installed; {install('gcs')}") from None
    # epath reads buckets with TensorFlow if that is installed; we always use gcsfs. Listings are
    # not cached, because TensorStore and other processes write to the same folders.
    os.environ.setdefault("EPATH_USE_TF", "false")
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def remote(name: str | os.PathLike) -> bool:
    """Returns whether a name is in a bucket."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(name)) is not None


def _validate_name(name: str) -> None:
    """Raises ConfigError if no file can have a local name."""
    if "\0" in name:
        raise ConfigError(f"{cut(name)}: a file's name has no NUL character")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        raise ConfigError(f"{cut(name)}: the name is not Unicode") from None
    longest = max(map(len, encoded.split(b"/")))
    if len(encoded) >= LONGEST_PATH or longest > LONGEST_NAME:
        raise ConfigError(
            f"{cut(name)}: a path has at most {LONGEST_PATH - 1} bytes, and each name in it"
            f" {LONGEST_NAME}"
        )


def lexists(name: str) -> bool:
    """Returns whether a local name is there, be it a link that leads nowhere."""
    try:
        return os.path.lexists(name)
    except ValueError:
        return False


def without_patterns(path: Path) -> Path:
    """Returns a name of a local file or folder for libraries that take some characters otherwise.

    Orbax takes `[` as the beginning of a pattern, TensorStore a backslash as a separator, and
    epath a name that ends with a colon as a scheme. The parent folder is then reached by a link in
    a folder of this process; it is created if missing.
    """
    if remote(path) or not re.search(r"[\[\\]|:(?=/)", str(path)):
        return path
    parent = os.path.abspath(path.parent)
    make_folder(pathlib.Path(parent))
    link = scratch() / f"to-{hashlib.sha256(os.fsencode(parent)).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(parent)
    return link / path.name


def scheme(name: str, known: Collection[str]) -> str:
    """Returns the known scheme that a name begins with, as in jsonl:REST; "" for a path.

    A path may have colons in it, as a time has.
    """
    prefix, colon, _ = name.partition(":")
    return prefix if colon and prefix in known else ""


def absolute(path: Path) -> Path:
    """Returns an absolute path without symbolic links."""
    return path if remote(path) else path.resolve()


def _store() -> Any:
    """Returns the client for buckets, which fsspec caches. It handles many files at a time."""
    _reach_buckets()
    return fsspec.filesystem("gcs")


@functools.cache  # only where it does not raise
def _reach_buckets() -> None:
    """Raises DataError within seconds if there is no network: the client would try for a minute."""
    server = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
    if reason := network.unreachable([server]):
        raise DataError(f"Google Cloud Storage cannot be reached: {reason}")


# ------------------------------------------------------------------ listing


def children(folder: Path) -> list[Path]:
    """Returns the files and folders in a folder, sorted by name; [] if there is no folder.

    `is_dir` of a path cannot replace this: it returns False if a bucket cannot be reached.
    """
    try:
        if remote(folder):
            _reach_buckets()
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as problem:
        raise DataError(f"{folder!s:.200}: {problem.strerror}") from None
    except ValueError as problem:  # a name with NUL
        raise DataError(f"{folder!s:.60}: {first_line(problem)}") from None


def files(folder: Path) -> list[Path]:
    """Returns the files in a folder and all its subfolders, sorted by name."""
    if remote(folder):
        return [epath.Path(SCHEME + name) for name in sorted(_listed(folder))]
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _listed(source: Path) -> dict[str, dict[str, Any]]:
    """Returns {bucket/name: metadata} for a file, or for all files in a folder."""
    entries = _store().find(str(source), detail=True)
    return {name: entry for name, entry in entries.items() if entry["type"] == "file"}


def size(file: Path) -> int:
    """Returns the number of bytes of a file."""
    if remote(file):
        return _store().size(str(file))
    return os.stat(file).st_size


def version(file: Path) -> str:
    """Returns what a bucket changes whenever it replaces a file."""
    (entry,) = _listed(file).values()
    return str(entry["generation"])


def glob(pattern: str) -> list[Path]:
    """Returns the files that match, sorted by name; `**` stands for any number of folders.

    A name that exists is taken literally, see `patterns.matching_files`.
    """
    if not remote(pattern):
        return [pathlib.Path(name) for name in patterns.matching_files(pattern)]
    path(pattern)  # raises if the scheme is unknown or gcsfs is not installed
    if globs.has_magic(pattern) and _store().isfile(pattern):
        return [epath.Path(pattern)]
    entries = _store().glob(pattern, detail=True)
    names = [name for name in sorted(entries) if entries[name]["type"] == "file"]
    return [epath.Path(SCHEME + name) for name in names]


def relative(name: str, folder: Path) -> str:
    """Returns a name relative to a folder, so that both can be moved; `within` is the inverse.

    A name that does not exist, or of which only one of the two is in a bucket, stays as it is.
    """
    is_relative = remote(name) == remote(folder) and path(name).exists()
    return os.path.relpath(name, folder) if is_relative else name


def within(folder: Path, name: str) -> Path:
    """Returns folder / name, in a bucket without `..`, which has no meaning in its names."""
    joined = name if remote(name) else os.path.join(folder, name)
    if not remote(joined):
        return pathlib.Path(joined)
    return path(SCHEME + posixpath.normpath(joined.removeprefix(SCHEME)))


# ------------------------------------------------------------------ reading


def read(path: Path, error: type[UserError] = DataError) -> bytes:
    """Returns the content of a file.

    Raises:
      UserError: of the given class, if there is no such file or it cannot be read.
    """
    content = read_if_there(path, error)
    if content is None:
        raise error(f"{path}: there is no such file")
    return content


def read_if_there(path: Path, error: type[UserError] = DataError) -> bytes | None:
    """Returns the content of a file; None if there is nothing of this name.

    Raises:
      UserError: of the given class, if it is a folder or device, a loop of links, or cannot be
        read.
    """
    try:
        if remote(path):
            _reach_buckets()
        else:
            validate_regular(path, error)
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or first_line(problem)}") from None
    except ValueError as problem:  # a name with NUL
        raise error(f"{path!s:.60}: {first_line(problem)}") from None


def exists(path: Path, error: type[UserError] = DataError) -> bool:
    """Returns whether there is a file or folder of this name.

    Raises:
      UserError: of the given class: the name leads to a loop of links, or no file can have it.
    """
    try:
        if remote(path):
            _reach_buckets()
            return path.exists()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as problem:
        raise error(f"{path!s:.200}: {problem.strerror}") from None
    except ValueError as problem:  # a name with NUL
        raise error(f"{path!s:.60}: {first_line(problem)}") from None
    return True


def validate_regular(path: Path, error: type[UserError] = DataError) -> None:
    """Raises an error if a local path is anything but a file: reading a pipe may never end.

    Raises:
      FileNotFoundError: there is nothing of this name.
      UserError: of the given class: it is a folder, a device or a pipe.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise error(f"{path}: is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise error(f"{path}: is a device or a pipe; expected a file")


# ------------------------------------------------------------------ writing


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents. In a bucket, a folder exists once it holds a file."""
    if not remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file, completely or not at all, and returns its path.

    Raises:
      ConfigError: the bucket does not exist.
      DataError: a folder has this name.
    """
    content = content.encode() if isinstance(content, str) else content
    if remote(path):
        try:
            _store().pipe_file(str(path), content)
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such bucket") from None
        return path
    try:
        with replacing_file(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except IsADirectoryError:
        raise DataError(
            f"{path}: is a folder; a file is written here: move it away"
        ) from None
    return path


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[pathlib.Path]:
    """Yields a local name. The file written there replaces `path`, completely or not at all."""
    if remote(path):
        with tempfile.TemporaryDirectory(prefix="rlhfjax-") as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            _store().put([str(temporary)], [str(path)])
        return
    temporary = pathlib.Path(path.with_name(f".{path.name}.{os.getpid()}"))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def usual_mode(file: Path) -> Iterator[None]:
    """Gives a local file, which the block writes, the mode of files that `open` creates."""
    local_file = pathlib.Path(file)
    local_file.touch()
    mode = local_file.stat().st_mode
    yield
    local_file.chmod(mode)


@contextlib.contextmanager
def replacing(folder: Path, last: str) -> Iterator[pathlib.Path]:
    """Yields an empty local folder whose content replaces `folder`, completely or not at all.

    Only one process may do so at a time. What a killed process left behind is removed.

    Args:
      last: the file without which the folder counts as absent. In a bucket it is removed first and
        written last.
    """
    if remote(folder):
        with tempfile.TemporaryDirectory(prefix="rlhfjax-") as temporary:
            yield pathlib.Path(temporary)
            _upload(pathlib.Path(temporary), folder, last)
        return
    folder = pathlib.Path(folder)
    make_folder(folder.parent)
    for leftover in folder.parent.glob(f".{globs.escape(folder.name)}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    older = temporary.with_name(f"{temporary.name}-older")
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
    local_files = [file for file in files(source) if file != source / last]
    targets = [folder / file.relative_to(source) for file in local_files]
    _store().put([*map(str, local_files)], [*map(str, targets)])
    write(folder / last, (source / last).read_bytes())


def remove(folder: Path) -> None:
    """Removes a folder and everything in it, if it exists."""
    if remote(folder):
        with contextlib.suppress(FileNotFoundError):
            _store().rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move(folder: Path, target: Path) -> None:
    """Renames a folder. In a bucket it has both names for a while."""
    make_folder(target.parent)
    if remote(folder):
        sources = files(folder)
        targets = [target / source.relative_to(folder) for source in sources]
        _store().copy([*map(str, sources)], [*map(str, targets)])
        remove(folder)
    else:
        os.replace(folder, target)


# ------------------------------------------------------------------ local copies


def local(source: Path) -> pathlib.Path:
    """Returns a local path with the same content, for libraries that cannot open others.

    From a bucket, a file or folder is downloaded once per version.

    Raises:
      FileNotFoundError: it is in a bucket and does not exist.
    """
    if not remote(source):
        return pathlib.Path(source)
    entries = _listed(source)
    if not entries:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    version = sorted((name, entry["generation"]) for name, entry in entries.items())
    digest = hashlib.sha256(repr(version).encode()).hexdigest()
    target = scratch() / digest[:32] / source.name
    if not target.exists():
        root = str(source).removeprefix(SCHEME)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=scratch()), source.name)
        copies = [str(temporary) + name.removeprefix(root) for name in entries]
        _store().get(list(entries), copies)
        with contextlib.suppress(OSError):  # another thread was faster
            os.replace(temporary.parent, target.parent)
    return target


def scratch() -> pathlib.Path:
    """Returns a local folder of this process, which is removed when the process ends."""
    return pathlib.Path(_scratch_folder().name)


@functools.cache
def _scratch_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="rlhfjax-")


class Mirror:
    """A local folder for files that are appended to, which `sync` copies to a bucket.

    Write to `folder`. If the target is local, `folder` is the target itself.
    """

    def __init__(self, target: Path, names: Iterable[str] = ()):
        """Copies the named files from the bucket, those that exist."""
        self._target = target
        self._temporary: tempfile.TemporaryDirectory | None = None
        # Size and modification time of each file as it was uploaded last.
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
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
        """Uploads files that have changed, unless it did so in the last `every` seconds."""
        if self._temporary is None or time.monotonic() - self._synced < every:
            return
        for path in files(self.folder):
            with contextlib.suppress(FileNotFoundError):  # removed by its writer
                self._upload(pathlib.Path(path))
        self._synced = time.monotonic()

    def _upload(self, file: pathlib.Path) -> None:
        status = file.stat()
        version = (status.st_size, status.st_mtime_ns)
        if not file.is_symlink() and self._uploaded.get(file) != version:
            write(self._target / file.relative_to(self.folder), file.read_bytes())
            self._uploaded[file] = version

    def close(self) -> None:
        """Uploads what has changed, and removes the local folder."""
        self.sync()
        if self._temporary is not None:
            self._temporary.cleanup()


# ------------------------------------------------------------------ locks and errors


def lock_file(path: Path) -> pathlib.Path:
    """Returns the local path of a lock; for a bucket, which has no locks, a temporary file."""
    if not remote(path):
        return pathlib.Path(path)
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir(), f"rlhfjax-{os.getuid()}-{name}.lock")


def refusal(error: BaseException | None) -> str:
    """Returns why a bucket cannot be used (rights, network, …), or "" for other errors."""
    while error is not None:
        if type(error).__module__.partition(".")[0] in ("gcsfs", "google", "aiohttp"):
            return f"Google Cloud Storage: {first_line(error, kind=True)}"
        error = error.__cause__ or error.__context__
    return ""
