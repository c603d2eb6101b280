"""Describes a rule-based reward model: a rubric that a judge answers. See `rewards/rubric.py`.

workdir/reward.json    the description, which `reward="stage:…"` of a later stage loads

A `compose` reward adds it to a reward model, on some prompts or on all.
"""

import dataclasses
from typing import Any

from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.load import stage_description, write
from rlhfjax.rewards.rubric import RubricConfig

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RubricConfig):
    """The rubric and its judge."""

    stage: str = "rubric"
    """Name of the stage."""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json holds, with names as the config has them."""
    return stage_description("rubric", config)


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes reward.json and returns the number of classes."""
    write(workdir, describe(config))
    metrics = {"rubric/classes": float(len(config.classes))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
