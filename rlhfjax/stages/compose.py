"""Describes a reward that is made of others: an ensemble of reward models, or a weighted sum.

workdir/reward.json    the description, which `reward="stage:…"` of a later stage loads

A description in place (`reward={"kind": "compose", …}`) is the same without a stage. The members of
an ensemble are reward stages with different seeds, each its own stage of the recipe.
"""

import dataclasses
from typing import Any

from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.compose import ComposeConfig
from rlhfjax.rewards.load import stage_description, write

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ComposeConfig):
    """The members, and how they are combined."""

    stage: str = "compose"
    """Name of the stage."""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json holds, with names as the config has them."""
    return stage_description("compose", config)


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes reward.json and returns the number of members."""
    write(workdir, describe(config))
    metrics = {"compose/members": float(len(config.members))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
