"""Opens the data that the options of a stage name."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from rlhfjax.data import verdicts
from rlhfjax.data.dataset_folders import is_dataset
from rlhfjax.data.formats import FormatName, is_spec
from rlhfjax.data.loader import Shards
from rlhfjax.data.mixture import combined, validate_weights
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source, merged_turns, open_source
from rlhfjax.data.unpaired import AsPreferences
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.ranges import Count, Positive

log = logging.getLogger("rlhfjax")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from; see `data.sources.open_source`."""

    spec: str
    """tfds:NAME[/CONFIG], hf-dataset:NAME, FORMAT:GLOB, or files whose names say their format."""
    kind: (
        Literal["text", "messages", "prompt", "preferences", "unpaired", "steps"] | None
    ) = None
    """Kind of the rows; None: the dataset's own, else that of the form."""
    split: str = "train"
    """train, validation or test; replaces {split} in a glob; "all" takes every row of files. In
    `preferences` of stages that train, "train,test" also names the held-out rows (validation)."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """The source's column names by ours."""
    format: FormatName | None = None
    """Format of the files of a spec without a scheme; None: by their names."""
    data_dir: str | None = None
    """Folder of TFDS datasets, or of the indexes of files; None: the default of either."""
    on_bad_row: Literal["error", "skip"] = "error"
    """At a malformed row: error ends the run, skip leaves the row out and counts it."""
    min_turns: Count = 0
    """Conversations with fewer turns are left out."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one row of a text file is."""
    limit: Count = 0
    """Number of rows, the first ones; 0: all."""
    form: str | None = None
    """Form of the rows, such as alpaca or pair; None: recognized by the columns."""
    weight: Positive | None = None
    """Share of the rows that training draws, relative to the weights of the option's other sources;
    None for all of them: every row once per epoch. Only training data is mixed."""

    def open(self) -> Source:
        """Returns the rows, and logs how many there are."""
        source = self.read()
        log.info("data: %s, %s: %s rows", self.spec, self.split, f"{len(source):,}")
        return source

    def read(self) -> Source:
        options = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        del options["limit"], options["weight"]
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
        self.merged = merged_turns(source)
        self.on_bad_row = getattr(source, "on_bad_row", "error")
        self._source = source
        self._limit = limit

    def __len__(self) -> int:
        return min(self._limit, len(self._source))

    def __getitem__(self, index: int) -> Row:
        return self._source[index]

    def locate(self, index: int) -> str:
        return self._source.locate(index)

    def of_chosen(
        self, indices: np.ndarray, name: str, dtype: Any, measure: verdicts.Measure
    ) -> np.ndarray:
        """Returns what `verdicts.of_chosen` does."""
        return verdicts.of_chosen(self._source, indices, name, dtype, measure)


def open_sources(configs: Iterable[SourceConfig], option: str) -> Source:
    """Returns the sources of an option, concatenated.

    Args:
      option: name of the option, for the error message.
    Raises:
      ConfigError: there are none, or one has a weight.
    """
    configs = list(configs)
    for i, config in enumerate(configs):
        validate_without_weight(config, f"{option}[{i}]")
    return open_mixture(configs, option)


def open_mixture(configs: Iterable[SourceConfig], option: str) -> Source:
    """Returns the sources of an option, mixed by their weights, or concatenated if none has one.

    Raises:
      ConfigError: there are none, or some have a weight and others none.
    """
    configs = list(configs)
    if not configs:
        raise ConfigError(f"{option}: at least one source is needed")
    validate_sources(configs, option)
    weights = [config.weight for config in configs]
    return combined([config.open() for config in configs], weights, option)


def validate_sources(configs: Iterable[SourceConfig], option: str) -> None:
    """Raises ConfigError if some sources of an option have a weight, and others none."""
    validate_weights([config.weight for config in configs], option)


def validate_without_weight(config: SourceConfig, option: str) -> None:
    """Raises ConfigError if a source that is not mixed with others has a weight."""
    if config.weight is not None:
        raise ConfigError(
            f"{option}.weight={config.weight}: only training data is mixed by weight;"
            " expected None"
        )


Preferences = tuple[SourceConfig | str, ...]
"""Rankings: folders that `collect` wrote, specs of sources, or sources with their options."""


def open_preferences(
    entries: Preferences,
    split: str,
    stage: str = "reward",
    kinds: tuple[str, ...] = ("preferences",),
) -> Source:
    """Returns the rankings of folders and sources, concatenated.

    Args:
      split: train, or the one of held-out rows, validation; see `SourceConfig.split`.
      kinds: kinds of rows that the stage takes. Rows of kind `unpaired` become preferences with one
        completion each (`unpaired.AsPreferences`).

    Raises:
      ConfigError: none is named, or one is of another kind.
    """
    if not entries:
        raise ConfigError(
            f"{stage}.preferences: at least one folder or jsonl: glob is needed"
        )
    sources = [_open_rankings(entry, split, stage, kinds) for entry in entries]
    weights = [None if isinstance(entry, str) else entry.weight for entry in entries]
    return combined(sources, weights, f"{stage}.preferences")


def _open_rankings(
    entry: SourceConfig | str, split: str, stage: str, kinds: tuple[str, ...]
) -> Source:
    if isinstance(entry, str):
        if is_spec(entry):
            return open_source(entry, kind="preferences", split=split)
        return read_preferences(entry, split)
    kind = entry.kind or "preferences"
    if kind not in kinds:
        raise ConfigError(
            f"{stage}.preferences: kind={kind!r} of {entry.spec}: expected"
            f" {' or '.join(kinds)}"
        )
    spec = f"tfds:{entry.spec}" if is_dataset(entry.spec) else entry.spec
    split = split_of_preferences(entry, split)
    source = dataclasses.replace(entry, spec=spec, kind=kind, split=split).open()
    return AsPreferences(source) if kind == "unpaired" else source


def split_of_preferences(entry: SourceConfig, split: str) -> str:
    """Returns the name that an entry has for a split of a stage: `train,test` has two."""
    train, _, held_out = entry.split.partition(",")
    names = {"train": train, "validation": held_out or "validation"}
    return names.get(split, split)


def own_shards(count: int, batch_size: int, layout: Layout) -> Shards:
    """Returns which of `count` streams this host runs: those whose rows are on its devices."""
    return Shards(count, layout.own_parts(batch_size, count))
