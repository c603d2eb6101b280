"""Batches for each stage, as iterators whose state can be saved and brought back exactly.

    batches = pretrain_batches(open_source("tfds:kjv"), tokenizer, batch_size=8, length=256, seed=0)
    batch = next(batches)            # {"tokens": int32 [8, 256], ...}
    state = batches.get_state()      # JSON-able
    batches.set_state(state)         # the next batch is the one that would have come

With train=True rows are shuffled anew each epoch, for ever. With train=False there is one pass in order, and the last
batch is padded with rows that count for nothing; `restart()` begins it again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from rlhfjax.data import chat, examples, packing
from rlhfjax.data.examples import Encoded
from rlhfjax.data.sources import Concatenated, Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError, ConfigError, DataError

Batch = dict[str, np.ndarray]
Weighted = Source | Sequence[Source] | Sequence[tuple[Source, float]]


class Batches(Iterator[Batch]):
    """Rows of a grain dataset in batches.

    Every host makes all rows, so that the data do not depend on how many hosts there are; `mesh.Layout.put` gives each
    device its own.
    """

    def __init__(
        self,
        rows: grain.IterDataset,
        filler: Callable[[Batch], Batch],
        *,
        batch_size: int,
        skipped: int = 0,
        **identity: Any,
    ):
        if batch_size < 1:
            raise ConfigError(f"loader: batch_size={batch_size} is below 1")
        self.skipped = skipped
        self._rows, self._filler, self._size = rows, filler, batch_size
        self._identity = {"batch_size": batch_size, **identity}
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
        return json.loads(json.dumps({"loader": self._identity, "rows": self._iterator.get_state()}))

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a state was taken. Raises CheckpointError when it was taken on other data or settings."""
        ours = json.loads(json.dumps(self._identity))
        for name in ours:
            if state["loader"].get(name) != ours[name]:
                saved = state["loader"].get(name)
                raise CheckpointError(f"data iterator: saved with {name}={saved}, now {name}={ours[name]}")
        self._iterator = iter(self._rows)
        self._iterator.set_state(_tuples(state["rows"]))


def pretrain_batches(
    source: Weighted,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
    cross_document: bool = False,
) -> Batches:
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

    sources = _check(source, ("text", "messages", "mixed"), length)
    encoded = [(Encoded(one, encode), weight) for one, weight in sources]
    rows = packing.concatenate_and_split(_mixed(encoded, seed, train).to_iter_dataset(_INLINE), length=length)
    if train:  # neighbours out of one long document should not make a batch
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=16 * batch_size, seed=seed)
    rows = rows.map(lambda row: packing.to_row(row, pad_id=tokenizer.pad_id, cross_document=cross_document))
    identity = _identity("pretrain", sources, length, seed, train) | {"cross_document": cross_document}
    return _batches(rows, _blank(tokenizer), sources, identity, batch_size)


def sft_batches(
    source: Weighted,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
) -> Batches:
    """First-fit packed conversations, the arrays of `pretrain_batches`; mask 1 on the assistant's tokens alone.

    A row that has stored ids (`rows.py`) is learnt by them, its last turn alone.
    """
    sources = _check(source, ("messages",), length)
    if not any(turn["role"] == "assistant" for one, _ in sources for turn in _all_turns(one)):
        raise DataError("sft: no conversation has an assistant turn to learn")
    encoded = [(Encoded(one, lambda _, row: examples.fine_tuning(tokenizer, row, length)), w) for one, w in sources]
    rows = packing.flatten(_mixed(encoded, seed, train).to_iter_dataset(_INLINE))
    bins = max(4 * batch_size, 64)  # more open rows leave less padding
    rows = packing.first_fit(rows, length=length, bins=bins, seed=seed if train else None)
    rows = rows.map(lambda row: packing.to_row(row, pad_id=tokenizer.pad_id))
    identity = _identity("sft", sources, length, seed, train)
    return _batches(rows, _blank(tokenizer), sources, identity, batch_size)


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

    Prompts lose their oldest turns until they fit. Rows that only fill the last batch repeat its first prompt, so that
    every row can be answered, and have index -1.
    """

    def encode(index: int, row: dict[str, Any]) -> Batch:
        tokens = chat.render_prompt(tokenizer, row["messages"], max_tokens=length)
        prompts, segments = np.full(length, tokenizer.pad_id, np.int32), np.zeros(length, np.int32)
        prompts[length - len(tokens) :], segments[length - len(tokens) :] = tokens, 1
        return {"prompts": prompts, "segments": segments, "index": np.int32(index)}

    sources = _check(source, ("prompt",), length)
    rows = _mixed([(Encoded(source, encode), 1.0)], seed, train).to_iter_dataset(_INLINE)
    identity = _identity("prompts", sources, length, seed, train)
    filler = lambda row: row | {"index": np.int32(-1)}  # noqa: E731
    return _batches(rows, filler, sources, identity, batch_size)


def preference_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    k: int | None = None,
    seed: int = 0,
    train: bool = True,
) -> Batches:
    """All completions of a prompt in one element: tokens, segments int32 [b, k, t], right-padded; scores, valid
    float32 [b, k]; lengths int32 [b, k], the tokens of each response; index int32 [b], -1 in rows that only fill.

    `k` is the most completions a prompt may have, by default the most in the source; `valid` is 0 where one has fewer.
    """
    sources = _check(source, ("preferences",), length)
    k = k or max(len(source[i]["completions"]) for i in range(len(source)))

    def encode(index: int, row: dict[str, Any]) -> Batch:
        arrays = examples.preference(tokenizer, row, k=k, length=length, where=source.where(index))
        return arrays | {"index": np.int32(index)}

    def filler(row: Batch) -> Batch:
        empty = {name: np.zeros_like(value) for name, value in row.items()}
        return empty | {"tokens": np.full_like(row["tokens"], tokenizer.pad_id), "index": np.int32(-1)}

    rows = _mixed([(Encoded(source, encode), 1.0)], seed, train).to_iter_dataset(_INLINE)
    identity = _identity("preferences", sources, length, seed, train) | {"k": k}
    return _batches(rows, filler, sources, identity, batch_size)


# Rows are read on the caller's thread: they come out of memory, and a CPU's cores are for the model.
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _mixed(encoded: list[tuple[Encoded, float]], seed: int, train: bool) -> grain.MapDataset:
    """One stream of examples: shuffled, for ever and mixed by weight, or everything once in order."""
    if not train:
        return grain.MapDataset.concatenate([grain.MapDataset.source(one) for one, _ in encoded])
    parts = [
        grain.MapDataset.source(one).shuffle(seed=(seed + 7919 * i) % 2**31).repeat()
        for i, (one, _) in enumerate(encoded)
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=[weight for _, weight in encoded])


def _check(source: Weighted, kinds: Sequence[str], length: int) -> list[tuple[Source, float]]:
    """(source, weight) pairs. Raises ConfigError for a kind or a length that the loader cannot use."""
    if isinstance(source, Source):
        pairs = [(source, 1.0)]
    elif all(isinstance(one, Source) for one in source):
        pairs = [(Concatenated(source), 1.0)]
    else:
        pairs = [(one, float(weight)) for one, weight in source]
    for one, weight in pairs:
        if one.kind not in kinds:
            raise ConfigError(f"loader: needs rows of kind {' or '.join(kinds)}, got {one.kind}")
        if weight <= 0:
            raise ConfigError(f"loader: the weight of a source must be positive, got {weight}")
    if length < 4:
        raise ConfigError(f"loader: length must be at least 4, got {length}")
    return pairs


def _identity(kind: str, sources: list[tuple[Source, float]], length: int, seed: int, train: bool) -> dict[str, Any]:
    """What a saved state has to agree with."""
    sizes = [[len(one), weight] for one, weight in sources]
    return {"kind": kind, "source_rows": sizes, "length": length, "seed": seed, "train": train}


def _batches(
    rows: grain.IterDataset,
    filler: Callable[[Batch], Batch],
    sources: list[tuple[Source, float]],
    identity: dict[str, Any],
    batch_size: int,
) -> Batches:
    skipped = sum(one.skipped for one, _ in sources)
    return Batches(rows, filler, batch_size=batch_size, skipped=skipped, **identity)


def _blank(tokenizer: Tokenizer) -> Callable[[Batch], Batch]:
    def filler(row: Batch) -> Batch:
        pads = {name: np.full_like(row[name], tokenizer.pad_id) for name in ("tokens", "targets")}
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
