"""Packs examples into rows of one length, with grain, whose state can be saved.

An example is int32 [t, 3]: input, target, and 1 where the target counts. An example of fine-tuning
is int32 [t, 4] or [t, 5], see `examples.fine_tuning` and `examples.with_documents`. Concatenated
examples are split where a row is full; first-fit packing keeps them whole.
"""

from typing import Any

import grain
import numpy as np

from rlhfjax.data.batches import TokenBatch

_FEATURE = "example"


class _Flatten(grain.experimental.FlatMapTransform):
    max_fan_out = 1 << 30

    def flat_map(self, element: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [{_FEATURE: example} for example in element]


def flatten(examples: grain.IterDataset) -> grain.IterDataset:
    """Returns the examples of lists of examples."""
    return grain.experimental.FlatMapIterDataset(examples, _Flatten())


def concatenate_and_split(
    examples: grain.IterDataset, *, length: int
) -> grain.IterDataset:
    """Returns full rows. An example that does not fit continues in the next row, from position 0.

    No target is lost or crosses examples, because an example has its targets before it is split.
    """
    examples = examples.map(lambda example: {_FEATURE: example})
    return grain.experimental.ConcatThenSplitIterDataset(
        examples, length_struct={_FEATURE: length}
    )


def first_fit(
    examples: grain.IterDataset, *, length: int, bins: int, seed: int | None
) -> grain.IterDataset:
    """Returns rows of whole examples, each in the first of `bins` open rows that has room for it.

    Args:
      seed: shuffles the rows; None: they keep their order.
    """
    return grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={_FEATURE: length},
        num_packing_bins=bins,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )


def to_row(
    packed: dict[str, Any], *, pad_id: int, cross_document: bool = False
) -> TokenBatch:
    """Returns one packed row; with `cross_document` it is a single document, as in GPT-3."""
    example = packed[_FEATURE]
    segment_ids = packed[f"{_FEATURE}_segment_ids"].astype(np.int32)
    positions = packed[f"{_FEATURE}_positions"].astype(np.int32)
    real = segment_ids > 0
    if cross_document:
        segment_ids = real.astype(np.int32)
        positions = np.arange(len(real), dtype=np.int32) * real
    return TokenBatch(
        tokens=np.where(real, example[:, 0], pad_id).astype(np.int32),
        targets=np.where(real, example[:, 1], pad_id).astype(np.int32),
        mask=example[:, 2].astype(np.float32),
        segment_ids=segment_ids,
        positions=positions,
    )


def examples_cut(packed: dict[str, Any]) -> np.ndarray:
    """Returns how many examples of a packed row lost tokens, float32 []."""
    return np.array(packed[_FEATURE][:, 3].sum(), np.float32)


def document_marks(packed: dict[str, Any]) -> np.ndarray:
    """Returns 1 on the tokens of documents of a packed row of fine-tuning, float32 [t]."""
    return packed[_FEATURE][:, 4].astype(np.float32)
