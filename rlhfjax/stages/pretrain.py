"""Pretraining: next-token loss on packed documents.

L(theta) = -1/|T| sum_{t in T} log p_theta(x_t | x_<t)

where T are the tokens that have a predecessor in their own document.
"""

import dataclasses
import functools

from rlhfjax.data.batches import TokenBatch, shapes
from rlhfjax.data.loader import pretrain_batches
from rlhfjax.language import (
    LanguageConfig,
    language_roles,
    language_stage,
    language_workload,
    validate_language,
)
from rlhfjax.mesh import Layout
from rlhfjax.roles import DISK, Sources
from rlhfjax.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig):
    """The options of pretraining."""

    stage: str = "pretrain"
    """Name of the stage."""
    cross_document: bool = False
    """Let a token attend to earlier documents of its row, as GPT-3 does (appendix B)."""


MODEL_NAME = "pretrained"
roles = language_roles
workload = language_workload
validate = validate_language


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    load = functools.partial(pretrain_batches, cross_document=config.cross_document)
    batch = shapes(TokenBatch, b=config.batch_size, t=config.length)
    return language_stage(config, layout, sources, load, batch)
