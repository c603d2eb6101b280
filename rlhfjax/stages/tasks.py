"""Prompts whose answers can be checked, from reasoning-gym's generators.

workdir/prompts/{train,validation,test}.jsonl    {"prompt", "answer", and what the rule needs to know}

    prompts   {"spec": "jsonl:stage:tasks/prompts/{split}.jsonl", "kind": "prompt", "split": "train"}
    reward    "rule:rlhfjax.rewards.tasks:score?metadata=stage:tasks/prompts/*.jsonl"
"""

import dataclasses
from typing import Any

from rlhfjax import paths
from rlhfjax.data.rows import SPLITS
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.ranges import PositiveCount, Seed, ShareBelowHalf
from rlhfjax.rewards.tasks import rows

FOLDER = "prompts"

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "tasks"
    tasks: tuple[
        str, ...
    ] = ()  # of reasoning-gym: chain_sum, spell_backward, word_sorting, …
    size: PositiveCount  # prompts of each task, all splits together
    held_out: ShareBelowHalf = 0.1  # share of them in validation, and in test
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.tasks:
            raise ConfigError(
                "tasks.tasks: at least one of reasoning-gym's is needed, chain_sum for instance"
            )
        if int(self.size * self.held_out) < 1:
            raise ConfigError(
                f"tasks.held_out={self.held_out} of size={self.size}: a share of at least one prompt"
            )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the three files; returns how many prompts each has. No question stands in two of them."""
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    held_out = int(config.size * config.held_out)
    seen: set[str] = set()
    for task in config.tasks:
        for i, row in enumerate(rows(task, config.size, config.seed)):
            split = (
                "test"
                if i < held_out
                else "validation"
                if i < 2 * held_out
                else "train"
            )
            if row["prompt"].strip() not in seen:
                seen.add(row["prompt"].strip())
                splits[split].append(row)
    for split, some in splits.items():
        if not some:
            raise DataError(
                f"tasks: {', '.join(config.tasks)} repeat themselves; nothing is left for {split}"
            )
        paths.make_folder(workdir / FOLDER)
        write_jsonl(workdir / FOLDER / f"{split}.jsonl", some)
    metrics = {f"tasks/{split}": float(len(some)) for split, some in splits.items()}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
