"""The N+ details, step 2: trains a reward model on TL;DR's comparisons; at toy size on dialogue.

Paper: Huang et al. 2024 (arXiv 2403.17031) and its released code ("code" below). Expected there,
  accuracy on TL;DR's validation comparisons: 1B 0.628 +- 0.002, 2.8B 0.669 +- 0.003, 6.9B 0.689 +-
  0.004. The toy's labeler is a program.
Command: rlhfjax train --config=experiments/huang2024/reward.py:size=1b
    --workdir=runs/huang2024/1b/reward
  rlhfjax run --config=experiments/huang2024/reward.py:size=toy --workdir=runs/huang2024/toy_reward
Variants: :size=1b, 2.8b or 6.9b; :seed=44413 (and 55513, 66613, 77713: the paper's four).
Hardware: one node of 8 H100 (code, sbatches). Toy: 2 CPU cores. Time and result: README.md beside
  this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

HERE = Path(__file__).parent
TOY = runpy.run_path(str(HERE.parent / "toy.py"))
SFT = runpy.run_path(str(HERE / "sft.py"))
VARIANTS = ("", "size=2.8b", "size=6.9b", "size=toy")

SIZES = ("1b", "2.8b", "6.9b")
COMPARISONS = 92_858  # TL;DR's; the code counts 92,832
LENGTH = 638  # detail 5: post and summary, summaries of up to 169 tokens (detail 4)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=(*SIZES, "toy"), seed=44413)
    return toy(arg.seed) if arg.size == "toy" else paper(arg)


def algorithm(**changes) -> dict:
    """Returns the options that do not depend on the size.

    The scalar head starts at N(0, 1 / sqrt(d + 1)) and reads the eos.
    """
    return {
        "loss": {"name": "bradley_terry"},
        # detail 15: a bias so that the reference summaries score 0 on average
        "normalize": "demonstrations",
        "optim": SFT["optim"](**changes),
    }


def paper(arg: ConfigDict) -> ConfigDict:
    batch = 64
    return stage_config(
        "reward",
        init_from=f"runs/huang2024/{arg.size}/sft",
        preferences=("jsonl:data/tldr/comparisons_{split}*.jsonl",),
        # code: the whole split
        demonstrations=(
            {"spec": "jsonl:data/tldr/sft_{split}*.jsonl", "kind": "messages"},
        ),
        length=LENGTH,
        batch_size=batch,
        steps=COMPARISONS // batch,  # one epoch
        eval_every=100,
        checkpoint={"every": 100, "minutes": 15.0},
        seed=arg.seed,
        **algorithm(),
    )


def toy(seed: int) -> ConfigDict:
    """Returns the toy recipe: SFT, 1,024 pairs ranked by the quickstart's labeler, one epoch."""
    collect = TOY["collect"](seed, samples_per_prompt=2, prompts=1024, held_out=192)
    demonstrations = ({**collect.eval_prompts.source, "split": "validation"},)
    own = {"demonstrations": demonstrations, **algorithm(learning_rate=1e-3)}
    return TOY["add"](
        SFT["toy"](seed),
        collect=collect,
        reward=TOY["ranked"]("reward", collect, batch_size=16, **own),
    )
