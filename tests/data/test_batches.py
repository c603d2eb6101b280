"""Batches as PyTrees: the order of their leaves, their shapes, and streams that are joined."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhfjax.data import batches
from rlhfjax.data.batches import (
    DirectBatch,
    PreferenceBatch,
    PromptBatch,
    TamerBatch,
    TokenBatch,
)
from rlhfjax.data.encoded import OVERHEAD, Encoded
from rlhfjax.data.loader import (
    Joined,
    preference_batches,
    pretrain_batches,
    prompt_batches,
    sft_batches,
)
from rlhfjax.data.prompts import Prompts

# The order of arguments of compiled programs. Another order is another program.
ORDER = {
    TokenBatch: "cut mask positions segment_ids targets tokens",
    PreferenceBatch: "cut index lengths same scores attention_mask tokens valid",
    DirectBatch: "cut index kl lengths reference same scores attention_mask tokens valid",
    TamerBatch: "response_length cut response_start attention_mask times tokens values weight",
}


@pytest.mark.parametrize("kind", ORDER)
def test_leaves_have_an_order_of_their_own(kind):
    names = ORDER[kind].split()
    assert jax.tree.leaves(kind(**{name: name for name in names})) == names


def test_a_direct_batch_holds_the_mismatched_one_before_its_reference():
    own, other = (
        PreferenceBatch(
            **{f.name: f"{mark}{f.name}" for f in dataclasses.fields(PreferenceBatch)}
        )
        for mark in ("", "other ")
    )
    batch = dataclasses.replace(DirectBatch.of(own, other), reference="reference")
    leaves = jax.tree.leaves(batch)
    assert leaves[:4] == ["cut", "index", "lengths", "other cut"]
    assert leaves[-6] == "reference" and len(leaves) == 17
    assert jax.tree.unflatten(jax.tree.structure(batch), leaves) == batch


def test_the_shapes_of_a_batch_are_those_that_the_loader_gives(
    tokenizer, documents, conversations, rankings
):
    options = {"batch_size": 4, "length": 16}
    cut = jax.ShapeDtypeStruct((4,), np.float32)
    text = batches.shapes(TokenBatch, b=4, t=16)
    pairs = [
        (text, pretrain_batches(documents, tokenizer, **options)),
        (
            dataclasses.replace(text, cut=cut),
            sft_batches(conversations, tokenizer, **options),
        ),
        (
            batches.shapes(PromptBatch, b=4, t=16),
            prompt_batches(Prompts(conversations), tokenizer, **options),
        ),
        (
            batches.shapes(PreferenceBatch, b=4, k=4, t=16),
            preference_batches(rankings, tokenizer, **options),
        ),
    ]
    for shapes, loader in pairs:
        batch = next(loader)
        assert type(batch) is type(shapes)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )


def test_rows_that_are_batches_take_room_too(documents):
    calls = []

    def encode(index, row):
        calls.append(index)
        ids = np.zeros(4, np.int32)
        return PromptBatch(
            tokens=ids, attention_mask=ids, cut=np.float32(0), index=np.int32(index)
        )

    encoded = Encoded(documents, encode, max_items=15 + 4 * OVERHEAD)
    for index in (0, 1, 0, 1):
        encoded[index]
    assert calls == [0, 1, 1]


class Counting:
    """Batches 1, 2, 3, ...; the position is the last one."""

    def __init__(self):
        self.n = 0

    def __next__(self):
        self.n += 1
        return self.n

    def restart(self):
        self.n = 0

    def get_state(self):
        return self.n

    def set_state(self, state):
        self.n = state


def test_joined_streams_keep_a_position_by_name_and_one_alone_its_own():
    both = Joined(lambda a, b: (a, b), {"": Counting(), "ptx/": Counting()})
    assert next(both) == (1, 1)
    assert both.get_state() == {"": 1, "ptx/": 1}
    both.set_state({"": 4, "ptx/": 7})
    assert next(both) == (5, 8)
    assert next(both.restart()) == (1, 1)
    alone = Joined(lambda a: 10 * a, {"": Counting()})
    assert next(alone) == 10 and alone.get_state() == 1
    alone.set_state(3)
    assert next(alone) == 40


def test_the_last_batch_is_filled():
    rows = [np.full(2, i) for i in range(3)]
    first, last = batches.in_batches(rows, 2, np.full(2, 9))
    assert first.tolist() == [[0, 0], [1, 1]] and last.tolist() == [[2, 2], [9, 9]]
