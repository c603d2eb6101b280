"""Opens the data that the options of a stage name."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Literal

from rlhfjax.data.loader import Shards
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source, is_spec, open_source
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.ranges import Count

log = logging.getLogger("rlhfjax")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from; see `data.sources.open_source`."""

    spec: str
    """tfds:NAME[/CONFIG], tfds:FOLDER, jsonl:GLOB or text:GLOB."""
    kind: Literal["text", "messages", "prompt", "preferences"] | None = None
    """Kind of the rows; None: the dataset's own, else text."""
    split: str = "train"
    """train, validation or test; replaces {split} in a glob; "all" takes every row of files."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """The source's column names by ours."""
    data_dir: str | None = None
    """Folder of TFDS datasets; None: TFDS's default."""
    on_bad_row: Literal["error", "skip"] = "error"
    """At a malformed row: error ends the run, skip leaves the row out and counts it."""
    min_turns: Count = 0
    """Conversations with fewer turns are left out."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one row of a text file is."""
    limit: Count = 0
    """Number of rows, the first ones; 0: all."""

    def open(self) -> Source:
        options = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        del options["limit"]
        source = open_source(**options)
        if source.skipped:
            log.warning(
                "source %r: %d malformed rows are left out", self.spec, source.skipped
            )
        source = Limited(source, self.limit) if self.limit else source
        log.info("data: %s, %s: %s rows", self.spec, self.split, f"{len(source):,}")
        return source


class Limited:
    """The first `limit` rows of a source."""

    def __init__(self, source: Source, limit: int):
        self.kind = source.kind
        self.skipped = source.skipped
        self.on_bad_row = getattr(source, "on_bad_row", "error")
        self._source = source
        self._limit = limit

    def __len__(self) -> int:
        return min(self._limit, len(self._source))

    def __getitem__(self, index: int) -> Row:
        return self._source[index]

    def locate(self, index: int) -> str:
        return self._source.locate(index)


def open_sources(configs: Iterable[SourceConfig], option: str) -> Source:
    """Returns the sources of a stage, concatenated.

    Args:
      option: name of the option, for the error message.
    Raises:
      ConfigError: there are none.
    """
    sources = [config.open() for config in configs]
    if not sources:
        raise ConfigError(f"{option}: at least one source is needed")
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def open_preferences(
    names: tuple[str, ...], split: str, stage: str = "reward"
) -> Source:
    """Returns the rankings of folders and `jsonl:` globs, concatenated.

    Raises:
      ConfigError: none is named.
    """
    if not names:
        raise ConfigError(
            f"{stage}.preferences: at least one folder or jsonl: glob is needed"
        )
    sources = []
    for name in names:
        if is_spec(name):
            sources.append(open_source(name, kind="preferences", split=split))
        else:
            sources.append(read_preferences(name, split))
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def own_shards(count: int, batch_size: int, layout: Layout) -> Shards:
    """Returns which of `count` streams this host runs: those whose rows are on its devices."""
    return Shards(count, layout.own_parts(batch_size, count))
