"""Sources of rows: datasets and files of several formats (see `formats`), with random access.

    open_source("tfds:chitchat", split="validation", min_turns=6)
    open_source("tfds:lm1b", kind="text")
    open_source("jsonl:chats/{split}/*.jsonl", kind="messages", columns={"messages": "dialogue"})
    open_source("text:books/*.txt", documents="paragraph")
    open_source("pairs.parquet", kind="preferences", columns={"chosen": "good", "rejected": "bad"})

All rows are read when a source is opened, so that a malformed one stops a run before it trains. Of
large files, and of those without random access, what was found is kept: see `indexed`.
"""

import contextlib
import itertools
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlhfjax.data import files, formats, indexed, kept, verdicts
from rlhfjax.data.forms import Reader
from rlhfjax.data.rows import BadRow, Row, normalize, split_key, validate_kind
from rlhfjax.errors import ConfigError, DataError

_ROWS_FOR_FORM = 100  # first rows, one of which has to show the form


@runtime_checkable
class Source(Protocol):
    """Rows of one kind by index."""

    skipped: int  # malformed rows that were left out

    @property
    def kind(self) -> str: ...

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
    format: str | None = None,
    data_dir: str | os.PathLike | None = None,
    on_bad_row: str = "error",
    min_turns: int = 0,
    documents: str = "file",
    validate: bool = True,
    form: str | None = None,
) -> "CheckedSource":
    """Opens a dataset or files: `tfds:NAME[/CONFIG]`, `jsonl:GLOB`, … (`formats.SPECS`).

    Files in a bucket are downloaded. Compressed files, and formats without random access, are
    converted once, see `indexed`.

    Args:
      kind: one of `rows.COLUMNS`. By default that of our own corpus, else text where there is such
        a column, else that of the form.
      split: train, validation or test; for TFDS also an expression; of a DatasetDict and of
        hf-dataset: any of its own. `{split}` in a glob is replaced by it. Without that, rows of
        files are split 90/5/5 by a stable hash, and "all" takes every row. A text is hashed whole.
        Other rows are hashed by their first user turn, so that equal prompts are in one split, and
        conversations that begin alike too.
      columns: our column names to the source's. Columns beyond the kind's own are passed through.
      format: one of `formats.FORMATS`, for a spec without a scheme; None: by the file's name.
      data_dir: where TFDS keeps its datasets, by default TFDS's own folder; where indexes of files
        are kept, by default `kept.cache_folder()`.
      on_bad_row: "error" stops at the first malformed row, "skip" counts it in `skipped`.
      min_turns: conversations with fewer turns are left out, and not counted as malformed.
      documents: what one row of a text file is: "file", "paragraph" (separated by empty lines) or
        "line".
      validate: False validates a row only when it is read, for sets too large to read twice; only
        with on_bad_row="error".
      form: one of `forms.FORMS`; None: recognized by the columns.

    Raises:
      ConfigError: the spec or an argument is invalid, or the columns are those of several forms.
      DataError: nothing is found, or a row is malformed: `file:line: why`.
    """
    named = formats.parse(spec, format)
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(
            f"source {spec!r}: on_bad_row must be 'error' or 'skip', got {on_bad_row!r}"
        )
    if not validate and (on_bad_row == "skip" or min_turns):
        raise ConfigError(
            f"source {spec!r}: on_bad_row='skip' and min_turns need validate=True"
        )
    columns = dict(columns or {})
    is_tfds = named.scheme == formats.TFDS
    default = None
    if is_tfds:
        # TFDS takes a second to import.
        from rlhfjax.data import corpora, tfds_records

        default = corpora.DEFAULT_KIND.get(named.rest)
    read = Reader(
        kind or default,
        columns,
        form,
        context=f"source {spec!r}",
        has_only_text=named.scheme in formats.OF_TEXTS,
    )

    def key(record: Mapping[str, Any]) -> str:
        row = read(record)
        return split_key(read.kind, row)

    records: files.Records
    if is_tfds:
        records = tfds_records.open_records(
            spec, named.rest, split, data_dir, read.recognize
        )
    else:
        chosen = formats.choose(spec, named, split, documents)
        records = _open_files(chosen, key, data_dir)
    source = CheckedSource(records, read)
    source.recognize()
    if isinstance(records, kept.Kept):
        settings = {
            "kind": read.kind,
            "form": read.form,
            "columns": columns,
            "min_turns": min_turns,
        }
        source.select(settings, skip=on_bad_row == "skip", validate=validate)
    elif validate:
        source.validate(
            skip=on_bad_row == "skip",
            keep=lambda row: len(row.get("messages", ())) >= min_turns,
        )
    if not len(source):
        raise DataError(
            f"source {spec!r}, split {split!r}: no rows are left of {source.found}{records.hint}"
        )
    return source


def _open_files(
    chosen: formats.Chosen, key: files.Key, data_dir: str | os.PathLike | None
) -> files.Records:
    if not indexed.needs_index(chosen.files, chosen.reader):
        return files.Files(chosen.files, chosen.reader, chosen.split, key)
    return indexed.open_indexed(
        chosen.files, chosen.reader, chosen.options, chosen.split, data_dir
    )


class CheckedSource:
    """Raw records as validated rows of one kind."""

    def __init__(self, records: files.Records, read: Reader):
        self.kind = read.kind
        self.skipped = 0
        self.found = len(records)  # rows of the split, also those that are left out
        self.merged = 0
        self.on_bad_row = "error"
        self._records = records
        self._read = read
        self._indices: Sequence[int] | np.ndarray = range(len(records))
        self._settings: list[Any] = []  # what decides which rows these are

    @property
    def form(self) -> str | None:
        """Name of the rows' form, see `forms.FORMS`; None as long as no row has one."""
        return self._read.form

    def validate(self, *, skip: bool, keep: Callable[[Row], bool]) -> None:
        """Reads every row once, and keeps those for which `keep` is true.

        Args:
          skip: leave out malformed rows instead of raising DataError.
        """
        self.on_bad_row = "skip" if skip else "error"
        indices = array("q")
        for i in range(len(self)):
            try:
                row = self._row(i)
                if keep(row):
                    indices.append(self._indices[i])
                    self.merged += merged_turns(row.get("messages"))
            except BadRow as reason:
                if not skip:
                    raise DataError(f"{self.locate(i)}: {reason}") from reason
                self.skipped += 1
        self._indices = indices
        self.kind = self._read.kind

    def select(self, settings: dict[str, Any], *, skip: bool, validate: bool) -> None:
        """Keeps the rows of the records' split, without the malformed and the short ones.

        What every row is, is found out once and kept beside the records.

        Args:
          settings: with the records, all that decides it.
          skip: leave out malformed rows instead of raising DataError.
          validate: False keeps all rows of the split.
        """
        records = self._records
        assert isinstance(records, kept.Kept)
        self.on_bad_row = "skip" if skip else "error"
        self._settings = [settings, records.split, skip, validate]
        if records.split is None and not validate:
            return
        found = verdicts.of_rows(records, settings, self._read)
        chosen = verdicts.in_split(found, records.split)
        self.found = int(np.count_nonzero(chosen))
        if validate:
            bad = chosen & verdicts.is_bad(found)
            if bad.any() and not skip:
                self._indices = np.flatnonzero(bad)
                self[0]  # raises
            self.skipped = int(np.count_nonzero(bad))
            chosen &= ~bad & ~verdicts.is_short(found)
        if not chosen.all():
            self._indices = np.flatnonzero(chosen).astype(np.uint32)
        if validate and settings["kind"] != "text":
            merged = verdicts.per_row(self, "merged", np.int32, _merged_in_row)
            self.merged = int(merged.sum())

    def of_chosen(
        self, indices: np.ndarray, name: str, dtype: Any, measure: verdicts.Measure
    ) -> np.ndarray:
        """Returns what `verdicts.of_chosen` does; kept beside an index of the records."""
        records = self._records
        if not isinstance(records, kept.Kept):
            return verdicts.computed(self, indices, dtype, measure)
        settings = [*self._settings, name, verdicts.digest(indices)]

        def measure_at(k: int) -> int:
            return measure(k, self[int(indices[k])])

        return records.remembered(settings, len(indices), dtype, measure_at)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        try:
            return self._row(index)
        except BadRow as reason:
            raise DataError(f"{self.locate(index)}: {reason}") from reason

    def columns(self) -> list[str]:
        """Returns the names of the columns of the first raw row that can be read."""
        for index in range(len(self)):
            with contextlib.suppress(BadRow):
                return list(map(str, self._records[self._indices[index]]))
        return []

    def recognize(self) -> None:
        """Reads rows in their order until one decides about the form, and so about the kind."""
        for index in range(min(len(self), _ROWS_FOR_FORM)):
            if self.form is not None:
                break
            with contextlib.suppress(BadRow):
                self._row(index)
        self.kind = self._read.kind

    def locate(self, index: int) -> str:
        return self._records.locate(int(self._indices[index]))

    def _row(self, index: int) -> Row:
        return self._read(self._records[int(self._indices[index])])


def _merged_in_row(row: Row) -> int:
    return merged_turns(row.get("messages"))


def merged_turns(source: Any) -> int:
    """Returns how many messages were joined to the one before them, which had the same role.

    Args:
      source: a source, or the messages of a row; others have no count.
    """
    return getattr(source, "merged", 0)


class Rows:
    """Rows in memory as a source, for tests and for what a stage has just made."""

    skipped = 0

    def __init__(self, rows: Sequence[Row], kind: str):
        validate_kind(kind, {})
        self.kind = kind
        self.merged = 0
        self._rows: list[Row] = []
        for i, row in enumerate(rows):
            try:
                self._rows.append(normalize(kind, row, {}))
            except BadRow as reason:
                raise DataError(f"{self.locate(i)}: {reason}") from reason
            self.merged += merged_turns(self._rows[-1].get("messages"))

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
        self.merged = sum(map(merged_turns, sources))
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
                contents = (message["content"] for message in row["messages"])
                yield from filter(None, contents)
            elif row["prompt"]:
                yield row["prompt"]
            yield from filter(None, row.get("completions", ()))
            yield from row.get("steps", ())
            if row.get("response"):
                yield row["response"]
