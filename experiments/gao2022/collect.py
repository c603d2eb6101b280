"""Over-optimization, step 3: the gold model compares the policy's responses.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 2. Expected there: below about 2,000 comparisons
  proxies of every size are near chance.
Command: rlhfjax train --config=experiments/gao2022/collect.py
    --workdir=runs/gao2022/1.2b/comparisons_90000
Variants: :policy=1.2b or 6b; :pairs=90000 or fewer, comparisons for training; :seed=1.
Hardware: not named by the paper. Time and result: README.md beside this file; at small scale:
  figure1a.py.
"""

from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.ranges import PositiveCount
from rlhfjax.stages import stage_config

VARIANTS = ("", "pairs=2000")

# section 2: 100,000 comparisons, 10 % of them held out
PAIRS, HELD_OUT = (90_000, 10_000)
# InstructGPT's "1k" prompts; table 1 (appendix C): 256 timesteps per rollout, tokens here
PROMPT, ANSWER = (1024, 256)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, policy=("1.2b", "6b"), pairs=Argument(PAIRS, PositiveCount), seed=0
    )
    prompts = {
        "spec": "jsonl:data/instructgpt/prompts_{split}*.jsonl",
        "kind": "prompt",
    }
    return stage_config(
        "collect",
        init_from=f"runs/gao2022/{arg.policy}/sft",
        # section 2: the response with the higher gold score; sampling labels was noisier
        labeler="runs/gao2022/gold",
        # One pair per prompt. InstructGPT has fewer prompts than this (31,144 in its table 6);
        # whether the paper repeats prompts or has others is unpublished, and a file with fewer
        # gives fewer pairs.
        prompts={"source": prompts, "limit": arg.pairs},
        eval_prompts={"source": {**prompts, "split": "validation"}, "limit": HELD_OUT},
        samples_per_prompt=2,
        prompt_length=PROMPT,
        max_new_tokens=ANSWER,
        temperature=1.0,  # unpublished; PPO's in InstructGPT
        batch_size=64,
        seed=arg.seed,
    )
