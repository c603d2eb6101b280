"""A stage of a config with the shapes of the models that it starts from, without any file of theirs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhfjax import paths, recipe, stages
from rlhfjax.config import build, parse_arg, to_dict
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import store
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.presets import preset
from rlhfjax.paths import Path
from rlhfjax.rewards import SCORERS, rules


class Subject(NamedTuple):
    """One stage to plan."""

    name: str
    config: Any  # the stage's typed config
    model: TransformerConfig
    reward: TransformerConfig | None = None  # None: no model scores


def parse_model(text: str) -> TransformerConfig:
    """`gpt3-1.3b` or `gpt3-1.3b:dtype=bfloat16,remat=full,scan_layers=true`: a preset with fields changed."""
    name, _, changes = text.partition(":")
    shape = preset(name)
    fields = {k: v for k, v in dataclasses.asdict(shape).items() if v is not None}
    return TransformerConfig(**dataclasses.asdict(shape) | dict(parse_arg(changes, **fields)))


def subject(
    config: Any, stage: str | None = None, workdir: Path | None = None, model: str = "", reward_model: str = ""
) -> Subject:
    """The stage that is planned: the config's own, or of a recipe the one of that name (by default its last).

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
    trains = [n for n in folders if hasattr(stages.find(values[n].get("stage", "")), "build")]
    name = stage or (trains[-1] if trains else "")
    if name not in trains:
        raise ConfigError(f"--stage={name}: the stages that train are {', '.join(trains) or 'none'}")
    typed = {n: recipe.check(recipe.resolve(values[n], folders, n), n) for n in folders}
    made = {str(folders[n]): c for n, c in typed.items()}
    chosen = typed[name]
    reward = getattr(chosen, "reward", None)
    return Subject(
        name,
        chosen,
        _start_of(chosen, made, model, name),
        None if reward is None else _reward_of(reward, made, reward_model, name),
    )


def _start_of(config: Any, made: Mapping[str, Any], given: str, name: str) -> TransformerConfig:
    """The shape that a stage starts from, its own `overrides` applied."""
    if (own := getattr(config, "model", None)) is not None:
        return own
    shape = _shape(config.init_from, made, given, f"{name}.init_from", "--model")
    if not (overrides := getattr(config, "overrides", None)):
        return shape
    return build(TransformerConfig, dataclasses.asdict(shape) | overrides, f"{name}.overrides")


def _reward_of(reward: str, made: Mapping[str, Any], given: str, name: str) -> TransformerConfig | None:
    if reward in SCORERS or reward.startswith(rules.PREFIX):
        return None
    if reward in made and made[reward].stage != "reward":
        return None  # described by rules or several models: scored on the host, or not as one program
    return _shape(reward, made, given, f"{name}.reward", "--reward_model")


def _shape(origin: str, made: Mapping[str, Any], given: str, where: str, flag: str) -> TransformerConfig:
    if origin in made:
        return _start_of(made[origin], made, given, where)
    try:
        return store.describe(store.find(origin)).config
    except CheckpointError:
        if given:
            return parse_model(given)
        raise ConfigError(
            f"{where}={origin}: no model there; say its shape with {flag}=PRESET, such as {flag}=gpt3-1.3b or "
            f"{flag}=gpt3-1.3b:dtype=bfloat16,scan_layers=true"
        ) from None
