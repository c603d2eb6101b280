"""Batches for each stage, as iterators whose state can be saved and brought back exactly.

    batches = pretrain_batches(open_source("tfds:kjv"), tokenizer, batch_size=8, length=256, seed=0)
    batch = next(batches)            # {"tokens": int32 [8, 256], ...}
    state = batches.get_state()      # JSON-able
    batches.set_state(state)         # the next batch is the one that would have come

With train=True rows are shuffled anew each epoch, for ever. With train=False there is one pass in order, and the last
batch is padded with rows that count for nothing; `restart()` begins it again.

Training may have S independent streams in the place of one (`Shards`). Of the one shuffled order stream j has examples
j, j + S, j + 2 S, ..., which it packs by itself, and it fills rows j B/S to (j + 1) B/S of every batch of B. A batch is
then a matter of seed, step and S, and a host needs to run only the streams whose rows its devices hold.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from rlhfjax import hosts, json_text
from rlhfjax.data import chat, examples, packing
from rlhfjax.data.examples import Encoded
from rlhfjax.data.padding import pad_left
from rlhfjax.data.sources import Concatenated, Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError, ConfigError, DataError
from rlhfjax.streams import PER_DATA_STREAM, PER_SOURCE

Batch = dict[str, np.ndarray]
Weighted = Source | Sequence[Source] | Sequence[tuple[Source, float]]
Encode = Callable[[int, dict[str, Any]], Any]
Pack = Callable[
    [grain.IterDataset, int, int], grain.IterDataset
]  # (examples, rows of a batch, seed) -> rows


@dataclass(frozen=True)
class Shards:
    """How many streams make a batch of training, and which of them this process runs."""

    count: int = 1
    own: tuple[int, ...] = (0,)


def rows_a_stream(batch_size: int, count: int, where: str = "loader") -> int:
    """The rows of a batch that each of `count` streams fills. Raises ConfigError where they cannot be equally many."""
    if batch_size < 1:
        raise ConfigError(f"{where}: batch_size={batch_size} is below 1")
    if count < 1 or batch_size % count:
        raise ConfigError(
            f"{where}.data_shards={count}: as many streams cannot share {batch_size} rows equally"
        )
    return batch_size // count


class Batches(Iterator[Batch]):
    """Rows of a grain dataset in batches of `size`.

    Every process makes all rows, so that the data do not depend on how many hosts there are; `mesh.Layout.put` gives
    each device its own.

    Args:
      filler: a row -> one that only fills the last batch.
      identity: what a saved state has to agree with.
    """

    def __init__(
        self,
        rows: grain.IterDataset,
        filler: Callable[[Batch], Batch],
        *,
        size: int,
        identity: Mapping[str, Any],
        skipped: int = 0,
    ):
        self.skipped = skipped
        self._rows, self._filler, self._size, self._identity = (
            rows,
            filler,
            size,
            identity,
        )
        self._iterator = iter(rows)

    def __next__(self) -> Batch:
        rows = []
        for row in self._iterator:
            rows.append(row)
            if len(rows) == self._size:
                break
        if not rows:
            raise StopIteration
        rows += [self._filler(rows[0])] * (self._size - len(rows))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def restart(self) -> "Batches":
        """Back to the first batch; returns itself, so that `for batch in batches.restart()` is one whole pass."""
        self._iterator = iter(self._rows)
        return self

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as plain JSON values."""
        return _as_json({"loader": self._identity, "rows": self._iterator.get_state()})

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a state was taken. Raises CheckpointError when it was taken on other data or settings."""
        _check_same(state["loader"], self._identity)
        self._iterator = iter(self._rows)
        self._iterator.set_state(_tuples(state["rows"]))


class ShardedBatches(Iterator[Batch]):
    """Batches whose equal shares of rows come from a stream each.

    The rows of streams that this process does not run are zeros, for `mesh.Layout.put` to leave alone.

    Args:
      streams: {j: the share of stream j}, of those that this process runs.
      count: of all streams.
      identity: what a saved state has to agree with.
    """

    def __init__(
        self, streams: Mapping[int, Batches], count: int, identity: Mapping[str, Any]
    ):
        if not streams:
            raise ConfigError("loader: a process has to run one stream at least")
        self.skipped = next(iter(streams.values())).skipped
        self._streams, self._count, self._identity = streams, count, identity

    def __next__(self) -> Batch:
        shares = {j: next(stream) for j, stream in self._streams.items()}
        like = next(iter(shares.values()))
        batch = {
            name: np.zeros((self._count, *share.shape), share.dtype)
            for name, share in like.items()
        }
        for j, share in shares.items():
            for name, rows in share.items():
                batch[name][j] = rows
        return {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in batch.items()}

    def get_state(self) -> dict[str, Any]:
        """Where all streams stand, of those elsewhere by the word of who runs them: all hosts call it at one place."""
        stand = {
            str(j): stream.get_state()["rows"] for j, stream in self._streams.items()
        }
        stand = {j: rows for one in hosts.gather(stand) for j, rows in one.items()}
        return {
            "loader": dict(self._identity),
            "rows": [stand[str(j)] for j in range(self._count)],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a state was taken, however its streams were shared out; raises as `Batches` does."""
        _check_same(state["loader"], self._identity)
        for j, stream in self._streams.items():
            stream.set_state({"loader": state["loader"], "rows": state["rows"][j]})


def pretrain_batches(
    source: Weighted,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
    cross_document: bool = False,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """Packed documents: tokens, targets, segments, positions int32 [b, t] and mask float32 [b, t].

    Targets are the next tokens of the same document, from the first after bos to eos. With `cross_document` (GPT-3,
    section 2.2) a row is one segment, and the last token of a document has the next one's bos as its target.

    Args:
      source: rows of kind text or messages; several sources are concatenated, (source, weight) pairs are mixed by
        weight in training and concatenated otherwise.
    """

    def encode(_: int, row: dict[str, Any]) -> np.ndarray:
        tokens = examples.document(tokenizer, row)
        if cross_document:
            tokens = np.append(tokens, np.int32(tokenizer.bos_id))
        return examples.shifted(tokens, np.ones(len(tokens), np.float32))

    def pack(documents: grain.IterDataset, size: int, seed: int) -> grain.IterDataset:
        rows = packing.concatenate_and_split(documents, length=length)
        if train:  # neighbors out of one long document should not make a batch
            rows = grain.experimental.WindowShuffleIterDataset(
                rows, window_size=16 * size, seed=seed
            )
        return rows.map(
            lambda row: packing.to_row(
                row, pad_id=tokenizer.pad_id, cross_document=cross_document
            )
        )

    sources = _check(source, ("text", "messages", "mixed"), length)
    order = _Order(batch_size, seed, train, shards)
    identity = _identity("pretrain", sources, length, order) | {
        "cross_document": cross_document
    }
    return _batches(sources, encode, pack, _blank(tokenizer), order, identity)


def sft_batches(
    source: Weighted,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """First-fit packed conversations, the arrays of `pretrain_batches`; mask 1 on the assistant's tokens alone.

    A row that has stored ids (`rows.py`) is learnt by them, its last turn alone. `cut` float32 [b]
    counts the examples of each row that lost tokens.
    """
    sources = _check(source, ("messages",), length)
    if not any(
        turn["role"] == "assistant" for one, _ in sources for turn in _all_turns(one)
    ):
        raise DataError("sft: no conversation has an assistant turn to learn")

    def encode(_: int, row: dict[str, Any]) -> list[np.ndarray]:
        return examples.fine_tuning(tokenizer, row, length)

    def pack(
        conversations: grain.IterDataset, size: int, seed: int
    ) -> grain.IterDataset:
        bins = max(4 * size, 64)  # more open rows leave less padding
        rows = packing.flatten(conversations)
        rows = packing.first_fit(
            rows, length=length, bins=bins, seed=seed if train else None
        )
        arrays = lambda row: packing.to_row(row, pad_id=tokenizer.pad_id)  # noqa: E731
        return rows.map(lambda row: arrays(row) | packing.examples_cut(row))

    order = _Order(batch_size, seed, train, shards)
    return _batches(
        sources,
        encode,
        pack,
        _blank(tokenizer),
        order,
        _identity("sft", sources, length, order),
    )


def prompt_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
) -> Batches:
    """Left-padded prompts [b, p], their segments [b, p] (0 on padding) and index [b] into `source`, all int32.

    Prompts lose their oldest turns until they fit; `cut` float32 [b] is 1 on those that lost
    tokens. Rows that only fill the last batch repeat its first prompt, so that every row can be
    answered, and have index -1.
    """

    def encode(index: int, row: dict[str, Any]) -> Batch:
        whole = chat.render_prompt(tokenizer, row["messages"])
        cut = len(whole) > length
        tokens = (
            chat.render_prompt(tokenizer, row["messages"], max_tokens=length)
            if cut
            else whole
        )
        (prompts,), (segments,) = pad_left(
            [tokens], length=length, pad_id=tokenizer.pad_id
        )
        return {
            "prompts": prompts,
            "segments": segments,
            "index": np.int32(index),
            "cut": np.float32(cut),
        }

    sources = _check(source, ("prompt",), length)
    order = _Order(batch_size, seed, train)
    filler = lambda row: row | {"index": np.int32(-1)}  # noqa: E731
    return _batches(
        sources,
        encode,
        _unpacked,
        filler,
        order,
        _identity("prompts", sources, length, order),
    )


def preference_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    k: int | None = None,
    seed: int = 0,
    train: bool = True,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """All completions of a prompt in one element: tokens, segments int32 [b, k, t], right-padded;
    scores, valid, cut float32 [b, k]; lengths, same int32 [b, k] (see `examples.preference`); index
    int32 [b], -1 in rows that only fill.

    `k` is the most completions a prompt may have, by default the most in the source; `valid` is 0 where one has fewer.
    """
    sources = _check(source, ("preferences",), length)
    if k is None:
        k = max(len(source[i]["completions"]) for i in range(len(source)))

    def encode(index: int, row: dict[str, Any]) -> Batch:
        arrays = examples.preference(
            tokenizer, row, k=k, length=length, where=source.locate(index)
        )
        return arrays | {"index": np.int32(index)}

    def filler(row: Batch) -> Batch:
        empty = {name: np.zeros_like(value) for name, value in row.items()}
        return empty | {
            "tokens": np.full_like(row["tokens"], tokenizer.pad_id),
            "index": np.int32(-1),
        }

    order = _Order(batch_size, seed, train, shards)
    identity = _identity("preferences", sources, length, order) | {"k": k}
    return _batches(sources, encode, _unpacked, filler, order, identity)


# Rows are read on the caller's thread: they come out of memory, and a CPU's cores are for the model.
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class _Order:
    """What decides which examples are in which batch. A single pass is one stream, whatever `shards` says."""

    batch_size: int
    seed: int
    train: bool
    shards: Shards = Shards()

    @property
    def streams(self) -> Shards:
        return self.shards if self.train else Shards()


def _batches(
    sources: list[tuple[Source, float]],
    encode: Encode,
    pack: Pack,
    filler: Callable[[Batch], Batch],
    order: _Order,
    identity: dict[str, Any],
) -> Batches | ShardedBatches:
    """Batches of the one stream, or of each that this process runs, all of which keep what any of them has encoded."""
    shards = order.streams
    size = rows_a_stream(order.batch_size, shards.count)
    encoded = [(Encoded(one, encode), weight) for one, weight in sources]
    skipped = sum(one.skipped for one, _ in sources)

    def stream(j: int) -> Batches:
        rows = pack(
            _mixed(encoded, order, j).to_iter_dataset(_INLINE),
            size,
            order.seed + PER_DATA_STREAM * j,
        )
        return Batches(rows, filler, size=size, identity=identity, skipped=skipped)

    if shards.count == 1:
        return stream(0)
    return ShardedBatches({j: stream(j) for j in shards.own}, shards.count, identity)


def _unpacked(examples: grain.IterDataset, size: int, seed: int) -> grain.IterDataset:
    """An example is a row."""
    return examples


def _mixed(
    encoded: list[tuple[Encoded, float]], order: _Order, j: int
) -> grain.MapDataset:
    """Stream j's examples: shuffled, for ever and mixed by weight, or everything once in order.

    Each source is shared out by itself, so that every stream is mixed by the same weights.
    """
    if not order.train:
        return grain.MapDataset.concatenate(
            [grain.MapDataset.source(one) for one, _ in encoded]
        )
    parts = [
        grain.MapDataset.source(one)
        .shuffle(seed=(order.seed + PER_SOURCE * i) % 2**31)
        .repeat()[j :: order.streams.count]
        for i, (one, _) in enumerate(encoded)
    ]
    return (
        parts[0]
        if len(parts) == 1
        else grain.MapDataset.mix(parts, weights=[weight for _, weight in encoded])
    )


def _check(
    source: Weighted, kinds: Sequence[str], length: int
) -> list[tuple[Source, float]]:
    """(source, weight) pairs. Raises ConfigError for a kind or a length that the loader cannot use."""
    if isinstance(source, Source):
        pairs = [(source, 1.0)]
    elif all(isinstance(one, Source) for one in source):
        pairs = [(Concatenated(source), 1.0)]
    else:
        pairs = [(one, float(weight)) for one, weight in source]
    for one, weight in pairs:
        if one.kind not in kinds:
            raise ConfigError(
                f"loader: needs rows of kind {' or '.join(kinds)}, got {one.kind}"
            )
        if weight <= 0:
            raise ConfigError(
                f"loader: the weight of a source must be positive, got {weight}"
            )
    if length < 4:
        raise ConfigError(f"loader: length must be at least 4, got {length}")
    return pairs


def _identity(
    kind: str, sources: list[tuple[Source, float]], length: int, order: _Order
) -> dict[str, Any]:
    """What a saved state has to agree with. One stream has no name in it, as before there were several."""
    sizes = [[len(one), weight] for one, weight in sources]
    identity = {
        "batch_size": order.batch_size,
        "kind": kind,
        "source_rows": sizes,
        "length": length,
    }
    identity |= {"seed": order.seed, "train": order.train}
    return identity | (
        {"data_shards": order.streams.count} if order.streams.count > 1 else {}
    )


def _check_same(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a state was saved with other data or settings than these."""
    saved, ours = ({"data_shards": 1} | one for one in (saved, _as_json(identity)))
    for name in ours:
        if saved.get(name) != ours[name]:
            raise CheckpointError(
                f"data iterator: saved with {name}={saved.get(name)}, now {name}={ours[name]}"
            )


def _as_json(value: Any) -> Any:
    """The value as it reads back from JSON: lists for tuples, strings for keys."""
    return json.loads(json_text.encode(value, "data iterator"))


def _blank(tokenizer: Tokenizer) -> Callable[[Batch], Batch]:
    def filler(row: Batch) -> Batch:
        pads = {
            name: np.full_like(row[name], tokenizer.pad_id)
            for name in ("tokens", "targets")
        }
        return {name: np.zeros_like(value) for name, value in row.items()} | pads

    return filler


def _all_turns(source: Source) -> Iterator[chat.Message]:
    for i in range(len(source)):
        yield from source[i]["messages"]


def _tuples(value: Any) -> Any:
    """JSON makes lists of grain's tuples, and grain compares its slices with tuples."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
