"""Words and n-grams."""

import itertools

import numpy as np

from rlhfjax.corpus.words import ngram_hashes, spans, text_hash, words


def test_words_are_runs_of_letters_and_digits_in_lower_case():
    assert words("It's 3 o'clock, snake_case!") == [
        *("it", "s", "3", "o", "clock", "snake", "case"),
    ]
    assert words("ÉTÉ — naïve") == ["été", "naïve"]
    assert words("!? …") == []


def test_scripts_without_blanks_have_one_word_per_character():
    assert words("我喜欢Python3。") == ["我", "喜", "欢", "python3"]
    assert words("こんにちは 한국어") == ["こ", "ん", "に", "ち", "は", "한국어"]


def test_spans_are_where_the_words_stand():
    text = "Ünder İstanbul: 中文 x1"
    assert [text[start:end].lower() for start, end in spans(text)] == words(text)
    assert spans("ab, cd") == [(0, 2), (4, 6)]


def test_equal_ngrams_have_equal_hashes_wherever_they_stand():
    tokens = ["a", "b", "c", "a", "b", "d"]
    hashes = ngram_hashes(tokens, 2)
    grams = list(itertools.pairwise(tokens))
    for i, j in itertools.combinations(range(5), 2):
        assert (hashes[i] == hashes[j]) == (grams[i] == grams[j])
    assert hashes[0] == hashes[3]


def test_an_ngrams_hash_is_the_polynomial_of_its_words():
    multiplier = 0x9E3779B97F4A7C15
    first, second, third = (text_hash(word) for word in "abc")
    expected = (first * multiplier**2 + second * multiplier + third) % 2**64
    assert ngram_hashes(list("abc"), 3).tolist() == [expected]
    assert ngram_hashes(list("ab"), 3).dtype == np.uint64
    assert len(ngram_hashes(list("ab"), 3)) == 0


def test_hashes_are_the_same_everywhere():
    """A number of this machine: another one would change which rows a corpus keeps."""
    assert text_hash("corpus") == 0x4F0F5AB9D7853419
