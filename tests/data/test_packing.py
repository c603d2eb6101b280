"""The order of packed rows."""

import grain
import numpy as np
import pytest

from rlhfjax.data import packing


def first_tokens(seed, n=32):
    """Returns the first input of every row, given n numbered examples that fill a row each."""
    full = [np.full((4, 3), i, np.int32) for i in range(n)]
    single = packing.flatten(grain.MapDataset.source([full]).to_iter_dataset())
    rows = packing.first_fit(single, length=4, bins=8, seed=seed)
    return [int(packing.to_row(row, pad_id=0).tokens[0]) for row in rows]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_shuffles_rows_and_0_is_one(seed):
    found = first_tokens(seed)
    assert sorted(found) == list(range(32)) and found != list(range(32))


def test_seed_0_is_not_seed_1():
    assert first_tokens(0) != first_tokens(1)


def test_without_a_seed_rows_keep_their_order():
    assert first_tokens(None) == list(range(32))
