"""Prompts for the stages that sample responses, and the pretraining text of PPO-ptx."""

import jax.numpy as jnp

from rlhfjax.data import loader
from rlhfjax.data.accepted import accepted, validate_prompt
from rlhfjax.data.batches import PolicyBatch, PromptBatch, TokenBatch, repeat, shapes
from rlhfjax.data.config import (
    Limited,
    open_mixture,
    own_shards,
    validate_without_weight,
)
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.programs import small
from rlhfjax.rl.config import PolicyConfig, PromptConfig, PtxConfig
from rlhfjax.stage import Batches
from rlhfjax.streams import PRETRAINING_MIX
from rlhfjax.types import Metrics


def open_prompts(
    config: PromptConfig, option: str, tokenizer: Tokenizer, seed: int = 0
) -> Source:
    """Returns the prompts of a config option that the tokenizer's chat template takes.

    Raises:
      ConfigError: the option names no source.
      DataError: a row is malformed, or the template refuses it.
    """
    source = read_prompts(config, option, seed)
    return accepted(source, tokenizer, validate_prompt)


def read_prompts(config: PromptConfig, option: str, seed: int = 0) -> Source:
    """Returns all prompts of a config option. Raises as `open_prompts` does."""
    if config.source is None:
        raise ConfigError(f"{option}.source: a value is required")
    validate_without_weight(config.source, f"{option}.source")
    source = config.source.open()
    if source.kind == "messages":
        takes_all = config.per_conversation == 0
        per_conversation = None if takes_all else config.per_conversation
        source = Prompts(source, per_conversation=per_conversation, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(
    config: PromptConfig, tokenizer: Tokenizer, stage: PolicyConfig
) -> loader.BatchStream:
    """Returns endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    source = open_prompts(config, f"{stage.stage}.prompts", tokenizer)
    return loader.prompt_batches(
        source,
        tokenizer,
        batch_size=stage.batch_size,
        length=stage.prompt_length,
        seed=stage.seed,
        train=True,
    )


def held_out_prompts(
    config: PromptConfig, tokenizer: Tokenizer, stage: PolicyConfig
) -> loader.BatchStream:
    """Returns one pass over held-out prompts, in order, in batches of at most `stage.episodes`."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts", tokenizer)
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


def policy_batches(
    config: PtxConfig,
    prompts: Batches,
    tokenizer: Tokenizer,
    stage: PolicyConfig,
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
        open_mixture(config.sources, f"{stage.stage}.ptx.sources"),
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
