"""Gao's figure 1b at small scale: PPO against a weak and a strong proxy, with and without penalty.

Paper: Gao et al. 2022 (arXiv 2210.10760), sections 3 and 3.6: without a KL penalty the proxy score
  rises and the gold score falls in the end; a penalty stops the policy earlier on the same curve of
  gold over KL, as early stopping would. The weak proxy is one of size m that learned from 1,024
  prompts (right on 59 % of held-out pairs in figure1a.py), the strong one from 8,192 (70 %).
Command: rlhfjax sweep --config=experiments/gao2022/figure1b.py --workdir=runs/gao2022/figure1b
Variants: :proxy=weak,seed=0 is one run of it, with both policies; :scale=full is for
  accelerators.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import math
import runpy
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study, fall_from_peak
from rlhfjax.sweep import grid, product, seeds

SMALL = runpy.run_path(str(Path(__file__).with_name("small.py")))
STORIES = SMALL["STORIES"]
PROXIES = {"weak": ("m", 1024), "strong": ("m", 8192)}
ITERATIONS = 100
RATE = 1.5e-4  # of PPO, as in ziegler2019/beta.py
PENALTY = 0.1  # it stops at 2 to 4 nats
SEEDS = 5  # pilots had seeds from 100 on
VARIANTS = ("proxy=weak", "proxy=strong", "proxy=weak,scale=full")


def proxy_gain(run) -> float:
    """Proxy reward at the end of PPO without penalty, less that at its first evaluation."""
    curve = run.curve("ppo/val_proxy")
    return curve[-1] - curve[0]


def fitted(run) -> np.ndarray:
    """alpha and beta of gold = d (alpha - beta log d), by least squares; at d = 0 it is 0."""
    kl, gold = np.array(run.curve("ppo/val_kl")), np.array(run.curve("ppo/val_gold"))
    d, gold = np.sqrt(kl[kl > 0]), gold[kl > 0]
    return np.linalg.lstsq(np.stack([d, -d * np.log(d)], axis=1), gold, rcond=None)[0]


def off_the_curve(run) -> float:
    """Gold reward of PPO with a penalty, less that without one at the same KL.

    The mean over the last five evaluations; the curve without a penalty is joined by lines over
    sqrt(KL), and NaN is returned where it does not reach.
    """
    kl, gold = np.array(run.curve("ppo/val_kl")), np.array(run.curve("ppo/val_gold"))
    order = np.argsort(kl)
    ends = np.array(run.curve("penalized/val_kl"))[-5:]
    if not kl.min() <= ends.min() <= ends.max() <= kl.max():
        return math.nan
    same_kl = np.interp(np.sqrt(ends), np.sqrt(kl[order]), gold[order])
    return float(np.mean(run.curve("penalized/val_gold")[-5:] - same_kl))


STUDY = Study(
    claim="PPO against a weak proxy loses gold reward while the proxy rises; a KL penalty is early"
    " stopping",
    paper="Gao et al. 2022",
    figure="figure 1b: gold score over the square root of KL; section 3.6",
    conditions={name: {"arg.proxy": name} for name in PROXIES},
    seeds=SEEDS,
    values={
        "accuracy": "proxy/val_accuracy",
        "fall of gold": fall_from_peak("ppo/val_gold"),
        "proxy gain": proxy_gain,
        "gold at the end": "ppo/val_gold",
        "off the curve": off_the_curve,
        "alpha": lambda run: fitted(run)[0],
        "beta": lambda run: fitted(run)[1],
        "KL": "ppo/val_kl",
        "KL with penalty": "penalized/val_kl",
    },
    requires=(
        Comparison(
            name="the proxy rises",
            value="proxy gain",
            condition="weak",
            baseline=0.0,
            expected="greater",
        ),
    ),
    primary=(
        Comparison(
            name="gold falls with the weak proxy",
            value="fall of gold",
            condition="weak",
            baseline=0.0,
            expected="less",
        ),
        Comparison(
            name="the strong proxy leaves more gold",
            value="gold at the end",
            condition="strong",
            baseline="weak",
            expected="greater",
        ),
        Comparison(
            name="a penalty stops on the same curve",
            value="off the curve",
            condition="weak",
            baseline=0.0,
            expected="equal",
            margin=0.15,
        ),
    ),
    curves=(
        "ppo/val_kl",
        "ppo/val_gold",
        "ppo/val_proxy",
        "penalized/val_kl",
        "penalized/val_gold",
    ),
    drawing=Figure(
        x="ppo/val_kl",
        y="ppo/val_gold",
        title="Gold reward of PPO",
        x_label="KL to the SFT, nats per response",
        y_label="gold reward (std of the SFT's)",
        x_scale="sqrt",
        beside={
            "with a penalty (both proxies)": ("penalized/val_kl", "penalized/val_gold")
        },
        paper="The smallest proxies peak at a KL of 13 to 18 nats and fall; the largest stay flat.",
    ),
    cost="47 minutes on 2 CPU cores with --parallel=2, tests beside; shared stages 84",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, proxy=tuple(PROXIES), scale=STORIES["SCALES"], seed=0)
    stages = SMALL["shared"]() | SMALL["proxy"](*PROXIES[arg.proxy], arg.seed)
    for name, coefficient in (("ppo", 0.0), ("penalized", PENALTY)):
        stages[name] = STORIES["ppo"](
            SMALL["POLICY"],
            arg.seed,
            RATE,
            reward="stage:proxy",
            gold="stage:gold",
            kl={"coefficient": coefficient},
            eval_prompts=SMALL["held_out"]() | {"limit": 256},
            **STORIES["loop"](ITERATIONS, evals=25),
        )
    return STORIES["recipe"](arg.scale, **stages)


def sweep(add) -> None:
    for overrides in product(grid("arg.proxy", *PROXIES), seeds(SEEDS)):
        add(overrides)
