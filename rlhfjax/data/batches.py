"""The batches that stages train on: dataclasses that are PyTrees of arrays.

The arrays are NumPy arrays on the host, `jax.Array`s on the devices, and `ShapeDtypeStruct`s where
a step is planned. In the comments b is the number of rows of a batch, t the tokens of a row and k
the completions of a prompt. A single row has the same fields without the first axis.

Compiled programs take the arrays in the order in which the fields are declared here: another order
would be another program, which the compilation cache does not know.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Leaf = Any  # not jax.Array: tree functions put shapes, shardings and None in place of arrays
Batch = TypeVar("Batch")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Packed text for language modeling: several documents or examples per row."""

    cut: Leaf = (
        None  # float32 [b], examples of the row that lost tokens; fine-tuning only
    )
    mask: Leaf  # float32 [b, t], 1 where the target counts
    positions: Leaf  # int32 [b, t], from 0 in each document
    segment_ids: (
        Leaf  # int32 [b, t], 1, 2, ... for the documents of the row, 0 on padding
    )
    targets: Leaf  # int32 [b, t], the next token of the same document
    tokens: Leaf  # int32 [b, t]

    @classmethod
    def shapes(cls, b: int, t: int, cut: bool = False) -> "TokenBatch":
        ids = jax.ShapeDtypeStruct((b, t), np.int32)
        return cls(
            cut=jax.ShapeDtypeStruct((b,), np.float32) if cut else None,
            mask=jax.ShapeDtypeStruct((b, t), np.float32),
            positions=ids,
            segment_ids=ids,
            targets=ids,
            tokens=ids,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Left-padded prompts of up to t tokens."""

    cut: Leaf  # float32 [b], 1 where the prompt lost tokens
    index: Leaf  # int32 [b], row of the source; -1 where the row only fills the batch
    attention_mask: Leaf  # int32 [b, t]
    tokens: Leaf  # int32 [b, t]

    @classmethod
    def shapes(cls, b: int, t: int) -> "PromptBatch":
        ids = jax.ShapeDtypeStruct((b, t), np.int32)
        return cls(
            cut=jax.ShapeDtypeStruct((b,), np.float32),
            index=jax.ShapeDtypeStruct((b,), np.int32),
            attention_mask=ids,
            tokens=ids,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Prompts for the stages that sample responses, and the text that PPO-ptx trains on."""

    prompts: PromptBatch
    text: TokenBatch | None = None  # None: PPO-ptx is off


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Prompts, each with up to k scored completions. A sequence is prompt and completion."""

    cut: Leaf  # float32 [b, k], 1 where the prompt or the completion lost tokens
    index: Leaf  # int32 [b], row of the source; -1 where the row only fills the batch
    lengths: Leaf  # int32 [b, k], tokens of the completion
    same: Leaf  # int32 [b, k], the first completion of the prompt with the same tokens
    scores: Leaf  # float32 [b, k], a higher score is better
    attention_mask: Leaf  # int32 [b, k, t]
    tokens: Leaf  # int32 [b, k, t], right-padded
    valid: Leaf  # float32 [b, k], 0 where the prompt has fewer than k completions

    @classmethod
    def shapes(cls, b: int, k: int, t: int) -> "PreferenceBatch":
        numbers = jax.ShapeDtypeStruct((b, k), np.float32)
        counts = jax.ShapeDtypeStruct((b, k), np.int32)
        ids = jax.ShapeDtypeStruct((b, k, t), np.int32)
        return cls(
            cut=numbers,
            index=jax.ShapeDtypeStruct((b,), np.int32),
            lengths=counts,
            same=counts,
            scores=numbers,
            attention_mask=ids,
            tokens=ids,
            valid=numbers,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectBatch(PreferenceBatch):
    """A PreferenceBatch with what the losses of the direct stage need besides the policy."""

    kl: Leaf = (
        None  # float32 [b], KTO's estimate of the KL in nats, the same in every row
    )
    mismatched: "DirectBatch | None" = (
        None  # KTO: the prompts with completions of other prompts
    )
    reference: Leaf = None  # float32 [b, k], log-probability of the completion, nats

    @classmethod
    def of(
        cls, batch: PreferenceBatch, mismatched: PreferenceBatch | None = None
    ) -> "DirectBatch":
        others = None if mismatched is None else cls.of(mismatched)
        return cls(**vars(batch), mismatched=others)


_DIRECT = ("cut", "index", "kl", "lengths", "mismatched", "reference", "same", "scores")
jax.tree_util.register_dataclass(
    DirectBatch, [*_DIRECT, "attention_mask", "tokens", "valid"], []
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TamerBatch:
    """Responses to a prompt, each with up to f pieces of feedback."""

    response_length: Leaf  # int32 [b]
    cut: Leaf  # float32 [b], 1 where the prompt or the response lost tokens
    response_start: Leaf  # int32 [b], position of the first token of the response
    attention_mask: Leaf  # int32 [b, t]
    times: (
        Leaf  # float32 [b, f], seconds from the response's first token to the feedback
    )
    tokens: Leaf  # int32 [b, t], right-padded
    values: Leaf  # float32 [b, f]
    weight: (
        Leaf  # float32 [b, f], 0 where the response has fewer than f pieces of feedback
    )

    @classmethod
    def shapes(cls, b: int, f: int, t: int) -> "TamerBatch":
        numbers = jax.ShapeDtypeStruct((b, f), np.float32)
        ids = jax.ShapeDtypeStruct((b, t), np.int32)
        return cls(
            response_length=jax.ShapeDtypeStruct((b,), np.int32),
            cut=jax.ShapeDtypeStruct((b,), np.float32),
            response_start=jax.ShapeDtypeStruct((b,), np.int32),
            attention_mask=ids,
            times=numbers,
            tokens=ids,
            values=numbers,
            weight=numbers,
        )


def stack(rows: Sequence[Batch]) -> Batch:
    """Stacks rows to a batch."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Concatenates batches along their rows."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def take(batch: Batch, rows: np.ndarray) -> Batch:
    """Returns the rows of a batch with these indices, or where a mask is True."""
    return jax.tree.map(lambda array: array[rows], batch)


def repeat(batch: Batch, times: int) -> Batch:
    """Repeats every row of a batch, so that `times` equal rows follow each other."""
    return jax.tree.map(lambda array: np.repeat(array, times, axis=0), batch)


def in_batches(rows: Sequence[Batch], size: int, filler: Batch) -> list[Batch]:
    """Returns rows as batches of `size`; the last batch is filled with `filler`."""
    rows = [*rows, *[filler] * (-len(rows) % size)]
    return [stack(rows[i : i + size]) for i in range(0, len(rows), size)]
