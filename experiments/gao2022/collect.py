"""Over-optimization, step 3: the gold model compares the policy's responses; or a toy.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 2. Expected there: below about 2,000 comparisons
  proxies of every size are near chance.
Command: rlhfjax train --config=experiments/gao2022/collect.py
    --workdir=runs/gao2022/1.2b/comparisons_90000
  rlhfjax run --config=experiments/gao2022/collect.py:size=toy --workdir=runs/gao2022/toy_collect
Variants: :policy=1.2b or 6b; :pairs=90000 or fewer, comparisons for training; :seed=1.
Hardware: not named by the paper. Toy: 2 CPU cores. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.ranges import Count
from rlhfjax.stages import stage_config

HERE = Path(__file__).parent
TOY = runpy.run_path(str(HERE.parent / "toy.py"))
VARIANTS = ("", "pairs=2000", "size=toy")

# section 2: 100,000 comparisons, 10 % of them held out
PAIRS, HELD_OUT = (90_000, 10_000)
# InstructGPT's "1k" prompts; table 1 (appendix C): 256 timesteps per rollout, tokens here
PROMPT, ANSWER = (1024, 256)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        size=("paper", "toy"),
        policy=("1.2b", "6b"),
        pairs=Argument(0, Count),
        seed=0,
    )
    return toy(arg.seed, arg.pairs or TOY_PAIRS) if arg.size == "toy" else paper(arg)


def paper(arg: ConfigDict) -> ConfigDict:
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
        prompts={"source": prompts, "limit": arg.pairs or PAIRS},
        eval_prompts={"source": {**prompts, "split": "validation"}, "limit": HELD_OUT},
        samples_per_prompt=2,
        prompt_length=PROMPT,
        max_new_tokens=ANSWER,
        temperature=1.0,  # unpublished; PPO's in InstructGPT
        batch_size=64,
        seed=arg.seed,
    )


TOY_PAIRS = 512


def toy(seed: int, pairs: int = TOY_PAIRS) -> ConfigDict:
    """Returns the toy recipe: pairs of the toy policy's responses, compared by the toy's gold
    model.
    """
    config = runpy.run_path(str(HERE / "gold.py"))["toy"](seed)
    # seed + 1: other responses than those that the gold model was trained on
    collect = TOY["collect"](
        seed + 1,
        samples_per_prompt=2,
        prompts=pairs,
        held_out=192,
        labeler="stage:gold",
    )
    return TOY["add"](config, collect=collect)
