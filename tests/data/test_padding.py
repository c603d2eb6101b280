"""Padding by hand."""

import numpy as np
import pytest

from rlhfjax.data.padding import pad_left, pad_right

ROWS = [[5, 6], [], np.array([7, 8, 9], np.int32)]


def test_rows_padded_on_the_left():
    tokens, segments = pad_left(ROWS, length=3, pad_id=1)
    assert tokens.tolist() == [[1, 5, 6], [1, 1, 1], [7, 8, 9]]
    assert segments.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert tokens.dtype == segments.dtype == np.int32


def test_rows_padded_on_the_right():
    tokens, segments = pad_right(ROWS, length=3, pad_id=1)
    assert tokens.tolist() == [[5, 6, 1], [1, 1, 1], [7, 8, 9]]
    assert segments.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert tokens.dtype == segments.dtype == np.int32


@pytest.mark.parametrize("pad", (pad_left, pad_right))
def test_a_row_that_is_too_long_is_an_error(pad):
    with pytest.raises(ValueError, match="broadcast"):
        pad([[1, 2, 3, 4]], length=3, pad_id=0)
