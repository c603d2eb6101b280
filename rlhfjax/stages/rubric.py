"""A rule-based reward model: a rubric that a judge answers, as a reward by name. See `rewards/rubric.py`.

workdir/reward.json    what `reward="stage:…"` loads; `compose` adds it to a reward model, on some prompts
"""

import dataclasses
from typing import Any

from rlhfjax.config import write_json
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.rewards.responses import FILE, beside
from rlhfjax.rewards.rubric import RubricConfig

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RubricConfig):
    stage: str = "rubric"
    mesh: MeshConfig = MeshConfig()


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json says, with names as the config has them."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(RubricConfig)}
    return {"kind": "rubric", **dataclasses.asdict(RubricConfig(**own))}


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes reward.json; returns how many classes there are."""
    values = describe(config)
    values["judge"]["model"] = beside(config.judge.model, workdir)
    write_json(workdir / FILE, values)
    metrics = {"rubric/classes": float(len(config.classes))}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
