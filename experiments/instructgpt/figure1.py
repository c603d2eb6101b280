"""InstructGPT's figure 1 at small scale: a small PPO-ptx model against larger ones.

Paper: Ouyang et al. 2022 (arXiv 2203.02155), figure 1: the 1.3B PPO-ptx model is preferred to the
  175B GPT-3; here the base is prompted, which makes it better. Stiennon et al. 2020 (arXiv
  2009.01325): a policy of human feedback is preferred to a supervised model ten times larger.
  People judged there. Here a program does, in a world of stories (gold:stories), and the largest
  model is eight times the smallest.
Command: rlhfjax sweep --config=experiments/instructgpt/figure1.py
    --workdir=runs/instructgpt/figure1
Variants: :size=s,method=ppo_ptx,seed=0 is one run of it; :scale=full is for accelerators.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study
from rlhfjax.sweep import grid, product, seeds

STORIES = runpy.run_path(str(Path(__file__).parents[1] / "stories.py"))
SIZES = tuple(STORIES["SIZES"])
METHODS = ("base", "prompted", "sft", "ppo", "ppo_ptx")
LARGEST, REWARD = "l", "l"  # the baseline; C.2: one reward model for all sizes
SEEDS = 5  # pilots had seeds from 100 on
VARIANTS = (
    "size=s,method=ppo_ptx",
    "size=l,method=prompted",
    "size=m,method=sft",
    "size=l,method=ppo_ptx,scale=full",
)
# At scale=full about a hundred times as many; the axis keeps these.
PARAMETERS = {"s": 110_000, "m": 280_000, "l": 870_000}

STUDY = Study(
    claim="A small PPO-ptx model is preferred to the largest prompted base, and to the largest SFT",
    paper="Ouyang et al. 2022; the claim on SFT: Stiennon et al. 2020",
    figure="figure 1: win rate against the largest SFT, by model size",
    conditions={
        f"{size}_{method}": {"arg.size": size, "arg.method": method}
        for size in SIZES
        for method in METHODS
    },
    seeds=SEEDS,
    values={"win rate": "evaluate/gold_win_rate", "gold": "evaluate/gold_policy"},
    requires=(
        Comparison(
            name="the gold reward needs capability",
            value="gold",
            condition="l_sft",
            baseline="s_sft",
            expected="greater",
        ),
    ),
    primary=(
        Comparison(
            name="the smallest PPO-ptx beats the largest prompted base",
            value="win rate",
            condition="s_ppo_ptx",
            baseline="l_prompted",
            expected="greater",
        ),
        Comparison(
            name="PPO-ptx beats SFT at the largest size",
            value="win rate",
            condition="l_ppo_ptx",
            baseline=0.5,
            expected="greater",
        ),
        Comparison(
            name="the smallest PPO-ptx beats the largest SFT",
            value="win rate",
            condition="s_ppo_ptx",
            baseline=0.5,
            expected="greater",
        ),
    ),
    drawing=Figure(
        y="win rate",
        title="Win rate against the largest SFT",
        x_label="parameters",
        y_label="win rate by the gold reward",
        x_scale="log",
        lines={
            method: {f"{size}_{method}": PARAMETERS[size] for size in SIZES}
            for method in METHODS
        },
        paper="PPO-ptx and PPO are above GPT-3, prompted and not, at every size; PPO-ptx of 1.3B is"
        " preferred to GPT-3 of 175B (caption), and that of 175B wins 73.4 +- 2 % (section 1).",
    ),
    cost="74 minutes on 2 CPU cores with --parallel=2, of which the bases take 17",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=SIZES, method=METHODS, scale=STORIES["SCALES"], seed=0)
    stages = STORIES["base"](arg.seed)
    stages |= STORIES["labeled"](REWARD, arg.seed)
    if arg.method in ("ppo", "ppo_ptx"):
        stages["ppo"] = STORIES["ppo"](arg.size, arg.seed, **ptx(arg.method))
    policy = {"base": "pretrain", "prompted": "pretrain", "sft": "sft"}.get(arg.method)
    stages["evaluate"] = STORIES["evaluate"](
        arg.seed,
        f"stage:{policy}_{arg.size}" if policy else "stage:ppo",
        f"stage:sft_{LARGEST}",
        **prompted(arg.method),
    )
    return STORIES["recipe"](arg.scale, **stages)


def ptx(method: str) -> dict:
    """Returns the mix of pretraining text: one row per episode (the paper: eight)."""
    if method == "ppo":
        return {}
    text = (STORIES["source"]("forum", "train"),)
    return {
        "ptx": {
            "coefficient": 0.2,
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
        "policy_prompts": {"source": source, "limit": STORIES["TESTED"]},
        "prompt_length": room,
    }


def sweep(add) -> None:
    sizes, methods = grid("arg.size", *SIZES), grid("arg.method", *METHODS)
    for overrides in product(sizes, methods, seeds(SEEDS)):
        add(overrides)
