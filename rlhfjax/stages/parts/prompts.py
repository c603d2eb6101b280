"""Prompts for the stages that sample answers."""

import dataclasses
from pathlib import Path
from typing import Any

from rlhfjax.data import loader
from rlhfjax.data.examples import Prompts
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.stages.parts.common import Limited, SourceConfig


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
        source = Prompts(source, per_conversation=config.per_conversation or None, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(
    config: PromptConfig, tokenizer_file: Path, stage: Any
) -> tuple[loader.Batches, SentencePieceTokenizer]:
    """Endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    tokenizer = load_tokenizer(tokenizer_file)
    source = open_prompts(config, f"{stage.stage}.prompts")
    options = {"batch_size": stage.batch_size, "length": stage.prompt_length, "seed": stage.seed}
    return loader.prompt_batches(source, tokenizer, train=True, **options), tokenizer


def held_out_prompts(config: PromptConfig, tokenizer: SentencePieceTokenizer, stage: Any) -> loader.Batches:
    """One pass over held-out prompts, in order."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts")
    size = min(stage.batch_size, -(-len(source) // 8) * 8) if len(source) < stage.batch_size else stage.batch_size
    return loader.prompt_batches(source, tokenizer, train=False, batch_size=size, length=stage.prompt_length)
