"""What models are made of before they are there: those of a recipe's stages, and those on the disk."""

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
    """A model that an earlier stage of the recipe will make, of a shape that nothing tells yet."""


class Origins:
    """Describes models by their sources.

    Args:
      configs: typed configs of a recipe's stages by their folders.
    """

    def __init__(self, configs: Mapping[str, Any]):
        self._configs = configs

    def describe(self, source: str) -> Model:
        """Returns a model as it will be loaded.

        Raises:
          Unknown: an earlier stage makes it, and its shape is not known yet.
          CheckpointError: there is no such model.
        """
        if source in self._configs:
            config = self._configs[source]
            for role in roles_of(config).values():
                return self.of_role(role, f"{config.stage}.overrides")
            raise Unknown(f"{source}: the stage {config.stage} leaves no model")
        if any(paths.path(source).is_relative_to(folder) for folder in self._configs):
            raise Unknown(f"{source}: a file of an earlier stage")
        return self.elsewhere(source)

    def elsewhere(self, source: str) -> Model:
        """Returns a model that no stage of the recipe makes."""
        return store.describe(source)

    def of_role(self, role: Role, context: str) -> Model:
        """Returns the model of a role, its `overrides` applied."""
        if isinstance(role.source, TransformerConfig):
            return Model(role.source, role.head, role.lora)
        config = self.describe(role.source).config
        if role.overrides:
            values = dataclasses.asdict(config) | dict(role.overrides)
            config = build(TransformerConfig, values, context)
        return Model(config, role.head)

    def described(self, source: str) -> dict[str, Any] | None:
        """Returns what a `reward.json` says, or will say; None where there is none."""
        config = self._configs.get(source)
        if config is None:
            return store.described(source)
        describe = getattr(stages.find(config.stage), "describe", None)
        return None if describe is None else to_dict(describe(config))

    def nets(self, roles: Roles, context: str) -> list[Net]:
        """Returns the roles whose models are known; a reward of several models gives one for each."""
        found = []
        for name, role in self.single(roles).items():
            try:
                found.append(
                    Net(name, role, self.of_role(role, f"{context}.overrides").config)
                )
            except CheckpointError:
                if name == next(iter(roles)) and not isinstance(
                    role.source, TransformerConfig
                ):
                    raise
        return found

    def single(self, roles: Roles) -> dict[str, Role]:
        """Returns roles of one model each: a reward that is no model gives none."""
        found: dict[str, Role] = {}
        for name, role in roles.items():
            if not role.scores:
                found[name] = role
                continue
            models = models_of(role.source, self)
            if role.optim is not None:  # a value function starts from the first
                models = [one._replace(suffix="") for one in models[:1]]
            for suffix, source, head in models:
                found[name + suffix] = role._replace(
                    source=source, head=head, scores=False
                )
        return found


def roles_of(config: Any) -> Roles:
    """Returns the roles that a stage's config declares."""
    declared = getattr(stages.find(config.stage), "roles", None)
    return declared(config) if declared else {}
