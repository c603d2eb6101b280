"""Iterates RLHF: every round samples from the policy of the round before.

Paper: Ziegler et al. 2019, section 2.3 (the reward model is trained anew on all labels so far, from
  the same start, as the policy moves); Ouyang et al. 2022, section 3.1 ("steps 2 and 3 can be
  iterated continuously"). Here every reward model starts from SFT and sees the comparisons of all
  rounds; every policy starts from the last one, with its KL to SFT. The setup is the
  quickstart's; the numbers of rounds and of comparisons per round are our choice.
Command: rlhfjax run --config=experiments/iterated/recipe.py:rounds=3 --workdir=runs/iterated
  then python experiments/iterated/curve.py runs/iterated
Variants: :rounds=2,size=toy runs in minutes; :size=smoke is the quickstart's smoke in every round.
Hardware: 2 CPU cores.
What to look at: the gold score of `evaluate_K` over rounds. Beside it stands one round of as many
  comparisons: the quickstart with `--config.collect.prompts.limit` K times as large.
"""

import runpy
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg

Rounds = Annotated[int, Interval(ge=1, le=24)]  # a recipe has at most 100 stages
VARIANTS = ("", "rounds=2,size=toy", "size=smoke")
TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
START = ("tokenizer", "pretrain", "sft")
ROUND = ("collect", "reward", "ppo", "evaluate")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, rounds=Argument(3, Rounds), size=("full", "toy", "smoke"), seed=0
    )
    toy = arg.size == "toy"
    base = TOY["quickstart"](arg.seed, size="smoke" if toy else arg.size)
    if toy:
        shrink(base)
    names = [f"{stage}_{k}" for k in range(1, arg.rounds + 1) for stage in ROUND]
    config = ConfigDict(
        {"stages": (*START, *names), **{name: base[name] for name in START}}
    )
    for k in range(1, arg.rounds + 1):
        config.update(
            {f"{stage}_{k}": one for stage, one in one_round(base, k).items()}
        )
    return config


def one_round(base: ConfigDict, k: int) -> dict[str, ConfigDict]:
    """Returns the stages of round k, counted from 1."""
    collect, reward, ppo, evaluate = (
        ConfigDict(base[name].to_dict()) for name in ROUND
    )
    last = "stage:sft" if k == 1 else f"stage:ppo_{k - 1}"
    # every round has other samples and other prefixes of the conversations
    seed = base.collect.seed + 1000 * k
    collect.update(init_from=last, seed=seed)
    reward.update(
        preferences=tuple(f"stage:collect_{i}/preferences" for i in range(1, k + 1))
    )
    ppo.update(
        init_from=last, reference="stage:sft", reward=f"stage:reward_{k}", seed=seed
    )
    evaluate.update(
        policy=f"stage:ppo_{k}", baseline="stage:sft", proxy=f"stage:reward_{k}"
    )
    return {"collect": collect, "reward": reward, "ppo": ppo, "evaluate": evaluate}


def shrink(base: ConfigDict) -> None:
    """Shrinks the quickstart's smoke size, so that a round takes well under a minute."""
    base.pretrain.update(steps=30, eval_every=30)
    base.sft.update(steps=20, eval_every=20)
    base.collect.prompts.limit, base.collect.eval_prompts.limit = 64, 32
    base.reward.update(steps=8, eval_every=8)
    base.reward.optim.warmup_steps = 2
    base.ppo.update(steps=3, eval_every=3)
    base.ppo.eval_prompts.limit = 32
    base.evaluate.prompts.limit = 32
    base.evaluate.batch_size = 32
    for name in ("pretrain", "sft", "reward", "ppo"):
        base[name].checkpoint.every = 0
