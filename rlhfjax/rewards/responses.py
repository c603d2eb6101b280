"""What rewards of sampled sequences share: their type, scorers of text as rewards, and names in
reward.json. See `load.py` for rewards by name."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts, paths
from rlhfjax.data import chat
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.paths import Path
from rlhfjax.programs import Rows, on_host
from rlhfjax.rewards import Scorer
from rlhfjax.roles import REWARD

Reward = Callable[
    [Any, Any, Any], Any
]  # (tokens [n, p + r], segments [n, p + r], mask [n, r]) -> scores [n]
Pairs = dict[str, tuple[Any, Any]]
FILE = (
    REWARD  # left by a stage that describes a reward: {"kind": ..., ...}, see `load.py`
)


class TextReward:
    """Scores the text of each response on the first host, which tells the others."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer):
        self.scorer, self.tokenizer = scorer, tokenizer

    def __call__(self, tokens: Rows, segments: Rows, mask: Rows) -> Rows:
        return on_host(self._scores, score_shapes)(tokens, segments, mask)

    def with_metrics(
        self, tokens: Rows, segments: Rows, mask: Rows
    ) -> tuple[Rows, Pairs]:
        """Scores, and what the scorer says of them where it says anything."""
        if not hasattr(self.scorer, "with_metrics"):
            return self(tokens, segments, mask), {}
        scored = on_host(
            self._scores_and_metrics, lambda *rows: (score_shapes(*rows), {})
        )
        return scored(tokens, segments, mask)

    def _scores(self, *arrays: jax.Array) -> np.ndarray:
        rows = self._texts(*arrays)
        return hosts.share(lambda: self.scorer(*rows))

    def _scores_and_metrics(self, *arrays: jax.Array) -> tuple[Rows, Pairs]:
        rows = self._texts(*arrays)
        return hosts.share(lambda: self.scorer.with_metrics(*rows))

    def _texts(self, *arrays: jax.Array) -> tuple[list[str], list[str]]:
        return texts(self.tokenizer, *(np.asarray(x) for x in hosts.whole(arrays)))


def score_shapes(tokens: Any, segments: Any, mask: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of scores [n] that come from the host."""
    return jax.ShapeDtypeStruct((mask.shape[0],), np.float32)


def score(reward: Reward, tokens: Any, segments: Any, mask: Any) -> tuple[Any, Pairs]:
    """Scores [n] and the reward's own metrics (disagreement, components, failures), empty where it has none."""
    if hasattr(reward, "with_metrics"):
        return reward.with_metrics(tokens, segments, mask)
    return reward(tokens, segments, mask), {}


def texts(
    tokenizer: Tokenizer, tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray
) -> tuple[list[str], list[str]]:
    """The texts of prompts, in our markers (`chat.prompt_text`), and of responses; pads and eos leave nothing."""
    p = tokens.shape[1] - mask.shape[1]
    prompts = [
        chat.prompt_text(tokenizer, row[seg > 0].tolist())
        for row, seg in zip(tokens[:, :p], segments[:, :p], strict=True)
    ]
    responses = [
        tokenizer.decode(row[keep > 0].tolist())
        for row, keep in zip(tokens[:, p:], mask, strict=True)
    ]
    return prompts, responses


def beside(name: str, folder: Path) -> str:
    """A name as reward.json keeps it: a path is relative to its folder, so that a recipe's workdir can be moved."""
    return paths.relative(name, folder)


def found(name: str, folder: Path) -> str:
    """What `beside` kept, as it is reached from here."""
    there = paths.within(folder, name)
    return str(there) if there.exists() else name


def check_scalar(saved: store.SavedModel, tokenizer: Tokenizer, name: str) -> None:
    if saved.model.head != "scalar":
        raise ConfigError(
            f"{name}: a reward model is needed, this one has a {saved.model.head} head"
        )
    if saved.model.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{name}: the reward model has another vocabulary than the policy"
        )
