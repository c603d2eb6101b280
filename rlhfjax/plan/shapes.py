"""A stage to plan: its config, and its models as shapes. No model file is read."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rlhfjax import paths, precision, recipe, stages
from rlhfjax import state as states
from rlhfjax.config import build, parse_arg, to_dict
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.footprint import Net
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.presets import preset
from rlhfjax.models.transformer import Model
from rlhfjax.origins import Origins, Unknown, roles_of
from rlhfjax.paths import Path
from rlhfjax.programs import Held
from rlhfjax.roles import Role, Workload
from rlhfjax.types import PyTree


class Shapes:
    """Models as shapes: the `roles.Sources` of a stage that is planned.

    Args:
      models: by source, without a role's `overrides`.
      origins: knows which rewards are made of others.
    """

    def __init__(self, models: Mapping[str, Model], origins: Origins):
        self.models, self._origins = dict(models), origins

    def open_model(
        self,
        source: str,
        layout: Layout,
        changes: Mapping[str, Any] = {},
        context: str = "",
    ) -> store.Opened:
        model = store.overridden(self.models[source], changes, context)

        def params() -> PyTree:
            shapes = states.abstract(model.shapes(), model.axes(), layout)
            owner = f"{source} on {layout.mesh.device_ids.tolist()}"
            return hold(shapes, owner)

        return store.Opened(model, TOKENIZER, params)

    def load(self, source: str, layout: Layout) -> store.SavedModel:
        opened = self.open_model(source, layout)
        return store.SavedModel(opened.model, opened.params(), opened.tokenizer)

    def tokenizer(self, source: str) -> Tokenizer:
        return TOKENIZER

    def described(self, source: str) -> dict[str, Any] | None:
        return self._origins.described(source)

    def changed(self, **fields: Any) -> "Shapes":
        """Returns the same models with other values of these config fields."""
        models = {}
        for source, model in self.models.items():
            config = dataclasses.replace(model.config, **fields)
            models[source] = dataclasses.replace(model, config=config)
        return Shapes(models, self._origins)


def hold(tree: PyTree, owner: str) -> PyTree:
    """Returns the shapes of a tree as those of arrays that stay on the devices."""

    def held(path: Any, x: jax.ShapeDtypeStruct) -> Held:
        return Held(x.shape, x.dtype, sharding=x.sharding, owner=owner, path=str(path))

    return jax.tree.map_with_path(held, tree)


class _Ids(Tokenizer):
    """The part of a tokenizer that jitted functions use: three different ids."""

    pad_id, eos_id, vocab_size = 0, 1, 0

    def token_id(self, piece: str) -> int:
        return 2


# Every model has the same one, because models of a stage must share a tokenizer.
TOKENIZER = _Ids()  # pyright: ignore[reportAbstractUsage]  # nothing encodes text here


class Subject(NamedTuple):
    """The stage that is planned."""

    name: str
    config: Any  # the stage's typed config
    sources: Shapes
    roles: Mapping[str, Role]  # of one model each

    @property
    def nets(self) -> list[Net]:
        """The models of the stage, the one that it trains first."""
        declared = roles_of(self.config)
        nets = []
        for name, role in self.roles.items():
            if name in declared:  # the config may have been changed since
                role = declared[name]._replace(source=role.source, scores=False)
            nets.append(Net(name, role, self._model_config(role)))
        return nets

    def _model_config(self, role: Role) -> TransformerConfig:
        if isinstance(role.source, TransformerConfig):
            return self.config.model
        assert isinstance(role.source, str)
        model = self.sources.models[role.source]
        overrides = getattr(self.config, "overrides", {}) if role.overrides else {}
        return store.overridden(model, overrides, "overrides").config

    @property
    def model(self) -> TransformerConfig:
        """The model_config of the first role."""
        return self.nets[0].config

    def workload(self, completions: int = 2) -> Workload:
        """Returns what a step computes."""
        return stages.find(self.config.stage).workload(self.config, completions)

    def with_config(self, **fields: Any) -> "Subject":
        """Returns the stage with other values of these config fields."""
        return self._replace(config=dataclasses.replace(self.config, **fields))

    def with_models(self, **fields: Any) -> "Subject":
        """Returns the stage with other values of these fields in all model_configs."""
        changed = self._replace(sources=self.sources.changed(**fields))
        if getattr(self.config, "model", None) is not None:
            model = dataclasses.replace(self.config.model, **fields)
            changed = changed.with_config(model=model)
        if overrides := getattr(self.config, "overrides", None):
            known = {name: fields.get(name, value) for name, value in overrides.items()}
            changed = changed.with_config(overrides=known)
        return changed


class Prepared(Subject):
    """A stage whose models and workload are computed once, for many estimates."""

    @functools.cached_property
    def nets(self) -> list[Net]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return super().nets

    @functools.cached_property
    def _workloads(self) -> dict[int, Workload]:
        return {}

    def workload(self, completions: int = 2) -> Workload:
        if completions not in self._workloads:
            self._workloads[completions] = super().workload(completions)
        return self._workloads[completions]


def parse_model(text: str, dtype: str = "") -> TransformerConfig:
    """Parses a preset with changed fields, `gpt3-1.3b:dtype=bfloat16,scan_layers=true`.

    Args:
      dtype: what "auto" stands for; default: the fastest one of this machine.
    """
    name, _, changes = text.partition(":")
    fields = dataclasses.asdict(preset(name))
    scalars = bool | int | float | str
    defaults = {k: v for k, v in fields.items() if isinstance(v, scalars)}
    changed = fields | dict(parse_arg(changes, **defaults))
    values = precision.resolved({"model": changed}, dtype=dtype)
    return build(TransformerConfig, values["model"], "model")


def subject(
    config: Any,
    stage: str | None = None,
    workdir: Path | None = None,
    model: str = "",
    reward_model: str = "",
    dtype: str = "",
) -> Subject:
    """Returns the stage that is planned.

    Args:
      config: of a stage or of a recipe.
      stage: its name in a recipe; by default the last one that trains.
      model: the preset, as `parse_model` reads it, of models that neither the config, nor an
        earlier stage, nor the disk describes.
      reward_model: the same for rewards.
      dtype: what "auto" stands for; default: the fastest one of this machine.
    Raises:
      ConfigError: the stage does not exist or does not train, or the model_config of a model is
        unknown.
    """
    values = precision.resolved(to_dict(config), dtype=dtype)
    if "stages" not in values:
        kind = values.get("stage", "")
        values = {"stages": [kind], kind: values}
    folders = recipe.stage_folders(values, workdir or paths.path("workdir"))
    trains = [
        n for n in folders if hasattr(stages.find(values[n].get("stage", "")), "build")
    ]
    name = stage or (trains[-1] if trains else "")
    if name not in trains:
        known = ", ".join(trains) or "none"
        raise ConfigError(f"--stage={name}: the stages that train are {known}")
    configs = {
        n: recipe.check(recipe.resolve(values[n], folders, n), n) for n in folders
    }
    origins = Origins({str(folders[n]): c for n, c in configs.items()})
    models: dict[str, Model] = {}
    roles: dict[str, Role] = {}
    for declared, role in roles_of(configs[name]).items():
        flag, given = "--model", model
        if role.scores:
            flag, given = "--reward_model", reward_model
        preset_model = parse_model(given, dtype) if given else None
        singles = origins.single({declared: role})
        roles |= singles
        for role_name, single in singles.items():
            source = single.source
            if isinstance(source, str) and source not in models:
                context = f"{name}: {role_name}={source}"
                models[source] = _model(
                    origins, source, single.head, context, flag, preset_model
                )
    return Subject(name, configs[name], Shapes(models, origins), roles)


def _model(
    origins: Origins,
    source: str,
    head: str,
    context: str,
    flag: str,
    given: TransformerConfig | None,
) -> Model:
    """Returns the model of a source.

    Args:
      flag: the option that gives the preset of a model that does not exist, and `given` that
        model_config.
    Raises:
      ConfigError: the model does not exist, and no preset was given for it.
    """
    try:
        return origins.describe(source)
    except Unknown:
        raise
    except CheckpointError:
        if given is not None:
            return Model(given, head)
        raise ConfigError(
            f"{context}: no model there; give its shape with {flag}=PRESET, such as "
            f"{flag}=gpt3-1.3b or {flag}=gpt3-1.3b:dtype=bfloat16,scan_layers=true"
        ) from None
