"""A preference dataset as JSON lines of rankings, for people to look at, to rank anew, or for another program.

workdir/rankings.jsonl    {"prompt", "completions", "ranking", "labeler", "time"}, see `rewards/rankings.py`
"""

import dataclasses

from rlhfjax.data.config import open_preferences
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.rankings import from_row, write_rankings

FILE = "rankings.jsonl"

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "export_rankings"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    splits: tuple[str, ...] = ("train", "validation")
    time: str = ""  # ISO 8601, when they were ranked; a dataset does not know
    mesh: MeshConfig = MeshConfig()


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes rankings.jsonl; returns how many there are."""
    if not config.splits:
        raise ConfigError("export_rankings.splits: at least one is needed")
    sources = [open_preferences(config.preferences, split) for split in config.splits]
    rankings = [
        from_row(source[i])._replace(time=config.time)
        for source in sources
        for i in range(len(source))
    ]
    write_rankings(workdir / FILE, rankings)
    metrics = {"export_rankings/rankings": float(len(rankings))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
