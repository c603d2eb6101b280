"""Supervised fine-tuning: next-token loss on the assistant's turns, in the chat template, packed.

L(theta) = -1/|A| sum_{t in A} log p_theta(x_t | x_<t)

where A are the assistant's tokens and the eos of its turns.
"""

import dataclasses

import jax
import numpy as np

from rlhfjax.data.batches import TokenBatch, shapes
from rlhfjax.data.loader import sft_batches
from rlhfjax.mesh import Layout
from rlhfjax.roles import DISK, Sources
from rlhfjax.stage import Stage
from rlhfjax.supervised import (
    LanguageConfig,
    language_roles,
    language_stage,
    language_workload,
    validate_streams,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig):
    """The options of supervised fine-tuning."""

    stage: str = "sft"
    """Name of the stage."""


MODEL_NAME = "SFT"
roles = language_roles
workload = language_workload
validate = validate_streams


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    batch = shapes(TokenBatch, b=config.batch_size, t=config.length)
    cut = jax.ShapeDtypeStruct((config.batch_size,), np.float32)
    batch = dataclasses.replace(batch, cut=cut)
    return language_stage(config, layout, sources, sft_batches, batch)
