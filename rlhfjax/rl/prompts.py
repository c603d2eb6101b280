"""Prompts for the stages that sample responses, and the pretraining text of PPO-ptx."""

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
    """Prompts: rows of kind prompt, or prefixes of conversations (kind messages).

    A prefix ends with a user's turn.
    """

    source: SourceConfig | None = None
    """Where the prompts are; required in stages that sample."""
    per_conversation: Count = 1
    """Prefixes per conversation; 0 takes all."""
    limit: Count = 0
    """Number of prompts; 0 takes all."""


def open_prompts(config: PromptConfig, option: str, seed: int = 0) -> Source:
    """Opens the prompts of a config option. Raises ConfigError if it names no source."""
    if config.source is None:
        raise ConfigError(f"{option}.source: a value is required")
    source = config.source.open()
    if source.kind == "messages":
        per_conversation = config.per_conversation or None
        source = Prompts(source, per_conversation=per_conversation, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.BatchStream:
    """Returns endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    source = open_prompts(config, f"{stage.stage}.prompts")
    return loader.prompt_batches(
        source,
        tokenizer,
        batch_size=stage.batch_size,
        length=stage.prompt_length,
        seed=stage.seed,
        train=True,
    )


def held_out_prompts(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.BatchStream:
    """Returns one pass over held-out prompts, in order, in batches of at most `stage.episodes`."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts")
    # Few prompts make a smaller batch, in a multiple of 8 that devices can share.
    size = min(stage.episodes, -(-len(source) // 8) * 8)
    return loader.prompt_batches(
        source, tokenizer, train=False, batch_size=size, length=stage.prompt_length
    )


def prompt_metrics(prompts: PromptBatch) -> Metrics:
    """Returns the share of an iteration's prompts that lost tokens."""
    share_cut = small(lambda cut: (cut.sum(), jnp.float32(cut.size)))
    return {"prompts_cut": share_cut(prompts.cut)}


# ------------------------------------------------------------------ PPO-ptx: text beside prompts


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """gamma E[log pi(x)] over pretraining text; its gradient is added to PPO's per minibatch.

    The paper's gamma, 27.8, comes without a unit. Here `unit` says what gamma multiplies.

    Source: Ouyang et al. 2022, eq. 2.
    """

    coefficient: NonNegative = 0.0
    """Weight gamma of the pretraining loss; 0 is off."""
    unit: Literal["token", "sequence"] = "token"
    """Whether gamma multiplies nats per token or nats per sequence."""
    ratio: Size = 8
    """Sequences of text per episode of an iteration (InstructGPT C.4: 8)."""
    length: TokensOrNone = 0
    """Tokens per sequence."""
    data_shards: Size = 1
    """Streams that the text comes in, as in a StreamConfig."""
    sources: tuple[SourceConfig, ...] = ()
    """Where the text is."""


def policy_batches(
    config: PtxConfig,
    prompts: Batches,
    tokenizer: Tokenizer,
    stage: Any,
    layout: Layout,
) -> loader.Joined:
    """Returns a stream of PolicyBatch: every prompt `samples_per_prompt` times, and the text."""

    def make(prompts: PromptBatch, text: TokenBatch | None = None) -> PolicyBatch:
        return PolicyBatch(prompts=repeat(prompts, stage.samples_per_prompt), text=text)

    # Checkpoints store the streams' positions by these names.
    if not config.coefficient:
        return loader.Joined(make, {"": prompts})
    if not config.length:
        raise ConfigError(
            f"{stage.stage}.ptx.length=0: must be > 0 with a ptx.coefficient"
        )
    size = stage.episodes * config.ratio
    text = loader.pretrain_batches(
        open_sources(config.sources, f"{stage.stage}.ptx.sources"),
        tokenizer,
        batch_size=size,
        length=config.length,
        seed=stage.seed + PRETRAINING_MIX,
        shards=own_shards(config.data_shards, size, layout),
    )
    return loader.Joined(make, {"": prompts, "ptx/": text})


def batch_shapes(config: PtxConfig, episodes: int, prompt_length: int) -> PolicyBatch:
    """Returns the shapes of an iteration's batch."""
    text = None
    if config.coefficient:
        text = shapes(TokenBatch, b=episodes * config.ratio, t=config.length)
    prompts = shapes(PromptBatch, b=episodes, t=prompt_length)
    return PolicyBatch(prompts=prompts, text=text)
