"""Over-optimization, step 2: trains the gold reward model, which replaces people.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 2: the 6B reward model of InstructGPT.
Command: rlhfjax train --config=experiments/gao2022/gold.py --workdir=runs/gao2022/gold
Variants: :seed=1.
Hardware: not named by the paper. Time and result: README.md beside this file; at small scale:
  figure1a.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg

HERE = Path(__file__).parent
VARIANTS = ("",)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, seed=0)
    # InstructGPT's reward model with another normalization
    other = runpy.run_path(str(HERE.parent / "instructgpt" / "reward.py"))
    config = other["get_config"](f"size=6.7b,seed={arg.seed}")
    # Section 2: mean 0 over responses of the initial policy and unit variance. Ours are over the
    # held-out comparisons, which for InstructGPT are responses of several policies; the `recenter`
    # stage sets the mean on responses of one policy.
    config.update(normalize="mean_std", demonstrations=())
    return config
