"""Trains the supervised policies of Stiennon et al. on TL;DR's summaries; at toy size on dialogue.

Paper: Stiennon et al. 2020 (arXiv 2009.01325), section 3.4 and appendix B.1; lengths from the
  released code, summarize-from-feedback.
Command: rlhfjax train --config=experiments/stiennon2020/sft.py:size=1.3b
    --workdir=runs/stiennon2020/1.3b/sft
  rlhfjax run --config=experiments/stiennon2020/sft.py:size=toy --workdir=runs/stiennon2020/toy
Variants: :size=1.3b, 6.7b or toy; :seed=1.
Hardware: toy: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
SIZES = ("1.3b", "6.7b")
VARIANTS = tuple(f"size={size}" for size in (*SIZES, "toy"))
LEARNING_RATE = {"1.3b": 6.35e-5, "6.7b": 2.83e-5}  # appendix B.1
# Unpublished for rollouts; the paper's best-of-n samples have 0.7, as have the rollouts of Huang et
# al. 2024.
TEMPERATURE = 0.7
POSTS = 123_169 * 95 // 100  # section 3.2: 123,169 posts, of which 5% are held out
# Tokens, from the released code (experiment_helpers.py): posts of 512, summaries of up to 48. Our
# chat template adds bos, the two markers and an eos to a post; their eos ends a summary as ours
# does.
POST, SUMMARY = 512 + 4, 48


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=(*SIZES, "toy"), seed=0)
    return toy(arg) if arg.size == "toy" else paper(arg)


def adam(learning_rate: float, schedule: str) -> dict:
    """Returns the optimizer; only learning rate and kind of schedule are published."""
    return {
        "name": "adam",  # appendix B.1; moments and epsilon are unpublished: Kingma & Ba's
        "learning_rate": learning_rate,
        "schedule": schedule,
        "final_fraction": 0.0,  # unpublished; to 0 is our choice
        "warmup_steps": 0,  # unpublished; none, as in InstructGPT's fine-tuning
        "b2": 0.999,
        "clip_norm": 1.0,  # unpublished; GPT-3's
    }


def paper(arg: ConfigDict) -> ConfigDict:
    def posts(split):
        return (
            {
                "spec": f"jsonl:data/tldr/{split}*.jsonl",
                "kind": "messages",
                "split": "all",
            },
        )

    return stage_config(
        "sft",
        # table 3: the presets stiennon-1.3b, stiennon-6.7b
        init_from=f"runs/stiennon2020/{arg.size}/pretrain",
        sources=posts("train"),
        eval_sources=posts("validation"),
        length=POST + SUMMARY,
        batch_size=128,  # appendix B.1; ours are rows, of which one may hold two short posts
        steps=POSTS // 128,  # one epoch, appendix B.1
        # the paper: fp16; dropout unpublished, none is GPT-3's
        overrides={"dtype": "bfloat16", "dropout": 0.0},
        eval_every=100,
        checkpoint={"every": 300, "minutes": 15.0},
        seed=arg.seed,
        optim=adam(LEARNING_RATE[arg.size], "cosine"),  # appendix B.1
    )


def sampling(arg: ConfigDict) -> dict:
    """Returns the toy's lengths, the quickstart's."""
    return {**TOY["sampling"](arg.seed), "temperature": TEMPERATURE}


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the toy recipe: the quickstart up to SFT, with this stage's optimizer."""
    config = TOY["quickstart"](arg.seed, until="collect")
    config.sft.optim.update({**adam(1e-3, "cosine"), "weight_decay": 0.0})
    return config
