"""Builds the recipes of the studies of over-optimization: a gold model, a pool, and proxies.

The gold reward is a learned model, of the largest size, trained on 32 thousand responses that a
program ranked (gold:stories). Proxies are smaller, and learn from its labels. The base, the SFT of
the policy, the gold model and the pool have seed 0 and are made once; seeds vary the labeled
responses and the proxy. Experiment files of this folder load this file by its path.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.stages import stage_config

STORIES = runpy.run_path(str(Path(__file__).parents[1] / "stories.py"))
POLICY, GOLD = "s", "l"
PROXIES = ("xxs", "xs", "s", "m")
RANKED = (1024, 8192)  # prompts of four responses, 6 comparisons each, in one epoch
PROMPTS, POOL = 64, 1000


def shared() -> dict[str, ConfigDict]:
    """Returns the stages that have seed 0: bases, SFT, the gold model and the pool."""
    stages = STORIES["base"](0)
    for size in STORIES["SMALLER"]:
        stages[f"pretrain_{size}"] = STORIES["pretrain"](size)
    stages["rankings"] = STORIES["collect"](POLICY, 0, prompts=8192)
    stages["gold"] = STORIES["reward"](
        GOLD, 0, prompts=8192, preferences=("stage:rankings/preferences",)
    )
    stages["pool"] = stage_config(
        "best_of_n",
        init_from=f"stage:sft_{POLICY}",
        proxy=STORIES["GOLD"],
        gold="stage:gold",
        save_responses=True,
        **pools(),
    )
    return stages


def pools() -> dict:
    """Returns the options of a pool that all runs share."""
    return {
        "prompts": held_out(),
        "pool": POOL,
        "batch_size": 500,
        "seed": 2000,
        **STORIES["SAMPLING"],
    }


def held_out() -> dict:
    return {"source": STORIES["source"]("", "test"), "limit": PROMPTS}


def proxy(size: str, ranked: int, seed: int) -> dict[str, ConfigDict]:
    """Returns the stages that rank four responses per prompt by gold, and learn a proxy."""
    comparisons = STORIES["collect"](POLICY, seed + 1, prompts=max(RANKED))
    comparisons.labeler = "stage:gold"
    comparisons.eval_prompts.limit = 600  # all of the split, for accuracies
    learned = STORIES["reward"](
        size,
        seed,
        prompts=ranked,
        init_from=f"stage:pretrain_{size}",
        preferences=("stage:comparisons/preferences",),
    )
    return {"comparisons": comparisons, "proxy": learned}
