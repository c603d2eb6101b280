"""Stages to plan whose model_configs are given in a test."""

from typing import Any

from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.origins import Origins, roles_of
from rlhfjax.plan.shapes import Shapes, Subject


def subject_of(config: Any, **models: TransformerConfig) -> Subject:
    """Returns a stage to plan.

    Args:
      models: the model_configs of its language models and rewards, by source.
    """
    origins = Origins({})
    roles = origins.single(roles_of(config))
    heads = {role.source: role.head for role in roles.values() if role.optim is None}
    known = {
        source: Model(shape, heads.get(source, "lm"))
        for source, shape in models.items()
    }
    return Subject(config.stage, config, Shapes(known, origins), roles)
