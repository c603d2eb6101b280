"""Names of models for people: `SFT` and `PPO` instead of baseline and policy."""

from collections.abc import Mapping
from typing import Any

from rlhfjax import stages
from rlhfjax.report.workdir import Run, Stage

ROLES = ("baseline", "policy", "pretrained")


def of_stage(stage: Stage) -> str:
    """Returns the name of the model that a stage leaves; the stage's own if it has no other."""
    return stages.model_name(stage.config) or stage.name


def of_models(run: Run, comparison: Stage | None) -> dict[str, str]:
    """Returns the names of the models of a comparison, by role.

    A model that no stage of the run made is called by its role. Models that would have one name
    are called by their stages.
    """
    names = {role: role for role in ROLES}
    if comparison is None:
        return names
    makers = {
        role: stage
        for role in ROLES
        if (stage := _maker(run, _source(comparison.config, role))) is not None
    }
    for role, stage in makers.items():
        names[role] = of_stage(stage)
    found = [names[role] for role in makers]
    for role, stage in makers.items():
        if found.count(names[role]) > 1:
            names[role] = stage.name
    return names


def possessive(name: str) -> str:
    """Returns `the baseline's` or `the SFT model's`."""
    return f"the {name}'s" if name in ROLES[:2] else f"the {name} model's"


def _source(config: Mapping[str, Any], role: str) -> str:
    """Returns what a comparison's config names as one of its models; "" if nothing."""
    options = config if role != "pretrained" else config.get("tax")
    return str(options.get(role) or "") if isinstance(options, Mapping) else ""


def _maker(run: Run, source: str) -> Stage | None:
    """Returns the stage that `stage:NAME` or a folder NN_NAME of the run names."""
    name = source.removeprefix("stage:").partition("/")[0]
    folder = source.rstrip("/").rpartition("/")[2]
    for i, stage in enumerate(run.stages):
        if source.startswith("stage:") and stage.name == name:
            return stage
        if "/" in source and folder == f"{i:02d}_{stage.name}":
            return stage
    return None
