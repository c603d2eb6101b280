"""Where a stage's data comes from: the options of its config, and the sources that they name."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, Literal

from rlhfjax import paths
from rlhfjax.data.loader import Shards
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.sources import Concatenated, Source, open_source
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
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k not in ("spec", "limit")
        }
        source = open_source(self.spec, **options)
        if source.skipped:
            log.warning(
                "source %r: %d malformed rows are left out", self.spec, source.skipped
            )
        return Limited(source, self.limit) if self.limit else source


class Limited:
    """The first rows of a source."""

    def __init__(self, source: Source, limit: int):
        self.kind, self.skipped, self._source, self._limit = (
            source.kind,
            source.skipped,
            source,
            limit,
        )

    def __len__(self) -> int:
        return min(self._limit, len(self._source))

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def where(self, index: int) -> str:
        return self._source.where(index)


def open_sources(configs: Iterable[SourceConfig], option: str) -> Source:
    """Returns all of a stage's sources as one.

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
    """Returns the rankings of all folders and `jsonl:` globs as one source.

    Raises:
      ConfigError: none is named.
    """
    if not names:
        raise ConfigError(
            f"{stage}.preferences: at least one folder or jsonl: glob is needed"
        )
    parts = [
        read_preferences(name, split)
        if ":" not in name or paths.remote(name)
        else open_source(name, kind="preferences", split=split)
        for name in names
    ]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def own_shards(count: int, batch_size: int, layout: Layout) -> Shards:
    """Returns those of `count` streams that this host runs: their rows lie on its devices."""
    return Shards(count, layout.own_parts(batch_size, count))
