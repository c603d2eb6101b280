"""The pieces of a response: whatever its tokens, stop texts and ends, those of a plain loop."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.sampling.stop import find_stop
from rlhfjax.serve.pieces import TextStream, joined, whole
from rlhfjax.serve.requests import Token


def pieces(words, ids, stop=(), ends=frozenset()):
    stream = TextStream(words, stop, ends)
    found = []
    for i, id in enumerate(ids):
        found.append(stream.push(Token(id, -float(i), ())))
        if stream.is_stopped:
            return found
    return [*found, stream.rest()]


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(4, 313), max_size=30),
    stop=st.lists(st.sampled_from(["a", "at", " c", "the", "\ufffd", "é"]), max_size=2),
)
def test_the_text_is_that_before_the_first_stop_text(words, ids, stop):
    text = words.decode(ids)
    end = find_stop(text, stop)
    found = joined(pieces(words, ids, stop))
    assert found.text == (text if end is None else text[:end])
    offsets = [placed.offset for placed in found.tokens]
    assert offsets == sorted(offsets)
    if end is None:
        assert [placed.token.id for placed in found.tokens] == ids
    else:
        assert all(offset < end for offset in offsets)


def test_a_token_comes_with_the_piece_in_which_it_begins(words):
    ids = words.encode("é")
    first, second = ids
    found = pieces(words, [*ids, words.eos_id], ends=frozenset([words.eos_id]))
    texts = [piece.text for piece in found]
    assert texts == ["", "é", "", ""]
    counts = [[placed.token.id for placed in piece.tokens] for piece in found]
    assert counts == [[], [first, second], [], [words.eos_id]]


def test_text_that_may_begin_a_stop_text_is_held_back(words):
    texts = [piece.text for piece in pieces(words, words.encode("12, 3"), [", 4"])]
    assert "".join(texts) == "12, 3"
    assert not any(text.endswith(",") for text in texts)


@pytest.mark.parametrize("text", ["the cat ran", "é🌧"])
def test_whole(words, text):
    ids = words.encode(text)
    found = whole(words, [Token(id, 0.0, ()) for id in ids])
    assert found.text == text
    assert [placed.token.id for placed in found.tokens] == ids
    assert found.tokens[0].offset == 0
