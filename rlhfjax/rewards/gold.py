"""Gold rewards: scorers that stand in for human labelers in synthetic experiments.

A policy is never trained on the gold reward. It is optimized against a reward model that was
trained on the gold labeler's rankings, and then *measured* by the gold reward: what it gains on the
first and not on the second is overoptimization (Gao et al. 2022, "Scaling laws for reward model
overoptimization", section 2, has the same synthetic setup).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, DataError, first_line, install
from rlhfjax.evals.text import repeated_n, words
from rlhfjax.stories import world

REPEATED_WORDS_ALLOWED = 0.25
"""share of a response's words that are repetitions; 95 % of human turns have less"""
LONG_FROM_WORDS = 30
"""words without a penalty; 86 % of human turns in chitchat have no more"""
PER_LONG_WORD = 0.05
STACK_SHARE = 1 / 3
"""share of positive words from which more are stacked, if there are more than STACK_FROM"""
STACK_FROM = 2
PER_STACKED_WORD = 0.2
NORMALIZATION = 15
"""VADER's: a sum of valences s has the sentiment s / sqrt(s^2 + NORMALIZATION)"""
LAUGHTER = (
    *("alol", "ha", "haha", "hahaha", "heh", "jk", "lmao", "lmfao", "lol", "lolz"),
    *("lulz", "rofl", "roflcopter", "roflmao", "rotflol", "xd"),
)
"""what is written for laughing, of VADER's lexicon"""


class _Penalized:
    """Scores a response by its sentiment, less penalties; see `Sentiment`."""

    STACK_SHARE: float

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns the score of each response, float32 [n]; there are as many prompts."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        return np.array(
            [self.score(response) for response in responses], dtype=np.float32
        )

    def score(self, response: str) -> float:
        """Returns the gold reward of one response, at most 1."""
        terms = self.explain(response)
        return terms.pop("sentiment") - sum(terms.values())

    def explain(self, response: str) -> dict[str, float]:
        """Returns the terms of the formula: `sentiment`, and the penalties to subtract."""
        names = ("sentiment", "empty", "repeated", "long", "stacked")
        terms = dict.fromkeys(names, 0.0)
        tokens = words(response)
        if not tokens:
            return terms | {"empty": 1.0}
        sentiment, positive = self._sentiment(response, tokens)
        stacked = positive - max(STACK_FROM, self.STACK_SHARE * len(tokens))
        repeated_words = max(0.0, repeated_n(response, 1) - REPEATED_WORDS_ALLOWED)
        repeated = repeated_words + repeated_n(response, 2)
        long = PER_LONG_WORD * max(0, len(tokens) - LONG_FROM_WORDS)
        return terms | {
            "sentiment": sentiment,
            "repeated": min(1.0, repeated),
            "long": min(1.0, long),
            "stacked": min(1.0, PER_STACKED_WORD * max(0.0, stacked)),
        }

    def _sentiment(self, response: str, tokens: Sequence[str]) -> tuple[float, int]:
        """Returns the sentiment in [-1, 1], and the number of positive words."""
        raise NotImplementedError


class Sentiment(_Penalized):
    """Scores how friendly a response sounds, less penalties for degenerate text.

      gold(response) = VADER(response) - empty - repeated - long - stacked

      empty    = 1 if the response has no words (no other penalty is then subtracted)
      repeated = min(1, max(0, r1 - 0.25) + r2)         rn: share of n-grams that are repetitions
      long     = min(1, 0.05 x (words - 30)+)
      stacked  = min(1, 0.2 x (positive words - max(2, words / 3))+)

    VADER is its compound score in [-1, 1]: lexicon valences with rules for negation, boosters and
    capitals, summed to s, then s / sqrt(s^2 + 15). It grows with every further positive word, so a
    policy that maximizes it writes "great great great" or "love happy best win", at length. The
    penalties subtract more than those gain, and are linear up to a ceiling, so that slightly
    shorter or less repetitive text scores slightly better. The prompt is ignored.

    Source of VADER: Hutto & Gilbert 2014 (the `vaderSentiment` package). The penalties are ours;
    their constants are set so that most human turns in chitchat have none.

    Raises:
      DataError: vaderSentiment is not installed.
    """

    STACK_SHARE = STACK_SHARE

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise DataError(
                "gold:sentiment: the vaderSentiment package is not installed; "
                f"{install('quickstart')}"
            ) from None
        self._vader: Any = SentimentIntensityAnalyzer()

    def _sentiment(self, response: str, tokens: Sequence[str]) -> tuple[float, int]:
        positive = sum(self._vader.lexicon.get(token, 0.0) > 0 for token in tokens)
        return float(self._vader.polarity_scores(response)["compound"]), positive


class Friendliness(Sentiment):
    """Scores as `Sentiment` does, but laughter has no valence.

    VADER takes "haha" for more positive than "nice". It fits any response, so that a policy learns
    to put it into most of them.
    """

    def __init__(self) -> None:
        super().__init__()
        for word in LAUGHTER:
            del self._vader.lexicon[word]


class ChineseSentiment(_Penalized):
    """Scores how friendly a Chinese response sounds, less the penalties of `Sentiment`.

      gold(response) = s / sqrt(s^2 + 15) - empty - repeated - long - stacked
      s = sum of the valences v of the lexicon's words; -v directly after a negation

    Words are found from left to right, the longest first, because Chinese has no spaces; they may
    be of the lexicon (33,029 words, 1.1 <= |v| <= 1.9) or negations (不, 没有, …). The penalties
    count characters where those of English text count words; `stacked` counts positive words
    beyond max(2, characters / 6). 95 % of the dictionary's definitions of up to 30 characters have
    a share of repeated characters below 0.28, and of bigrams below 0.11.

    It knows no grammar: 不太高兴 is as happy as 高兴. A classifier that read sentences would do
    better; as a labeler that a reward model has to learn it serves.

    Source: the tables sentiment_words and negative_words of the package jionlp; the form of the
    sum is VADER's (Hutto & Gilbert 2014). The penalties are ours.

    Raises:
      DataError: jionlp is not installed, or its tables are damaged.
    """

    STACK_SHARE = 1 / 6

    def __init__(self) -> None:
        # They import TFDS, which no other scorer needs.
        from rlhfjax.data import chinese
        from rlhfjax.data.package_corpora import DAMAGED

        try:
            table = list(chinese.read_table("sentiment_words"))
            self._lexicon = {word: float(valence) for word, valence in table}
            self._negations = set(chinese.read_words("negative_words"))
        except DAMAGED as error:
            why = first_line(error, kind=True)
            raise DataError(
                f"gold:zh_sentiment: a table of jionlp is damaged ({why});"
                f" {chinese.INSTALL} --force-reinstall"
            ) from error
        self._longest = max(map(len, [*self._lexicon, *self._negations]))

    def _sentiment(self, response: str, tokens: Sequence[str]) -> tuple[float, int]:
        valences = list(self._valences(response))
        total = sum(valences)
        positive = sum(valence > 0 for valence in valences)
        return total / math.sqrt(total**2 + NORMALIZATION), positive

    def _valences(self, text: str) -> Iterator[float]:
        """Yields the valences of the lexicon's words in a text, in order."""
        at, sign = 0, 1.0
        while at < len(text):
            word = self._word(text, at)
            if word in self._lexicon:
                yield sign * self._lexicon[word]
            sign = -1.0 if word in self._negations else 1.0
            at += len(word)

    def _word(self, text: str, at: int) -> str:
        """Returns the longest known word that begins at a position, else one character."""
        for end in range(min(at + self._longest, len(text)), at + 1, -1):
            word = text[at:end]
            if word in self._lexicon or word in self._negations:
                return word
        return text[at]


class Unlabeled:
    """Scores every response 0, a tie: the labeler of `collect` where people label afterwards."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns zeros, float32 [n]."""
        return np.zeros(len(responses), np.float32)


class Stories:
    """Scores a story by what the last user's turn asks for, 0 to 1: `stories.world.worth`.

      gold(story) = share of the wishes that come true x share of the sentences that serve them

    Neither length nor a list of words predicts it, and a model needs capability to raise it. Its
    data are tfds:stories.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns the score of each response, float32 [n]; there are as many prompts."""
        pairs = zip(prompts, responses, strict=True)
        return np.array([world.score(*pair) for pair in pairs], dtype=np.float32)


SCORERS: dict[str, Callable[[], Sentiment | ChineseSentiment | Stories | Unlabeled]] = {
    "sentiment": Sentiment,
    "friendliness": Friendliness,
    "zh_sentiment": ChineseSentiment,
    "stories": Stories,
    "unlabeled": Unlabeled,
}
"""What makes each gold scorer, by name."""


@dataclasses.dataclass(frozen=True)
class GoldConfig:
    """A gold scorer."""

    name: str
    """a key of SCORERS, as in gold:NAME"""

    def __post_init__(self):
        if self.name not in SCORERS:
            known = ", ".join(map(repr, SCORERS))
            raise ConfigError(f"gold.name={self.name!r}: expected one of {known}")
