"""InstructGPT, step 3: trains PPO with pretraining gradients (PPO-ptx).

Paper: Ouyang et al. 2022 (arXiv 2203.02155), eq. 2 and appendix C.4. Expected there for 175B:
  preferred to GPT-3 in 85 +- 3 % (section 4.1). At small scale: figure1.py and ptx.py.
Command: rlhfjax train --config=experiments/instructgpt/ppo.py:size=1.3b
    --workdir=runs/instructgpt/1.3b/ppo_ptx
  rlhfjax train --config=experiments/instructgpt/ppo.py:size=1.3b,ptx=false
      --workdir=runs/instructgpt/1.3b/ppo
Variants: :size=1.3b, 6.7b or 175b; :ptx=false is the paper's "PPO"; :gamma=20, the mix's
  coefficient; :seed=1.
Hardware: 60 petaflop/s-days for 175B. Not yet run.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

VARIANTS = (
    "",
    "size=1.3b,ptx=false",
    "size=6.7b",
    "size=6.7b,ptx=false",
    "size=175b",
    "size=175b,ptx=false",
)

EPISODES = 256_000  # C.4: "256k"; whether that is 256,000 or 262,144 is unpublished
BATCH, MINIBATCH = 512, 64  # C.4
ITERATIONS = EPISODES // BATCH
GAMMA = 27.8  # C.4, for all sizes, see `ptx`
# C.4 gives no learning rate of the policy. E.9 sweeps 2.55e-6 to 2.55e-5 for 1.3B and 6B, in
# log-linear steps, and says that without the mix everything above 8.05e-6 diverged: that middle of
# the sweep is our choice. For 175B it tried 2.55e-6 and 3.74e-6; which one was chosen (by labelers'
# ratings) is unpublished: the lower one.
LEARNING_RATE = {"1.3b": 8.05e-6, "6.7b": 8.05e-6, "175b": 2.55e-6}
VALUE_LEARNING_RATE = {"1.3b": 9e-6, "6.7b": 9e-6, "175b": 5e-6}  # C.4


def algorithm() -> dict:
    """Returns the options that do not depend on the size."""
    return {
        "value": "reward",  # C.4: a value function of its own, from the reward model
        "value_head": "loaded",
        "epochs": 1,  # C.4
        "minibatches": BATCH // MINIBATCH,
        "clip": 0.2,  # C.4
        "value_clip": 0.2,  # unpublished; Ziegler et al. 2019, their code
        # unpublished; the same. Under Adam it only matters for gradient clipping
        "value_coefficient": 0.1,
        "gamma": 1.0,  # C.4: no discount
        "lam": 0.95,  # unpublished; Stiennon et al. 2020
        "whiten_rewards": "none",  # unpublished
        "whiten_advantages": "minibatch",  # unpublished; Ziegler et al. 2019, their code
        "temperature": 1.0,  # C.4
        # C.4, per token, fixed; eq. 2
        "kl": {"coefficient": 0.02, "place": "reward", "estimator": "k1"},
    }


def optim(updates_of_warmup: int, **changes) -> dict:
    """Returns C.4: constant after a warm-up from a tenth of the peak over 10 iterations."""
    return {
        "name": "adam",
        "schedule": "constant",
        "warmup_steps": updates_of_warmup,
        "warmup_start": 0.1,
        "b1": 0.9,  # appendix C
        "b2": 0.95,  # appendix C
        "eps": 1e-8,  # unpublished; GPT-3's
        "clip_norm": 1.0,  # unpublished; GPT-3's
        **changes,
    }


def ptx(arg: ConfigDict, **changes) -> dict:
    """Returns the options of gamma E[log pi(x)], eq. 2, added in every minibatch (C.4).

    The paper does not say whether log pi(x) is of a token or of a sequence, so that 27.8 has no
    meaning of its own in other code. Here it multiplies nats per token, the unit in which PPO's
    loss is a mean as well; `unit="sequence"` multiplies by the length of the text too. E.6: 20 and
    more restores SQuADv2 and DROP.
    """
    if not arg.ptx:
        return {}
    gamma = arg.gamma or GAMMA
    # C.4: 8 examples per episode
    return {"coefficient": gamma, "unit": "token", "ratio": 8, **changes}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=tuple(LEARNING_RATE), ptx=True, gamma=0.0, seed=0)
    warmup = 10 * (BATCH // MINIBATCH)
    text = {"spec": "jsonl:data/pretraining/{split}*.jsonl", "kind": "text"}
    # Table 6: 31,144 prompts of customers, 16,185 for validation.
    prompts = {
        "spec": "jsonl:data/instructgpt/prompts_{split}*.jsonl",
        "kind": "prompt",
    }
    return stage_config(
        "ppo",
        init_from=f"runs/instructgpt/{arg.size}/start",  # C.3; the reference too
        reward="runs/instructgpt/6.7b/reward",
        prompts={"source": prompts},
        # our choice
        eval_prompts={"source": {**prompts, "split": "validation"}, "limit": 512},
        # appendix C: "1k"; longer prompts were dropped, here they lose their oldest turns
        prompt_length=1024,
        max_new_tokens=1024,  # appendix C: "1k"
        batch_size=BATCH,
        steps=ITERATIONS,
        # A minibatch of 64: on more devices, tensors are split too, but 50,257 rows of the
        # embedding are 29 x 1,733.
        mesh={"data": 1, "fsdp": MINIBATCH, "tensor": -1, "rules": {"vocab": ()}}
        if arg.size == "175b"
        else {},
        eval_every=25,
        checkpoint={"every": 25, "minutes": 15.0},
        log={"every": 1},
        seed=arg.seed,
        ema=0.992,  # C.4; an average over iterations: of which steps it is one is unpublished
        # unpublished; the context of pretraining
        ptx=ptx(arg, length=2048, sources=(text,)),
        optim=optim(warmup, learning_rate=LEARNING_RATE[arg.size]),
        value_optim=optim(warmup, learning_rate=VALUE_LEARNING_RATE[arg.size]),
        **algorithm(),
    )


def sweep(add) -> None:
    """Adds coefficients of the mix: E.6, figure 33."""
    for gamma in (0.0, 1.0, 5.0, 20.0, 27.8):
        add(**{"ptx.coefficient": gamma})
