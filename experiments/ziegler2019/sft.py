"""Trains the models that Ziegler et al.'s policies start from: GPT-2 on books, or summaries.

Paper: Ziegler et al. 2019 (arXiv 1909.08593), section 2.1. Style policies start from the first;
  summaries start from GPT-2 as it is, or from the second.
Command: rlhfjax train --config=experiments/ziegler2019/sft.py --workdir=runs/ziegler2019/774m/books
Variants: :task=sentiment or descriptiveness (the same books), cnndm, tldr; :seed=1.
Hardware: the paper names none for this stage. Time and result: README.md beside this file; at small
  scale: beta.py.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

VARIANTS = ("", "task=cnndm", "task=tldr")
KIND = {
    "sentiment": "style",
    "descriptiveness": "style",
    "cnndm": "summary",
    "tldr": "summary",
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, task=tuple(KIND), seed=0)
    return stage_config(
        "pretrain" if KIND[arg.task] == "style" else "sft",
        init_from="runs/ziegler2019/774m/gpt2",  # section 2.1: GPT-2 of 774M parameters
        # We know no number of this stage: batch and optimizer are those with which GPT-1 was
        # fine-tuned (Radford et al. 2018, section 4.1), length is GPT-2's context, the updates are
        # our choice.
        length=1024,
        batch_size=32,
        steps=10_000,
        overrides={"dropout": 0.1},  # GPT-1
        eval_every=1000,
        eval_batches=32,
        checkpoint={"every": 1000, "minutes": 15.0},
        seed=arg.seed,
        optim={
            "name": "adam",
            "learning_rate": 6.25e-5,
            "schedule": "linear",
            "warmup_steps": 20,  # 0.2% of the updates
            "b2": 0.999,
            "clip_norm": 1.0,
        },
        **data(arg),
    )


def data(arg: ConfigDict) -> dict:
    """Returns the sources: whole books for the pretrain stage, summaries for the sft stage."""
    kind, folder = (
        ("text", "books") if KIND[arg.task] == "style" else ("messages", arg.task)
    )

    def split(name):
        return (
            {
                "spec": f"jsonl:data/{folder}/{{split}}*.jsonl",
                "kind": kind,
                "split": name,
            },
        )

    return {"sources": split("train"), "eval_sources": split("validation")}
