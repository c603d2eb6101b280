"""Opens the data that the options of a stage name."""

import dataclasses
import logging
from collections.abc import Iterable

from rlhfjax import paths
from rlhfjax.data.loader import Shards
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source, open_source
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.ranges import Count

log = logging.getLogger("rlhfjax")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A source of rows; see `data.sources.open_source` for the options."""

    spec: str
    """`tfds:NAME[/CONFIG]`, `tfds:FOLDER`, `jsonl:GLOB` or `text:GLOB`."""
    kind: str | None = None
    """Kind of the rows: text, messages, prompt or preferences; None: by the source."""
    split: str = "train"
    """Split of the source: train, validation, test or all."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """The source's column name for each of our column names."""
    data_dir: str | None = None
    """Folder of TFDS datasets; None: the default of TFDS."""
    on_bad_row: str = "error"
    """What a malformed row does: "error" stops, "skip" leaves the row out."""
    min_turns: Count = 0
    """Conversations with fewer turns are left out."""
    documents: str = "file"
    """What a row of a text file is: "file", "paragraph" or "line"."""
    limit: Count = 0
    """Rows that are used, from the first; 0: all."""

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
        return Limited(source, self.limit) if self.limit else source


class Limited:
    """The first `limit` rows of a source."""

    def __init__(self, source: Source, limit: int):
        self.kind = source.kind
        self.skipped = source.skipped
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
        if ":" in name and not paths.remote(name):
            sources.append(open_source(name, kind="preferences", split=split))
        else:
            sources.append(read_preferences(name, split))
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def own_shards(count: int, batch_size: int, layout: Layout) -> Shards:
    """Returns which of `count` streams this host runs: those whose rows are on its devices."""
    return Shards(count, layout.own_parts(batch_size, count))
