"""Describes models before they are made by a recipe's stages, and models on disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhfjax import paths, stages
from rlhfjax.config import build, to_dict
from rlhfjax.errors import CheckpointError
from rlhfjax.footprint import Net
from rlhfjax.interop import store
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.rewards.load import models_of
from rlhfjax.roles import Role, Roles


class Unknown(CheckpointError):
    """An earlier stage of the recipe makes the model, and its model_config is not known yet."""


class Origins:
    """Describes models by their sources.

    Args:
      configs: typed configs of the recipe's earlier stages by their folders.
    """

    def __init__(self, configs: Mapping[str, Any]):
        self._configs = configs

    def describe(self, source: str) -> Model:
        """Returns a model as it will be loaded.

        Raises:
          Unknown: an earlier stage makes it, and its model_config is not known yet.
          CheckpointError: there is no such model.
        """
        if source in self._configs:
            config = self._configs[source]
            if not leaves_model(config.stage):
                raise CheckpointError(
                    f"{source}: the stage {config.stage} leaves no model"
                )
            for role in roles_of(config).values():
                return self.of_role(role, f"{config.stage}.overrides")
            raise Unknown(f"{source}: the stage {config.stage} declares no model")
        if any(paths.path(source).is_relative_to(folder) for folder in self._configs):
            raise Unknown(f"{source}: a file of an earlier stage")
        return store.describe(source)

    def of_role(self, role: Role, context: str) -> Model:
        """Returns the model of a role, its `overrides` applied."""
        if isinstance(role.source, TransformerConfig):
            return Model(role.source, role.head, role.lora)
        config = self.describe(str(role.source)).config
        if role.overrides:
            values = dataclasses.asdict(config) | dict(role.overrides)
            config = build(TransformerConfig, values, context)
        return Model(config, role.head)

    def described(self, source: str) -> dict[str, Any] | None:
        """Returns the contents of a `reward.json`, as it is or will be; None if there is none."""
        config = self._configs.get(source)
        if config is None:
            return store.described(source)
        describe = getattr(stages.find(config.stage), "describe", None)
        return None if describe is None else to_dict(describe(config))

    def nets(self, roles: Roles, context: str) -> list[Net]:
        """Returns the roles whose models are known, one per model of a reward.

        Raises:
          CheckpointError: the model of the first role is not known.
        """
        nets = []
        for name, role in self.single(roles).items():
            try:
                model = self.of_role(role, f"{context}.overrides")
            except CheckpointError:
                if name == next(iter(roles)):
                    raise
                continue
            nets.append(Net(name, role, model.config))
        return nets

    def single(self, roles: Roles) -> dict[str, Role]:
        """Returns roles of one model each: none for a reward that is not a model."""
        single: dict[str, Role] = {}
        for name, role in roles.items():
            if not role.scores or isinstance(role.source, TransformerConfig):
                single[name] = role
                continue
            models = models_of(role.source, self)
            if role.optim is not None:  # a value function starts from the first
                models = [model._replace(suffix="") for model in models[:1]]
            for model in models:
                single[name + model.suffix] = role._replace(
                    source=model.source, head=model.head, scores=False
                )
        return single


def roles_of(config: Any) -> Roles:
    """Returns the roles that a stage declares for its config."""
    declared = getattr(stages.find(config.stage), "roles", None)
    return declared(config) if declared else {}


def leaves_model(stage: str) -> bool:
    """Returns whether a stage leaves a model: all that train, and jobs that say so.

    A job outside of this package may leave one without saying it.
    """
    module = stages.find(stage)
    return hasattr(module, "build") or getattr(module, "LEAVES_MODEL", ":" in stage)
