"""The alignment tax at equal reward: PPO, PPO-ptx, and PPO with a larger KL coefficient.

Paper: Ouyang et al. 2022 (arXiv 2203.02155), sections 4.2 and appendix E.6: PPO loses on public
  tasks, pretraining text that is mixed in brings most of it back, a larger KL coefficient does not
  without giving up reward. Here the tax is the loss on text of a third kind, verses, which the base
  was pretrained on and which neither SFT nor the mixed-in text contains; SFT takes most of it.
Command: rlhfjax sweep --config=experiments/instructgpt/ptx.py --workdir=runs/instructgpt/ptx
Variants: :method=ptx,seed=0 is one run of it; :scale=full is for accelerators.
Hardware: 2 CPU cores. Time and result: README.md beside this file.
"""

import math
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.lab import Comparison, Figure, Study
from rlhfjax.sweep import grid, product, seeds

STORIES = runpy.run_path(str(Path(__file__).parents[1] / "stories.py"))
METHODS = ("ppo", "ptx", "beta")
SIZE, REWARD = "m", "l"  # of the policy; of the reward model, as in figure1.py
STEPS = 4000  # of further pretraining: three fifths of the rows are the forum's
LEVEL = 0.7  # gold reward at which methods are compared; a pilot's SFT had 0.39
BETA, LARGER_BETA = 0.05, 0.2
RATE = 1.5e-4  # of PPO, as in ziegler2019/beta.py
SEEDS = 5  # pilots had seeds from 100 on
VARIANTS = ("method=ptx", "method=beta", "method=ptx,scale=full")


def loss_at_level(run) -> float:
    """Loss on the third text where the gold reward first reaches LEVEL, between evaluations."""
    gold, loss = run.curve("ppo/val_gold"), run.curve("ppo/val_text_loss")
    for i in range(1, len(gold)):
        if gold[i] >= LEVEL > gold[i - 1]:
            share = (LEVEL - gold[i - 1]) / (gold[i] - gold[i - 1])
            return loss[i - 1] + share * (loss[i] - loss[i - 1])
    return math.nan


STUDY = Study(
    claim="At equal gold reward PPO-ptx has a lower loss than PPO on text that neither SFT nor the"
    " mix contains",
    paper="Ouyang et al. 2022",
    figure="section 4.2 and figures 29, 33, 34: regressions on public tasks",
    conditions={method: {"arg.method": method} for method in METHODS},
    seeds=SEEDS,
    values={
        "loss at level": loss_at_level,
        "tax": lambda run: (
            run.metric("evaluate/text_loss_policy")
            - run.metric("start/text_loss_baseline")
        ),
        "loss of the base": "start/text_loss_baseline",
        "loss of the SFT": "start/text_loss_policy",
        "gold": "evaluate/gold_policy",
        "KL": "ppo/val_kl",
    },
    requires=(
        Comparison(
            name="PPO has forgotten, against the base",
            value="tax",
            condition="ppo",
            baseline=0.0,
            expected="greater",
        ),
    ),
    primary=(
        Comparison(
            name="PPO-ptx has lower loss at equal gold reward",
            value="loss at level",
            condition="ptx",
            baseline="ppo",
            expected="less",
        ),
    ),
    curves=("ppo/val_gold", "ppo/val_text_loss", "ppo/val_kl"),
    drawing=Figure(
        x="ppo/val_gold",
        y="ppo/val_text_loss",
        title="What is forgotten, against what is gained",
        x_label="gold reward",
        y_label="loss on verses, nats per token",
        paper="PPO is below GPT-3 on public tasks, PPO-ptx near it; a larger KL coefficient lowers"
        " both tax and reward (figures 33 and 34).",
    ),
    cost="40 minutes on 2 CPU cores, other runs beside; the bases (38 minutes) and the labels and"
    " reward models of ziegler2019/beta.py were in the cache",
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, method=METHODS, scale=STORIES["SCALES"], seed=0)
    forum, chats, verses = texts("train")
    stages = STORIES["base"](arg.seed) | STORIES["labeled"](REWARD, arg.seed)
    stages["pretrain_mixed"] = STORIES["pretrain"](
        SIZE,
        init_from=f"stage:pretrain_{SIZE}",  # which reads requests
        tokenizer=None,
        model=None,
        sources=(
            forum | {"weight": 3.0},
            chats | {"weight": 1.0},
            verses | {"weight": 1.0},
        ),
        eval_sources=texts("validation"),
        **STORIES["loop"](STEPS),
    )
    stages["sft_mixed"] = STORIES["sft"](
        SIZE, arg.seed, init_from="stage:pretrain_mixed"
    )
    tax = {"texts": texts("validation")[2:], "batches": 8}
    stages["start"] = STORIES["evaluate"](
        arg.seed, "stage:sft_mixed", "stage:pretrain_mixed", tax=tax
    )
    stages["ppo"] = STORIES["ppo"](
        SIZE,
        arg.seed,
        RATE,
        init_from="stage:sft_mixed",
        kl={"coefficient": LARGER_BETA if arg.method == "beta" else BETA},
        eval_prompts={"source": STORIES["source"]("", "validation"), "limit": 256},
        eval_text={"sources": texts("validation")[2:], "length": 88},
        **(ptx(forum, chats) if arg.method == "ptx" else {}),
        **STORIES["loop"](60, evals=30),
    )
    stages["evaluate"] = STORIES["evaluate"](
        arg.seed, "stage:ppo", "stage:sft_mixed", tax=tax
    )
    return STORIES["recipe"](arg.scale, **stages)


def texts(split: str) -> tuple[dict, dict, dict]:
    """Returns the forum of stories, chats, and verses, which the policy never sees again."""
    chats = {"spec": "tfds:chitchat", "kind": "messages", "split": split}
    verses = {"spec": "tfds:kjv", "kind": "text", "split": split}
    return STORIES["source"]("forum", split), chats, verses


def ptx(*sources: dict) -> dict:
    """Returns the mix of pretraining text, without verses: a row per episode (the paper: eight)."""
    length = STORIES["PROMPT"] + STORIES["RESPONSE"]
    mix = {"coefficient": 0.2, "ratio": 1, "length": length, "sources": sources}
    return {"ptx": mix}


def sweep(add) -> None:
    for overrides in product(grid("arg.method", *METHODS), seeds(SEEDS)):
        add(overrides)
