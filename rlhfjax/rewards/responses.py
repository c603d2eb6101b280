"""What rewards of sampled responses share: their types, and scorers of text as rewards."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import chat
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.programs import Rows, on_host
from rlhfjax.types import Metrics


@runtime_checkable
class Reward(Protocol):
    """Scores sampled responses; higher is better.

    Args:
      tokens, attention_mask: [n, p + r], prompts and responses.
      mask: [n, r], 1 on the tokens of the responses.

    Returns:
      Scores [n]. A score depends on its own prompt and response only.
    """

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows, /) -> Rows: ...


Scored = tuple[Rows, dict[str, Any]]
"""Scores [n] with metrics: (sum, weight) by name, or shapes of them where a step is recorded."""


@runtime_checkable
class RewardWithMetrics(Reward, Protocol):
    """A reward with metrics of its own: disagreement, components, failures."""

    def with_metrics(
        self, tokens: Rows, attention_mask: Rows, mask: Rows, /
    ) -> Scored: ...


@runtime_checkable
class Scorer(Protocol):
    """Scores responses as text; higher is better. `TextReward` makes a reward of it.

    Args:
      prompts: n texts with chat markers.
      responses: n texts without special tokens.

    Returns:
      float32 [n]. A score depends on its own prompt and response only.
    """

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> np.ndarray: ...


@runtime_checkable
class ScorerWithMetrics(Scorer, Protocol):
    """A scorer with metrics of its own."""

    def with_metrics(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[np.ndarray, Metrics]: ...


@runtime_checkable
class BatchScorer(Scorer, Protocol):
    """A scorer that needs the outcomes of a whole batch for its metrics, or to find an error."""

    def outcomes(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Any]:
        """Returns one picklable outcome per response, of a host's own rows."""
        ...

    def summarize(self, outcomes: Sequence[Any]) -> tuple[np.ndarray, Metrics]:
        """Returns the scores [n] and metrics of all rows; every host calls it alike."""
        ...


ScoringHosts = Literal["every", "first", "together"]
"""Which hosts score: each its own rows; the first one all rows; or all hosts all rows together,
as a model on the mesh needs it."""


_HostScored = tuple[np.ndarray, Metrics]


class TextReward:
    """Scores the text of each response; every host has all scores.

    Args:
      hosts: which hosts score.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: Tokenizer, hosts: ScoringHosts = "every"
    ):
        self.scorer, self.tokenizer = scorer, tokenizer
        self._hosts = hosts

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns the scores [n]."""
        return self.with_metrics(tokens, attention_mask, mask)[0]

    def with_metrics(
        self,
        tokens: Rows,
        attention_mask: Rows,
        mask: Rows,
        counts: Rows | None = None,
    ) -> Scored:
        """Returns the scores [n] and the scorer's metrics, empty where it has none.

        Args:
          counts: [n], 0 for responses that are not scored; None: all are.
        """
        scored = on_host(
            self._scores_and_metrics, lambda *rows: (score_shapes(*rows[:3]), {})
        )
        return scored(tokens, attention_mask, mask, counts)

    def _scores_and_metrics(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array,
        mask: jax.Array,
        counts: Any,
    ) -> Scored:
        arrays = hosts.whole((tokens, attention_mask, mask))
        rows = [np.asarray(x) for x in arrays]
        if counts is None:
            return self._share_scores(rows)
        # A rule may have no metadata where it does not count: there it must not fail.
        chosen = np.flatnonzero(np.asarray(hosts.whole(counts)) > 0)
        scores = np.zeros(len(rows[0]), np.float32)
        if not len(chosen):
            return scores, {}
        scores[chosen], metrics = self._share_scores([x[chosen] for x in rows])
        return scores, metrics

    def _share_scores(self, rows: Sequence[np.ndarray]) -> _HostScored:
        """Returns the scores [n] and metrics of all rows, on every host."""
        if self._hosts == "together":
            return self._score(rows)
        if self._hosts == "first":
            return hosts.share(lambda: self._score(rows))
        if isinstance(self.scorer, BatchScorer):
            outcomes = hosts.share_all(lambda: self._own_outcomes(rows))
            return self.scorer.summarize([one for part in outcomes for one in part])
        parts = hosts.share_all(lambda: self._score_own(rows))
        scores = np.concatenate([scores for scores, _ in parts])
        return scores, _summed([metrics for _, metrics in parts])

    def _score(self, rows: Sequence[np.ndarray]) -> _HostScored:
        prompts, responses = texts(self.tokenizer, *rows)
        if isinstance(self.scorer, ScorerWithMetrics):
            return self.scorer.with_metrics(prompts, responses)
        return self.scorer(prompts, responses), {}

    def _score_own(self, rows: Sequence[np.ndarray]) -> _HostScored:
        own = _own(rows)
        return self._score(own) if len(own[0]) else (np.zeros(0, np.float32), {})

    def _own_outcomes(self, rows: Sequence[np.ndarray]) -> list[Any]:
        assert isinstance(self.scorer, BatchScorer)
        return self.scorer.outcomes(*texts(self.tokenizer, *_own(rows)))


def _own(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns this host's part of the rows."""
    own = hosts.own_rows(len(rows[0]))
    return [x[own] for x in rows]


def _summed(parts: Sequence[Metrics]) -> Metrics:
    """Returns metrics whose sums and weights are those of all parts."""
    total: Metrics = {}
    for part in parts:
        for name, (value, weight) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + weight)
    return total


def score_shapes(
    tokens: Rows, attention_mask: Rows, mask: Rows
) -> jax.ShapeDtypeStruct:
    """Returns the shape of scores [n] that are computed on the host."""
    return jax.ShapeDtypeStruct((mask.shape[0],), np.float32)


def score(reward: Reward, tokens: Rows, attention_mask: Rows, mask: Rows) -> Scored:
    """Returns the scores [n] of a reward and its metrics, empty where it has none."""
    if isinstance(reward, RewardWithMetrics):
        return reward.with_metrics(tokens, attention_mask, mask)
    return reward(tokens, attention_mask, mask), {}


def texts(
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    attention_mask: np.ndarray,
    mask: np.ndarray,
) -> tuple[list[str], list[str]]:
    """Returns the texts of prompts, with chat markers (`chat.prompt_text`), and of responses.

    Padding and eos are left out.
    """
    p = tokens.shape[1] - mask.shape[1]
    prompts, responses = [], []
    for ids, segment, counts in zip(tokens, attention_mask, mask, strict=True):
        prompt = ids[:p][segment[:p] > 0]
        prompts.append(chat.prompt_text(tokenizer, prompt.tolist()))
        responses.append(tokenizer.decode(ids[p:][counts > 0].tolist()))
    return prompts, responses


def validate_reward_model(
    saved: store.SavedModel | store.Opened, tokenizer: Tokenizer, name: str
) -> None:
    """Validates that a model can score responses of the policy that has this tokenizer.

    Raises:
      ConfigError: it has no scalar head, or fewer token ids than the tokenizer.
    """
    model = saved.model
    if model.head != "scalar":
        raise ConfigError(
            f"{name}: expected a reward model, got one with a {model.head} head"
        )
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{name}: the reward model has {model.config.vocab_size} token ids,"
            f" the policy's tokenizer {tokenizer.vocab_size}"
        )
