"""Sources of rows: TFDS datasets, JSON lines and text files behind one random-access face.

    open_source("tfds:chitchat", split="validation", min_turns=6)
    open_source("tfds:lm1b", kind="text")
    open_source("jsonl:chats/{split}/*.jsonl", kind="messages", columns={"messages": "dialogue"})
    open_source("text:books/*.txt", documents="paragraph")

All rows are looked at when a source is opened, so that a malformed one stops a run before it trains.
"""

import functools
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tensorflow_datasets as tfds

from rlhfjax import paths
from rlhfjax.data import corpora, files
from rlhfjax.data.rows import (
    BadRow,
    Row,
    check_kind,
    normalize,
    required_columns,
    split_key,
)
from rlhfjax.errors import ConfigError, DataError


@runtime_checkable
class Source(Protocol):
    """Rows of one kind by index. `where(i)` names a row for people; `skipped` counts malformed rows left out."""

    kind: str
    skipped: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def where(self, index: int) -> str: ...


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
    """Opens `tfds:NAME[/CONFIG]`, `tfds:FOLDER`, `jsonl:GLOB` or `text:GLOB`; what is in a bucket is downloaded.

    Args:
      kind: text, messages, prompt or preferences; text where neither the caller nor our own corpus says otherwise.
      split: train, validation or test (a TFDS expression too). `{split}` in a glob is replaced by
        it; without that, rows are split 90/5/5 by a stable hash, and `split="all"` takes every row.
        A text is hashed whole. Other rows are hashed by their first user turn, so that a prompt is
        in one split alone, and so are conversations that begin alike.
      columns: our column names to the source's; names beyond the kind's own are passed through.
      data_dir: where TFDS keeps its datasets, its own default if None.
      on_bad_row: "error" stops at the first malformed row, "skip" leaves it out and counts it in `skipped`.
      min_turns: conversations with fewer turns are left out (not counted as malformed).
      documents: what one row of a text file is: "file", "paragraph" (parted by empty lines) or "line".
      validate: False checks a row only when it is read, for sets too large to look through; errors only.

    Raises:
      ConfigError: the spec or an argument makes no sense.
      DataError: nothing is found, or a row is malformed: `file:line: why`.
    """
    scheme, _, rest = spec.partition(":")
    if scheme not in ("tfds", "jsonl", "text") or not rest:
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
    kind = kind or (
        corpora.DEFAULT_KIND.get(rest, "text") if scheme == "tfds" else "text"
    )
    check_kind(kind, columns)
    key = lambda record: split_key(kind, normalize(kind, record, columns))  # noqa: E731
    if scheme == "tfds":
        records: files.Records = _open_tfds(
            spec, rest, split, data_dir, required_columns(kind, columns)
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
    """Raw records seen as rows of one kind."""

    def __init__(self, records: files.Records, kind: str, columns: Mapping[str, str]):
        self.kind, self.skipped = kind, 0
        self._records, self._columns = records, columns
        self._indices: Sequence[int] = range(len(records))

    def validate(self, *, skip: bool, keep: Callable[[Row], bool]) -> None:
        """Reads every row once; keeps the good ones that `keep` wants."""
        indices = array("q")
        for index in self._indices:
            try:
                if keep(self._row(index)):
                    indices.append(index)
            except BadRow as reason:
                if not skip:
                    raise DataError(
                        f"{self._records.where(index)}: {reason}"
                    ) from reason
                self.skipped += 1
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        try:
            return self._row(self._indices[index])
        except BadRow as reason:
            raise DataError(f"{self.where(index)}: {reason}") from reason

    def where(self, index: int) -> str:
        return self._records.where(self._indices[index])

    def _row(self, index: int) -> Row:
        return normalize(self.kind, self._records[index], self._columns)


class Rows:
    """Rows that are already in memory, as a source: for tests and for what a stage has just made."""

    skipped = 0

    def __init__(self, rows: Sequence[Row], kind: str):
        check_kind(kind, {})
        self.kind, self._rows = kind, []
        for i, row in enumerate(rows):
            try:
                self._rows.append(normalize(kind, row, {}))
            except BadRow as reason:
                raise DataError(f"row {i}: {reason}") from reason

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"row {index}"


class Concatenated:
    """Several sources one after the other; kinds may differ where the reader of the rows allows it."""

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise ConfigError("source: nothing to concatenate")
        self.sources = list(sources)
        kinds = {source.kind for source in sources}
        self.kind = kinds.pop() if len(kinds) == 1 else "mixed"
        self.skipped = sum(source.skipped for source in sources)
        self._ends = [
            sum(len(s) for s in self.sources[: i + 1]) for i in range(len(self.sources))
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        source, local = self._find(index)
        return source[local]

    def where(self, index: int) -> str:
        source, local = self._find(index)
        return source.where(local)

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.sources[part], index - (self._ends[part] - len(self.sources[part]))


def texts(*sources: Source) -> Iterator[str]:
    """All text of some sources, message by message: what a tokenizer is trained on."""
    for source in sources:
        for i in range(len(source)):
            row = source[i]
            if "text" in row:
                yield row["text"]
            else:
                yield from (message["content"] for message in row.get("messages", ()))
                prompt = () if "messages" in row else (row["prompt"],)
                yield from (
                    text for text in (*prompt, *row.get("completions", ())) if text
                )


class _TfdsRecords:
    hint = ""

    def __init__(self, name: str, data: Sequence[Mapping[str, Any]]):
        self._name, self._data = name, data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._data[index]

    def where(self, index: int) -> str:
        return f"{self._name} record {index}"


def _open_tfds(
    spec: str, name: str, split: str, data_dir: Any, needed: Sequence[str]
) -> _TfdsRecords:
    builder = _tfds_builder(spec, name, data_dir)
    missing = [column for column in needed if column not in builder.info.features]
    if missing:
        found = ", ".join(builder.info.features)
        raise DataError(
            f"source {spec!r}: no column {missing[0]!r}, found {found}; map it with columns="
        )
    try:
        data = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise DataError(
            f"source {spec!r}: {builder.data_dir} is not in array_record format; remove it"
        ) from error
    except (ValueError, KeyError) as error:
        raise DataError(
            f"source {spec!r}: no split {split!r}, found {', '.join(builder.info.splits)}"
        ) from error
    return _TfdsRecords(f"tfds:{builder.name}[{split}]", data)


def _tfds_builder(spec: str, name: str, data_dir: Any) -> tfds.core.DatasetBuilder:
    if (paths.path(name) / corpora.INFO).is_file():
        return tfds.builder_from_directory(paths.local(paths.path(name)))
    data_dir = paths.path(data_dir or tfds.core.constants.DATA_DIR)
    make = corpora.BUILDERS.get(name) or functools.partial(tfds.builder, name)
    try:
        builder = make(data_dir=os.fspath(corpora.writable(data_dir)))
    except (tfds.core.DatasetNotFoundError, ImportError) as error:
        names = ", ".join(corpora.BUILDERS)
        raise DataError(
            f"source {spec!r}: no such TFDS dataset or folder (our own: {names})"
        ) from error
    return corpora.prepare_for(data_dir, builder)
