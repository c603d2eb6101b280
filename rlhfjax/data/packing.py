"""Examples packed into rows of one length, with grain. All state is checkpointable.

An example is int32 [t, 3]: input, target, 1 where the target counts. For fine-tuning it is [t, 4];
`examples_cut` reads the fourth column. A row is what a stage sees: `tokens`, `targets`, `mask`,
`segments` (1, 2, ... for the row's examples, 0 for padding) and `positions` (from 0 per segment).
"""

from typing import Any

import grain
import numpy as np

Row = dict[str, np.ndarray]
_FEATURE = "example"


class _Flatten(grain.experimental.FlatMapTransform):
    max_fan_out = 1 << 30

    def flat_map(self, element: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [{_FEATURE: example} for example in element]


def flatten(examples: grain.IterDataset) -> grain.IterDataset:
    """Returns single examples, given lists of examples."""
    return grain.experimental.FlatMapIterDataset(examples, _Flatten())


def concatenate_and_split(
    examples: grain.IterDataset, *, length: int
) -> grain.IterDataset:
    """Returns full rows. An example that does not fit continues in the next row.

    There it is a segment of its own, from position 0. Targets were taken within each example before
    it was split, so none is lost or crosses examples.
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
      seed: shuffles the rows, unless None.
    """
    return grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={_FEATURE: length},
        num_packing_bins=bins,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )


def to_row(packed: dict[str, Any], *, pad_id: int, cross_document: bool = False) -> Row:
    """Returns the arrays of one packed row.

    Args:
      cross_document: the whole row is one segment, as in GPT-3.
    """
    example = packed[_FEATURE]
    segments = packed[f"{_FEATURE}_segment_ids"].astype(np.int32)
    positions = packed[f"{_FEATURE}_positions"].astype(np.int32)
    real = segments > 0
    if cross_document:
        segments = real.astype(np.int32)
        positions = np.arange(len(real), dtype=np.int32) * real
    return {
        "tokens": np.where(real, example[:, 0], pad_id).astype(np.int32),
        "targets": np.where(real, example[:, 1], pad_id).astype(np.int32),
        "mask": example[:, 2].astype(np.float32),
        "segments": segments,
        "positions": positions,
    }


def examples_cut(packed: dict[str, Any]) -> Row:
    """Returns the number of a packed row's examples that lost tokens, float32 [].

    Those have 1 in the fourth column.
    """
    return {"cut": np.array(packed[_FEATURE][:, 3].sum(), np.float32)}
