"""Pretraining: next-token loss on packed documents.

L(theta) = -1/|T| sum_{t in T} log p_theta(x_t | x_<t), T the tokens that have a predecessor in their own document.
"""

import dataclasses

from rlhfjax.data import loader
from rlhfjax.mesh import Layout
from rlhfjax.stages import Stage
from rlhfjax.stages.parts.common import SourceConfig, StreamConfig, begin, check_streams, open_sources, own_shards
from rlhfjax.stages.parts.language import language_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "pretrain"
    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()
    length: int
    cross_document: bool = False  # GPT-3 (App. B) attends across the documents of a window; we keep them apart


check = check_streams


def build(config: Config, layout: Layout) -> Stage:
    start = begin(config, layout)
    check(config, layout, start.model.config)
    options = {"batch_size": config.batch_size, "length": config.length, "cross_document": config.cross_document}
    train, held_out = (
        open_sources(config.sources, "pretrain.sources"),
        open_sources(config.eval_sources, "eval_sources"),
    )
    own = own_shards(config.data_shards, config.batch_size, layout)
    return language_stage(
        config,
        start,
        layout,
        batches=loader.pretrain_batches(train, start.tokenizer, seed=config.seed, shards=own, **options),
        held_out=loader.pretrain_batches(held_out, start.tokenizer, seed=0, train=False, **options),
        tokens=config.batch_size * config.length,
    )
