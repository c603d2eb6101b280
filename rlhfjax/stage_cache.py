"""Takes the results of a stage from a cache: `--cache=DIR`.

Runs repeat bit for bit, so a stage that was computed once need not be computed again. A stage's key
is the SHA-256 of all that decides its files:

  config     every option with its default; a folder of an earlier stage is replaced by that stage's
             key, any other file or folder that is named by its content
  code       the sources of the stage, of the training loop, and of all modules that they import.
             They decide the lowered programs, and what happens on the host
  versions   Python's and those of the packages that rlhfjax requires
  machine    kind and number of the devices and hosts, jax's flags; of a CPU also its features and
             the number of cores, by which XLA splits its work
  folder     the stage's folder, such as 01_sft, which stands in some of the files: runs share a
             stage that has the same place in their recipes

A stage whose chat template writes the date counts as computed only where the template would write
the same now (`template_dates` of done.json).

A stage that runs code from outside of the package (a rule, a stage of a user's package) has no key:
what that code depends on is not known. Nor has a stage that reads from such a stage.

    DIR/KEY/key.json    what the key is made of
    DIR/KEY/stage/      the files of the stage

The cache is never cleaned: remove folders in it by hand, any of them at any time.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from rlhfjax import (
    hosts,
    json_text,
    paths,
    processor,
    stages,
    template_date,
    trackers,
    workdirs,
)
from rlhfjax.config import fill_defaults
from rlhfjax.data import formats
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
KEY_FILE = "key.json"
STAGE_FOLDER = "stage"
# The code that every stage runs, beside its own: the loop, and the choice of mesh.strategy=auto.
ROOTS = ("rlhfjax.train", "rlhfjax.footprint")
# Extras whose packages compute nothing.
_TOOLS = re.compile(r"extra == .(test|plan|transformers|slurm|wandb)\b")
_FILES = re.compile(rf"({'|'.join(formats.SCHEMES)}|hf|gguf):(.*)", re.DOTALL)
# Environment variables that change what is computed.
_FLAGS = re.compile(
    r"XLA_FLAGS|LIBTPU_INIT_ARGS|JAX_(?!COMPILATION_CACHE|PERSISTENT).*"
)
_CHUNK = 2**22


class NoKey(Exception):
    """Why a stage has no key."""


class Cache:
    """The cache of a recipe. Stages are asked for in their order.

    Args:
      folder: DIR.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._keys: dict[str, str | NoKey] = {}  # by the folders of earlier stages

    def key(self, config: Mapping[str, Any], workdir: Path) -> dict[str, Any] | None:
        """Returns what the key of a stage is made of; None for a stage without a key.

        Args:
          config: the stage's config, with the folders of earlier stages in it.
        """
        try:
            content = self._content(config, workdir)
        except NoKey as reason:
            self._keys[str(workdir)] = reason
            log.info("%s is not cached: %s", workdir.name, reason)
            return None
        self._keys[str(workdir)] = digest(content)
        return content

    def _content(self, config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
        name = config["stage"]
        if ":" in name:
            raise NoKey(f"the stage {name} is not part of rlhfjax")
        filled = fill_defaults(stages.config_class(name), config)
        return {
            "folder": workdir.name,
            "config": _identified(filled, self._dated_keys()),
            "code": code_digest(*ROOTS, stages.find(name).__name__),
            "versions": versions(),
            "machine": machine(),
        }

    def _dated_keys(self) -> dict[str, str | NoKey]:
        """Returns the keys of earlier stages, with the dates that their templates wrote."""
        keys = dict(self._keys)
        for folder, key in self._keys.items():
            if isinstance(key, NoKey):
                continue
            kept = self._folder / key / STAGE_FOLDER
            if dates := _dates(paths.path(folder)) or _dates(kept):
                keys[folder] = digest({"key": key, workdirs.DATES: dates})
        return keys

    def has(self, content: Mapping[str, Any]) -> bool:
        """Returns whether a finished stage with this key is there, for the date of today."""
        folder = self._folder / digest(content)
        if not (folder / KEY_FILE).exists():
            return False
        return template_date.is_now(_dates(folder / STAGE_FOLDER))

    def restore(self, content: Mapping[str, Any], workdir: Path, last: str) -> bool:
        """Copies a stage's files into its workdir; returns whether the cache had them.

        Args:
          last: the file without which the workdir counts as unfinished.
        """
        if not self.has(content):
            return False
        source = paths.local(self._folder / digest(content) / STAGE_FOLDER)
        with paths.replacing(workdir, last) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return True

    def store(self, content: Mapping[str, Any], workdir: Path) -> None:
        """Copies the files of a finished stage into the cache."""
        folder = self._folder / digest(content)
        with paths.replacing(folder, KEY_FILE) as temporary:
            # A stage that runs alone has the id of its wandb run, which is no other's.
            ignore = shutil.ignore_patterns(*trackers.WANDB_FILES)
            target = temporary / STAGE_FOLDER
            shutil.copytree(paths.local(workdir), target, ignore=ignore)
            text = json_text.encode(content, KEY_FILE, indent=2, sort_keys=True)
            paths.write(temporary / KEY_FILE, text + "\n")

    @contextlib.contextmanager
    def locked(self, content: Mapping[str, Any], name: str) -> Iterator[None]:
        """Waits until no other process of this machine computes the stage with this key."""
        paths.make_folder(self._folder)
        lock = paths.lock_file(self._folder / f"{digest(content)}.lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info(
                    "%s: another run is computing the same stage; waiting for it", name
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _dates(folder: Path) -> dict[str, str]:
    """Returns what the templates of a finished stage wrote of the date."""
    done = workdirs.read_done(folder) or {}
    return done.get(workdirs.DATES, {})


def digest(content: Mapping[str, Any]) -> str:
    """Returns the key: 32 hexadecimal digits."""
    text = json_text.encode(content, "key of a stage", sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ------------------------------------------------------------------ config


def _identified(value: Any, keys: Mapping[str, str | NoKey]) -> Any:
    """Returns a config with keys and contents in the place of files and folders."""
    if isinstance(value, Mapping):
        if value.get("kind") == "rule":
            raise NoKey(
                f"a rule runs code from outside of rlhfjax: {value.get('function')}"
            )
        return {name: _identified(part, keys) for name, part in value.items()}
    if isinstance(value, list):
        return [_identified(part, keys) for part in value]
    return _identified_text(value, keys) if isinstance(value, str) else value


def _identified_text(text: str, keys: Mapping[str, str | NoKey]) -> Any:
    if text.startswith("rule:"):
        raise NoKey(f"a rule runs code from outside of rlhfjax: {text}")
    for folder, key in keys.items():
        if folder in text:
            if isinstance(key, NoKey):
                raise NoKey(f"it reads {folder}, which is not cached")
            name = paths.path(folder).name
            return {"stage": text.replace(folder, f"{name}@{key}")}
    found = _FILES.fullmatch(text)
    scheme, name = found.groups() if found else ("", text)
    if scheme == formats.HF_DATASET:
        raise NoKey(f"what the hub has may change: {text}")
    files = _file_digests(name) if scheme in formats.FORMATS else []
    if scheme in ("jsonl", "text") or files:
        return {"text": text, "files": files}
    if (content := _content_digest(name)) is not None:
        return {"text": text, "content": content}
    if not scheme and formats.by_ending(name) and (files := _file_digests(name)):
        return {"text": text, "files": files}
    return text


def _file_digests(pattern: str) -> list[tuple[str, str]]:
    """Returns the names and digests of the files of a glob, in which {split} may stand."""
    found = paths.glob(pattern) or paths.glob(pattern.replace("{split}", "*"))
    return [(file.name, file_digest(file)) for file in found]


def _content_digest(name: str) -> str | None:
    """Returns the digest of a file or folder; None if there is none of this name."""
    try:
        path = paths.path(name)
        if path.is_file():
            return file_digest(path)
        if not name or not path.is_dir():
            return None
    except (OSError, ValueError):  # no name that a file can have
        return None
    return _folder_digest(path)


def _folder_digest(folder: Path) -> str:
    files = paths.files(folder)
    parts = [f"{file.relative_to(folder)}:{file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    local = paths.local(path)
    status = local.stat()
    return _file_digest(str(local), status.st_size, status.st_mtime_ns)


@functools.cache
def _file_digest(name: str, size: int, changed: int) -> str:
    del size, changed  # a file that has changed is read again
    total = hashlib.sha256()
    with open(name, "rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


# ------------------------------------------------------------------ code, versions, machine


@functools.cache
def code_digest(*modules: str) -> str:
    """Returns the digest of the sources of modules and of all of rlhfjax that they import."""
    parts = []
    for name in sorted(imported(*modules)):
        parts.append(f"{name}:{hashlib.sha256(_source(name)).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def imported(*modules: str) -> set[str]:
    """Returns modules of rlhfjax and all modules of rlhfjax that they import, at any depth."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += _imports(name)
    return found


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Returns the modules of rlhfjax that a module imports, also inside of its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parents = {name.rpartition(".")[0] for name in names}
    return tuple(name for name in names | parents if _is_ours(name))


@functools.cache
def _is_ours(name: str) -> bool:
    if name.partition(".")[0] != "rlhfjax":
        return False
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(name) is not None
    return False


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DataError(f"{module}: its source is not there")
    return paths.path(spec.origin).read_bytes()


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that rlhfjax requires."""
    found = {"python": platform.python_version()}
    names = {"jaxlib"}
    for requirement in importlib.metadata.requires("rlhfjax") or ():
        if not _TOOLS.search(requirement):
            names.add(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    for name in sorted(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Returns what the compiled programs depend on, beside their code."""
    device = jax.devices()[0]
    flags = {k: v for k, v in os.environ.items() if _FLAGS.fullmatch(k)}
    description = {
        "platform": device.platform,
        "kind": device.device_kind,
        "compiler": device.client.platform_version,
        "devices": jax.device_count(),
        "hosts": hosts.count(),
        "flags": flags,
    }
    if device.platform == "cpu":
        features = " ".join(sorted(processor.features()))
        description |= {"cores": processor.cores(), "features": features}
    return description
