"""Prompts for the stages that sample responses, and the text beside them that PPO-ptx trains on."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from rlhfjax.data import loader
from rlhfjax.data.batches import PolicyBatch, PromptBatch, TokenBatch, repeat, shapes
from rlhfjax.data.config import Limited, SourceConfig, open_sources, own_shards
from rlhfjax.data.examples import Prompts
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.programs import small
from rlhfjax.ranges import Count, NonNegative, Size, TokensOrNone
from rlhfjax.stage import Batches
from rlhfjax.streams import PRETRAINING_MIX
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompts: rows of kind prompt as they are, or prefixes of conversations (kind messages) that end with a user."""

    source: SourceConfig | None = None
    per_conversation: Count = 1  # prefixes of one conversation, 0: all
    limit: Count = 0  # prompts, 0: all


def open_prompts(config: PromptConfig, what: str, seed: int = 0) -> Source:
    if config.source is None:
        raise ConfigError(f"{what}.source: prompts are needed")
    source = config.source.open()
    if source.kind == "messages":
        most = config.per_conversation if config.per_conversation > 0 else None
        source = Prompts(source, per_conversation=most, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.BatchStream:
    """Endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    source = open_prompts(config, f"{stage.stage}.prompts")
    options = {
        "batch_size": stage.batch_size,
        "length": stage.prompt_length,
        "seed": stage.seed,
    }
    return loader.prompt_batches(source, tokenizer, train=True, **options)


def held_out_prompts(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.BatchStream:
    """One pass over held-out prompts, in order."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts")
    size = stage.episodes
    if len(source) < size:
        size = min(size, -(-len(source) // 8) * 8)
    return loader.prompt_batches(
        source, tokenizer, train=False, batch_size=size, length=stage.prompt_length
    )


def prompt_metrics(prompts: PromptBatch) -> Metrics:
    """Returns the share of an iteration's prompts that lost tokens."""
    share_cut = small(lambda cut: (cut.sum(), jnp.float32(cut.size)))
    return {"prompts_cut": share_cut(prompts.cut)}


# ------------------------------------------------------------------ PPO-ptx: text beside the prompts


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """gamma E[log pi(x)] over pretraining text, its gradient added to PPO's in every minibatch.

    The paper's gamma, 27.8, comes without a unit; here it multiplies nats per token or nats per sequence: see `unit`.
    """

    coefficient: NonNegative = 0.0  # 0: off
    unit: Literal["token", "sequence"] = "token"
    ratio: Size = (
        8  # sequences of text for every episode, over an iteration (InstructGPT C.4: 8)
    )
    length: TokensOrNone = 0  # tokens of a sequence
    data_shards: Size = 1  # streams that the text comes in, as of a StreamConfig
    sources: tuple[SourceConfig, ...] = ()


def policy_batches(
    config: PtxConfig,
    prompts: Batches,
    tokenizer: Tokenizer,
    stage: Any,
    layout: Layout,
) -> loader.Joined:
    """Returns PolicyBatches: the prompts, `samples_per_prompt` times each, and PPO-ptx's text."""

    def make(prompts: PromptBatch, text: TokenBatch | None = None) -> PolicyBatch:
        return PolicyBatch(prompts=repeat(prompts, stage.samples_per_prompt), text=text)

    # The names of the streams stand in checkpoints.
    if not config.coefficient:
        return loader.Joined(make, {"": prompts})
    if not config.length:
        raise ConfigError(
            f"{stage.stage}.ptx.length: the mix needs the length of its sequences"
        )
    size = stage.episodes * config.ratio
    source = open_sources(config.sources, f"{stage.stage}.ptx.sources")
    own = own_shards(config.data_shards, size, layout)
    options = {
        "batch_size": size,
        "length": config.length,
        "seed": stage.seed + PRETRAINING_MIX,
        "shards": own,
    }
    text = loader.pretrain_batches(source, tokenizer, **options)
    return loader.Joined(make, {"": prompts, "ptx/": text})


def batch_shapes(config: PtxConfig, episodes: int, prompt_length: int) -> PolicyBatch:
    """Returns the shapes of an iteration's batch."""
    text = None
    if config.coefficient:
        text = shapes(TokenBatch, b=episodes * config.ratio, t=config.length)
    prompts = shapes(PromptBatch, b=episodes, t=prompt_length)
    return PolicyBatch(prompts=prompts, text=text)
