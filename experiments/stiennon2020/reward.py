"""Trains the reward models of Stiennon et al. on pairs of summaries; at toy size on dialogue.

Paper: Stiennon et al. 2020 (arXiv 2009.01325), section 3.4 and appendix B.1. Doubling the
  comparisons there is worth 1.1 points of accuracy, doubling the model 1.8 (figure 6). The toy does
  not measure this.
Command: rlhfjax train --config=experiments/stiennon2020/reward.py:size=1.3b
    --workdir=runs/stiennon2020/1.3b/reward
  rlhfjax run --config=experiments/stiennon2020/reward.py:size=toy --workdir=runs/stiennon2020/toy
Variants: :size=1.3b, 6.7b or toy; :seed=1 to 9, of which the paper keeps the best.
Hardware: toy: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
SFT = runpy.run_path(str(Path(__file__).with_name("sft.py")))
VARIANTS = SFT["VARIANTS"]
LEARNING_RATE = {"1.3b": 1.5e-5, "6.7b": 5e-6}  # appendix B.1
COMPARISONS = 64_832  # section 3.2, all that were released


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=(*SFT["SIZES"], "toy"), seed=0)
    return toy(arg) if arg.size == "toy" else paper(arg)


def algorithm(demonstrations: tuple) -> dict:
    """Returns the paper's options of the reward model, which hold at any size."""
    return {
        "loss": {"name": "bradley_terry"},  # section 3.4
        # appendix B.1: shifted so that the reference summaries score 0 on average
        "normalize": "demonstrations",
        "demonstrations": demonstrations,
    }


def paper(arg: ConfigDict) -> ConfigDict:
    return stage_config(
        "reward",
        # appendix B.1: the supervised model with a new head; of std 1 / (d + 1) as printed, of 1 /
        # sqrt(d + 1) here and in the code
        init_from=f"runs/stiennon2020/{arg.size}/sft",
        # rows of prompt, two completions and scores
        preferences=("jsonl:data/tldr/comparisons_{split}*.jsonl",),
        length=SFT["POST"]
        + 128,  # the released code: a reward model reads up to 128 tokens of summary
        batch_size=64,  # appendix B.1
        steps=COMPARISONS // 64,  # one epoch, appendix B.1
        overrides={"dtype": "bfloat16", "dropout": 0.0},  # see sft.py
        eval_every=100,
        checkpoint={"every": 300, "minutes": 15.0},
        seed=arg.seed,
        optim=SFT["adam"](LEARNING_RATE[arg.size], "cosine"),  # appendix B.1
        **algorithm(
            (
                {
                    "spec": "jsonl:data/tldr/validation*.jsonl",
                    "kind": "messages",
                    "split": "all",
                },
            )
        ),
    )


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the toy recipe: pairs compared by the quickstart's labeler.

    The demonstrations score 0 on average.
    """
    config = SFT["toy"](arg)
    collect = TOY["collect"](
        arg.seed,
        samples_per_prompt=2,
        prompts=2048,
        held_out=96,
        **SFT["sampling"](arg),
    )
    reward = TOY["ranked"](
        "reward",
        collect,
        batch_size=32,
        evals=4,
        optim=SFT["adam"](1e-3, "cosine"),
        **algorithm(({**config.sft.eval_sources[0], "limit": 96},)),
    )
    return TOY["add"](config, collect=collect, reward=reward)


def sweep(add) -> None:
    """Adds 3 seeds; appendix B.1 takes the best of 3 to 10."""
    for seed in range(3):
        add(seed=seed)
