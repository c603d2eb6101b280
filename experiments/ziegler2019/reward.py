"""Trains the reward models of Ziegler et al. on the best of four responses.

Paper: Ziegler et al. 2019 (arXiv 1909.08593), sections 2.2 and 2.3; and its released code,
  lm-human-preferences (launch.py, train_reward.py), which differs in size, batch, learning rate and
  labels.
Command: rlhfjax train --config=experiments/ziegler2019/reward.py:task=tldr
    --workdir=runs/ziegler2019/774m/tldr/reward
Variants: :task=sentiment, descriptiveness, cnndm or tldr; :numbers=code, those of the released
  code; :seed=1.
Hardware: not named by the paper. Time and result: README.md beside this file; at small scale:
  beta.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

SFT = runpy.run_path(str(Path(__file__).with_name("sft.py")))
VARIANTS = tuple(
    f"task={task}{rest}"
    for task in ("sentiment", "descriptiveness", "cnndm", "tldr")
    for rest in ("", ",numbers=code")
)
KIND = SFT["KIND"]
# section 2.1; the code was released for, and tested with, the smallest GPT-2
MODEL = {"paper": "774m", "code": "124m"}
# Tokens. Style: queries of 32 to 64 (the code: 64), continued by 24; summaries: queries of up to
# 500, responses of 75 (section 3 and launch.py). Our chat template adds bos, the two markers and an
# eos to a query.
QUERY = {"style": 64 + 4, "summary": 500 + 4}
RESPONSE = {"style": 24, "summary": 75}
# section 3 and launch.py
TEMPERATURE = {"sentiment": 0.7, "descriptiveness": 0.7, "cnndm": 0.5, "tldr": 0.7}
NUMBERS = {
    # learning rate and batch: section 2.2; labels: 5,000 for style (10,000 and 20,000 are no
    # better), 60,000 for summaries (section 3)
    ("paper", "style"): {"learning_rate": 1.77e-5, "batch_size": 8, "labels": 5_000},
    ("paper", "summary"): {
        "learning_rate": 1.77e-5,
        "batch_size": 32,
        "labels": 60_000,
    },
    # launch.py
    ("code", "style"): {"learning_rate": 5e-5, "batch_size": 32, "labels": 4_992},
    ("code", "summary"): {"learning_rate": 2.5e-5, "batch_size": 16, "labels": 46_000},
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, task=tuple(KIND), numbers=("paper", "code"), seed=0)
    kind, numbers = KIND[arg.task], NUMBERS[arg.numbers, KIND[arg.task]]
    return stage_config(
        "reward",
        init_from=start(arg),
        # rows of prompt, completions (four samples of the policy at its start) and scores, 1 for
        # the one picked
        preferences=(f"jsonl:data/{arg.task}/best_of_4_{{split}}*.jsonl",),
        length=QUERY[kind] + RESPONSE[kind],
        batch_size=numbers["batch_size"],
        steps=numbers["labels"] // numbers["batch_size"],  # one epoch
        overrides={"dropout": 0.0},  # section 2.2: no dropout
        eval_every=50,
        checkpoint={"every": 150, "minutes": 15.0},
        seed=arg.seed,
        optim=optim(numbers["learning_rate"]),
        **loss(),
    )


def start(arg: ConfigDict) -> str:
    """Returns the language model that reward model and policy start from (section 2.1)."""
    books = KIND[arg.task] == "style" and arg.numbers == "paper"
    return f"runs/ziegler2019/{MODEL[arg.numbers]}/{'books' if books else 'gpt2'}"


def optim(learning_rate: float) -> dict:
    """Returns Adam of the released code: TensorFlow's, epsilon 1e-5, linear to 0, no clipping."""
    return {
        # the paper says Adam; moments and epsilon are the code's (core.py, minimize)
        "name": "adam_tf",
        "learning_rate": learning_rate,
        "schedule": "linear",
        "b2": 0.999,
        "eps": 1e-5,
        "clip_norm": 0.0,
    }


def loss() -> dict:
    """Returns the paper's options of the reward model, which hold at any size."""
    return {
        "loss": {"name": "best_of_k"},  # eq. 1
        "normalize_before": "mean_std",  # the code; the paper only has the second normalization
        # section 2.2: mean 0, variance 1 on samples of the policy at its start
        "normalize": "mean_std",
    }
