"""Iterators of batches, whose position can be saved and restored exactly.

    source = open_source("tfds:kjv")
    batches = pretrain_batches(source, tokenizer, batch_size=8, length=256, seed=0)
    batch = next(batches)            # a TokenBatch, see `batches.py`
    position = batches.get_state()   # JSON values
    batches.set_state(position)      # the next batch is again the one after `batch`

With train=True the batches never end, and every epoch has a new order. With train=False there is
one pass in order; the last batch is filled with rows that do not count, and `restart()` begins
again.

A training batch may be filled by several independent streams (`Shards`), so that a host needs to
run only the streams whose rows are on its own devices. Stream j of S takes the examples j, j + S,
j + 2 S, ... of the one shuffled order, packs them by itself, and fills the rows j B/S to
(j + 1) B/S of every batch of B rows. A batch therefore depends on seed, step and S, but not on the
hosts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import jax
import numpy as np
from typing_extensions import TypedDict

from rlhfjax import hosts, json_text
from rlhfjax.data import chat, examples, packing
from rlhfjax.data.accepted import (
    Validate,
    accepted,
    validate_document,
    validate_fine_tuning,
    validate_preference,
    validate_prompt,
)
from rlhfjax.data.batches import (
    PreferenceBatch,
    PromptBatch,
    TokenBatch,
    concatenate,
    stack,
)
from rlhfjax.data.examples import Encoded
from rlhfjax.data.padding import pad_left
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError, ConfigError, DataError
from rlhfjax.streams import PER_DATA_STREAM, PER_SOURCE
from rlhfjax.types import PyTree

# One source, sources to concatenate, or (source, weight) pairs to mix.
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


# ------------------------------------------------------------------ iterators


class Batches(Iterator[PyTree]):
    """Stacks the rows of a grain dataset to batches.

    Args:
      rows: the rows, each a batch without its first axis.
      filler: takes a row and returns one that fills the last batch and does not count.
      size: rows per batch.
      identity: settings that a saved position has to agree with.
      skipped: number of malformed rows of the source.
    """

    def __init__(
        self,
        rows: grain.IterDataset,
        filler: Callable[[PyTree], PyTree],
        *,
        size: int,
        identity: Mapping[str, Any],
        skipped: int = 0,
    ):
        self.skipped = skipped
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
        self.skipped = next(iter(streams.values())).skipped
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


# ------------------------------------------------------------------ loaders


def pretrain_batches(
    source: Sources,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
    cross_document: bool = False,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """Returns TokenBatches of packed documents.

    The targets of a document are its tokens after bos, and eos.

    Args:
      source: rows of kind text or messages. Several sources are concatenated. Pairs of source and
        weight are mixed by weight in training, and concatenated otherwise.
      cross_document: a row is a single document, and the target of a document's last token is the
        next document's bos (GPT-3, section 2.2).
    """

    def encode(_: int, row: Row) -> np.ndarray:
        tokens = examples.document(tokenizer, row)
        if cross_document:
            tokens = np.append(tokens, np.int32(tokenizer.bos_id))
        return examples.shifted(tokens, np.ones(len(tokens), np.float32))

    def to_row(packed: dict[str, Any]) -> TokenBatch:
        return packing.to_row(
            packed, pad_id=tokenizer.pad_id, cross_document=cross_document
        )

    def pack(documents: grain.IterDataset, size: int, seed: int) -> grain.IterDataset:
        rows = packing.concatenate_and_split(documents, length=length)
        if train:  # so that the parts of a long document are not all in one batch
            rows = grain.experimental.WindowShuffleIterDataset(
                rows, window_size=16 * size, seed=seed
            )
        return rows.map(to_row)

    sources = _with_weights(source, ("text", "messages", "mixed"), length)
    sources = _accepted(sources, tokenizer, validate_document)
    order = _Order(batch_size, seed, train, shards)
    identity = _identity("pretrain", sources, length, order)
    identity["cross_document"] = cross_document
    return _batches(sources, encode, pack, _blank_row(tokenizer), order, identity)


def sft_batches(
    source: Sources,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """Returns TokenBatches of packed conversations, with mask 1 on the assistant's tokens.

    Conversations are packed first-fit. Of a row with stored ids (see `rows.py`) only the response
    counts.

    Raises:
      DataError: no conversation has an assistant turn.
    """
    sources = _with_weights(source, ("messages",), length)
    sources = _accepted(sources, tokenizer, validate_fine_tuning)
    if not any(_has_response(each) for each, _ in sources):
        raise DataError("sft: no conversation has an assistant turn to learn")

    def encode(_: int, row: Row) -> list[np.ndarray]:
        return examples.fine_tuning(tokenizer, row, length)

    def to_row(packed: dict[str, Any]) -> TokenBatch:
        row = packing.to_row(packed, pad_id=tokenizer.pad_id)
        return replace(row, cut=packing.examples_cut(packed))

    def pack(
        conversations: grain.IterDataset, size: int, seed: int
    ) -> grain.IterDataset:
        rows = packing.first_fit(
            packing.flatten(conversations),
            length=length,
            bins=max(4 * size, 64),  # more open rows leave less padding
            seed=seed if train else None,
        )
        return rows.map(to_row)

    order = _Order(batch_size, seed, train, shards)
    identity = _identity("sft", sources, length, order)
    return _batches(sources, encode, pack, _blank_row(tokenizer), order, identity)


def _has_response(source: Source) -> bool:
    return any(
        turn["role"] == "assistant"
        for i in range(len(source))
        for turn in source[i]["messages"]
    )


def prompt_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
) -> Batches | ShardedBatches:
    """Returns PromptBatches.

    Long prompts lose their oldest turns until they fit. The rows that fill the last batch repeat
    its first prompt, because every row has to get a response.
    """

    def encode(index: int, row: Row) -> PromptBatch:
        ids = chat.render_prompt(tokenizer, row["messages"])
        cut = len(ids) > length
        if cut:
            ids = chat.render_prompt(tokenizer, row["messages"], max_tokens=length)
        (tokens,), (attention_mask,) = pad_left(
            [ids], length=length, pad_id=tokenizer.pad_id
        )
        return PromptBatch(
            tokens=tokens,
            attention_mask=attention_mask,
            index=np.int32(index),
            cut=np.float32(cut),
        )

    def filler(row: PromptBatch) -> PromptBatch:
        return replace(row, index=np.int32(-1))

    sources = _with_weights(source, ("prompt",), length)
    sources = _accepted(sources, tokenizer, validate_prompt)
    order = _Order(batch_size, seed, train)
    identity = _identity("prompts", sources, length, order)
    return _batches(sources, encode, _unpacked, filler, order, identity)


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
    """Returns PreferenceBatches.

    Args:
      k: the largest number of completions per prompt; None: the largest of the source.
    """
    sources = _with_weights(source, ("preferences",), length)
    sources = _accepted(sources, tokenizer, validate_preference)
    ((source, _),) = sources
    if k is None:
        k = max(len(source[i]["completions"]) for i in range(len(source)))

    def encode(index: int, row: Row) -> PreferenceBatch:
        example = examples.preference(
            tokenizer, row, k=k, length=length, context=source.locate(index)
        )
        return replace(example, index=np.int32(index))

    def filler(row: PreferenceBatch) -> PreferenceBatch:
        zeros = jax.tree.map(np.zeros_like, row)
        pads = np.full_like(row.tokens, tokenizer.pad_id)
        return replace(zeros, tokens=pads, index=np.int32(-1))

    order = _Order(batch_size, seed, train, shards)
    identity = _identity("preferences", sources, length, order)
    identity["k"] = k
    return _batches(sources, encode, _unpacked, filler, order, identity)


def _unpacked(examples: grain.IterDataset, size: int, seed: int) -> grain.IterDataset:
    """Returns the examples as rows: a row is one example."""
    return examples


def _blank_row(tokenizer: Tokenizer) -> Callable[[TokenBatch], TokenBatch]:
    """Returns a filler whose rows have no target."""

    def filler(row: TokenBatch) -> TokenBatch:
        pads = np.full_like(row.tokens, tokenizer.pad_id)
        zeros = jax.tree.map(np.zeros_like, row)
        return replace(zeros, tokens=pads, targets=pads)

    return filler


# ------------------------------------------------------------------ the order of examples


@dataclass(frozen=True)
class _Order:
    """The settings that decide which examples are in which batch."""

    batch_size: int
    seed: int
    train: bool
    shards: Shards = Shards()

    @property
    def streams(self) -> Shards:
        """The streams of a batch; a single pass has one, whatever `shards` says."""
        return self.shards if self.train else Shards()


def _batches(
    sources: list[tuple[Source, float]],
    encode: Encode,
    pack: Pack,
    filler: Callable[[PyTree], PyTree],
    order: _Order,
    identity: dict[str, Any],
) -> Batches | ShardedBatches:
    """Returns the batches of the streams that this process runs.

    The streams share the encoded examples.
    """
    shards = order.streams
    size = rows_per_stream(order.batch_size, shards.count)
    encoded = [(Encoded(source, encode), weight) for source, weight in sources]
    skipped = sum(source.skipped for source, _ in sources)

    def stream(j: int) -> Batches:
        examples = _ordered(encoded, order, j).to_iter_dataset(_INLINE)
        rows = pack(examples, size, order.seed + PER_DATA_STREAM * j)
        return Batches(rows, filler, size=size, identity=identity, skipped=skipped)

    if shards.count == 1:
        return stream(0)
    return ShardedBatches({j: stream(j) for j in shards.own}, shards.count, identity)


def _ordered(
    encoded: list[tuple[Encoded, float]], order: _Order, j: int
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


def _with_weights(
    source: Sources, kinds: Sequence[str], length: int
) -> list[tuple[Source, float]]:
    """Returns the sources with their weights.

    Raises:
      ConfigError: the loader cannot use the kind of a source, its weight, or the length.
    """
    pairs: list[tuple[Source, float]]
    if isinstance(source, Source):
        pairs = [(source, 1.0)]
    elif weighted := [each for each in source if isinstance(each, tuple)]:
        pairs = [(each, float(weight)) for each, weight in weighted]
    else:
        pairs = [
            (Concatenated([each for each in source if isinstance(each, Source)]), 1.0)
        ]
    for each, weight in pairs:
        if each.kind not in kinds:
            raise ConfigError(
                f"loader: needs rows of kind {' or '.join(kinds)}, got {each.kind}"
            )
        if weight <= 0:
            raise ConfigError(f"loader: weight={weight} of a source: must be > 0")
    if length < 4:
        raise ConfigError(f"loader: length={length}: must be >= 4")
    return pairs


def _accepted(
    sources: list[tuple[Source, float]], tokenizer: Tokenizer, validate: Validate
) -> list[tuple[Source, float]]:
    """Returns the sources with the rows that the chat template takes."""
    return [(accepted(each, tokenizer, validate), weight) for each, weight in sources]


# ------------------------------------------------------------------ saved positions


def _identity(
    kind: str, sources: list[tuple[Source, float]], length: int, order: _Order
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
