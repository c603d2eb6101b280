"""Supervised fine-tuning: next-token loss on the assistant's turns, in the chat template, packed.

L(theta) = -1/|A| sum_{t in A} log p_theta(x_t | x_<t)

where A are the assistant's tokens and the eos of its turns.
"""

import dataclasses
import functools

from rlhfjax.data.batches import TokenBatch
from rlhfjax.data.config import SourceConfig, open_sources, own_shards
from rlhfjax.data.loader import BatchStream, sft_batches
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.mesh import Layout
from rlhfjax.roles import DISK, Role, Sources, Workload
from rlhfjax.stage import Stage
from rlhfjax.supervised import (
    MODEL,
    StreamConfig,
    language_stage,
    supervised_workload,
    trained_role,
    validate_streams,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """The options of supervised fine-tuning."""

    stage: str = "sft"
    """Name of the stage."""
    sources: tuple[SourceConfig, ...] = ()
    """Conversations to train on."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out conversations."""


validate = validate_streams


def workload(config: Config, completions: int = 1) -> Workload:
    return supervised_workload(config)


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config)}


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    def open_batches(tokenizer: Tokenizer) -> tuple[BatchStream, BatchStream]:
        train = open_sources(config.sources, "sft.sources")
        held_out = open_sources(config.eval_sources, "sft.eval_sources")
        batches = functools.partial(
            sft_batches,
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            length=config.length,
        )
        shards = own_shards(config.data_shards, config.batch_size, layout)
        return (
            batches(train, seed=config.seed, shards=shards),
            batches(held_out, train=False),
        )

    shapes = TokenBatch.shapes(config.batch_size, config.length, cut=True)
    return language_stage(config, layout, roles(config), sources, open_batches, shapes)
