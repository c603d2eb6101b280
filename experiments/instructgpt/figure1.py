"""InstructGPT's figure 1 at small scale: a small PPO model against much larger ones.

Paper: Ouyang et al. 2022 (arXiv 2203.02155), figure 1.
Command: rlhfjax sweep --config=experiments/instructgpt/figure1.py --workdir=runs/figure1
Variants: :size=s,method=ppo_ptx,seed=0 is one run of it.
Hardware: 2 CPU cores.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg

STORIES = runpy.run_path(str(Path(__file__).parents[1] / "stories.py"))
METHODS = ("base", "prompted", "sft", "ppo", "ppo_ptx")
LARGEST, REWARD = "l", "m"  # the baseline; C.2: one reward model for all sizes
VARIANTS = ("size=s,method=ppo_ptx",)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("s", "xs", "m", "l"), method=METHODS, seed=0)
    with_ppo = arg.method in ("ppo", "ppo_ptx")
    needed = {arg.size, LARGEST, *([REWARD] if with_ppo else [])}
    stages = {"tokenizer": STORIES["tokenizer"]()}
    for size in (each for each in STORIES["SIZES"] if each in needed):
        stages[f"pretrain_{size}"] = STORIES["pretrain"](size)
        stages[f"sft_{size}"] = STORIES["sft"](size, arg.seed)
    if with_ppo:
        stages["collect"] = STORIES["collect"](REWARD, arg.seed)
        stages["reward"] = STORIES["reward"](REWARD, arg.seed)
        stages["ppo"] = STORIES["ppo"](arg.size, arg.seed, **ptx(arg.method))
    policy = {"base": "pretrain", "prompted": "pretrain", "sft": "sft"}.get(arg.method)
    stages["evaluate"] = STORIES["evaluate"](
        arg.seed,
        f"stage:{policy}_{arg.size}" if policy else "stage:ppo",
        f"stage:sft_{LARGEST}",
        **prompted(arg.method),
    )
    return STORIES["recipe"](**stages)


def ptx(method: str) -> dict:
    """Returns the mix of pretraining text: one row per episode (the paper: eight)."""
    if method == "ppo":
        return {}
    text = (STORIES["source"]("forum", "train"),)
    return {
        "ptx": {
            "coefficient": 1.0,
            "ratio": 1,
            "length": STORIES["PROMPT"] + STORIES["RESPONSE"],
            "sources": text,
        }
    }


def prompted(method: str) -> dict:
    """Returns two solved requests before each prompt, for a model that was only pretrained."""
    if method != "prompted":
        return {}
    source = STORIES["source"]("prompted", "test")
    room = STORIES["LENGTH"] - STORIES["RESPONSE"]
    return {
        "policy_prompts": {"source": source, "limit": 512},
        "prompt_length": room,
    }
