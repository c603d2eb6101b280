"""Prompts for the stages that sample answers."""

import dataclasses
from typing import Any

import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.config import Limited, SourceConfig
from rlhfjax.data.examples import Prompts
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.stage import Batches, Shapes, row_shapes


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompts: rows of kind prompt as they are, or prefixes of conversations (kind messages) that end with a user."""

    source: SourceConfig | None = None
    per_conversation: int = 1  # prefixes of one conversation, 0: all
    limit: int = 0  # prompts, 0: all


def open_prompts(config: PromptConfig, what: str, seed: int = 0) -> Source:
    if config.source is None:
        raise ConfigError(f"{what}.source: prompts are needed")
    source = config.source.open()
    if source.kind == "messages":
        most = config.per_conversation if config.per_conversation > 0 else None
        source = Prompts(source, per_conversation=most, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(config: PromptConfig, tokenizer: Tokenizer, stage: Any) -> loader.Batches:
    """Endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    source = open_prompts(config, f"{stage.stage}.prompts")
    options = {"batch_size": stage.batch_size, "length": stage.prompt_length, "seed": stage.seed}
    return loader.prompt_batches(source, tokenizer, train=True, **options)


class Repeated:
    """Every row of a stream of batches `times` times, one after the other: a group of answers to each prompt."""

    def __init__(self, batches: Batches, times: int):
        self._batches, self._times = batches, times

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: np.repeat(rows, self._times, axis=0) for name, rows in next(self._batches).items()}

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


def held_out_prompts(config: PromptConfig, tokenizer: Tokenizer, stage: Any) -> loader.Batches:
    """One pass over held-out prompts, in order."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts")
    size = stage.episodes
    if len(source) < size:
        size = min(size, -(-len(source) // 8) * 8)
    return loader.prompt_batches(source, tokenizer, train=False, batch_size=size, length=stage.prompt_length)


def prompt_shapes(size: int, length: int) -> Shapes:
    """Returns the shapes of a batch of prompts."""
    row = (length,)
    return row_shapes(
        size,
        prompts=(row, np.int32),
        segments=(row, np.int32),
        index=((), np.int32),
        cut=((), np.float32),
    )
