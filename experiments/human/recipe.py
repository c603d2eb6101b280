"""Trains on what people prefer: collect, label, reward, PPO, and round again.

Paper: Ouyang et al. 2022 (InstructGPT), section 3.1 ("steps 2 and 3 can be iterated continuously")
  and appendix B. Models, lengths and learning rates are the quickstart's. The numbers of rounds and
  of rankings per round are our choice; the paper has 33 thousand prompts.
Command: rlhfjax run --config=experiments/human/recipe.py --workdir=runs/human
  It prints a link for the organizer and one per labeler, and waits until they have ranked. The same
  command goes on where it stopped.
Variants: :rounds=2 asks people twice, the second time about the new policy's responses;
  :task=compare shows two responses instead of four; :count=500 ends a round after 500 labels;
  :labelers=5 invites five; :size=smoke is the quickstart's smoke in every round; :by=gold lets the
  gold reward rank in place of people, for a try of the whole recipe.
Hardware: 2 CPU cores, the time of the quickstart beside that of the labelers.
What to look at: `evaluate_K`, the win rate against SFT by `gold`, which here stands for another
  panel of people.
"""

import runpy
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.stages import stage_config

Rounds = Annotated[int, Interval(ge=1, le=19)]  # a recipe has at most 100 stages
Labels = Annotated[int, Interval(ge=0, le=1_000_000)]
People = Annotated[int, Interval(ge=1, le=1000)]
VARIANTS = (
    "",
    "rounds=2,task=compare,count=500",
    "size=smoke,by=gold",
)
TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
START = ("tokenizer", "pretrain", "sft")
ROUND = ("collect", "label", "reward", "ppo", "evaluate")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        rounds=Argument(1, Rounds),
        task=("rank", "compare"),
        count=Argument(0, Labels),
        labelers=Argument(2, People),
        by=("people", "gold"),
        size=("full", "smoke"),
        seed=0,
    )
    base = TOY["quickstart"](arg.seed, size=arg.size)
    base.label = stage_config(
        "label",
        task=arg.task,
        count=arg.count,
        labelers=tuple(f"labeler-{i}" for i in range(1, arg.labelers + 1)),
        simulated="gold:sentiment" if arg.by == "gold" else "",
        # A tenth of the items is ranked by two labelers, to see how far they agree.
        overlap=2,
        overlap_share=0.1,
        seed=arg.seed,
    )
    base.collect.update(labeler="gold:unlabeled")
    names = [f"{stage}_{k}" for k in range(1, arg.rounds + 1) for stage in ROUND]
    config = ConfigDict(
        {"stages": (*START, *names), **{name: base[name] for name in START}}
    )
    for k in range(1, arg.rounds + 1):
        for stage, options in one_round(base, k).items():
            config[f"{stage}_{k}"] = options
    return config


def one_round(base: ConfigDict, k: int) -> dict[str, ConfigDict]:
    """Returns the stages of round k, counted from 1."""
    collect, label, reward, ppo, evaluate = (
        ConfigDict(base[name].to_dict()) for name in ROUND
    )
    last = "stage:sft" if k == 1 else f"stage:ppo_{k - 1}"
    # Every round has other samples and other prefixes of the conversations.
    seed = base.collect.seed + 1000 * (k - 1)
    collect.update(init_from=last, seed=seed)
    label.update(answers=(f"stage:collect_{k}/preferences",), seed=seed)
    reward.update(
        preferences=tuple(f"stage:label_{i}/preferences" for i in range(1, k + 1))
    )
    ppo.update(
        init_from=last, reference="stage:sft", reward=f"stage:reward_{k}", seed=seed
    )
    evaluate.update(
        policy=f"stage:ppo_{k}", baseline="stage:sft", proxy=f"stage:reward_{k}"
    )
    return {
        "collect": collect,
        "label": label,
        "reward": reward,
        "ppo": ppo,
        "evaluate": evaluate,
    }
