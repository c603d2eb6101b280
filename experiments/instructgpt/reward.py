"""InstructGPT, step 2: trains a reward model on rankings of K responses.

Paper: Ouyang et al. 2022 (arXiv 2203.02155), eq. 1 and appendix C.2. Expected there: accuracy 72.4
  +- 0.4 % on comparisons of the same labelers, 69.6 +- 0.9 % on those of held-out ones (section
  4.1; appendix E.2 prints the two the other way round).
Command: rlhfjax train --config=experiments/instructgpt/reward.py
    --workdir=runs/instructgpt/6.7b/reward
Variants: :size=1.3b, 6.7b or 175b, the policy that it is for, which changes nothing: C.2 uses one
  6B reward model for all of them (a 175B one was less stable); :seed=1.
Hardware: not named by the paper. Not yet run.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

SIZES = ("1.3b", "6.7b", "175b")
PROMPTS = 6_623 + 26_584  # table 6: by labelers and by customers
BATCH = 64  # C.2: prompts, up to 64 C(9, 2) = 2,304 comparisons
LENGTH = 2048  # appendix C


def algorithm(**changes) -> dict:
    """Returns the options that do not depend on the size."""
    return {
        # eq. 1: all pairs of a prompt are one element; ties are dropped
        "loss": {"name": "kwise"},
        # section 3.5: a bias so that the labelers' demonstrations score 0 on average
        "normalize": "demonstrations",
        "optim": {
            "name": "adam",
            "learning_rate": 9e-6,  # C.2; insensitive to 50 % more or less
            "schedule": "cosine",  # C.2
            "final_fraction": 0.1,  # C.2
            "warmup_steps": 0,  # unpublished; none, as C.1
            "b1": 0.9,  # appendix C
            "b2": 0.95,  # appendix C
            "eps": 1e-8,  # unpublished; GPT-3's
            "clip_norm": 1.0,  # unpublished; GPT-3's
            **changes,
        },
    }


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("6.7b", *SIZES), seed=0)
    steps = PROMPTS // BATCH  # C.2: one epoch; a second one over-fits
    return stage_config(
        "reward",
        # Section 3.5 says "from the SFT model"; C.2 says GPT-3 6B fine-tuned on ARC, BoolQ, CoQA,
        # DROP, MultiNLI, OpenBookQA, QuAC, RACE and Winogrande, and that SFT gives similar results:
        # SFT, whose data are available.
        init_from="runs/instructgpt/6.7b/sft",
        overrides={"dropout": 0.0},  # unpublished; else SFT's 0.2 would be inherited
        # K of 4 to 9 responses (section 3.5)
        preferences=("jsonl:data/instructgpt/comparisons_{split}*.jsonl",),
        demonstrations=(
            {
                "spec": "jsonl:data/instructgpt/demonstrations_{split}*.jsonl",
                "kind": "messages",
            },
        ),
        length=LENGTH,
        batch_size=BATCH,
        steps=steps,
        eval_every=steps // 4,
        checkpoint={"every": steps // 4, "minutes": 15.0},
        seed=arg.seed,
        **algorithm(),
    )
