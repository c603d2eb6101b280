"""How much of pairwise preferences single words predict: a check of gold rewards.

A gold reward that ten words predict is a word list in disguise, and a policy is then measured by
how often it says them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Num

from rlhfjax.evals.stats import length_baseline
from rlhfjax.evals.text import words

COUNT = 10  # words
MOST_RESPONSES = 8  # per prompt; pairs grow with their square


class WordBaselines(NamedTuple):
    """Held-out accuracies of preferring a response by the words in it."""

    word: float
    """Of the best single word; 1/2 without pairs."""
    ten: float
    """Of a vote of the ten best words."""
    chosen: tuple[tuple[str, int], ...]
    """The words, best first, with +1 if responses with the word are preferred and -1 if not."""
    pairs: int
    """Held-out pairs that the labels order."""


def word_baselines(
    texts: Sequence[Sequence[str]], labels: Num[np.ndarray, "p k"]
) -> WordBaselines:
    """Returns how well single words predict which of two responses a labeler prefers.

    With the pairs (better, worse) of the even prompts, a word's score is the number of pairs in
    which only the better response has it, minus those in which only the worse one has it. The ten
    words with the largest |score| are chosen. On the odd prompts, a word of a positive score votes
    for the response that has it, one of a negative score for the other. The response with more
    votes is predicted; equal votes count 1/2.

    Args:
      texts: responses [p][k]. Of more than MOST_RESPONSES per prompt the first ones count.
      labels: the labeler's scores; pairs with equal labels, or a NaN, are dropped.
    """
    sets = [[set(words(text)) for text in row[:MOST_RESPONSES]] for row in texts]
    scores: Counter[str] = Counter()
    for better, worse in _pairs(sets[::2], labels[::2]):
        scores.update(better - worse)
        scores.subtract(worse - better)
    ranked = sorted(scores.items(), key=lambda item: (-abs(item[1]), item[0]))
    chosen = [(word, 1 if score > 0 else -1) for word, score in ranked if score]
    chosen = chosen[:COUNT]
    held_out = list(_pairs(sets[1::2], labels[1::2]))
    return WordBaselines(
        word=_accuracy(chosen[:1], held_out),
        ten=_accuracy(chosen, held_out),
        chosen=tuple(chosen),
        pairs=len(held_out),
    )


def substitutes(
    texts: Sequence[Sequence[str]],
    lengths: Num[np.ndarray, "p k"],
    labels: Num[np.ndarray, "p k"],
) -> dict[str, float]:
    """Returns the metrics of what predicts a labeler's preferences without reading a response.

    length_accuracy: `length_baseline`. word_accuracy, ten_words_accuracy: `word_baselines`.

    Args:
      texts: responses [p][k]; where a label is NaN there is none.
      lengths: in any unit.
    """
    by_words = word_baselines(texts, labels)
    some = slice(None), slice(MOST_RESPONSES)
    valid = np.isfinite(labels[some])
    given = np.where(valid, labels[some], 0.0)
    valid = valid.astype(np.float64)
    return {
        "length_accuracy": length_baseline(lengths[some], given, valid),
        "word_accuracy": by_words.word,
        "ten_words_accuracy": by_words.ten,
    }


def _pairs(
    sets: Sequence[Sequence[set[str]]], labels: np.ndarray
) -> Iterator[tuple[set[str], set[str]]]:
    """Yields the words of the better and of the worse response, for every ordered pair."""
    for row, scores in zip(sets, labels.tolist(), strict=True):
        for i in range(len(row)):
            for j in range(i):
                if scores[i] > scores[j]:
                    yield row[i], row[j]
                elif scores[j] > scores[i]:
                    yield row[j], row[i]


def _accuracy(
    chosen: Sequence[tuple[str, int]], pairs: Sequence[tuple[set[str], set[str]]]
) -> float:
    if not pairs:
        return 0.5
    right = 0.0
    for better, worse in pairs:
        votes = sum(sign * ((w in better) - (w in worse)) for w, sign in chosen)
        right += (np.sign(votes) + 1) / 2
    return float(right / len(pairs))
