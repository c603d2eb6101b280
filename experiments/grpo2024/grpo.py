"""Trains GRPO on questions of mathematics, the KL in the loss; at toy size on dialogue.

Paper: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), section 4. Expected there for 7B: GSM8K
  88.2%, MATH 51.7% (table 5). The toy does not measure this.
Command: rlhfjax train --config=experiments/grpo2024/grpo.py --workdir=runs/grpo2024/grpo
  rlhfjax run --config=experiments/grpo2024/grpo.py:size=toy --workdir=runs/grpo2024/toy
Variants: :estimator=dr_grpo (Liu et al. 2025) or dapo (Yu et al. 2025), without a KL term as those
  papers; :seed=1.
Hardware: toy: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
# section 4.2: 64 outputs per question, training batch 1024, which we read as responses
GROUP, BATCH = (64, 1024)
QUESTIONS = 144_000  # section 4.2: "around 144K questions"
VARIANTS = ("", "estimator=dr_grpo", "estimator=dapo", "size=toy")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, size=("paper", "toy"), estimator=("grpo", "dr_grpo", "dapo"), seed=0
    )
    return toy(arg) if arg.size == "toy" else paper(arg)


def loss(arg: ConfigDict) -> dict:
    """Returns the options in which the three papers differ."""
    own = {
        # eq. 3 and 4: k3 in the loss, differentiated as it stands; section 4.2: coefficient 0.04
        "grpo": {"kl": {"coefficient": 0.04, "place": "loss", "estimator": "grpo"}},
        "dr_grpo": {"kl": {"coefficient": 0.0}},
        # clip-higher, overlong responses left out, groups of equal scores not counted: sections
        # 3.1, 3.2, 3.4
        "dapo": {
            "kl": {"coefficient": 0.0},
            "clip_high": 0.28,
            "overlong": "leave_out",
            "only_informative": True,
        },
    }
    # epsilon is not stated by DeepSeekMath; 0.2 is TRL's default, and DAPO's lower one
    return {"estimator": arg.estimator, "clip": 0.2, **own[arg.estimator]}


def paper(arg: ConfigDict) -> ConfigDict:
    return stage_config(
        "group",
        init_from="runs/grpo2024/instruct",  # DeepSeekMath-Instruct 7B
        # section 4.2: trained from DeepSeekMath-Base 7B at learning rate 2e-5
        reward="runs/grpo2024/reward",
        prompts={
            "source": {
                "spec": "jsonl:data/math/prompts*.jsonl",
                "kind": "prompt",
                "split": "all",
            }
        },
        eval_prompts={
            "source": {
                "spec": "jsonl:data/math/validation*.jsonl",
                "kind": "prompt",
                "split": "all",
            }
        },
        samples_per_prompt=GROUP,
        batch_size=BATCH // GROUP,
        epochs=1,  # section 4.2: a single update after each exploration
        minibatches=1,
        prompt_length=512,  # unpublished; 1024 is the limit of the whole, halved here
        max_new_tokens=512,  # section 4.2: maximal length 1024
        temperature=1.0,  # unpublished; our choice
        steps=QUESTIONS
        // (BATCH // GROUP),  # unpublished; one pass over the questions, our choice
        eval_every=100,
        checkpoint={"every": 100, "minutes": 15.0},
        log={"every": 1},
        seed=arg.seed,
        optim={
            "learning_rate": 1e-6,  # section 4.2
            # unpublished, our choice; so are the moments, the epsilon and the clipping
            "schedule": "constant",
            "b2": 0.999,
            "clip_norm": 1.0,
        },
        **loss(arg),
    )


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the toy recipe: the quickstart up to its reward model, then groups of 8."""
    config = TOY["quickstart"](arg.seed, until="ppo")
    policy = TOY["policy"](
        "group",
        arg.seed,
        samples_per_prompt=8,
        batch_size=8,
        # as in the quickstart: a small model has to learn to end its responses
        missing_eos="penalty",
        optim={
            "learning_rate": 5e-4,
            "schedule": "constant",
            "warmup_steps": 4,
            "warmup_start": 0.1,
        },
        **TOY["loop"](24),
        **loss(arg),
    )
    return TOY["add"](
        config, policy=policy, evaluate=TOY["evaluate"](arg.seed, policy="stage:policy")
    )
