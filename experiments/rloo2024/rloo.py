"""Trains RLOO, whose baseline is the other samples of a prompt, on TL;DR; at toy size on dialogue.

Paper: Ahmadian et al. 2024 (arXiv 2402.14740), "Back to Basics". Win rates there are by GPT-4 and
  are not what the toy measures.
Command: rlhfjax train --config=experiments/rloo2024/rloo.py --workdir=runs/rloo2024/rloo
  rlhfjax run --config=experiments/rloo2024/rloo.py:size=toy --workdir=runs/rloo2024/toy
Variants: :k=2 or 4, samples per prompt; :estimator=reinforce, the paper's moving-average baseline;
  :seed=1.
Hardware: toy: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.ranges import Several
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
EPISODES = 512  # TRL's index of papers
PROMPTS = 116_722  # of TL;DR's supervised split, Huang et al. 2024
VARIANTS = ("", "k=2", "estimator=reinforce", "size=toy")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        size=("paper", "toy"),
        k=Argument(4, Several),
        estimator=("rloo", "reinforce"),
        seed=0,
    )
    return toy(arg) if arg.size == "toy" else paper(arg)


def paper(arg: ConfigDict) -> ConfigDict:
    return stage_config(
        "group",
        init_from="runs/rloo2024/sft",
        reward="runs/rloo2024/reward",
        prompts={
            "source": {
                "spec": "jsonl:data/tldr/prompts*.jsonl",
                "kind": "prompt",
                "split": "all",
            }
        },
        eval_prompts={
            "source": {
                "spec": "jsonl:data/tldr/validation*.jsonl",
                "kind": "prompt",
                "split": "all",
            }
        },
        estimator=arg.estimator,
        samples_per_prompt=arg.k,  # 2 and 4 in the paper
        batch_size=EPISODES
        // arg.k,  # 512 episodes; whether the paper counts prompts or episodes was not read
        minibatches=2,  # two optimizer steps per generation, TRL's index of papers
        # TRL's index of papers; in the reward of the whole sequence
        kl={"coefficient": 0.03},
        prompt_length=512,  # unpublished; Huang et al. 2024 for the same data
        max_new_tokens=53,  # unpublished; Huang et al. 2024 for the same data
        temperature=1.0,  # unpublished; TRL's default
        steps=PROMPTS
        * arg.k
        // EPISODES,  # unpublished; one pass over the prompts, our choice
        eval_every=50,
        checkpoint={"every": 50, "minutes": 15.0},
        log={"every": 1},
        seed=arg.seed,
        optim={
            "learning_rate": 1e-6,  # TRL's index of papers
            # unpublished, our choice; so are the moments, the epsilon and the clipping
            "schedule": "constant",
            "b2": 0.999,
            "clip_norm": 1.0,
        },
    )


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the toy recipe: the quickstart up to its reward model, then this estimator."""
    config = TOY["quickstart"](arg.seed, until="ppo")
    policy = TOY["policy"](
        "group",
        arg.seed,
        estimator=arg.estimator,
        samples_per_prompt=arg.k,
        batch_size=64 // arg.k,
        minibatches=2,
        kl={"coefficient": 0.03},
        # as in the quickstart: a small model has to learn to end its responses
        missing_eos="penalty",
        optim={
            "learning_rate": 5e-4,
            "schedule": "constant",
            "warmup_steps": 4,
            "warmup_start": 0.1,
        },
        **TOY["loop"](24),
    )
    return TOY["add"](
        config, policy=policy, evaluate=TOY["evaluate"](arg.seed, policy="stage:policy")
    )
