"""Over-optimization, step 2: the gold reward model, which stands in for people from here on; at toy
size on dialogue.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 2: the 6B reward model of InstructGPT.
Command: rlhfjax train --config=experiments/gao2022/gold.py --workdir=runs/gao2022/gold
  rlhfjax run --config=experiments/gao2022/gold.py:size=toy --workdir=runs/gao2022/toy_gold
Variants: :seed=1.
Hardware: the paper names none. Toy: 2 CPU cores. Time and result: README.md beside this file.
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
    """InstructGPT's reward model, on another scale."""
    other = runpy.run_path(str(HERE.parent / "instructgpt" / "reward.py"))
    config = other["get_config"](f"size=6.7b,seed={arg.seed}")
    # Section 2: mean 0 over answers of the initial policy and unit variance. Ours are over the
    # held-out comparisons, which for InstructGPT are answers of several policies; the `recenter`
    # stage sets the mean on answers of one.
    config.update(normalize="mean_std", demonstrations=())
    return config


def toy(seed: int) -> ConfigDict:
    """A reward model of the policy's size, from 8,192 answers ranked by the quickstart's labeler.

    The labeler, a program, is the toy's human; what the paper calls gold is this model, and from
    here on the program is not asked again.
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
