"""Iterators over batches, whose position can be saved and restored exactly."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from typing_extensions import TypedDict

from rlhfjax import hosts, json_text
from rlhfjax.data.batches import concatenate, stack
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.types import PyTree


@dataclass(frozen=True)
class Counts:
    """What was changed or left out of the rows of a stream when its sources were opened."""

    skipped: int = 0
    """Malformed rows that were left out."""
    merged: int = 0
    """Messages that were joined to the one before them, which had the same role."""


class Batches(Iterator[PyTree]):
    """Stacks the rows of a grain dataset to batches.

    Args:
      rows: the rows, each a batch without its first axis.
      filler: takes a row and returns one that fills the last batch and does not count.
      size: rows per batch.
      identity: settings that a saved position has to agree with.
      counts: what was left out of the rows.
    """

    def __init__(
        self,
        rows: grain.IterDataset,
        filler: Callable[[PyTree], PyTree],
        *,
        size: int,
        identity: Mapping[str, Any],
        counts: Counts = Counts(),
    ):
        self.skipped, self.merged = counts.skipped, counts.merged
        self._rows = rows
        self._filler = filler
        self._size = size
        self._identity = identity
        self._iterator = iter(rows)

    def __next__(self) -> PyTree:
        rows = []
        for row in self._iterator:
            rows.append(row)
            if len(rows) == self._size:
                break
        if not rows:
            raise StopIteration
        rows += [self._filler(rows[0])] * (self._size - len(rows))
        return stack(rows)

    def restart(self) -> "Batches":
        """Goes back to the first batch, and returns the iterator itself."""
        self._iterator = iter(self._rows)
        return self

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON values."""
        return _as_json({"loader": self._identity, "rows": self._iterator.get_state()})

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
          CheckpointError: the position was saved with other data or settings.
        """
        _validate_identity(state, self._identity)
        self._iterator = iter(self._rows)
        self._iterator.set_state(_as_tuples(state["rows"]))


class Joined(Iterator[PyTree]):
    """Makes a batch of the next batch of every stream.

    Args:
      make: takes a batch of every stream and returns a batch.
      streams: the streams by their names in a saved position. The position of a single stream is
        saved without its name.
    """

    def __init__(self, make: Callable[..., PyTree], streams: Mapping[Any, Any]):
        self.skipped = sum(getattr(each, "skipped", 0) for each in streams.values())
        self.merged = sum(getattr(each, "merged", 0) for each in streams.values())
        self._make = make
        self._streams = streams

    def __next__(self) -> PyTree:
        return self._make(*[next(stream) for stream in self._streams.values()])

    def restart(self) -> "Joined":
        """Goes back to the first batch, and returns the iterator itself."""
        for stream in self._streams.values():
            stream.restart()
        return self

    def get_state(self) -> Any:
        """Returns the positions of all streams as JSON values."""
        states = {name: stream.get_state() for name, stream in self._streams.items()}
        return states if len(states) > 1 else next(iter(states.values()))

    def set_state(self, state: Any) -> None:
        """Goes to saved positions; raises as `Batches.set_state` does."""
        for name, stream in self._streams.items():
            stream.set_state(state[name] if len(self._streams) > 1 else state)


class ShardedBatches(Joined):
    """Concatenates the rows of several streams to batches.

    The rows of streams that other processes run are zeros here; `mesh.Layout.put` does not read
    them.

    Args:
      streams: the streams that this process runs, by their number.
      count: number of all streams.
      identity: settings that a saved position has to agree with.
    """

    def __init__(
        self, streams: Mapping[int, Batches], count: int, identity: Mapping[str, Any]
    ):
        if not streams:
            raise ConfigError("loader: a process has to run at least one stream")
        super().__init__(self._concatenate, streams)
        first = next(iter(streams.values()))
        self.skipped, self.merged = first.skipped, first.merged  # of all streams
        self._count = count
        self._identity = identity

    def _concatenate(self, *parts: PyTree) -> PyTree:
        zeros = jax.tree.map(np.zeros_like, parts[0])
        by_stream = dict(zip(self._streams, parts, strict=True))
        return concatenate([by_stream.get(j, zeros) for j in range(self._count)])

    def get_state(self) -> dict[str, Any]:
        """Returns the positions of all streams, also of those that other processes run.

        All processes have to call it at the same step.
        """
        own = {str(j): s.get_state()["rows"] for j, s in self._streams.items()}
        positions: dict[str, Any] = {}
        for part in hosts.gather(own):
            positions |= part
        rows = [positions[str(j)] for j in range(self._count)]
        return {"loader": dict(self._identity), "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, whichever processes ran the streams when it was saved."""
        _validate_identity(state, self._identity)
        for j, stream in self._streams.items():
            stream.set_state({"loader": state["loader"], "rows": state["rows"][j]})


BatchStream = Batches | Joined


# ------------------------------------------------------------------ saved positions


class _Position(TypedDict, extra_items=Any):
    """A saved position: the settings, and where grain's iterator stands."""

    loader: json_text.Object
    rows: json_text.Object | list[json_text.Object]  # a list: one per stream


def _validate_identity(state: Any, identity: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a position was saved with other data or settings."""
    json_text.validate(state, "data iterator", _Position, error=CheckpointError)
    saved = {"data_shards": 1, **state["loader"]}
    identity = {"data_shards": 1, **_as_json(identity)}
    for name, value in identity.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"data iterator: saved with {name}={saved.get(name)}, now {name}={value}"
            )


def _as_json(value: Any) -> Any:
    """Returns a value as JSON reads it back: with lists for tuples, and strings for keys."""
    return json_text.parse(json_text.encode(value, "data iterator"))


def _as_tuples(value: Any) -> Any:
    """Returns a position with tuples for lists, which grain compares its own with."""
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
