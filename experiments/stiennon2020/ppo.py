"""Trains PPO of Stiennon et al.: a value network of its own, a fixed KL coefficient; or a toy.

Paper: Stiennon et al. 2020 (arXiv 2009.01325), section 3.4 and appendix B.1. Expected there, by
  human labelers: 1.3B preferred to the reference summaries by 61% (section 4.1), at a KL of 14 to
  19 nats where beta is 0.05 (table 9). The toy does not measure this.
Command: rlhfjax train --config=experiments/stiennon2020/ppo.py:size=1.3b
    --workdir=runs/stiennon2020/1.3b/ppo
  rlhfjax run --config=experiments/stiennon2020/ppo.py:size=toy --workdir=runs/stiennon2020/toy
Variants: :size=1.3b, 6.7b or toy; :beta=0.1 (table 9: 0.35, 0.10, 0.07, 0.05); :seed=1.
Hardware: toy: 2 CPU cores, minutes; RL at 6.7B took the authors about 320 GPU-days. Time and
  result: README.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
SFT = runpy.run_path(str(Path(__file__).with_name("sft.py")))
REWARD = runpy.run_path(str(Path(__file__).with_name("reward.py")))
VARIANTS = (*SFT["VARIANTS"], "size=1.3b,beta=0.1")
LEARNING_RATE = {"1.3b": 1.5e-5, "6.7b": 7e-6}  # appendix B.1
BATCH = {"1.3b": 512, "6.7b": 256}  # appendix B.1
EPISODES = 1_000_000  # appendix B.1


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=(*SFT["SIZES"], "toy"), beta=0.05, seed=0)
    return toy(arg) if arg.size == "toy" else paper(arg)


def algorithm(arg: ConfigDict) -> dict:
    """Returns the paper's options of PPO, which hold at any size."""
    return {
        # section 3.4 and figure 11: a separate network, initialized to the reward model
        "value": "reward",
        "value_head": "loaded",
        "epochs": 4,  # appendix B.1
        "gamma": 1.0,  # appendix B.1
        "lam": 0.95,  # appendix B.1
        # appendix B.1: 0.05, fixed; in the reward of every token
        "kl": {"coefficient": arg.beta},
        # The paper does not state what follows. One minibatch per epoch, both clips and the value's
        # coefficient are those of the same authors' earlier code (Ziegler et al. 2019), the score
        # of a response without an end that of Huang et al. 2024 (N+ details, 23), whitened
        # advantages that of both; rewards are not whitened in the latter.
        "minibatches": 1,
        "clip": 0.2,
        "value_clip": 0.2,
        "value_coefficient": 0.1,
        "missing_eos": "replace",
        "missing_eos_value": -1.0,
        "whiten_advantages": "minibatch",
        "whiten_rewards": "none",
    }


def paper(arg: ConfigDict) -> ConfigDict:
    def prompts(split):
        return {
            "source": {
                "spec": f"jsonl:data/tldr/prompts_{split}*.jsonl",
                "kind": "prompt",
                "split": "all",
            }
        }

    optim = SFT["adam"](LEARNING_RATE[arg.size], "linear")  # appendix B.1
    return stage_config(
        "ppo",
        init_from=f"runs/stiennon2020/{arg.size}/sft",
        reward=f"runs/stiennon2020/{arg.size}/reward",
        prompts=prompts("train"),  # section 3.2: 287,790 posts
        eval_prompts={**prompts("validation"), "limit": 1024},
        prompt_length=SFT["POST"],
        max_new_tokens=SFT["SUMMARY"],
        temperature=SFT["TEMPERATURE"],
        batch_size=BATCH[arg.size],
        steps=EPISODES // BATCH[arg.size],
        eval_every=100,
        checkpoint={"every": 100, "minutes": 15.0},
        log={"every": 1},
        seed=arg.seed,
        optim=optim,
        value_optim=optim,  # unpublished; the same
        **algorithm(arg),
    )


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the toy recipe: reward model, PPO and best-of-n against it, an evaluation."""
    config = REWARD["toy"](arg)
    sampling = SFT["sampling"](arg)
    optim = SFT["adam"](1e-3, "linear")
    own = {
        "optim": optim,
        "value_optim": optim,
        **algorithm(arg),
        **sampling,
        **TOY["loop"](24),
    }
    ppo = TOY["policy"]("ppo", arg.seed, batch_size=64, **own)
    best_of_n = TOY["best_of_n"](arg.seed, proxy="stage:reward", **sampling)  # table 10
    return TOY["add"](
        config,
        ppo=ppo,
        best_of_n=best_of_n,
        evaluate=TOY["evaluate"](arg.seed, **sampling),
    )


def sweep(add) -> None:
    """Adds the coefficients of table 9: KLs of 1.8, 3.8, 9.4 and 14 to 19 nats."""
    for beta in (0.35, 0.10, 0.07, 0.05):
        add(**{"kl.coefficient": beta})
