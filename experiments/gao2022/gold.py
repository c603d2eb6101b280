"""Over-optimization, step 2: trains the gold reward model, which replaces people; or a toy.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 2: the 6B reward model of InstructGPT.
Command: rlhfjax train --config=experiments/gao2022/gold.py --workdir=runs/gao2022/gold
  rlhfjax run --config=experiments/gao2022/gold.py:size=toy --workdir=runs/gao2022/toy_gold
Variants: :seed=1.
Hardware: not named by the paper. Toy: 2 CPU cores. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg

HERE = Path(__file__).parent
TOY = runpy.run_path(str(HERE.parent / "toy.py"))
VARIANTS = ("", "size=toy")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("paper", "toy"), seed=0)
    return toy(arg.seed) if arg.size == "toy" else paper(arg)


def paper(arg: ConfigDict) -> ConfigDict:
    """Returns InstructGPT's reward model with another normalization."""
    other = runpy.run_path(str(HERE.parent / "instructgpt" / "reward.py"))
    config = other["get_config"](f"size=6.7b,seed={arg.seed}")
    # Section 2: mean 0 over responses of the initial policy and unit variance. Ours are over the
    # held-out comparisons, which for InstructGPT are responses of several policies; the `recenter`
    # stage sets the mean on responses of one policy.
    config.update(normalize="mean_std", demonstrations=())
    return config


def toy(seed: int) -> ConfigDict:
    """Returns the toy recipe: a gold model trained on 8,192 responses ranked by a program.

    The program stands for the people of the toy; from here on only this model is asked.
    """
    config = runpy.run_path(str(HERE / "sft.py"))["toy"](seed)
    collect = TOY["collect"](seed, samples_per_prompt=4, prompts=2048, held_out=192)
    gold = TOY["ranked"](
        "reward",
        collect,
        batch_size=16,
        preferences=("stage:human/preferences",),
        normalize="mean_std",
        optim={"learning_rate": 1e-3, "warmup_steps": 10, "final_fraction": 0.1},
    )
    return TOY["add"](config, human=collect, gold=gold)
