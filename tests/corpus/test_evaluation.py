"""Removal of evaluation text, on documents whose pieces are counted by hand."""

import numpy as np

from rlhfjax.corpus.evaluation import hits, overlap, pieces, table_of

QUESTION = "What is the boiling point of water at sea level in degrees"
OPTIONS = {"ngram": 4, "window": 10, "most_pieces": 3}


def words_from(letter, n):
    return " ".join(f"{letter}{i}" for i in range(n))


def test_hits_are_the_ngrams_that_both_texts_have():
    table = table_of(["a b c d e", "c d e f", "x y"], 3)
    assert len(table) == 4  # abc, bcd, cde, def
    assert len(hits("A, B: c!", table, 3)) == 1
    assert len(hits("b c d e b c d", table, 3)) == 2
    assert len(hits("a b d e", table, 3)) == 0
    assert len(hits("a b c", table_of([], 3), 3)) == 0


def test_hits_are_indices_of_the_table():
    table = table_of(["a b c d e"], 3)
    own = table_of(["c d e"], 3)
    assert table[hits("c d e", table, 3)].tolist() == own.tolist()


def test_the_ngram_and_its_surroundings_are_cut_out():
    before, after = "x" * 30 + " ", " " + "y" * 40
    table = table_of(["one two three four"], 4)
    left = pieces(f"{before}one two three four{after}", table, **OPTIONS)
    assert left == ["x" * 21, "y" * 31]  # each window has a blank and 9 letters


def test_short_pieces_are_discarded():
    table = table_of(["one two three four"], 4)
    left = pieces(f"{'x' * 15} one two three four {'y' * 30}", table, **OPTIONS)
    assert left == ["y" * 21]
    assert pieces("one two three four", table, **OPTIONS) == []


def test_windows_that_touch_are_one():
    """Two n-grams, five letters apart: one hole, so two pieces."""
    table = table_of(["one two three four", "five six seven eight"], 4)
    text = f"{'x' * 30} one two three four abc five six seven eight {'y' * 30}"
    assert pieces(text, table, **OPTIONS) == ["x" * 21, "y" * 21]


def test_a_document_in_too_many_pieces_is_removed():
    table = table_of(["one two three four"], 4)
    hole = " one two three four "
    three = hole.join(["x" * 40] * 3)
    assert len(pieces(three, table, **OPTIONS)) == 3
    four = hole.join(["x" * 40] * 4)
    assert pieces(four, table, **OPTIONS) == []


def test_the_overlap_is_shown_as_it_stands():
    table = table_of([QUESTION], 13)
    assert len(table) == 0  # it has 12 words
    table = table_of([QUESTION], 12)
    text = f"Quiz! {QUESTION.upper()}?"
    assert overlap(text, table, 12) == QUESTION.upper()
    assert overlap("nothing", table, 12) == ""
    assert np.issubdtype(table.dtype, np.uint64)
