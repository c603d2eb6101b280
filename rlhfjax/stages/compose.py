"""A reward made of others, by name in one file: an ensemble of reward models, or a weighted sum with rules and judges.

workdir/reward.json    what `reward="stage:…"` of a policy stage then loads

An ensemble's members are reward stages that differ in their seed, each its own stage of the recipe.
"""

import dataclasses
from typing import Any

from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.compose import ComposeConfig, save

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ComposeConfig):
    stage: str = "compose"
    mesh: MeshConfig = MeshConfig()


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json says, with names as the config has them."""
    return {"kind": "compose", **dataclasses.asdict(_own(config))}


def _own(config: Config) -> ComposeConfig:
    return ComposeConfig(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(ComposeConfig)}
    )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes reward.json; returns how many members there are."""
    save(workdir, _own(config))
    metrics = {"compose/members": float(len(config.members))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
