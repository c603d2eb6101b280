"""The batches that stages train on: dataclasses that are PyTrees of arrays.

The arrays are NumPy arrays on the host, `jax.Array`s on the devices, and `ShapeDtypeStruct`s where
a step is planned. Their axes are b rows, k completions of a prompt, f pieces of feedback, and t
tokens. A single row has the same fields without the first axis.

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


def array(spec: str) -> Any:
    """Declares a field that is an array, such as "int32 b t"."""
    return dataclasses.field(metadata={"array": spec})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Packed text for language modeling: several documents or examples per row."""

    cut: Leaf = None
    """float32 [b]: examples of the row that lost tokens; fine-tuning only."""
    documents: Leaf = None
    """float32 [b, t]: 1 on tokens of documents; fine-tuning with documents only."""
    mask: Leaf = array("float32 b t")
    """1 where the target counts."""
    positions: Leaf = array("int32 b t")
    """From 0 in each document."""
    segment_ids: Leaf = array("int32 b t")
    """1, 2, ... for the documents of the row; 0 on padding."""
    targets: Leaf = array("int32 b t")
    """The next token of the same document."""
    tokens: Leaf = array("int32 b t")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Left-padded prompts of up to t tokens."""

    cut: Leaf = array("float32 b")
    """1 where the prompt lost tokens."""
    index: Leaf = array("int32 b")
    """Row of the source; -1 where the row only fills the batch."""
    attention_mask: Leaf = array("int32 b t")
    tokens: Leaf = array("int32 b t")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Prompts for the stages that sample responses, and the text that PPO-ptx trains on."""

    prompts: PromptBatch
    text: TokenBatch | None = None
    """None: PPO-ptx is off."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Prompts, each with up to k scored completions. A sequence is prompt and completion."""

    cut: Leaf = array("float32 b k")
    """1 where the prompt or the completion lost tokens."""
    index: Leaf = array("int32 b")
    """Row of the source; -1 where the row only fills the batch."""
    lengths: Leaf = array("int32 b k")
    """Tokens of the completion."""
    same: Leaf = array("int32 b k")
    """Number of the prompt's first completion with the same tokens."""
    scores: Leaf = array("float32 b k")
    """A higher score is better."""
    attention_mask: Leaf = array("int32 b k t")
    tokens: Leaf = array("int32 b k t")
    """Right-padded."""
    valid: Leaf = array("float32 b k")
    """0 where the prompt has fewer than k completions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectBatch(PreferenceBatch):
    """A PreferenceBatch with what the losses of the direct stage need besides the policy."""

    kl: Leaf = None
    """float32 [b]: KTO's estimate of the KL in nats, the same in every row."""
    mismatched: "DirectBatch | None" = None
    """The prompts with completions of other prompts; KTO only."""
    reference: Leaf = None
    """float32 [b, k]: log-probability of the completion under the reference, nats."""

    @classmethod
    def of(
        cls, batch: PreferenceBatch, mismatched: PreferenceBatch | None = None
    ) -> "DirectBatch":
        others = None if mismatched is None else cls.of(mismatched)
        return cls(**vars(batch), mismatched=others)


# As if all its fields were declared in one class.
_DIRECT = "cut index kl lengths mismatched reference same scores attention_mask tokens"
jax.tree_util.register_dataclass(DirectBatch, [*_DIRECT.split(), "valid"], [])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TamerBatch:
    """Responses to a prompt, each with up to f pieces of feedback."""

    response_length: Leaf = array("int32 b")
    cut: Leaf = array("float32 b")
    """1 where the prompt or the response lost tokens."""
    response_start: Leaf = array("int32 b")
    """Position of the first token of the response."""
    attention_mask: Leaf = array("int32 b t")
    times: Leaf = array("float32 b f")
    """Seconds from the response's first token to the feedback."""
    tokens: Leaf = array("int32 b t")
    """Right-padded."""
    values: Leaf = array("float32 b f")
    """The feedback."""
    weight: Leaf = array("float32 b f")
    """0 where the response has fewer than f pieces of feedback."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Solutions in steps. A sequence is prompt and solution."""

    cut: Leaf = array("float32 b")
    """1 where the prompt or the solution lost tokens."""
    attention_mask: Leaf = array("int32 b t")
    ends: Leaf = array("float32 b t")
    """1 at the last token of each step."""
    labels: Leaf = array("float32 b t")
    """There the label, 1 for a right step; 0 elsewhere."""
    tokens: Leaf = array("int32 b t")
    """Right-padded."""
    valid: Leaf = array("float32 b")
    """0 where the row only fills the batch."""
    weight: Leaf = array("float32 b t")
    """1 at the last token of each step whose label counts."""


def shapes(batch: type[Batch], **sizes: int) -> Batch:
    """Returns the shapes of a batch; `shapes(PromptBatch, b=8, t=64)` is of 8 prompts.

    Optional arrays are absent.
    """
    arrays = {}
    for field in dataclasses.fields(batch):  # pyright: ignore[reportArgumentType]
        if "array" in field.metadata:
            dtype, *axes = field.metadata["array"].split()
            shape = tuple(sizes[axis] for axis in axes)
            arrays[field.name] = jax.ShapeDtypeStruct(shape, dtype)
    return batch(**arrays)


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
