"""Sources of rows: TFDS datasets, JSON lines and text files, all with random access.

    open_source("tfds:chitchat", split="validation", min_turns=6)
    open_source("tfds:lm1b", kind="text")
    open_source("jsonl:chats/{split}/*.jsonl", kind="messages", columns={"messages": "dialogue"})
    open_source("text:books/*.txt", documents="paragraph")

All rows are read when a source is opened, so that a malformed one stops a run before it trains.
"""

import itertools
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rlhfjax.data import corpora, files, tfds_records
from rlhfjax.data.rows import (
    BadRow,
    Row,
    normalize,
    required_columns,
    split_key,
    validate_kind,
)
from rlhfjax.errors import ConfigError, DataError

SCHEMES = ("tfds", "jsonl", "text")


def is_spec(name: str) -> bool:
    """Returns whether a name is that of a source; a folder's name may have a colon, too."""
    return name.startswith(tuple(f"{scheme}:" for scheme in SCHEMES))


@runtime_checkable
class Source(Protocol):
    """Rows of one kind by index."""

    kind: str
    skipped: int  # malformed rows that were left out

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def locate(self, index: int) -> str:
        """Returns where a row stands, for errors."""
        ...


def open_source(
    spec: str,
    *,
    kind: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    data_dir: str | os.PathLike | None = None,
    on_bad_row: str = "error",
    min_turns: int = 0,
    documents: str = "file",
    validate: bool = True,
) -> Source:
    """Opens `tfds:NAME[/CONFIG]`, `tfds:FOLDER`, `jsonl:GLOB` or `text:GLOB`.

    Files in a bucket are downloaded.

    Args:
      kind: text, messages, prompt or preferences. By default that of our own corpus, else text.
      split: train, validation or test; for TFDS also an expression. `{split}` in a glob is replaced
        by it. Without that, rows of files are split 90/5/5 by a stable hash, and "all" takes every
        row. A text is hashed whole. Other rows are hashed by their first user turn, so that equal
        prompts are in one split, and conversations that begin alike too.
      columns: our column names to the source's. Columns beyond the kind's own are passed through.
      data_dir: where TFDS keeps its datasets; by default TFDS's own folder.
      on_bad_row: "error" stops at the first malformed row, "skip" counts it in `skipped`.
      min_turns: conversations with fewer turns are left out, and not counted as malformed.
      documents: what one row of a text file is: "file", "paragraph" (separated by empty lines) or
        "line".
      validate: False validates a row only when it is read, for sets too large to read twice; only
        with on_bad_row="error".

    Raises:
      ConfigError: the spec or an argument is invalid.
      DataError: nothing is found, or a row is malformed: `file:line: why`.
    """
    scheme, _, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if scheme not in SCHEMES or not rest:
        raise ConfigError(
            f"source {spec!r}: expected tfds:NAME[/CONFIG], jsonl:GLOB or text:GLOB"
        )
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(
            f"source {spec!r}: on_bad_row must be 'error' or 'skip', got {on_bad_row!r}"
        )
    if not validate and (on_bad_row == "skip" or min_turns):
        raise ConfigError(
            f"source {spec!r}: on_bad_row='skip' and min_turns need validate=True"
        )
    columns = dict(columns or {})
    default = corpora.DEFAULT_KIND.get(rest) if scheme == "tfds" else None
    kind = kind or default or "text"
    validate_kind(kind, columns)

    def key(record: Mapping[str, Any]) -> str:
        return split_key(kind, normalize(kind, record, columns))

    if scheme == "tfds":
        needed = required_columns(kind, columns)
        records: files.Records = tfds_records.open_records(
            spec, rest, split, data_dir, needed
        )
    elif scheme == "jsonl":
        records = files.JsonLines(spec, rest, split, key)
    else:
        records = files.TextFiles(spec, rest, split, key, documents)
    source = CheckedSource(records, kind, columns)
    if validate:
        source.validate(
            skip=on_bad_row == "skip",
            keep=lambda row: len(row.get("messages", ())) >= min_turns,
        )
    if not len(source):
        raise DataError(
            f"source {spec!r}, split {split!r}: no rows are left of {len(records)}{records.hint}"
        )
    return source


class CheckedSource:
    """Raw records as validated rows of one kind."""

    def __init__(self, records: files.Records, kind: str, columns: Mapping[str, str]):
        self.kind = kind
        self.skipped = 0
        self.on_bad_row = "error"
        self._records = records
        self._columns = columns
        self._indices: Sequence[int] = range(len(records))

    def validate(self, *, skip: bool, keep: Callable[[Row], bool]) -> None:
        """Reads every row once, and keeps those for which `keep` is true.

        Args:
          skip: leave out malformed rows instead of raising DataError.
        """
        self.on_bad_row = "skip" if skip else "error"
        indices = array("q")
        for i in range(len(self)):
            try:
                if keep(self._row(i)):
                    indices.append(self._indices[i])
            except BadRow as reason:
                if not skip:
                    raise DataError(f"{self.locate(i)}: {reason}") from reason
                self.skipped += 1
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        try:
            return self._row(index)
        except BadRow as reason:
            raise DataError(f"{self.locate(index)}: {reason}") from reason

    def locate(self, index: int) -> str:
        return self._records.locate(self._indices[index])

    def _row(self, index: int) -> Row:
        record = self._records[self._indices[index]]
        return normalize(self.kind, record, self._columns)


class Rows:
    """Rows in memory as a source, for tests and for what a stage has just made."""

    skipped = 0

    def __init__(self, rows: Sequence[Row], kind: str):
        validate_kind(kind, {})
        self.kind = kind
        self._rows: list[Row] = []
        for i, row in enumerate(rows):
            try:
                self._rows.append(normalize(kind, row, {}))
            except BadRow as reason:
                raise DataError(f"{self.locate(i)}: {reason}") from reason

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def locate(self, index: int) -> str:
        return f"row {index}"


class Concatenated:
    """Several sources one after the other. Their kinds may differ, if the reader allows it."""

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise ConfigError("source: nothing to concatenate")
        self.sources = list(sources)
        kinds = {source.kind for source in sources}
        self.kind = kinds.pop() if len(kinds) == 1 else "mixed"
        self.skipped = sum(source.skipped for source in sources)
        self._ends = list(itertools.accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        source, local = self.find(index)
        return source[local]

    def locate(self, index: int) -> str:
        source, local = self.find(index)
        return source.locate(local)

    def find(self, index: int) -> tuple[Source, int]:
        """Returns the source of a row, and the row's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        source = self.sources[part]
        return source, index - self._ends[part] + len(source)


def texts(*sources: Source) -> Iterator[str]:
    """Yields all texts of some sources, message by message, to train a tokenizer on."""
    for source in sources:
        for i in range(len(source)):
            row = source[i]
            if "text" in row:
                yield row["text"]
                continue
            if "messages" in row:
                yield from (message["content"] for message in row["messages"])
            elif row["prompt"]:
                yield row["prompt"]
            yield from filter(None, row.get("completions", ()))
