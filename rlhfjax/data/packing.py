"""Examples into rows of one length, with grain: concatenate and split, or first-fit. All state is checkpointable.

An example is int32 [t, 3]: input, target, 1 where the target counts; for fine-tuning [t, 4], see
`examples_cut`. A row is what a stage sees: `tokens`, `targets`, `mask`, `segments` (1, 2, ... for
the examples of the row, 0 for padding) and `positions` (from 0 in each segment).
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
    """Lists of examples to single ones."""
    return grain.experimental.FlatMapIterDataset(examples, _Flatten())


def concatenate_and_split(
    examples: grain.IterDataset, *, length: int
) -> grain.IterDataset:
    """Full rows: an example that does not fit goes on in the next row, as a segment of its own from position 0.

    Targets were taken within each example before it was split, so none is lost or crosses an example.
    """
    examples = examples.map(lambda example: {_FEATURE: example})
    return grain.experimental.ConcatThenSplitIterDataset(
        examples, length_struct={_FEATURE: length}
    )


def first_fit(
    examples: grain.IterDataset, *, length: int, bins: int, seed: int | None
) -> grain.IterDataset:
    """Whole examples, each in the first of `bins` open rows with room for it; rows are shuffled if there is a seed."""
    return grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={_FEATURE: length},
        num_packing_bins=bins,
        seed=0 if seed is None else seed,
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
