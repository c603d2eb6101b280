"""Over-optimization, step 6: PPO against a proxy, no KL penalty, measured by gold; or a toy.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 3, appendix C. Expected there, gold score over d
  = sqrt(KL), nats: R(d) = d (alpha - beta log d); read off figure 1b the 3M proxy peaks at KL 13 to
  18 and is back to 0 near 95, the 3B one is flat from 80 on. The coefficients are not printed as
  numbers.
Command: rlhfjax train --config=experiments/gao2022/ppo.py:proxy=85m
    --workdir=runs/gao2022/1.2b/ppo_85m
  rlhfjax run --config=experiments/gao2022/ppo.py:size=toy --workdir=runs/gao2022/toy
  then python experiments/gao2022/curve.py runs/gao2022/toy
Variants: :proxy=3m to 3b, as in proxy.py; :policy=6b; :kl=0.05, the penalty of section 3.6;
  :pairs=2000; :seed=1.
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
PROXY = runpy.run_path(str(HERE / "proxy.py"))
COLLECT = runpy.run_path(str(HERE / "collect.py"))
VARIANTS = ("", "proxy=3m", "proxy=3b", "policy=6b", "kl=0.05", "size=toy")

BATCH = 256  # table 1 (appendix C)
MINIBATCHES = 128  # table 1 (appendix C), per epoch
MULTIPLIER = 4e-3  # table 1 (appendix C), of a learning rate that it does not name; as in proxy.py
RATE = {"1.2b": 2.0e-4, "6b": 1.2e-4}  # GPT-3's table 2.1


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        size=("paper", "toy"),
        policy=tuple(RATE),
        proxy=("85m", *PROXY["SIZES"]),
        pairs=Argument(0, Count),
        kl=0.0,
        seed=0,
    )
    return toy(arg) if arg.size == "toy" else paper(arg)


def algorithm(arg: ConfigDict) -> dict:
    """Returns the options that do not depend on the size."""
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


def paper(arg: ConfigDict) -> ConfigDict:
    pairs = arg.pairs or COLLECT["PAIRS"]
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
        reward=f"runs/gao2022/{arg.policy}/proxy_{arg.proxy}_{pairs}",
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


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the toy recipe: its proxy, PPO without a penalty, best-of-n for comparison."""
    config = runpy.run_path(str(HERE / "best_of_n.py"))["toy"](
        arg.seed, arg.pairs or COLLECT["TOY_PAIRS"]
    )
    optim = {"learning_rate": 5e-4, "schedule": "constant"}
    policy = TOY["policy"](
        "ppo",
        arg.seed,
        reward="stage:proxy",
        gold="stage:gold",
        eval_prompts={"source": config.best_of_n.prompts.source, "limit": 64},
        batch_size=64,
        minibatches=4,
        optim=optim,
        value_optim=optim,
        **TOY["loop"](60, evals=20),
        **algorithm(arg),
    )
    evaluate = TOY["evaluate"](
        arg.seed, policy="stage:ppo", gold="stage:gold", proxy="stage:proxy"
    )
    return TOY["add"](config, ppo=policy, evaluate=evaluate)


def sweep(add) -> None:
    """Adds the KL penalties of section 3.6, figure 9."""
    for coefficient in (0.0, 0.05, 0.1, 0.2):  # the paper's own values were not read
        add(**{"kl.coefficient": coefficient})
