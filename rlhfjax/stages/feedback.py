"""Describes AI feedback: a judge with principles, as a labeler. See `rewards/feedback.py`.

workdir/reward.json    the description, which `labeler="stage:…"` of `collect` loads

The reward stage then takes `loss={"name": "soft"}`.
"""

import dataclasses
from typing import Any

from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.feedback import FeedbackConfig, read_lines
from rlhfjax.rewards.load import stage_description, write

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FeedbackConfig):
    """The judge, and what it is asked."""

    stage: str = "feedback"
    """Name of the stage."""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json holds, with names as the config has them."""
    return stage_description("feedback", config)


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes reward.json and returns the number of principles."""
    write(workdir, describe(config))
    metrics = {"feedback/principles": float(len(read_lines(config.principles)))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
