"""Which examples are in which batch: sources, their weights, the shuffled order, streams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain

from rlhfjax.data.accepted import Accepted, Validate, accepted
from rlhfjax.data.encoded import MOST_ITEMS, Encoded
from rlhfjax.data.iterators import Batches, Counts, ShardedBatches
from rlhfjax.data.mixture import Mixed
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source, merged_turns
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.streams import PER_DATA_STREAM, PER_SOURCE
from rlhfjax.types import PyTree

# One source (`mixture.Mixed` is several to mix), sources to concatenate, or (source, weight) pairs.
Sources = Source | Sequence[Source] | Sequence[tuple[Source, float]]

Encode = Callable[[int, Row], Any]  # (index of the row, row) -> example
Pack = Callable[[grain.IterDataset, int, int], grain.IterDataset]
"""(examples, rows per batch, seed) -> rows."""

# Examples are read on the caller's thread: they are in memory, and the cores are for the model.
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class Shards:
    """The streams that fill a training batch.

    count: number of streams.
    own: the streams that this process runs.
    """

    count: int = 1
    own: tuple[int, ...] = (0,)


def rows_per_stream(batch_size: int, count: int, stage: str = "loader") -> int:
    """Returns the number of rows that each of `count` streams fills in a batch.

    Raises:
      ConfigError: the streams cannot fill equal parts.
    """
    if batch_size < 1:
        raise ConfigError(f"{stage}.batch_size={batch_size}: must be >= 1")
    if count < 1 or batch_size % count:
        raise ConfigError(
            f"{stage}.data_shards={count}: must divide the {batch_size} rows of a batch"
        )
    return batch_size // count


@dataclass(frozen=True)
class Order:
    """The settings that decide which examples are in which batch."""

    batch_size: int
    seed: int
    train: bool
    shards: Shards = Shards()

    @property
    def streams(self) -> Shards:
        """The streams of a batch; a single pass has one, whatever `shards` says."""
        return self.shards if self.train else Shards()


def make_batches(
    sources: list[tuple[Source, float]],
    encode: Encode,
    pack: Pack,
    filler: Callable[[PyTree], PyTree],
    order: Order,
    identity: dict[str, Any],
) -> Batches | ShardedBatches:
    """Returns the batches of the streams that this process runs.

    The streams share the encoded examples.

    Args:
      encode: takes the index of a row among those of all sources, and the row.
    """
    shards = order.streams
    size = rows_per_stream(order.batch_size, shards.count)
    encoded, first = [], 0
    room = MOST_ITEMS // len(sources)
    for source, weight in sources:
        encoded.append((Encoded(source, encode, room, first), weight))
        first += len(source)
    counts = Counts(
        skipped=sum(source.skipped for source, _ in sources),
        merged=sum(merged_turns(source) for source, _ in sources),
    )

    def stream(j: int) -> Batches:
        examples = _ordered(encoded, order, j).to_iter_dataset(_INLINE)
        rows = pack(examples, size, order.seed + PER_DATA_STREAM * j)
        return Batches(rows, filler, size=size, identity=identity, counts=counts)

    if shards.count == 1:
        return stream(0)
    return ShardedBatches({j: stream(j) for j in shards.own}, shards.count, identity)


def _ordered(
    encoded: list[tuple[Encoded, float]], order: Order, j: int
) -> grain.MapDataset:
    """Returns the examples of stream j.

    In training they are shuffled, mixed by weight and never end. Every source is divided among the
    streams by itself, so that all streams have the same mixture. A single pass has every example
    once, in order.
    """
    datasets = [grain.MapDataset.source(examples) for examples, _ in encoded]
    if not order.train:
        return grain.MapDataset.concatenate(datasets)
    parts = []
    for i, dataset in enumerate(datasets):
        seed = (order.seed + PER_SOURCE * i) % 2**31
        parts.append(dataset.shuffle(seed=seed).repeat()[j :: order.streams.count])
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[weight for _, weight in encoded])


def weighted(source: Sources) -> list[tuple[Source, float]]:
    """Returns the sources to mix with their weights; those to concatenate are one of weight 1."""
    if isinstance(source, Mixed):
        return source.pairs()
    if isinstance(source, Source):
        return [(source, 1.0)]
    pairs = [each for each in source if isinstance(each, tuple)]
    if pairs:
        return [(each, float(weight)) for each, weight in pairs]
    parts = [each for each in source if isinstance(each, Source)]
    return [(Concatenated(parts), 1.0)]


def usable(
    source: Sources,
    kinds: Sequence[str],
    length: int,
    tokenizer: Tokenizer,
    validate: Validate,
    every: bool = False,
) -> list[tuple[Source, float]]:
    """Returns the sources with their weights and only the rows that the chat template takes.

    Args:
      every: validate all rows, also with our own template, which takes every conversation.
    Raises:
      ConfigError: the loader cannot use the kind of a source, its weight, or the length.
    """
    pairs = weighted(source)
    for each, weight in pairs:
        if each.kind not in kinds:
            raise ConfigError(
                f"loader: needs rows of kind {' or '.join(kinds)}, got {each.kind}"
            )
        if weight <= 0:
            raise ConfigError(f"loader: weight={weight} of a source: must be > 0")
    if length < 4:
        raise ConfigError(f"loader: length={length}: must be >= 4")
    take = Accepted if every else accepted
    return [(take(each, tokenizer, validate), weight) for each, weight in pairs]


def identity_of(
    kind: str, sources: list[tuple[Source, float]], length: int, order: Order
) -> dict[str, Any]:
    """Returns the settings that a saved position has to agree with."""
    identity = {
        "batch_size": order.batch_size,
        "kind": kind,
        "source_rows": [[len(source), weight] for source, weight in sources],
        "length": length,
        "seed": order.seed,
        "train": order.train,
    }
    if order.streams.count > 1:  # absent for one stream, as in older checkpoints
        identity["data_shards"] = order.streams.count
    return identity
