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

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grain
import jax
import numpy as np

from rlhfjax.data import chat, examples, packing, steps, verdicts
from rlhfjax.data.accepted import (
    validate_document,
    validate_fine_tuning,
    validate_preference,
    validate_prompt,
)
from rlhfjax.data.batches import PreferenceBatch, PromptBatch, StepBatch, TokenBatch
from rlhfjax.data.iterators import Batches as Batches
from rlhfjax.data.iterators import BatchStream as BatchStream
from rlhfjax.data.iterators import Joined as Joined
from rlhfjax.data.iterators import ShardedBatches
from rlhfjax.data.order import Order, Sources, identity_of, make_batches, usable
from rlhfjax.data.order import Shards as Shards
from rlhfjax.data.order import rows_per_stream as rows_per_stream
from rlhfjax.data.padding import pad_left
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError


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

    The targets of a document are all its tokens but the first: without a bos, no token comes before
    the first word.

    Args:
      source: rows of kind text or messages. Several sources are concatenated. Pairs of source and
        weight are mixed by weight in training, and concatenated otherwise.
      cross_document: a row is a single document, and the target of a document's last token is the
        next document's bos (GPT-3, section 2.2). Without a bos it has no target.
    """

    def encode(_: int, row: Row) -> np.ndarray:
        tokens = examples.document(tokenizer, row)
        counts = np.ones(len(tokens), np.float32)
        if cross_document:
            following = tokenizer.document_start or (tokenizer.document_end,)
            tokens = np.append(tokens, np.int32(following[0]))
            counts = np.append(counts, np.float32(bool(tokenizer.document_start)))
        return examples.shifted(tokens, counts)

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

    kinds = ("text", "messages", "mixed")
    sources = usable(source, kinds, length, tokenizer, validate_document)
    order = Order(batch_size, seed, train, shards)
    identity = identity_of("pretrain", sources, length, order)
    identity["cross_document"] = cross_document
    return make_batches(sources, encode, pack, _blank_row(tokenizer), order, identity)


def sft_batches(
    source: Sources,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    train: bool = True,
    documents: bool = False,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """Returns TokenBatches of packed conversations, with mask 1 on the assistant's tokens.

    Conversations are packed first-fit. Of a row with stored ids (see `rows.py`) only the response
    counts.

    Args:
      source: rows of kind messages. Weights count rows: a weight of 0.1 beside 0.9 makes one row in
        ten a row of that source, whatever its tokens.
      documents: sources may be of kind text too. Their documents are packed with the conversations,
        and all their targets count, see `examples.with_documents`. InstructGPT mixes 10 % of
        pretraining data into fine-tuning (Ouyang et al. 2022, appendix C.3).

    Raises:
      DataError: no conversation has an assistant turn.
    """
    kinds = ("messages", "text", "mixed") if documents else ("messages",)
    sources = usable(source, kinds, length, tokenizer, validate_fine_tuning)
    if not any(_has_response(each) for each, _ in sources):
        raise DataError("sft: no conversation has an assistant turn to learn")
    to_examples = examples.with_documents if documents else examples.fine_tuning

    def encode(_: int, row: Row) -> list[np.ndarray]:
        return to_examples(tokenizer, row, length)

    def to_row(packed: dict[str, Any]) -> TokenBatch:
        row = packing.to_row(packed, pad_id=tokenizer.pad_id)
        row = replace(row, cut=packing.examples_cut(packed))
        if documents:
            row = replace(row, documents=packing.document_marks(packed))
        return row

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

    order = Order(batch_size, seed, train, shards)
    identity = identity_of("sft", sources, length, order)
    if documents:
        identity["documents"] = True
    return make_batches(sources, encode, pack, _blank_row(tokenizer), order, identity)


def _has_response(source: Source) -> bool:
    """Returns whether a conversation has an assistant turn."""
    return source.kind != "text" and any(
        turn["role"] == "assistant"
        for i in range(len(source))
        for turn in source[i].get("messages", ())
    )


def prompt_batches(
    source: Sources,
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

    sources = usable(source, ("prompt",), length, tokenizer, validate_prompt)
    order = Order(batch_size, seed, train)
    identity = identity_of("prompts", sources, length, order)
    return make_batches(sources, encode, _unpacked, filler, order, identity)


def preference_batches(
    source: Sources,
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
    kinds = ("preferences",)
    sources = usable(source, kinds, length, tokenizer, validate_preference)
    every = Concatenated([each for each, _ in sources])
    if k is None:
        counts = verdicts.per_row(every, "completions", np.int32, completions)
        k = int(counts.max())

    def encode(index: int, row: Row) -> PreferenceBatch:
        example = examples.preference(
            tokenizer, row, k=k, length=length, context=every.locate(index)
        )
        return replace(example, index=np.int32(index))

    def filler(row: PreferenceBatch) -> PreferenceBatch:
        zeros = jax.tree.map(np.zeros_like, row)
        pads = np.full_like(row.tokens, tokenizer.pad_id)
        return replace(zeros, tokens=pads, index=np.int32(-1))

    order = Order(batch_size, seed, train, shards)
    identity = identity_of("preferences", sources, length, order)
    identity["k"] = k
    return make_batches(sources, encode, _unpacked, filler, order, identity)


def completions(row: Row) -> int:
    """Returns the number of completions of a preference row."""
    return len(row["completions"])


def step_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    separator: str,
    neutral: steps.Neutral = None,
    seed: int = 0,
    train: bool = True,
    shards: Shards = Shards(),
) -> Batches | ShardedBatches:
    """Returns StepBatches, see `data.steps`.

    Raises:
      DataError: a row cannot be used, and its source does not leave such rows out.
    """
    rule = {"separator": separator, "neutral": neutral}
    validate = functools.partial(steps.validate_steps, **rule)
    sources = usable(source, ("steps",), length, tokenizer, validate, every=True)

    def encode(_: int, row: Row) -> StepBatch:
        return steps.step_example(tokenizer, row, length=length, **rule)

    def filler(row: StepBatch) -> StepBatch:
        zeros = jax.tree.map(np.zeros_like, row)
        return replace(zeros, tokens=np.full_like(row.tokens, tokenizer.pad_id))

    order = Order(batch_size, seed, train, shards)
    identity = identity_of("steps", sources, length, order) | rule
    return make_batches(sources, encode, _unpacked, filler, order, identity)


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
