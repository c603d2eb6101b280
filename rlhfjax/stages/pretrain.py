"""Pretraining: next-token loss on packed documents.

L(theta) = -1/|T| sum_{t in T} log p_theta(x_t | x_<t)

where T are the tokens that have a predecessor in their own document.
"""

import dataclasses
import functools

from rlhfjax.data.batches import TokenBatch
from rlhfjax.data.config import SourceConfig, open_sources, own_shards
from rlhfjax.data.loader import BatchStream, pretrain_batches
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
    """The options of pretraining."""

    stage: str = "pretrain"
    """Name of the stage."""
    sources: tuple[SourceConfig, ...] = ()
    """Documents to train on."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out documents."""
    cross_document: bool = False
    """Let a token attend to earlier documents of its row, as GPT-3 does (appendix B)."""


validate = validate_streams


def workload(config: Config, completions: int = 1) -> Workload:
    return supervised_workload(config)


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config)}


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    def open_batches(tokenizer: Tokenizer) -> tuple[BatchStream, BatchStream]:
        train = open_sources(config.sources, "pretrain.sources")
        held_out = open_sources(config.eval_sources, "pretrain.eval_sources")
        batches = functools.partial(
            pretrain_batches,
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            length=config.length,
            cross_document=config.cross_document,
        )
        shards = own_shards(config.data_shards, config.batch_size, layout)
        return (
            batches(train, seed=config.seed, shards=shards),
            batches(held_out, train=False),
        )

    shapes = TokenBatch.shapes(config.batch_size, config.length)
    return language_stage(config, layout, roles(config), sources, open_batches, shapes)
