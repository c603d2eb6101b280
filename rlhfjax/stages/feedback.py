"""AI feedback: a judge with principles, as a labeler by name. See `rewards/feedback.py`.

workdir/reward.json    what `labeler="stage:…"` of `collect` loads; the reward stage then takes `loss={"name": "soft"}`
"""

import dataclasses
from typing import Any

from rlhfjax.config import write_json
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.feedback import FeedbackConfig, read_lines
from rlhfjax.rewards.responses import FILE, beside

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FeedbackConfig):
    stage: str = "feedback"
    mesh: MeshConfig = MeshConfig()


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json says, with names as the config has them."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(FeedbackConfig)}
    return {"kind": "feedback", **dataclasses.asdict(FeedbackConfig(**own))}


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes reward.json; returns how many principles there are."""
    values = describe(config) | {"principles": beside(config.principles, workdir)}
    values["judge"]["model"] = beside(config.judge.model, workdir)
    write_json(workdir / FILE, values)
    metrics = {"feedback/principles": float(len(read_lines(config.principles)))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
