"""Runs late stages of a finished recipe again: `rlhfjax run --from=STAGE` and `--only=STAGE`.

The stages before are taken as they are. What runs again is first moved to `previous/N/`, so that no
result is lost.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlhfjax import (
    claims,
    hosts,
    json_text,
    paths,
    precision,
    recipe,
    references,
    trackers,
)
from rlhfjax.arguments import did_you_mean
from rlhfjax.config import to_dict, write_json
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
PREVIOUS = "previous"


class Choice(NamedTuple):
    """Which stages run again."""

    flag: str  # "from": the stage and all after it; "only": the stage alone
    stage: str

    def __str__(self) -> str:
        return f"--{self.flag}={self.stage}"


def run(
    config: Mapping[str, Any] | ConfigDict,
    workdir: Path,
    choice: Choice,
    cache: Path | None = None,
) -> dict[str, float]:
    """Runs the chosen stages of a recipe; returns the last value of every metric of every stage.

    An unfinished stage resumes if its config is the same, so that the same command continues after
    an interruption. A finished stage runs again.

    Raises:
      ConfigError: there is no such stage, a stage before it is not done, or options of other stages
        have changed.
    """
    given = to_dict(config)
    values = hosts.share(lambda: precision.resolved(given, workdir))
    if "stages" not in values:
        raise ConfigError(f"{choice}: this config is a single stage, not a recipe")
    folders = recipe.stage_folders(values, workdir)
    hosts.share(lambda: _prepare(values, folders, workdir, choice))
    last = choice.stage if choice.flag == "only" else ""
    return recipe.run(values, workdir, last=last, cache=cache)


def _prepare(
    values: dict[str, Any], folders: Mapping[str, Path], workdir: Path, choice: Choice
) -> None:
    """Moves away what runs again and records the config."""
    moved, changed = to_move(values, folders, workdir, choice)
    if moved:
        _validate(values, folders, moved)
    _move_away([folders[name] for name in moved], workdir)
    if changed:
        write_json(workdir / recipe.CONFIG, values)


def to_move(
    values: dict[str, Any], folders: Mapping[str, Path], workdir: Path, choice: Choice
) -> tuple[list[str], bool]:
    """Returns the stages whose results are moved away, and whether the config has changed.

    Raises: as `run`.
    """
    names = list(folders)
    if choice.stage not in names:
        hint = did_you_mean(choice.stage, names)
        raise ConfigError(f"{choice}: the stages are {', '.join(names)}{hint}")
    before = names[: names.index(choice.stage)]
    for name in before:
        if not (folders[name] / recipe.DONE).exists():
            raise ConfigError(
                f"{choice}: {name} is not finished in {workdir}; run without --{choice.flag} first"
            )
    again = chosen(values, folders, choice)
    changed = claims.decisive(workdir, values)
    kept = [name for name in names if name not in again]
    for place in changed:
        if place.partition(".")[0] in kept:
            raise ConfigError(
                f"{choice}: {place} has changed, and {place.partition('.')[0]} does not run "
                f"again; use --from={place.partition('.')[0]} or a new --workdir"
            )
    target = again if choice.flag == "from" else [choice.stage]
    finished = all((folders[name] / recipe.DONE).exists() for name in target)
    return again if changed or finished else [], bool(changed)


def _validate(
    values: dict[str, Any], folders: Mapping[str, Path], again: Collection[str]
) -> None:
    """Validates the stages that run again, before their results are moved away."""
    resolved = {name: recipe.resolve(values[name], folders, name) for name in folders}
    typed = recipe.check_all(resolved, folders)
    references.validate(typed, folders, recipe.DONE, again)


def chosen(
    values: dict[str, Any], folders: Mapping[str, Path], choice: Choice
) -> list[str]:
    """Returns the stages whose results are replaced: with `only`, also those that depend on it."""
    names = list(folders)
    later = names[names.index(choice.stage) :]
    if choice.flag == "from":
        return later
    again: list[str] = []
    for name in later:
        resolved = recipe.resolve(values[name], folders, name)
        sources = [str(folders[source]) for source in again]
        if name == choice.stage or _mentions(resolved, sources):
            again.append(name)
    return again


def _mentions(value: Any, folders: Collection[str]) -> bool:
    """Returns whether a string in a resolved config contains one of the folders."""
    if isinstance(value, str):
        return any(folder in value for folder in folders)
    return any(_mentions(part, folders) for _, part in json_text.parts(value, ""))


def _move_away(folders: Collection[Path], workdir: Path) -> None:
    present = [folder for folder in folders if folder.exists()]
    if not present:
        return
    number = 1
    while (target := workdir / PREVIOUS / str(number)).exists():
        number += 1
    for folder in present:
        paths.move(folder, target / folder.name)
    trackers.forget_wandb(workdir, target)
    log.info("moved to %s: %s", target, ", ".join(folder.name for folder in present))
