"""Describes readers."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.fuzz import inputs


class Trial(NamedTuple):
    """A reader that is ready: its folder is written."""

    seeds: list[bytes]  # good inputs, which the reader has to read
    inputs: inputs.Bytes
    call: Callable[[bytes], Any]
    refusable: bool = False  # the seeds may be refused: nothing has their names here


class Reader(NamedTuple):
    """A reader and how it is tried."""

    make: Callable[[Path], Trial]  # prepares an empty folder
    examples: int = 100  # inputs in CI: about half a second
    accepted: tuple[type, ...] = ()  # exceptions that are right beside UserError


Table = dict[str, Reader]
Strategy = Callable[[Sequence[bytes]], inputs.Bytes]


def file_reader(
    table: Table,
    name: str,
    strategy: Strategy,
    prepare: Callable[[Path], tuple[Path, list[bytes], Callable[[], Any]]],
    **options: Any,
) -> None:
    """Adds a reader of one file to a table.

    Args:
      strategy: makes bad contents of good ones.
      prepare: writes what stands beside the file; returns the file, good contents of it, and what
        reads it.
    """

    def make(folder: Path) -> Trial:
        file, seeds, read = prepare(folder)

        def call(content: bytes) -> Any:
            file.write_bytes(content)
            return read()

        return Trial(seeds, strategy(seeds), call)

    table[name] = Reader(make, **options)


def files_reader(
    table: Table,
    name: str,
    prepare: Callable[[Path], tuple[dict[Path, Strategy], Callable[[], Any]]],
    **options: Any,
) -> None:
    """Adds a reader of several files, one of which is bad, to a table.

    The first byte of an input is the number of the file; the rest is its content.

    Args:
      prepare: writes the files; returns how bad contents of each are made, and what reads all.
    """

    def make(folder: Path) -> Trial:
        strategies, read = prepare(folder)
        files = list(strategies)
        good = [file.read_bytes() for file in files]

        def call(content: bytes) -> Any:
            if not content or content[0] >= len(files):
                return None
            file = files[content[0]]
            file.write_bytes(content[1:])
            try:
                return read()
            finally:
                file.write_bytes(good[content[0]])

        made = []
        for i, file in enumerate(files):
            strategy = strategies[file]([good[i]])
            made.append(strategy.map(functools.partial(bytes.__add__, bytes([i]))))
        seeds = [bytes([i]) + content for i, content in enumerate(good)]
        return Trial(seeds, st.one_of(made), call)

    table[name] = Reader(make, **options)


def text_reader(
    table: Table,
    name: str,
    seeds: Sequence[str],
    parts: Sequence[str],
    read: Callable[[str], Any],
    ends: str = "",
    **options: Any,
) -> None:
    """Adds a reader of a text, such as the value of a flag, to a table.

    Args:
      parts: pieces of the language that the text is in.
      ends: a pattern of where such a piece ends.
    """

    def make(folder: Path) -> Trial:
        return Trial(
            seeds=[seed.encode() for seed in seeds],
            inputs=inputs.text_bytes(seeds, parts, ends),
            call=lambda content: read(content.decode("utf-8", "surrogateescape")),
            refusable=True,
        )

    table[name] = Reader(make, **options)


def dumped(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def lines(*rows: Any) -> bytes:
    return b"".join(line + b"\n" for line in dumped(*rows))
