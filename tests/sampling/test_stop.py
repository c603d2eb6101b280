"""Stop texts: where a response is cut, in ids and in pieces of text."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.sampling.stop import cut_ids, find_stop, until_stop
from tests.data.conftest import tokenizer
from tests.data.test_hf_tokenizer import CONFIG, LLAMA2, byte_bpe, llama2

__all__ = ["tokenizer"]  # a fixture


@pytest.fixture(scope="module")
def bytes_bpe():
    return HuggingFaceTokenizer(byte_bpe(), CONFIG, template="chatml")


def test_the_first_of_several_stop_texts_by_hand():
    assert find_stop("4.\nUser: 5", ["User", "\n"]) == 2
    assert find_stop("4.\nUser: 5", ["User", "5"]) == 3
    assert find_stop("4.", ["User", "\n"]) is None
    assert find_stop("baab", ["aab", "a"]) == 1 and find_stop("baab", ["aab", "b"]) == 0
    assert find_stop("xaab", ["aab", "b"]) == 1
    assert find_stop("", ["a"]) is None and find_stop("abc", []) is None


@pytest.mark.parametrize("stop", ["sat", "at on", "mat", ", who", "t", " ", "the cat"])
def test_ids_spell_the_text_before_the_stop_text(bytes_bpe, tokenizer, stop):
    """Also if the stop text begins within a token; ids before that token are those sampled."""
    text = "the cat sat on the mat, who ran?"
    for kind in (bytes_bpe, tokenizer):
        ids = kind.encode(text)
        cut = cut_ids(kind, ids, [stop])
        expected = text[: text.index(stop)]
        assert kind.decode(cut) == expected
        whole = [
            n for n in range(len(ids)) if expected.startswith(kind.decode(ids[:n]))
        ]
        assert cut[: whole[-1]] == ids[: whole[-1]]


def test_a_stop_text_within_a_token_loses_nothing_before_it(bytes_bpe):
    """The piece " the" with stop "he": its beginning " t" stays, as other ids."""
    the = bytes_bpe.encode("on the")
    assert bytes_bpe.decode(the[-1:]) == " the"
    cut = cut_ids(bytes_bpe, the, ["he"])
    assert bytes_bpe.decode(cut) == "on t"
    assert cut == [*the[:-1], *bytes_bpe.encode(" t")]


def test_ids_without_a_stop_text_and_incomplete_characters_stay(bytes_bpe):
    ids = bytes_bpe.encode("é🙂 a")
    assert cut_ids(bytes_bpe, ids, ["b"]) == ids
    assert cut_ids(bytes_bpe, ids, [" a"]) == bytes_bpe.encode("é🙂")
    assert cut_ids(bytes_bpe, ids, ["🙂"]) == bytes_bpe.encode("é")
    assert cut_ids(bytes_bpe, [*ids, bytes_bpe.eos_id], ["é"]) == []


def test_a_tokenizer_with_a_blank_before_a_text_adds_none():
    """Of " the" before "e", " th" would come back as two blanks and th: it is left out."""
    tokenizer = HuggingFaceTokenizer(llama2("always"), LLAMA2, template="llama2")
    ids = tokenizer.encode("a the")
    assert tokenizer.decode(ids) == "a the"
    assert tokenizer.decode(cut_ids(tokenizer, ids, ["e"])) in ("a", "a th")
    assert tokenizer.decode(cut_ids(tokenizer, ids, [" the"])) == "a"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=14),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    seed=st.integers(0, 99),
)
def test_pieces_are_the_text_before_the_stop_text_however_they_are_cut(
    text, stop, seed
):
    edges = np.random.default_rng(seed).integers(0, len(text) + 1, 4)
    edges = [0, *sorted(edges.tolist()), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    asked = []

    def one_by_one():
        for i, piece in enumerate(pieces):
            asked.append(i)
            yield piece

    place = find_stop(text, stop)
    got = list(until_stop(one_by_one(), stop))
    assert "".join(got) == text[:place] and "" not in got
    if place is None:
        assert asked == list(range(len(pieces)))
    else:  # not one piece more than those that hold the stop text
        read = "".join(pieces[i] for i in asked[:-1])
        assert find_stop(read, stop) is None


def test_text_is_held_back_only_as_long_as_it_may_be_a_stop_text():
    stop = ["\nUser"]
    assert list(until_stop(["a", "b\n", "U", "x", "\n"], stop)) == [
        "a",
        "b",
        "\nUx",
        "\n",
    ]
    assert list(until_stop(["a\nUs", "er b"], stop)) == ["a"]
    assert list(until_stop(["a", "b"], [])) == ["a", "b"]
