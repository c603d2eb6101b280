"""Measures the surface of generated text: diversity, repetition and length."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

# Chinese characters with their iteration mark and zero, hiragana, katakana and its halfwidth forms.
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_UNSPACED = _HAN + _KANA
_RUN = f"[^\\W_{_UNSPACED}]+"
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(f"(?![\\W_])[{_UNSPACED}]|{_RUN}(?:['’]{_RUN})*")


def words(text: str) -> list[str]:
    """Returns the lower-case words of a text: runs of letters and digits, inner apostrophes kept.

    Chinese and Japanese are written without spaces: each Chinese character and each kana is a word.
    """
    return _WORD.findall(text.lower())


def count_runs(text: str) -> int:
    """Returns the number of runs between blanks, punctuation included: words as `wc` counts them.

    A run with Chinese characters or kana, which stand without blanks, counts as its `words`.
    """
    return sum(
        len(words(run)) if _UNSPACED_CHARACTER.search(run) else 1
        for run in text.split()
    )


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Returns the n-grams of a sequence in order; none if it is shorter than n."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(grams: Iterable[tuple[str, ...]]) -> float:
    """Returns the share of different n-grams among n-grams; 1 without n-grams."""
    grams = list(grams)
    if not grams:
        return 1.0
    return len(set(grams)) / len(grams)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Returns the distinct-n of a set of texts: different n-grams / n-grams, in [0, 1].

    N-grams are counted over the set, not per text, so that one response to every prompt scores low.
    The value falls with the amount of text: compare sets of equally many responses to the same
    prompts. It is 0 if all texts are shorter than n words.

    Source: Li et al. 2016, "A diversity-promoting objective function", section 5.2.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return distinct(grams) if grams else 0.0


def repeated_n(text: str, n: int) -> float:
    """Returns the share of a text's n-grams that are repetitions; 0 without n-grams."""
    return 1.0 - distinct(ngrams(words(text), n))


def describe(texts: Sequence[str]) -> dict[str, float]:
    """Returns statistics of a set of texts; none for an empty set.

    Returns:
      distinct_1, distinct_2: `distinct_n` of the set.
      repeated_2: mean over texts of `repeated_n`.
      words, words_p95: mean and 95th percentile of the number of words.
      empty: share of texts without a word.
    """
    if not texts:
        return {}
    lengths = np.array([len(words(text)) for text in texts], dtype=np.float64)
    repeated = [repeated_n(text, 2) for text in texts]
    return {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "repeated_2": float(np.mean(repeated)),
        "words": float(lengths.mean()),
        "words_p95": float(np.percentile(lengths, 95)),
        "empty": float(np.mean(lengths == 0)),
    }
