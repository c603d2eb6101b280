"""Labelers of responses: a reward, or people's rankings, behind one protocol.

`feedback.py` has a judge as a labeler; `load.py` loads labelers by name.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rlhfjax import hosts
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.rewards.rankings import Ranking
from rlhfjax.rewards.responses import Reward, texts


class Answers(NamedTuple):
    """k responses to each of p prompts; row i k + j is the j-th response to prompt i."""

    tokens: Any  # [p k, prompt + response]
    attention_mask: Any  # [p k, prompt + response]
    mask: Any  # [p k, response]
    prompts: list[str]  # p texts with chat markers
    completions: list[list[str]]  # k texts for each of the p prompts

    @property
    def k(self) -> int:
        """Responses per prompt."""
        return len(self.completions[0])


def make_answers(
    tokens: Any, attention_mask: Any, mask: Any, k: int, tokenizer: Tokenizer
) -> Answers:
    """Returns the responses of a rollout that has k consecutive rows per prompt."""
    on_host = [np.asarray(x) for x in hosts.whole((tokens, attention_mask, mask))]
    prompts, completions = texts(tokenizer, *on_host)
    starts = range(0, len(completions), k)
    grouped = [completions[i : i + k] for i in starts]
    return Answers(tokens, attention_mask, mask, prompts[::k], grouped)


@runtime_checkable
class Labeler(Protocol):
    """Labels responses.

    Returns:
      float [p, k]: higher is better, equal is a tie, NaN is no opinion. The unit depends on the
      labeler: a reward, minus a rank, or numbers whose differences are log-odds (judges).
    """

    def __call__(self, answers: Answers) -> np.ndarray: ...


class RewardLabeler:
    """Labels responses with the scores of a reward."""

    def __init__(self, reward: Reward):
        self._reward = reward

    def __call__(self, answers: Answers) -> np.ndarray:
        """Returns the scores, float64 [p, k]."""
        scores = self._reward(answers.tokens, answers.attention_mask, answers.mask)
        return np.asarray(hosts.whole(scores), np.float64).reshape(-1, answers.k)


class RankingsLabeler:
    """Labels responses with people's ranks, found by prompt and text; NaN for unranked responses.

    Ranks are compared within one ranking. If a prompt has several, the one with most of the
    responses counts.
    """

    def __init__(self, rankings: list[Ranking]):
        self._ranks: dict[str, list[dict[str, int]]] = {}  # by prompt: text to rank
        for ranking in rankings:
            ranks = dict(zip(ranking.completions, ranking.ranks, strict=True))
            self._ranks.setdefault(ranking.key, []).append(ranks)

    def __call__(self, answers: Answers) -> np.ndarray:
        """Returns minus the ranks, float64 [p, k]."""
        prompts = zip(answers.prompts, answers.completions, strict=True)
        return np.array(
            [self._label(prompt, responses) for prompt, responses in prompts]
        )

    def _label(self, prompt: str, responses: list[str]) -> list[float]:
        known = max(
            self._ranks.get(prompt, [{}]),
            key=lambda ranks: sum(response in ranks for response in responses),
        )
        return [-float(known.get(response, np.nan)) for response in responses]
