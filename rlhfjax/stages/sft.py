"""Supervised fine-tuning: next-token loss on what the assistant says, in the chat template, packed.

L(theta) = -1/|A| sum_{t in A} log p_theta(x_t | x_<t), A the assistant's tokens and the eos of its turns.
"""

import dataclasses

from rlhfjax.data import loader
from rlhfjax.mesh import Layout
from rlhfjax.stages import Stage
from rlhfjax.stages.parts.common import SourceConfig, StreamConfig, begin, check_streams, open_sources, own_shards
from rlhfjax.stages.parts.language import language_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "sft"
    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()
    length: int


check = check_streams


def build(config: Config, layout: Layout) -> Stage:
    start = begin(config, layout)
    check(config, layout, start.model.config)
    options = {"batch_size": config.batch_size, "length": config.length}
    train, held_out = open_sources(config.sources, "sft.sources"), open_sources(config.eval_sources, "sft.eval_sources")
    own = own_shards(config.data_shards, config.batch_size, layout)
    return language_stage(
        config,
        start,
        layout,
        batches=loader.sft_batches(train, start.tokenizer, seed=config.seed, shards=own, **options),
        held_out=loader.sft_batches(held_out, start.tokenizer, seed=0, train=False, **options),
        tokens=config.batch_size * config.length,
    )
