"""A stage to plan: its config, and its models as shapes. No model file is read."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rlhfjax import paths, recipe, stages
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


class Shapes:
    """Models as shapes: `roles.Sources` for a stage that is planned.

    Args:
      models: by their sources, as they are before a role's `overrides`.
      origins: what tells which rewards are made of others.
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

        def held() -> Any:
            shapes = states.abstract(model.shapes(), model.axes(), layout)
            owner = f"{source} on {layout.mesh.device_ids.tolist()}"
            return hold(shapes, owner)

        return store.Opened(model, _Ids(), held)

    def load(self, source: str, layout: Layout) -> store.SavedModel:
        opened = self.open_model(source, layout)
        return store.SavedModel(opened.model, opened.params(), opened.tokenizer)

    def tokenizer(self, source: str) -> Tokenizer:
        return _Ids()

    def described(self, source: str) -> dict[str, Any] | None:
        return self._origins.described(source)

    def changed(self, **fields: Any) -> "Shapes":
        """Returns the same models with other options."""
        models = {
            source: dataclasses.replace(
                model, config=dataclasses.replace(model.config, **fields)
            )
            for source, model in self.models.items()
        }
        return Shapes(models, self._origins)


def hold(tree: Any, owner: str) -> Any:
    """Returns shapes of arrays that stay on the devices."""

    def held(path: Any, x: jax.ShapeDtypeStruct) -> Held:
        return Held(x.shape, x.dtype, sharding=x.sharding, owner=owner, path=str(path))

    return jax.tree.map_with_path(held, tree)


class _Ids(Tokenizer):
    """A tokenizer as far as the jitted functions know one: three numbers that are not equal."""

    pad_id, eos_id, vocab_size = 0, 1, 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ids)

    def __hash__(self) -> int:
        return 0

    def token_id(self, piece: str) -> int:
        """Any piece's."""
        return 2


class Subject(NamedTuple):
    """One stage to plan."""

    name: str
    config: Any  # the stage's typed config
    sources: Shapes
    roles: Mapping[str, Role]  # of one model each

    @property
    def nets(self) -> list[Net]:
        """The models that take part, the one that the stage is about first."""
        own = roles_of(self.config)
        return [
            Net(name, self._now(role, own.get(name)), self._config(role))
            for name, role in self.roles.items()
        ]

    def _now(self, role: Role, declared: Role | None) -> Role:
        """Returns a role with what the config, which may have been changed, says of it."""
        return (
            role
            if declared is None
            else declared._replace(source=role.source, scores=False)
        )

    def _config(self, role: Role) -> TransformerConfig:
        if isinstance(role.source, TransformerConfig):
            return self.config.model
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
        """Returns the stage with other options."""
        return self._replace(config=dataclasses.replace(self.config, **fields))

    def with_models(self, **fields: Any) -> "Subject":
        """Returns the stage with other options of all its models."""
        config, sources = self.config, self.sources.changed(**fields)
        if getattr(config, "model", None) is not None:
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, **fields)
            )
        if overrides := getattr(config, "overrides", None):
            changed = {
                name: fields.get(name, value) for name, value in overrides.items()
            }
            config = dataclasses.replace(config, overrides=changed)
        return self._replace(config=config, sources=sources)


def parse_model(text: str) -> TransformerConfig:
    """`gpt3-1.3b` or `gpt3-1.3b:dtype=bfloat16,remat=full,scan_layers=true`: a preset with fields changed."""
    name, _, changes = text.partition(":")
    shape = preset(name)
    fields = {k: v for k, v in dataclasses.asdict(shape).items() if v is not None}
    return build(
        TransformerConfig,
        dataclasses.asdict(shape) | dict(parse_arg(changes, **fields)),
        "model",
    )


def subject(
    config: Any,
    stage: str | None = None,
    workdir: Path | None = None,
    model: str = "",
    reward_model: str = "",
) -> Subject:
    """Returns the stage that is planned: the config's own, or of a recipe the one of that name (by default its last).

    A model comes from the config, from the stage before that makes it, from disk, or else from `model` and
    `reward_model`, presets as `parse_model` reads them.

    Raises:
      ConfigError: there is no such stage, it does not train, or the shape of a model is known nowhere.
    """
    values = to_dict(config)
    folder = workdir or paths.path("workdir")
    if "stages" not in values:
        values = {"stages": [values.get("stage", "")], values.get("stage", ""): values}
    folders = recipe.stage_folders(values, folder)
    trains = [
        n for n in folders if hasattr(stages.find(values[n].get("stage", "")), "build")
    ]
    name = stage or (trains[-1] if trains else "")
    if name not in trains:
        raise ConfigError(
            f"--stage={name}: the stages that train are {', '.join(trains) or 'none'}"
        )
    typed = {n: recipe.check(recipe.resolve(values[n], folders, n), n) for n in folders}
    chosen = typed[name]
    origins = Origins({str(folders[n]): c for n, c in typed.items()})
    models: dict[str, Model] = {}
    roles: dict[str, Role] = {}
    for declared, role in roles_of(chosen).items():
        flag, given = (
            ("--reward_model", reward_model) if role.scores else ("--model", model)
        )
        for role_name, one in origins.single({declared: role}).items():
            roles[role_name] = one
            if (
                not isinstance(one.source, TransformerConfig)
                and one.source not in models
            ):
                models[one.source] = _find(
                    origins, one, f"{name}: {role_name}", flag, given
                )
    return Subject(name, chosen, Shapes(models, origins), roles)


def _find(origins: Origins, role: Role, context: str, flag: str, given: str) -> Model:
    """Returns the model that a role's source stands for.

    Args:
      flag: what gives a preset for a model that is nowhere, and `given` its value.
    Raises:
      ConfigError: the model is nowhere, and no preset was given for it.
    """
    try:
        return origins.describe(role.source)
    except Unknown:
        raise
    except CheckpointError:
        if given:
            return Model(parse_model(given), role.head)
        raise ConfigError(
            f"{context}={role.source}: no model there; say its shape with {flag}=PRESET, such as {flag}=gpt3-1.3b "
            f"or {flag}=gpt3-1.3b:dtype=bfloat16,scan_layers=true"
        ) from None
