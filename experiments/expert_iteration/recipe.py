"""Iterates: sample responses, keep the best of each prompt, fine-tune on them.

Paper: Anthony et al. 2017 (arXiv 1705.08439); on language ReST (Gulcehre et al. 2023, arXiv
  2308.08998); one round is the rejection sampling of Llama 2 (Touvron et al. 2023, section 3.2.3),
  which keeps the best of K responses by its reward model.
  None publishes numbers for a model of this size: every number below is our choice.
Command: rlhfjax run --config=experiments/expert_iteration/recipe.py --workdir=runs/expert_iteration
Variants: :size=toy, the quickstart at its smallest; :rounds=3; :samples_per_prompt=16 (K); :keep=2;
  :seed=1. The labeler is the quickstart's gold reward itself.
Hardware: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
SIZES = {"full": "full", "toy": "smoke"}
Rounds = Annotated[int, Interval(ge=1, le=24)]  # a recipe has at most 100 stages
VARIANTS = ("", "rounds=3", "size=toy")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        size=tuple(SIZES),
        rounds=Argument(2, Rounds),
        samples_per_prompt=8,
        keep=1,
        seed=0,
    )
    config = base(arg, until="collect")
    policy = "sft"
    for i in range(1, arg.rounds + 1):
        policy = add_round(config, arg, policy, i)
    evaluate = base(arg).evaluate
    evaluate.update({"policy": f"stage:{policy}", "proxy": None})
    return TOY["add"](config, evaluate=evaluate)


def base(arg: ConfigDict, until: str | None = None) -> ConfigDict:
    """Returns a fresh copy of the quickstart's config, whose parts are changed."""
    return TOY["quickstart"](arg.seed, until, SIZES[arg.size])


def add_round(config: ConfigDict, arg: ConfigDict, policy: str, i: int) -> str:
    """Adds collect_i, select_i and sft_i, which start from a policy; returns the name of sft_i."""
    quickstart, changes = (
        base(arg),
        {"init_from": f"stage:{policy}", "seed": arg.seed + i},
    )
    collect, tuned = quickstart.collect, quickstart.sft
    collect.update(samples_per_prompt=arg.samples_per_prompt, **changes)
    if arg.size == "toy":
        collect.prompts.limit = 384
    collect.prompts.per_conversation = 3
    preferences = (f"stage:collect_{i}/preferences",)
    select = stage_config(
        "select", preferences=preferences, tokenizer="stage:tokenizer", keep=arg.keep
    )
    rows = {"kind": "messages", "split": "all"}
    tuned.update(
        sources=({"spec": f"jsonl:stage:select_{i}/train.jsonl", **rows},),
        eval_sources=({"spec": f"jsonl:stage:select_{i}/validation.jsonl", **rows},),
        **changes,
    )
    TOY["add"](
        config, **{f"collect_{i}": collect, f"select_{i}": select, f"sft_{i}": tuned}
    )
    return f"sft_{i}"
