"""Prepares chitchat's conversations and a tokenizer on what is left.

Paper: the filters are GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendices A and C) and
  InstructGPT's (Ouyang et al. 2022, arXiv 2203.02155, section 3.2). Unpublished, and our choice:
  the least probability of the language, the threshold and n-grams of near-duplicates, the prefix.
Command: rlhfjax run --config=experiments/prepare/recipe.py --workdir=runs/prepare
Variants: :workers=2 measures rows in two processes, with the same result.
Hardware: 2 CPU cores, two minutes. Counts: README.md beside this file.
"""

from typing import Annotated

from annotated_types import Interval
from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.stages import stage_config

VARIANTS = ("",)
WorkerCount = Annotated[int, Interval(ge=0, le=64)]


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, workers=Argument(0, WorkerCount))
    config = ConfigDict({"stages": ("prepare", "tokenizer")})
    config.prepare = stage_config(
        "prepare",
        sources=({"spec": "tfds:chitchat", "split": "train"},),
        language={"keep": ("en",), "probability": 0.3},
        near={"threshold": 0.7},
        prompts={"prefix": 60},
        evaluation={"sources": ({"spec": "tfds:chitchat", "split": "test"},)},
        workers=arg.workers,
    )
    prepared = {
        "spec": "jsonl:stage:prepare/{split}/*.jsonl",
        "kind": "messages",
        "split": "train",
    }
    config.tokenizer = stage_config("tokenizer", sources=(prepared,), vocab_size=2048)
    return config
