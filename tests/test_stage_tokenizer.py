"""The stage `tokenizer` on more text than it takes: rows spread evenly, each once."""

import logging
import math

import numpy as np
import pytest

from rlhfjax.data.sources import Rows
from rlhfjax.stages import tokenizer
from rlhfjax.stages.tokenizer import Spread


@pytest.mark.parametrize("size", [1, 2, 3, 10, 21, 100, 1597])
def test_spread_rows_are_each_there_once_and_any_beginning_is_even(size):
    spread = Spread(Rows([{"text": str(i)} for i in range(size)], "text"))
    places = np.array([int(spread[i]["text"]) for i in range(size)])
    assert sorted(places) == list(range(size))
    assert spread.locate(size - 1) == f"row {places[-1]}"
    for count in range(10, size + 1):
        # Of an even spread, every half of the source has half of the rows, within two.
        assert abs((places[:count] < size / 2).sum() - count / 2) <= 2
    with pytest.raises(IndexError):
        spread[size]


def taken(source, most, caplog):
    caplog.clear()
    config = tokenizer.Config(vocab_size=300)
    with caplog.at_level(logging.INFO, logger="rlhfjax"):
        found = list(tokenizer.taken_texts(source, float(most), config))
    return found, caplog.text


def test_a_large_source_is_taken_in_part(caplog):
    rows = [f"row number {i:04d}" for i in range(1000)]  # 15 bytes each
    source = Rows([{"text": text} for text in rows], "text")
    for most in (15_000, math.inf):
        found, logged = taken(source, most, caplog)
        assert found == rows and "on 0.0 MB of text (300 pieces" in logged
    found, logged = taken(source, 14_990, caplog)
    spread = Spread(source)
    expected = [spread[i]["text"] for i in range(1000)]
    assert found == [*expected[:-1], expected[-1][:5]]
    assert "0.0 MB of text, of rows spread evenly over all" in logged
    book = Rows([{"text": "é" * 100}], "text")  # a part of a single text
    assert taken(book, 31, caplog)[0] == ["é" * 15]
