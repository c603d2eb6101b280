"""Over-optimization, step 1: fine-tunes the policy that all responses are sampled from.

Paper: Gao et al. 2022 (arXiv 2210.10760), "Scaling laws for reward model overoptimization", section
  2.
Command: rlhfjax train --config=experiments/gao2022/sft.py:policy=1.2b
    --workdir=runs/gao2022/1.2b/sft
Variants: :policy=1.2b, the main one, or 6b; :seed=1.
Hardware: not named by the paper. Time and result: README.md beside this file; at small scale:
  figure1a.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg

HERE = Path(__file__).parent
VARIANTS = ("", "policy=6b")

# GPT-3 without its embeddings has 1.2 and 6.4 billion parameters where its own table says 1.3 and
# 6.7: the names here count that way. The start is of experiments/instructgpt/pretrain.py.
POLICIES = {"1.2b": "1.3b", "6b": "6.7b"}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, policy=tuple(POLICIES), seed=0)
    # two epochs on InstructGPT's demonstrations; the rest is unpublished: its appendix C.3
    other = runpy.run_path(str(HERE.parent / "instructgpt" / "sft.py"))
    return other["get_config"](
        f"size={POLICIES[arg.policy]},role=start,seed={arg.seed}"
    )
