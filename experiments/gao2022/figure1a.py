"""Gao's figure 1a at small scale: best-of-n against proxies of four sizes and two amounts of data.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 3: over d = sqrt(KL) the gold score of best-of-n
  is d (alpha - beta d), and falls in the end if the proxy is weak. There the gold model has 6B, the
  policy 1.2B, proxies 3M to 3B; here 870, 110 and 11 to 280 thousand parameters.
Command: rlhfjax sweep --config=experiments/gao2022/figure1a.py --workdir=runs/gao2022/figure1a
Variants: :proxy=xxs,ranked=1024,seed=0 is one run of it; :scale=full is for accelerators.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study, fall_from_peak
from rlhfjax.stages import stage_config
from rlhfjax.sweep import grid, product, seeds

SMALL = runpy.run_path(str(Path(__file__).with_name("small.py")))
PROXIES, RANKED = SMALL["PROXIES"], tuple(map(str, SMALL["RANKED"]))
SEEDS = 5  # pilots had seeds from 100 on
VARIANTS = (
    "proxy=xxs,ranked=1024",
    "proxy=m,ranked=8192",
    "proxy=m,ranked=8192,scale=full",
)


def gain(run):
    """(n, d, gold) of best-of-n from n = 2 on, gold less its mean."""
    n = np.array(run.curves["best_of_n/gold"][0])
    d = np.sqrt(run.curve("best_of_n/kl"))
    gold = np.array(run.curve("best_of_n/gold"))
    return n[1:], d[1:], gold[1:] - gold[0]


def fitted(run) -> np.ndarray:
    """alpha and beta of the gain d (alpha - beta d), by least squares over n >= 2."""
    _, d, y = gain(run)
    return np.linalg.lstsq(np.stack([d, -d * d], axis=1), y, rcond=None)[0]


def peak(run) -> float:
    """KL at which gold is highest, nats."""
    kl, gold = run.curve("best_of_n/kl"), run.curve("best_of_n/gold")
    return kl[int(np.argmax(gold))]


def better_form(run) -> float:
    """By how much d (alpha - beta d), fitted to n <= 64, errs less than others at larger n.

    The others have log d, the form of RL, and d^2 in place of the last d; the better one counts.
    """
    n, d, y = gain(run)
    seen, errors = n <= 64, []
    for term in (d, np.log(d), d * d):
        columns = np.stack([d, -d * term], axis=1)
        found = np.linalg.lstsq(columns[seen], y[seen], rcond=None)[0]
        errors.append(np.sqrt(np.mean((columns @ found - y)[~seen] ** 2)))
    return float(min(errors[1:]) - errors[0])


STUDY = Study(
    claim="Best-of-n against a proxy loses gold reward again, later if it is better; the form is"
    " d (alpha - beta d)",
    paper="Gao et al. 2022",
    figure="figure 1a: gold score over the square root of KL",
    conditions={
        f"{size} {ranked}": {"arg.proxy": size, "arg.ranked": ranked}
        for size in PROXIES
        for ranked in RANKED
    },
    seeds=SEEDS,
    values={
        "accuracy": "proxy/val_accuracy",
        "fall of gold": fall_from_peak("best_of_n/gold"),
        "KL of the peak": peak,
        "alpha": lambda run: fitted(run)[0],
        "beta": lambda run: fitted(run)[1],
        "better form": better_form,
    },
    requires=(
        Comparison(
            name="the weakest proxy is weak",
            value="accuracy",
            condition="xxs 1024",
            baseline=0.65,
            expected="less",
        ),
        Comparison(
            name="the strongest proxy is not",
            value="accuracy",
            condition="m 8192",
            baseline=0.65,
            expected="greater",
        ),
    ),
    primary=(
        Comparison(
            name="gold falls with the weakest proxy",
            value="fall of gold",
            condition="xxs 1024",
            baseline=0.0,
            expected="less",
        ),
        Comparison(
            name="with the strongest proxy it falls later",
            value="KL of the peak",
            condition="m 8192",
            baseline="xxs 1024",
            expected="greater",
        ),
        Comparison(
            name="d (alpha - beta d) predicts larger n best",
            value="better form",
            condition="m 8192",
            baseline=0.0,
            expected="greater",
        ),
    ),
    curves=("best_of_n/kl", "best_of_n/gold", "best_of_n/proxy"),
    drawing=Figure(
        x="best_of_n/kl",
        y="best_of_n/gold",
        title="Gold reward of best-of-n",
        x_label="KL to the SFT, nats per response",
        y_label="gold reward (std of the SFT's)",
        x_scale="sqrt",
        paper="Larger proxies reach a higher gold score; the smallest curves rise, peak and fall.",
    ),
    cost="54 minutes on 2 CPU cores with --parallel=2, other runs beside; what all share 41 more",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, proxy=PROXIES, ranked=RANKED, scale=SMALL["STORIES"]["SCALES"], seed=0
    )
    stages = SMALL["shared"]() | SMALL["proxy"](arg.proxy, int(arg.ranked), arg.seed)
    stages["best_of_n"] = stage_config(
        "best_of_n",
        init_from=f"stage:sft_{SMALL['POLICY']}",
        proxy="stage:proxy",
        responses="stage:pool",
        **SMALL["pools"](),
    )
    return SMALL["STORIES"]["recipe"](arg.scale, **stages)


def sweep(add) -> None:
    sizes, ranked = grid("arg.proxy", *PROXIES), grid("arg.ranked", *RANKED)
    for overrides in product(sizes, ranked, seeds(SEEDS)):
        add(overrides)
