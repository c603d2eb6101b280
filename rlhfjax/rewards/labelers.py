"""Who labels answers: gold scorers, reward models, judges and people's rankings behind one protocol.

See `load.py` for labelers by name.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rlhfjax import hosts
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.rewards.rankings import Ranking
from rlhfjax.rewards.responses import Reward, texts


class Answers(NamedTuple):
    """k answers to each of p prompts: row i k + j is the j-th answer to prompt i."""

    tokens: Any  # [p k, prompt + response]
    segments: Any  # [p k, prompt + response]
    mask: Any  # [p k, response]
    prompts: list[str]  # p texts, chat markers included
    completions: list[list[str]]  # p times k texts

    @property
    def k(self) -> int:
        return len(self.completions[0])


def make_answers(
    tokens: Any, segments: Any, mask: Any, k: int, tokenizer: Tokenizer
) -> Answers:
    """Answers out of a rollout whose rows are k to a prompt."""
    host = (np.asarray(x) for x in hosts.whole((tokens, segments, mask)))
    prompts, completions = texts(tokenizer, *host)
    grouped = [completions[i : i + k] for i in range(0, len(completions), k)]
    return Answers(tokens, segments, mask, prompts[::k], grouped)


@runtime_checkable
class Labeler(Protocol):
    """Labels answers.

    Returns:
      float [p, k]: higher is better, equal is a tie, NaN is no opinion. What a number means beyond its order is the
      labeler's own: a reward, minus a rank, or log-probabilities whose differences are log-odds (judges).
    """

    def __call__(self, answers: Answers) -> np.ndarray: ...


class RewardLabeler:
    """A reward as a labeler: a gold scorer, a reward model, rules."""

    def __init__(self, reward: Reward):
        self._reward = reward

    def __call__(self, answers: Answers) -> np.ndarray:
        scores = hosts.whole(
            self._reward(answers.tokens, answers.segments, answers.mask)
        )
        return np.asarray(scores, np.float64).reshape(-1, answers.k)


class RankingsLabeler:
    """What people said of the same answers, found by prompt and text; NaN where they did not rank one.

    Ranks of one ranking only are compared with each other: of several of one prompt, the one with most of the answers.
    """

    def __init__(self, rankings: list[Ranking]):
        self._ranks: dict[str, list[dict[str, int]]] = {}
        for one in rankings:
            self._ranks.setdefault(one.key, []).append(
                dict(zip(one.completions, one.ranks, strict=True))
            )

    def __call__(self, answers: Answers) -> np.ndarray:
        return np.array(
            [
                self._label(*row)
                for row in zip(answers.prompts, answers.completions, strict=True)
            ]
        )

    def _label(self, prompt: str, texts: list[str]) -> list[float]:
        known = max(
            self._ranks.get(prompt, [{}]),
            key=lambda ranks: sum(text in ranks for text in texts),
        )
        return [-float(known.get(text, float("nan"))) for text in texts]
