"""Scores of conversations by a reward."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlhfjax.data.chat import render, render_prompt
from rlhfjax.data.padding import pad_left, pad_right
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.rewards.load import load_reward, models_of
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.responses import Reward
from rlhfjax.roles import DISK
from rlhfjax.serve.refused import Refused

SHORTEST = (
    16  # tokens that prompts and responses are padded to; the others are its doubles
)


class Scored(NamedTuple):
    """The scores of some conversations."""

    scores: list[float]
    tokens: int  # of all conversations


class Scorer:
    """Scores the last response of conversations, one at a time.

    Args:
      name: of the reward, for the replies.
    """

    def __init__(self, name: str, reward: Reward, tokenizer: Tokenizer):
        self.name, self._reward, self._tokenizer = name, reward, tokenizer
        self._lock = threading.Lock()
        self._longest = None
        if isinstance(reward, ModelReward):
            self._longest = reward.model.config.max_length

    def scores(self, conversations: Sequence[Sequence[dict[str, str]]]) -> Scored:
        """Returns the reward of each conversation's last response.

        Raises:
          Refused: a conversation does not end with a response, or is too long.
        """
        with self._lock:
            pairs = [self._tokens(messages) for messages in conversations]
            scores = [self._score(*pair) for pair in pairs]
        tokens = sum(len(prompt) + len(response) for prompt, response in pairs)
        return Scored(scores, tokens)

    def _tokens(self, messages: Sequence[dict[str, str]]) -> tuple[list, list]:
        """Returns the ids of the prompt and of the response, the end of its turn included."""
        if messages[-1]["role"] != "assistant":
            message = "messages: the last one must be the assistant's, which is scored"
            raise Refused(400, message, param="messages")
        try:
            prompt = render_prompt(self._tokenizer, messages[:-1]).tolist()
            tokens, mask = render(self._tokenizer, messages)
        except DataError as error:
            raise Refused(400, str(error), param="messages") from None
        is_response = (mask > 0) & (np.arange(len(tokens)) >= len(prompt))
        response = tokens[is_response].tolist()
        length = len(prompt) + len(response)
        if self._longest is not None and length > self._longest:
            raise Refused(
                400,
                f"the reward model has room for {self._longest} tokens, got {length}",
                code="context_length_exceeded",
                param="messages",
            )
        return prompt, response

    def _score(self, prompt: list, response: list) -> float:
        pad_id = self._tokenizer.pad_id
        p, r = self._lengths(len(prompt), len(response))
        left = pad_left([prompt], length=p, pad_id=pad_id)
        right = pad_right([response], length=r, pad_id=pad_id)
        tokens, attention_mask = np.concatenate([left, right], axis=2)
        mask = np.asarray(right[1], np.float32)
        rewards = self._reward(*jax.device_put((tokens, attention_mask, mask)))
        return float(np.asarray(rewards)[0])

    def _lengths(self, prompt: int, response: int) -> tuple[int, int]:
        """Returns what prompt and response are padded to: few lengths, each is compiled once."""
        p, r = _padded(prompt), _padded(response)
        if self._longest is None or p + r <= self._longest:
            return p, r
        return self._longest - response, response


def _padded(length: int) -> int:
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return padded


def load_scorer(source: str, layout: Layout, tokenizer: Tokenizer) -> Scorer:
    """Returns the scorer of a reward.

    Args:
      source: a reward model or another reward, as `reward` of a ppo config.
      tokenizer: of the policy, for rewards that are no models.
    Raises: as `load_reward` does.
    """
    for part in models_of(source, DISK):
        if part.head == "scalar" and isinstance(part.source, str):
            tokenizer = store.open_model(part.source, layout).tokenizer
    return Scorer(source, load_reward(source, layout, tokenizer), tokenizer)
