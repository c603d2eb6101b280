"""Any reward by its name, as a function of sampled sequences: a reward model's workdir or a scorer of text."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.models import store
from rlhfjax.rewards import SCORERS, Scorer, load_scorer
from rlhfjax.rewards.model import ModelReward

Reward = Callable[[Any, Any, Any], Any]  # (tokens [n, p + r], segments [n, p + r], mask [n, r]) -> scores [n]


class TextReward:
    """Scores the text of each response on the host."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer):
        self.scorer, self.tokenizer = scorer, tokenizer

    def __call__(self, tokens: jax.Array, segments: jax.Array, mask: jax.Array) -> np.ndarray:
        tokens, segments, mask = (np.asarray(x) for x in jax.device_get((tokens, segments, mask)))
        prompts, responses = texts(self.tokenizer, tokens, segments, mask)
        return self.scorer(prompts, responses)


def texts(
    tokenizer: Tokenizer, tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray
) -> tuple[list[str], list[str]]:
    """The texts of prompts and responses; pads and eos leave nothing."""
    p = tokens.shape[1] - mask.shape[1]
    prompts = [tokenizer.decode(row[seg > 0].tolist()) for row, seg in zip(tokens[:, :p], segments[:, :p], strict=True)]
    responses = [tokenizer.decode(row[keep > 0].tolist()) for row, keep in zip(tokens[:, p:], mask, strict=True)]
    return prompts, responses


def load_reward(name: str, layout: Layout, tokenizer: Tokenizer) -> Reward:
    """A reward by name: one of the scorers of text, or the workdir of a reward stage.

    Raises:
      ConfigError: the model there has no scalar head, or another vocabulary.
      CheckpointError: there is no model.
    """
    if name in SCORERS:
        return TextReward(load_scorer(name), tokenizer)
    saved = store.load(name, layout)
    check_scalar(saved, tokenizer, name)
    return ModelReward(saved.model, saved.params)


def check_scalar(saved: store.SavedModel, tokenizer: Tokenizer, name: str) -> None:
    if saved.model.head != "scalar":
        raise ConfigError(f"{name}: a reward model is needed, this one has a {saved.model.head} head")
    if saved.model.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"{name}: the reward model has another vocabulary than the policy")


def known(names: Sequence[str] = tuple(SCORERS)) -> str:
    return ", ".join(names)
