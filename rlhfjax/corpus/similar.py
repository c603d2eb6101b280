"""Similarity of short texts: ROUGE-L to the most similar one of a pool.

    ROUGE-L F1 = 2 LCS / (m + n)

with the longest common subsequence of the words of both texts and their numbers of words m and n.

Source: Lin 2004, "ROUGE"; Wang et al. 2022 (Self-Instruct), section 2.2: an instruction is added to
the pool if its ROUGE-L with every instruction there is below 0.7.
"""

import importlib.util
from typing import NamedTuple

from rlhfjax.corpus.words import words
from rlhfjax.errors import ConfigError, install


class Nearest(NamedTuple):
    """The text of a pool that is the most similar to another one."""

    name: str  # "" in an empty pool
    similarity: float


class Pool:
    """Texts by their names, in the order in which they came."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._words: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, text: str) -> None:
        self._names.append(name)
        self._words.append(words(text))

    def nearest(self, text: str) -> Nearest:
        """Returns the most similar text of the pool, the first of several."""
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        # With insertions and deletions alone, 1 - distance / (m + n) is 2 LCS / (m + n).
        similarity = Indel.normalized_similarity
        found = process.extractOne(words(text), self._words, scorer=similarity)
        if found is None:
            return Nearest("", 0.0)
        _, score, index = found
        return Nearest(self._names[index], float(score))


def validate_installed(option: str) -> None:
    """Raises ConfigError if rapidfuzz is missing."""
    if importlib.util.find_spec("rapidfuzz") is None:
        raise ConfigError(
            f"{option}: rapidfuzz is not installed; {install('synthesize')}"
        )
