"""Words of a text, and hashes of the word n-grams in it.

A word is a run of letters and digits, in lower case. Scripts that put no blanks between words
(Chinese, Japanese, Thai, Khmer, Lao, Burmese) have one word per character.
"""

import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np

_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no product loses a bit


class Span(NamedTuple):
    """A piece of a text: the characters start to end - 1."""

    start: int
    end: int


def words(text: str) -> list[str]:
    """Returns the words of a text, in order."""
    return [word.lower() for word in _WORD.findall(text)]


def spans(text: str) -> list[Span]:
    """Returns where the words of a text stand, in the order of `words`."""
    return [Span(*match.span()) for match in _WORD.finditer(text)]


def ngram_hashes(tokens: list[str], n: int) -> np.ndarray:
    """Returns the hashes, uint64 [max(0, t - n + 1)], of the n-grams that begin at each word.

    The hash of words w_1 … w_n is the sum of h(w_i) m^(n - i) modulo 2^64, with an odd m.
    """
    count = max(0, len(tokens) - n + 1)
    word_hashes = np.array([_word_hash(token) for token in tokens], np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(n if count else 0):
        total = total * MULTIPLIER + word_hashes[i : i + count]
    return total


@functools.lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return text_hash(word)


def text_hash(text: str) -> int:
    """Returns a hash of 64 bits that is the same on every machine."""
    return int.from_bytes(digest(text)[:8], "big")


def digest(text: str) -> bytes:
    """Returns a hash of 16 bytes that is the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
