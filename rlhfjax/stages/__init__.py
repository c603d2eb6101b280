"""One file per stage of the recipe.

A stage's module has a frozen dataclass `Config` and one of two functions:
  `build(config, layout, sources) -> Stage` for what trains, run by the loop in `train.py`;
  `run(config, workdir, layout) -> {metric: value}` for a job, which writes its output whole (tokenizer, collect, …).
A job with `ON_ONE_HOST = True` computes on no device: its `run` is called on the first host alone.
What else it may have:
  `roles(config) -> {name: Role}`: the models that take part; the first is the one that it leaves or works on;
  `workload(config, completions) -> Workload`: what a step, or a job's batch, computes;
  `validate(config, layout, model_config)`: raises ConfigError before any stage of a recipe has begun; `model_config` is
    that of the first role, None where it is not known.

A stage may live outside of this folder: `stage="package.module:Name"` names a module, and Name its class of configs.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhfjax import renamed
from rlhfjax.config import defaults
from rlhfjax.errors import ConfigError, first_line


def names() -> list[str]:
    """Returns the stages of this package: the modules of this folder."""
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]


def find(name: str) -> ModuleType:
    """Returns the module of a stage.

    Raises:
      ConfigError: there is none of that name.
    """
    module, colon, _ = name.partition(":")
    if colon:
        return _outside(name, module)
    if name not in names():
        known = ", ".join(names())
        raise ConfigError(
            f"stage {name!r} is unknown{renamed.hint(name, renamed.STAGES)};"
            f" known: {known}, or package.module:Config of your own"
        )
    return importlib.import_module(f"rlhfjax.stages.{name}")


def _outside(name: str, module: str) -> ModuleType:
    """Returns a module outside of this package."""
    try:
        found = importlib.import_module(module)
    except Exception as e:
        raise ConfigError(
            f"stage {name!r}: {module} cannot be imported ({first_line(e, kind=True)})"
        ) from e
    if not (hasattr(found, "build") or hasattr(found, "run")):
        raise ConfigError(
            f"stage {name!r}: {module} has neither build nor run; see rlhfjax/stages/__init__.py"
        )
    return found


def config_class(name: str) -> type:
    """Returns the class of a stage's configs."""
    module, _, attribute = name.partition(":")
    found = getattr(find(name), attribute or "Config", None)
    if not isinstance(found, type):
        raise ConfigError(f"stage {name!r}: {module} has no class {attribute!r}")
    return found


def stage_config(stage: str, **values: Any) -> ConfigDict:
    """Returns a stage's config with every option present, so that each can be overridden and config.json is complete.

    Raises:
      ConfigError: an option that the stage does not have.
    """
    return config_dict.create(
        **defaults(config_class(stage), {"stage": stage, **values}, where=stage)
    )
