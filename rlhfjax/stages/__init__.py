"""The stages of recipes, one file each.

A stage's module has a frozen dataclass `Config` and one of two functions:
  `build(config, layout, sources) -> Stage` of a stage that trains, run by the loop in `train.py`;
  `run(config, workdir, layout) -> {metric: value}` of a job, which writes its output whole.
It may also have:
  `roles(config) -> {name: Role}`: the models that take part; the first is the model that the stage
    leaves or works on;
  `workload(config, completions) -> Workload`: what a step, or a job's batch, computes;
  `batches(config)`: the number of batches of a job, None if only its data tells;
  `validate(config, layout, model_config)`: raises ConfigError before any stage of a recipe begins;
    `model_config` is that of the first role, None if it is not known;
  `describe(config)`: the contents of the reward.json that the stage leaves;
  `MODEL_NAME`, or `model_name(config)` of the config as config.json has it: what people call the
    model that the stage leaves;
  `ON_ONE_HOST = True` of a job that uses no device: `run` is called on the first host only;
  `LEAVES_MODEL = True` of a job that leaves a model in its workdir.

A stage may live outside of this package: `stage="package.module:Name"`, Name being its `Config`.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhfjax import renamed, user_code
from rlhfjax.arguments import did_you_mean
from rlhfjax.config import defaults
from rlhfjax.errors import ConfigError, UserError
from rlhfjax.json_text import named, shown


@functools.cache
def names() -> tuple[str, ...]:
    """Returns the names of this package's stages, which are its modules."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def find(name: Any) -> ModuleType:
    """Returns the module of a stage.

    Raises:
      ConfigError: there is no stage of that name.
    """
    if not isinstance(name, str):
        raise ConfigError(f"stage={shown(name)}: expected the name of a stage")
    if ":" in name:
        return _outside(name)
    if name not in names():
        known = ", ".join(names())
        raise ConfigError(
            f"stage {shown(name)} is unknown{renamed.hint(name, renamed.STAGES)};"
            f" known: {known}, or package.module:Config of your own"
            f"{did_you_mean(name, names())}"
        )
    return importlib.import_module(f"rlhfjax.stages.{name}")


def _outside(name: str) -> ModuleType:
    """Returns the module of a stage outside of this package."""
    module, _ = user_code.split(name, "stage", user_code.STAGE)
    outside = user_code.load_module(
        module, f"stage {shown(name, 200)}", user_code.STAGE
    )
    if not (hasattr(outside, "build") or hasattr(outside, "run")):
        raise ConfigError(
            f"stage {shown(name, 200)}: {named(module, 200)} has neither build nor run;"
            " see rlhfjax/stages/__init__.py"
        )
    return outside


def config_class(name: Any) -> type:
    """Returns the config dataclass of a stage."""
    found = find(name)
    module, _, attribute = name.partition(":")
    cls = getattr(found, attribute or "Config", None)
    if not isinstance(cls, type):
        raise ConfigError(f"stage {name!r}: {module} has no class {attribute!r}")
    return cls


def model_name(config: Mapping[str, Any]) -> str | None:
    """Returns what people call the model that a stage leaves, such as PPO; None if it has no name.

    Args:
      config: as config.json has it; of a stage that is not known, there is no name.
    """
    try:
        module = find(config.get("stage"))
    except UserError:
        return None
    if hasattr(module, "model_name"):
        return module.model_name(config)
    return getattr(module, "MODEL_NAME", None)


def stage_config(stage: str, **values: Any) -> ConfigDict:
    """Returns a stage's config with every option, so that each can be overridden.

    Raises:
      ConfigError: an option that the stage does not have.
    """
    options = defaults(config_class(stage), {"stage": stage, **values}, where=stage)
    return config_dict.create(**options)
