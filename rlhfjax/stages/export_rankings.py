"""Exports a preference dataset as JSON lines of rankings, to inspect, to rank again, or to convert.

workdir/rankings.jsonl    {"prompt", "completions", "ranking", "labeler", "time"}, see
                          `rewards/rankings.py`
"""

import dataclasses

from rlhfjax.data.config import Preferences, open_preferences
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.rankings import from_row, write_rankings

FILE = "rankings.jsonl"

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which rankings are exported."""

    stage: str = "export_rankings"
    """Name of the stage."""
    preferences: Preferences = ()
    """folders that `collect` wrote, specs, or sources with options"""
    splits: tuple[str, ...] = ("train", "validation")
    """splits to export, at least one"""
    time: str = ""
    """when the completions were ranked, ISO 8601; datasets do not store it"""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes rankings.jsonl; returns the number of rankings."""
    if not config.splits:
        raise ConfigError("export_rankings.splits: at least one is needed")
    rankings = []
    for split in config.splits:
        source = open_preferences(config.preferences, split)
        rows = (source[i] for i in range(len(source)))
        rankings += [from_row(row)._replace(time=config.time) for row in rows]
    write_rankings(workdir / FILE, rankings)
    metrics = {"export_rankings/rankings": float(len(rankings))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
