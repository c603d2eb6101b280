"""What generated text looks like without asking what it says: diversity, repetition, length."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

# Chinese characters with their iteration mark and zero, hiragana, katakana and its halfwidth forms.
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_UNSPACED = _HAN + _KANA
_RUN = f"[^\\W_{_UNSPACED}]+"
_WORD = re.compile(f"(?![\\W_])[{_UNSPACED}]|{_RUN}(?:['’]{_RUN})*")


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case: runs of letters and digits, apostrophes inside
    kept.

    Chinese and Japanese put no blanks between words: each Chinese character and each kana is a
    word.
    """
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of a sequence in order; none when it is shorter than n."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(grams: Iterable[tuple[str, ...]]) -> float:
    """Number of different n-grams / number of n-grams; 1 when there are none, as nothing is said twice."""
    grams = list(grams)
    return len(set(grams)) / len(grams) if grams else 1.0


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct-n of a set of answers: different n-grams in all of them / n-grams in all of them, in (0, 1].

    Counts over the set, not per answer, so that one answer given to every prompt scores low. It falls with the amount
    of text: compare sets of as many answers to the same prompts. 0 when there is no n-gram at all: answers that are
    all shorter than n words are not diverse.

    Source: Li et al. 2016, "A diversity-promoting objective function", section 5.2.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return distinct(grams) if grams else 0.0


def repeated_n(text: str, n: int) -> float:
    """Share of a text's n-grams that were in it before, 1 - distinct/total; 0 when there are none."""
    return 1.0 - distinct(ngrams(words(text), n))


def describe(texts: Sequence[str]) -> dict[str, float]:
    """The figures of a set of answers that are worth a line: diversity, repetition inside answers, length.

    Returns:
      distinct_1, distinct_2: `distinct_n` of the set.
      repeated_2: mean over answers of `repeated_n`.
      words, words_p95: mean and 95th percentile of the number of words.
      empty: share of answers without a word.
    """
    lengths = np.array([len(words(text)) for text in texts], dtype=np.float64)
    if not lengths.size:
        return {}
    return {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "repeated_2": float(np.mean([repeated_n(text, 2) for text in texts])),
        "words": float(lengths.mean()),
        "words_p95": float(np.percentile(lengths, 95)),
        "empty": float(np.mean(lengths == 0)),
    }
