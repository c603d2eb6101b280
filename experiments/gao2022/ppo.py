"""Over-optimization, step 6: PPO against a proxy, no KL penalty, measured by gold.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 3, appendix C. Expected there, gold score over d
  = sqrt(KL), nats: R(d) = d (alpha - beta log d); read off figure 1b the 3M proxy peaks at KL 13 to
  18 and is back to 0 near 95, the 3B one is flat from 80 on. The coefficients are not printed as
  numbers.
Command: rlhfjax train --config=experiments/gao2022/ppo.py:proxy=85m
    --workdir=runs/gao2022/1.2b/ppo_85m
Variants: :proxy=3m to 3b, as in proxy.py; :policy=6b; :kl=0.05, the penalty of section 3.6;
  :pairs=2000; :seed=1.
Hardware: not named by the paper. Time and result: README.md beside this file; at small scale:
  figure1b.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.ranges import PositiveCount
from rlhfjax.stages import stage_config

HERE = Path(__file__).parent
PROXY = runpy.run_path(str(HERE / "proxy.py"))
COLLECT = runpy.run_path(str(HERE / "collect.py"))
VARIANTS = ("", "proxy=3m", "proxy=3b", "policy=6b", "kl=0.05")

BATCH = 256  # table 1 (appendix C)
MINIBATCHES = 128  # table 1 (appendix C), per epoch
MULTIPLIER = 4e-3  # table 1 (appendix C), of a learning rate that it does not name; as in proxy.py
RATE = {"1.2b": 2.0e-4, "6b": 1.2e-4}  # GPT-3's table 2.1


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        policy=tuple(RATE),
        proxy=("85m", *PROXY["SIZES"]),
        pairs=Argument(COLLECT["PAIRS"], PositiveCount),
        kl=0.0,
        seed=0,
    )
    prompts = {
        "spec": "jsonl:data/instructgpt/prompts_{split}*.jsonl",
        "kind": "prompt",
    }
    optim = {
        "name": "adam",
        "learning_rate": MULTIPLIER * RATE[arg.policy],
        "schedule": "constant",  # unpublished; InstructGPT
        "b1": 0.9,  # unpublished; InstructGPT, appendix C
        "b2": 0.95,  # unpublished; the same
        "eps": 1e-8,  # unpublished; GPT-3's
        "clip_norm": 1.0,  # unpublished; GPT-3's
    }
    return stage_config(
        "ppo",
        init_from=f"runs/gao2022/{arg.policy}/sft",
        reward=f"runs/gao2022/{arg.policy}/proxy_{arg.proxy}_{arg.pairs}",
        gold="runs/gao2022/gold",
        prompts={"source": prompts},
        # our choice
        eval_prompts={"source": {**prompts, "split": "validation"}, "limit": 512},
        prompt_length=COLLECT["PROMPT"],
        max_new_tokens=COLLECT["ANSWER"],
        batch_size=BATCH,
        minibatches=MINIBATCHES,
        # unpublished; stop by hand when the curve has turned (the paper's figures end near KL 100)
        steps=1000,
        eval_every=10,
        checkpoint={"every": 50, "minutes": 15.0},
        log={"every": 1},
        seed=arg.seed,
        optim=optim,
        value_optim=optim,
        **algorithm(arg),
    )


def algorithm(arg: ConfigDict) -> dict:
    """Returns the options of the algorithm."""
    return {
        "kl": {"coefficient": arg.kl},  # section 2: 0, but for section 3.6
        "epochs": 1,  # unpublished; WebGPT's table 7, whose other defaults agree with table 1
        "clip": 0.2,  # table 1 (appendix C)
        "lam": 0.95,  # table 1 (appendix C)
        "gamma": 1.0,  # unpublished; WebGPT's table 7
        "value": "policy",  # unpublished; a proxy may be far smaller than the policy
        "value_clip": 0.2,  # unpublished
        "value_coefficient": 0.1,  # unpublished
        # unpublished; WebGPT's table 7 has them normalized. A minibatch has two episodes
        "whiten_advantages": "batch",
        "temperature": 1.0,  # unpublished; InstructGPT
    }


def sweep(add) -> None:
    """Adds the KL penalties of section 3.6, figure 9."""
    for coefficient in (0.0, 0.05, 0.1, 0.2):  # the paper's own values were not read
        add(**{"kl.coefficient": coefficient})
