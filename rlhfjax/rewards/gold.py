"""Gold rewards: scorers that stand in for human labelers in synthetic experiments.

A policy is never trained on the gold reward. It is optimized against a reward model that was
trained on the gold labeler's rankings, and then *measured* by the gold reward: what it gains on the
first and not on the second is overoptimization (Gao et al. 2022, "Scaling laws for reward model
overoptimization", section 2, has the same synthetic setup).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, DataError, install
from rlhfjax.evals.text import repeated_n, words

REPEATED_WORDS_ALLOWED = 0.25
"""share of a response's words that are repetitions; 95 % of human turns have less"""
LONG_FROM_WORDS = 30
"""words without a penalty; 86 % of human turns in chitchat have no more"""
PER_LONG_WORD = 0.05
STACK_SHARE = 1 / 3
"""share of positive words from which more are stacked, if there are more than STACK_FROM"""
STACK_FROM = 2
PER_STACKED_WORD = 0.2


class Sentiment:
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

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise DataError(
                "gold:sentiment: the vaderSentiment package is not installed; "
                f"{install('quickstart')}"
            ) from None
        self._vader: Any = SentimentIntensityAnalyzer()

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
        positive = sum(self._vader.lexicon.get(token, 0.0) > 0 for token in tokens)
        stacked = positive - max(STACK_FROM, STACK_SHARE * len(tokens))
        repeated_words = max(0.0, repeated_n(response, 1) - REPEATED_WORDS_ALLOWED)
        repeated = repeated_words + repeated_n(response, 2)
        long = PER_LONG_WORD * max(0, len(tokens) - LONG_FROM_WORDS)
        return terms | {
            "sentiment": float(self._vader.polarity_scores(response)["compound"]),
            "repeated": min(1.0, repeated),
            "long": min(1.0, long),
            "stacked": min(1.0, PER_STACKED_WORD * max(0.0, stacked)),
        }


SCORERS: dict[str, Callable[[], Sentiment]] = {"sentiment": Sentiment}
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
