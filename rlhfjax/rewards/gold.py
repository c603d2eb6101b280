"""Gold rewards: labelers that nobody trains, which stand in for people where there are none.

A policy never sees the gold reward. It is optimized against a reward model trained on the gold labeler's rankings,
and then *measured* by the gold reward: what it gains on the first and not on the second is over-optimization
(Gao et al. 2022, "Scaling laws for reward model overoptimization", section 2, the same synthetic setup).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhfjax.errors import DataError
from rlhfjax.evals.text import repeated_n, words

REPEATED_WORDS_ALLOWED = 0.25  # share of an answer's words that is there a second time: 95 % of human turns have less
LONG_FROM_WORDS = 30  # 86 % of human turns in chitchat are no longer
PER_LONG_WORD = 0.05
STACK_SHARE, STACK_FROM = (
    1 / 3,
    2,
)  # positive words beyond a third of the answer, and beyond two, are stacked
PER_STACKED_WORD = 0.2


class Sentiment:
    """The quickstart's simulated labeler: how friendly an answer sounds, less what makes an answer degenerate.

      gold(answer) = VADER(answer) - empty - repeated - long - stacked

      empty    = 1 if the answer has no words (then nothing else is taken off)
      repeated = min(1, max(0, r1 - 0.25) + r2)         rn: share of the n-grams that were there before
      long     = min(1, 0.05 x (words - 30)+)
      stacked  = min(1, 0.2 x (positive words - max(2, words / 3))+)

    VADER is its compound score in [-1, 1]: lexicon valences with rules for negation, boosters and capitals, summed
    to s, then s / sqrt(s^2 + 15). It grows with every further positive word, so a policy that maximizes it says
    "great great great" or "love happy best win", at length; the penalties take away more than those gain, and are
    linear up to a ceiling, so that a little less of it is a little better. The prompt is not looked at.

    Source of VADER: Hutto & Gilbert 2014 (the `vaderSentiment` package). The penalties are ours; the constants are set
    by what human turns in chitchat do, most of which lose nothing.

    Raises:
      DataError: vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise DataError(
                "gold:sentiment: the vaderSentiment package is not installed; pip install 'rlhfjax[quickstart]'"
            ) from None
        self._vader: Any = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Scores each response, float32 [n]; the prompts must be as many."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        return np.array(
            [self.score(response) for response in responses], dtype=np.float32
        )

    def score(self, answer: str) -> float:
        """The gold reward of one answer, at most 1."""
        parts = self.explain(answer)
        return parts.pop("sentiment") - sum(parts.values())

    def explain(self, answer: str) -> dict[str, float]:
        """The terms of the formula by name: `sentiment`, and the penalties, which are subtracted."""
        tokens = words(answer)
        if not tokens:
            return {
                "sentiment": 0.0,
                "empty": 1.0,
                "repeated": 0.0,
                "long": 0.0,
                "stacked": 0.0,
            }
        positive = sum(self._vader.lexicon.get(token, 0.0) > 0 for token in tokens)
        stacked = positive - max(STACK_FROM, STACK_SHARE * len(tokens))
        again = max(0.0, repeated_n(answer, 1) - REPEATED_WORDS_ALLOWED) + repeated_n(
            answer, 2
        )
        return {
            "sentiment": float(self._vader.polarity_scores(answer)["compound"]),
            "empty": 0.0,
            "repeated": min(1.0, again),
            "long": min(1.0, PER_LONG_WORD * max(0, len(tokens) - LONG_FROM_WORDS)),
            "stacked": min(1.0, PER_STACKED_WORD * max(0.0, stacked)),
        }
