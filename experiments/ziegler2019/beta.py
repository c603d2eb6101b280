"""Reward against KL for five coefficients of the KL penalty, beside the best that is possible.

Paper: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: the penalty keeps the policy where the
  reward model holds, and the best policy at a KL is pi ∝ rho exp(r / beta); table 10: without it
  the samples collapse. The controller of the coefficient is measured in docs/optimum.md.
Command: rlhfjax sweep --config=experiments/ziegler2019/beta.py --workdir=runs/ziegler2019/beta
Variants: :beta=0.2,seed=0 is one run of it; :scale=full is for accelerators.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import math
import runpy
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study
from rlhfjax.stages import stage_config
from rlhfjax.sweep import grid, product, seeds

STORIES = runpy.run_path(str(Path(__file__).parents[1] / "stories.py"))
BETAS = ("0.0", "0.05", "0.2", "0.5", "1.0")
POLICY, REWARD = "s", "l"
PROMPTS = 128  # held-out requests, of PPO's evaluations and of the pools
POOL = 512  # of the SFT: it tells the best policy up to log 512 - 3 = 3.2 nats
SAMPLES = 16  # of a policy per request, to count how many are distinct
RATE = 1.5e-4  # of PPO; at 5e-4 the policy without a penalty loses proxy reward again, see LOG.md
SEEDS = 5  # pilots had seeds from 100 on
VARIANTS = ("beta=0.0", "beta=0.5", "beta=0.5,scale=full")


def share_of_best(run) -> float:
    """PPO's gain of proxy reward, over that of the best policy at its KL; none beyond the pool."""
    kl, reward = run.metric("ppo/val_kl"), run.metric("ppo/val_proxy")
    best = run.curve("pool/tilt_proxy")
    kls = run.curve("pool/kl")[: len(best)]
    if not kls[0] < kl <= kls[-1]:
        return math.nan
    start = best[0]
    return (reward - start) / (np.interp(math.sqrt(kl), np.sqrt(kls), best) - start)


STUDY = Study(
    claim="The KL penalty trades reward for closeness, near the best trade; without it samples"
    " collapse",
    paper="Ziegler et al. 2019",
    figure="section 2.2, reward against KL; table 10, samples without a penalty",
    conditions={f"beta {beta}": {"arg.beta": beta} for beta in BETAS},
    seeds=SEEDS,
    values={
        "proxy": "ppo/val_proxy",
        "gold": "ppo/val_gold",
        "KL": "ppo/val_kl",
        "distinct": "responses/distinct_responses",
        "share of best": share_of_best,
    },
    primary=(
        Comparison(
            name="without a penalty, responses to a prompt become alike",
            value="distinct",
            condition="beta 0.0",
            baseline="beta 0.5",
            expected="less",
            margin=0.05,
        ),
        Comparison(
            name="a smaller penalty gives more proxy reward",
            value="proxy",
            condition="beta 0.05",
            baseline="beta 0.5",
            expected="greater",
        ),
        Comparison(
            name="PPO reaches over half of the best gain at its KL",
            value="share of best",
            condition="beta 0.5",
            baseline=0.5,
            expected="greater",
        ),
    ),
    curves=(
        "ppo/val_kl",
        "ppo/val_proxy",
        "ppo/val_gold",
        "pool/kl",
        "pool/tilt_proxy",
        "pool/proxy",
    ),
    drawing=Figure(
        x="ppo/val_kl",
        y="ppo/val_proxy",
        title="Proxy reward against KL, during training",
        x_label="KL to the SFT, nats per response",
        y_label="proxy reward (std of the SFT's)",
        x_scale="sqrt",
        beside={
            "best at its KL": ("pool/kl", "pool/tilt_proxy"),
            "best of n": ("pool/kl", "pool/proxy"),
        },
        paper="More KL buys more reward, less and less; the reachable curve is drawn by weighting"
        " samples of the start (section 2.2).",
    ),
    cost="43 minutes on 2 CPU cores with --parallel=2; the bases 28 more, once for all studies",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, beta=BETAS, scale=STORIES["SCALES"], seed=0)
    stages = STORIES["base"](arg.seed)
    stages |= STORIES["labeled"](REWARD, arg.seed)
    stages["pool"] = pool(f"stage:sft_{POLICY}", POOL, arg.seed)
    stages["ppo"] = STORIES["ppo"](
        POLICY,
        arg.seed,
        RATE,
        kl={"coefficient": float(arg.beta)},
        eval_prompts=held_out(),
    )
    stages["responses"] = pool("stage:ppo", SAMPLES, arg.seed)
    return STORIES["recipe"](arg.scale, **stages)


def held_out() -> dict:
    return {"source": STORIES["source"]("", "validation"), "limit": PROMPTS}


def pool(policy: str, size: int, seed: int) -> ConfigDict:
    """Returns responses of a policy to the held-out requests, with both rewards."""
    return stage_config(
        "best_of_n",
        init_from=policy,
        proxy="stage:reward",
        gold=STORIES["GOLD"],
        prompts=held_out(),
        pool=size,
        batch_size=512,
        seed=seed + 2000,
        **STORIES["SAMPLING"],
    )


def sweep(add) -> None:
    for overrides in product(grid("arg.beta", *BETAS), seeds(SEEDS)):
        add(overrides)
