"""Whose workdir it is: the config that a workdir was started with, compared with another one."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rlhfjax import json_text, paths, provenance, stages, workdirs
from rlhfjax.config import fill_defaults, write_json
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Path
from rlhfjax.workdirs import CONFIG, DONE

log = logging.getLogger("rlhfjax")
Change = Literal["free", "mesh", "steps", "refused"]
# Options of a stage whose values a resumed run may change; every other option is refused.
_CHANGES: dict[str, Change] = {
    "log": "free",
    "checkpoint": "free",
    "mesh": "mesh",
    "rollout_mesh": "mesh",
    "rollout_layout": "mesh",
    "rollout_tensor": "mesh",
    "rollout_cache_parts": "mesh",
    "frozen_mesh": "mesh",
    "steps": "steps",
    "host": "free",
    "port": "free",
    "grace": "free",
    "labelers": "free",
}
# The changes of options that decide what a run computes.
_DECISIVE: tuple[Change, ...] = ("refused", "steps")
_ABSENT = object()


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, or compares the config with the one that is there.

    Options that may change are recorded. A finished stage whose steps were raised is unfinished
    again. Another finished stage keeps the config that it was computed with.

    Raises:
      ConfigError: the workdir belongs to another config; the message names the options that differ.
    """
    compare(workdir, config)
    if paths.exists(workdir / CONFIG) and not _has_only_configs(workdir):
        _record_changes(workdir, config)
        return
    try:
        paths.make_folder(workdir)
    except OSError as e:
        raise ConfigError(f"--workdir={workdir}: {e.strerror}") from None
    write_json(workdir / CONFIG, config)


def _record_changes(workdir: Path, config: Mapping[str, Any]) -> None:
    """Records options that may change, and that stages whose steps were raised are unfinished."""
    changed = differences(workdir, config)
    for folder in raised(workdir, config):
        log.info("%s: more steps than before; it goes on", folder.name)
        (folder / DONE).unlink(missing_ok=True)
    if not changed or paths.exists(workdir / DONE):
        return
    meshes = [f"{x}: {changed[x]}" for x in changed if change_of(x) == "mesh"]
    if meshes and "stages" not in config:  # a stage of a recipe claims its own folder
        log.warning(
            "%s: the mesh has changed (%s); the last bits of numbers may differ from those of"
            " an uninterrupted run",
            workdir.name,
            "; ".join(meshes),
        )
    write_json(workdir / CONFIG, config)


def compare(workdir: Path, config: Mapping[str, Any]) -> None:
    """Validates that the workdir is free or was started with this config.

    Options of logging, checkpoints and meshes may differ, see `change_of`. The steps of a stage may
    be more than before if its learning rate does not depend on their number, and if no later stage
    of the recipe has begun with its model.

    Raises:
      ConfigError: it belongs to another config; the message names the options that differ.
    """
    differ = refused(workdir, config)
    if differ:
        texts = [f"{place}: {change}" for place, change in differ.items()]
        more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
        raise ConfigError(
            f"{workdir} was started with another config ({'; '.join(texts[:5])}{more}); "
            f"use a new --workdir{_from_first_changed(config, differ)}"
        )


def _from_first_changed(config: Mapping[str, Any], places: Iterable[str]) -> str:
    """Returns the advice to run the changed stages again; "" if that is not possible."""
    names = list(config.get("stages", ()))
    changed = {place.partition(".")[0] for place in places}
    if not changed <= set(names):
        return ""
    first = next(name for name in names if name in changed)
    return f", or --from={first}, which runs {first} and the stages after it again"


def change_of(option: str) -> Change:
    """Returns how a resumed run takes another value of an option of its stage.

    free: its numbers do not depend on the option. mesh: their last bits may. steps: it may be
    raised, see `compare`. refused: of every other option.

    Args:
      option: such as "log.every", without the name of a recipe's stage.
    """
    name, *_ = re.split(r"[.\[]", option)
    return _CHANGES.get(name, "refused")


def refused(workdir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the differences that keep a config from resuming a workdir, as `differences` does."""
    changed = differences(workdir, config)
    if not changed:
        return {}
    before = workdirs.read_config(workdir) or {}
    found = {}
    for place, change in changed.items():
        stage, option = split(config, place)
        kind = change_of(option)
        if kind == "refused":
            found[place] = change
        elif kind == "steps":
            reason = _why_not_raised(_part(before, stage), _part(config, stage))
            if later := _begun_after(workdir, config, stage):
                reason = (
                    reason or f"and {later} has begun with the model of fewer steps"
                )
            if reason:
                found[place] = f"{change}, {reason}"
    return found


def decisive(workdir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the differences, as `differences` does, that decide what a run computes."""
    return {
        place: change
        for place, change in differences(workdir, config).items()
        if change_of(split(config, place)[1]) in _DECISIVE
    }


def decisive_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that decide what a run computes, by their places, defaults included.

    Options of logging, checkpoints and meshes are left out, see `change_of`.
    """
    options = json_text.leaves(with_defaults(config))
    return {
        place: value
        for place, value in options.items()
        if change_of(split(config, place)[1]) in _DECISIVE
    }


def split(config: Mapping[str, Any], place: str) -> tuple[str, str]:
    """Returns the stage of a recipe, "" for a single stage, and the option of a place."""
    names = [name for name in config.get("stages", ()) if place.startswith(f"{name}.")]
    stage = max(names, key=len, default="")
    is_recipe = "stages" in config
    return stage, "" if is_recipe and not stage else place[len(stage) :].lstrip(".")


def _part(config: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """Returns the config of a stage of a recipe; "": the config is the stage's own."""
    part = config.get(stage) if stage else config
    return part if isinstance(part, Mapping) else {}


def _why_not_raised(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns why the steps of a stage cannot be changed as they are; "" if they can."""
    if "steps" not in before or "steps" not in now:
        return "one of them is absent"
    if now["steps"] < before["steps"]:
        return "they can only be raised"
    for name, optim in with_defaults(now).items():
        is_optim = isinstance(optim, Mapping) and "decay_steps" in optim
        if is_optim and optim["schedule"] != "constant" and not optim["decay_steps"]:
            return (
                "and the learning rate decays until the last step; raising them needs"
                f" {name}.schedule='constant' or {name}.decay_steps"
            )
    return ""


def _begun_after(workdir: Path, config: Mapping[str, Any], stage: str) -> str:
    """Returns the first stage after a finished one that has results; "" if none has."""
    names = list(config.get("stages", ()))
    if not stage or not paths.exists(_folder(workdir, names, stage) / DONE):
        return ""
    for name in names[names.index(stage) + 1 :]:
        folder = _folder(workdir, names, name)
        if paths.exists(folder / CONFIG) and not _has_only_configs(folder):
            return name
    return ""


def _folder(workdir: Path, names: Sequence[str], stage: str) -> Path:
    """Returns the folder of a stage of a recipe, or the workdir of a single stage."""
    return workdir / f"{names.index(stage):02d}_{stage}" if stage else workdir


def raised(workdir: Path, config: Mapping[str, Any]) -> list[Path]:
    """Returns the folders of finished stages whose steps are more than they were finished with."""
    names = list(config.get("stages", ()))
    places = [split(config, place) for place in differences(workdir, config)]
    changed = [stage for stage, option in places if change_of(option) == "steps"]
    folders = [_folder(workdir, names, stage) for stage in changed]
    return [folder for folder in folders if paths.exists(folder / DONE)]


def differences(workdir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns how a config differs from the workdir's: {place of an option: old -> new}.

    An absent option counts as its default, so that new options leave older workdirs usable.
    A workdir without results differs from nothing.
    """
    path = workdir / CONFIG
    if not paths.exists(path) or _has_only_configs(workdir):
        return {}
    before = _Options(workdirs.read_config(workdir) or {})
    now = _Options(json_text.parse(json_text.encode(config, path)))
    places = sorted(before.all.keys() | now.all.keys())
    return {
        place: f"{before.show(place)} -> {now.show(place)}"
        for place in places
        if before.all.get(place, _ABSENT) != now.all.get(place, _ABSENT)
    }


class _Options:
    """The options of a config by their places; `all` has those that are absent too."""

    def __init__(self, config: Mapping[str, Any]):
        self._present = json_text.leaves(config)
        self.all = json_text.leaves(with_defaults(config))

    def show(self, place: str) -> str:
        if place in self._present:
            return str(self._present[place])
        return f"absent ({self.all[place]})" if place in self.all else "absent"


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stage's config, or a recipe's, with the default of every absent option.

    The config of an unknown stage stays as it is.
    """
    if "stages" in config:
        return {
            name: with_defaults(part) if isinstance(part, Mapping) else part
            for name, part in config.items()
        }
    if config.get("stage") not in stages.names():
        return dict(config)
    return fill_defaults(stages.config_class(config["stage"]), config)


def _has_only_configs(workdir: Path) -> bool:
    """Returns whether a run stopped before its first result: its config may be corrected."""
    names = {file.name for file in paths.files(workdir)}
    return names <= {CONFIG, provenance.FILE}
