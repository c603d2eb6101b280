"""Writes prompts with verifiable answers, from reasoning-gym's generators.

workdir/prompts/{train,validation,test}.jsonl    {"prompt", "answer", and the rule's metadata}

    prompts   {"spec": "jsonl:stage:tasks/prompts/{split}.jsonl", "kind": "prompt",
               "split": "train"}
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
    """Which tasks are generated, and how many prompts of each."""

    stage: str = "tasks"
    """Name of the stage."""
    tasks: tuple[str, ...] = ()
    """names in reasoning-gym: chain_sum, spell_backward, word_sorting, …"""
    size: PositiveCount
    """prompts per task, over all splits"""
    held_out: ShareBelowHalf = 0.1
    """share of the prompts in validation, and share in test"""
    seed: Seed = 0
    """seed of the generators"""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""

    def __post_init__(self):
        if not self.tasks:
            raise ConfigError(
                "tasks.tasks: at least one of reasoning-gym's is needed,"
                " chain_sum for instance"
            )
        if int(self.size * self.held_out) < 1:
            raise ConfigError(
                f"tasks.held_out={self.held_out}: must be at least one prompt"
                f" of size={self.size}"
            )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the three files; returns the number of prompts in each.

    A question that was generated before is left out, so that no two files share one.
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    held_out = int(config.size * config.held_out)
    seen: set[str] = set()
    for task in config.tasks:
        for i, row in enumerate(rows(task, config.size, config.seed)):
            question = row["prompt"].strip()
            if question not in seen:
                seen.add(question)
                splits[_split_of(i, held_out)].append(row)
    metrics = {}
    for split, prompts in splits.items():
        if not prompts:
            raise DataError(
                f"tasks: {', '.join(config.tasks)} repeat their questions;"
                f" no prompt is left for {split}"
            )
        paths.make_folder(workdir / FOLDER)
        write_jsonl(workdir / FOLDER / f"{split}.jsonl", prompts)
        metrics[f"tasks/{split}"] = float(len(prompts))
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _split_of(index: int, held_out: int) -> str:
    """Returns the split of a task's prompt: the first are held out."""
    if index < held_out:
        return "test"
    return "validation" if index < 2 * held_out else "train"
