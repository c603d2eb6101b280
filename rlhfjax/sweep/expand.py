"""Expands an experiment file's `sweep(add)` to named runs and validates each of them."""

import dataclasses
import hashlib
import re
import runpy
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from rlhfjax import recipe
from rlhfjax.config import explain, to_dict
from rlhfjax.errors import ConfigError, UserError
from rlhfjax.paths import Path
from rlhfjax.sweep import Overrides

ARG = "arg."
NAME_LENGTH = 120  # maximum characters of a run's name


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    overrides: Overrides
    workdir: Path
    command: tuple[str, ...]  # the words after `rlhfjax`
    config: dict[str, Any]  # the complete config, overrides applied, of JSON types

    @property
    def finished(self) -> bool:
        return recipe.finished(self.config, self.workdir)


def expand(
    config: str, workdir: Path, given: Mapping[str, Any] | None = None
) -> list[Run]:
    """Returns the runs of a sweep, in the file's order.

    Args:
      config: FILE.py[:args].
      given: options of the command line, which all runs have.
    Raises:
      ConfigError: the file has no `sweep`; two runs are equal; or an override names an unknown
        option, has a wrong type, sets a given option, or leads to an invalid config.
    """
    file, _, arg = config.partition(":")
    loaded = _guarded(file, lambda: runpy.run_path(file))
    if not callable(loaded.get("sweep")):
        raise ConfigError(f"{file}: it has no sweep(add), which says what to run")
    found: list[Overrides] = []
    _guarded(
        file, lambda: loaded["sweep"](lambda overrides: found.append(dict(overrides)))
    )
    if not found:
        raise ConfigError(f"{file}: its sweep(add) added nothing")
    runs = [
        _run(file, loaded["get_config"], arg, given or {}, overrides, workdir)
        for overrides in found
    ]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{file}: its sweep adds {twice[0]} twice")
    for run in runs:
        recipe.compare(run.workdir, run.config)
    return runs


def _run(
    file: str,
    get_config: Callable[..., ConfigDict],
    arg: str,
    given: Mapping[str, Any],
    overrides: Overrides,
    workdir: Path,
) -> Run:
    name = name_of(overrides)
    arguments = {
        key.removeprefix(ARG): value
        for key, value in overrides.items()
        if key.startswith(ARG)
    }
    options = {
        key: value for key, value in overrides.items() if not key.startswith(ARG)
    }
    if both := sorted(options.keys() & given.keys()):
        raise ConfigError(f"--config.{both[0]}: this option is what the sweep varies")
    options = dict(given) | options
    text = with_arguments(arg, arguments)
    config = _guarded(file, lambda: get_config(text) if text else get_config())
    values = to_dict(overlay(config, options))
    for stage in recipe.stage_folders(values, workdir) if "stages" in values else ():
        recipe.check(values[stage], stage)
    if "stages" not in values:
        recipe.check(values, values.get("stage", "config"))
    source = f"--config={file}:{text}" if text else f"--config={file}"
    options = [
        f"--config.{key}={literal(key, value)}" for key, value in options.items()
    ]
    command = (
        "run" if "stages" in values else "train",
        source,
        f"--workdir={workdir / name}",
        *options,
    )
    return Run(name, overrides, workdir / name, command, values)


def _guarded(file: str, call: Callable[[], Any]) -> Any:
    """Returns the call's result; an error of an experiment file becomes one line with its place."""
    try:
        return call()
    except UserError:
        raise
    except Exception as e:
        raise ConfigError(explain(e, file)) from e


def with_arguments(arg: str, arguments: Mapping[str, Any]) -> str:
    """Appends arguments: `"size=smoke"` and {"seed": 3} give `"size=smoke,seed=3"`.

    Raises:
      ConfigError: an argument is in both.
    """
    for item in filter(None, arg.split(",")):
        if item.partition("=")[0] in arguments:
            raise ConfigError(
                f"--config=…:{item}: this argument is what the sweep varies"
            )
    items = [f"{key}={literal(key, value)}" for key, value in arguments.items()]
    return ",".join(filter(None, [arg, *items]))


def overlay(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of the config with the overrides applied, strictly.

    Raises:
      ConfigError: an option that there is not, or a value of another type.
    """
    config = config.copy_and_resolve_references()
    for key, value in overrides.items():
        *path, last = key.split(".")
        node: Any = config
        for part in path:
            node = node[part] if isinstance(node, ConfigDict) and part in node else None
        if not isinstance(node, ConfigDict) or last not in node:
            raise ConfigError(f"sweep: the config has no option {key!r}")
        try:
            node[last] = value
        except (TypeError, ValueError):
            raise ConfigError(
                f"sweep: {key}={value!r} is not of type {type(node[last]).__name__}"
            ) from None
    return config


def literal(key: str, value: Any) -> str:
    """Formats a value for the command line.

    Raises:
      ConfigError: the command line cannot hold such a value.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str | tuple):
        return value if isinstance(value, str) else repr(value)
    raise ConfigError(
        f"sweep: {key}={value!r}: expected a number, a text, a bool or a tuple of them"
    )


def name_of(overrides: Mapping[str, Any]) -> str:
    """Returns the name of a run's folder, such as `ppo.kl.coefficient=0.05,seed=1`.

    The name depends on this run's overrides alone, so that a sweep may grow. Unsuitable characters
    are replaced and a long name is cut; then a hash of the full name keeps it unique.
    """
    items = [
        f"{key.removeprefix(ARG)}={literal(key, value)}"
        for key, value in overrides.items()
    ]
    full_name = ",".join(items) or "base"
    name = re.sub(r"[^\w.=,+-]+", "-", full_name)
    if name == full_name and len(name) <= NAME_LENGTH and not name.startswith("."):
        return name
    digest = hashlib.sha256(full_name.encode()).hexdigest()
    return f"{name.lstrip('.')[:NAME_LENGTH]}-{digest[:8]}"
