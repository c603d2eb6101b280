"""Builds the recipes of the studies: models of three sizes on stories, from text to a policy.

The world is drawn by a program (rlhfjax/stories): requests for a story, and a gold reward that
follows it sentence by sentence. The base of each size is pretrained once, with seed 0, and all
studies share it; seeds vary what comes after it. Experiment files load this file by its path:
  STORIES = runpy.run_path(str(Path(__file__).parents[1] / "stories.py"))
"""

from typing import Any

from ml_collections import ConfigDict

from rlhfjax.stages import stage_config

GOLD = "gold:stories"
VOCAB = 512
LENGTH = 224  # of a row: two solved requests, a third and its story
PROMPT, RESPONSE = 40, 48
TESTED = 512  # requests of an evaluation
SAMPLING = {
    "prompt_length": PROMPT,
    "max_new_tokens": RESPONSE,
    "temperature": 1.0,
}
# Width and layers; found by pilots, as are all numbers here, see LOG.md.
SIZES = {"s": (48, 3), "m": (80, 3), "l": (128, 4)}
SMALLER = {"xxs": (16, 1), "xs": (32, 2)}  # of reward models
RATE, STEPS = 2e-3, 4000  # of pretraining
DTYPE = "float32"  # "auto" would differ from machine to machine
SCALES = ("small", "full")  # 2 CPU cores; accelerators


def source(name: str, split: str) -> dict[str, Any]:
    """Returns a corpus of stories, such as "forum" or "" for requests and labelers' stories."""
    spec = f"tfds:stories_{name}" if name else "tfds:stories"
    return {"spec": spec, "kind": "messages", "split": split}


def loop(steps: int, evals: int = 4) -> dict[str, Any]:
    """Returns the options of a stage that trains; only its last step is saved."""
    return {
        "steps": steps,
        "eval_every": max(1, steps // evals),
        "checkpoint": {"every": steps},
        "log": {"every": max(1, steps // 40), "tensorboard": False},
    }


def optim(rate: float, warmup: int, **changes: Any) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "warmup_steps": warmup,
        "final_fraction": 0.1,
        "weight_decay": 0.1,
        **changes,
    }


def tokenizer(**changes: Any) -> ConfigDict:
    options = {"sources": (source("forum", "train"),), "vocab_size": VOCAB}
    return stage_config("tokenizer", **options | changes)


def pretrain(size: str, **changes: Any) -> ConfigDict:
    """Returns the base of a size: without changes the same for all seeds and studies."""
    width, layers = (SIZES | SMALLER)[size]
    options = {
        "tokenizer": "stage:tokenizer",
        "model": {
            "vocab_size": VOCAB,
            "d_model": width,
            "n_layers": layers,
            "n_heads": width // 16,
            "d_ff": 11 * width // 4,
            "max_length": LENGTH,
            "dtype": DTYPE,
        },
        "sources": (source("forum", "train"),),
        "eval_sources": (source("forum", "validation"),),
        "eval_batches": 4,
        "length": LENGTH,
        "batch_size": 10,
        "seed": 0,
        "optim": optim(RATE, warmup=100),
        **loop(STEPS),
    }
    return stage_config("pretrain", **options | changes)


def sft(size: str, seed: int, steps: int = 400, **changes: Any) -> ConfigDict:
    """Returns fine-tuning of a size's base on labelers' stories."""
    options = {
        "init_from": f"stage:pretrain_{size}",
        "sources": (source("", "train"),),
        "eval_sources": (source("", "validation"),),
        "eval_batches": 4,
        "length": PROMPT + RESPONSE,
        "batch_size": 32,
        "seed": seed,
        "optim": optim(1e-3, warmup=20),
        **loop(steps),
    }
    return stage_config("sft", **options | changes)


def base(seed: int) -> dict[str, ConfigDict]:
    """Returns the stages from the tokenizer to the SFT of all sizes.

    Every run of a study has all of them, in this order, so that they are taken from the cache: a
    stage's place in the recipe is a part of its key.
    """
    stages = {"tokenizer": tokenizer()}
    for size in SIZES:
        stages |= {f"pretrain_{size}": pretrain(size), f"sft_{size}": sft(size, seed)}
    return stages


RANKED = 4096  # prompts, four responses each


def labeled(size: str, seed: int) -> dict[str, ConfigDict]:
    """Returns the stages that label a size's responses and learn a reward model from them."""
    return {
        "collect": collect(size, seed, RANKED),
        "reward": reward(size, seed, RANKED),
    }


def collect(size: str, seed: int, prompts: int = 4096) -> ConfigDict:
    """Returns four responses of a size's SFT to each prompt, ranked by the gold reward."""
    return stage_config(
        "collect",
        init_from=f"stage:sft_{size}",
        labeler=GOLD,
        prompts={"source": source("", "train"), "limit": prompts},
        eval_prompts={"source": source("", "validation"), "limit": 256},
        samples_per_prompt=4,
        batch_size=64,
        seed=seed,
        **SAMPLING,
    )


def reward(size: str, seed: int, prompts: int = 4096, **changes: Any) -> ConfigDict:
    """Returns a reward model of a size on the rankings, from its SFT, for one epoch."""
    options = {
        "init_from": f"stage:sft_{size}",
        "preferences": ("stage:collect/preferences",),
        "length": PROMPT + RESPONSE,
        "batch_size": 16,
        "seed": seed,
        "normalize": "mean_std",
        "optim": optim(1e-3, warmup=min(20, prompts // 64), weight_decay=0.0),
        **loop(prompts // 16),
    }
    return stage_config("reward", **options | changes)


def ppo(size: str, seed: int, rate: float = 5e-4, **changes: Any) -> ConfigDict:
    """Returns PPO of a size's SFT against the reward model."""
    rates = {"schedule": "constant", "warmup_steps": 8, "warmup_start": 0.1}
    options = {
        "init_from": f"stage:sft_{size}",
        "reward": "stage:reward",
        "gold": GOLD,
        "prompts": {"source": source("", "train")},
        "eval_prompts": {"source": source("", "validation"), "limit": 128},
        "batch_size": 64,
        "epochs": 2,
        "minibatches": 4,
        "kl": {"coefficient": 0.05},
        "missing_eos": "penalty",
        "missing_eos_value": 1.0,
        "seed": seed,
        "optim": {"learning_rate": rate, **rates},
        "value_optim": {"learning_rate": 1e-3, **rates},
        **loop(60),
        **SAMPLING,
    }
    return stage_config("ppo", **options | changes)


def evaluate(seed: int, policy: str, baseline: str, **changes: Any) -> ConfigDict:
    """Returns the gold win rate of a policy against a baseline, on held-out requests."""
    options = {
        "policy": policy,
        "baseline": baseline,
        "gold": GOLD,
        "prompts": {"source": source("", "test"), "limit": TESTED},
        "batch_size": 128,
        "seed": seed + 1000,
        **SAMPLING,
    }
    return stage_config("evaluate", **options | changes)


def recipe(scale: str = "small", **stages: ConfigDict) -> ConfigDict:
    """Returns a recipe of stages, in their order."""
    if scale == "full":
        for stage in stages.values():
            widen(stage)
    return ConfigDict({"stages": tuple(stages), **stages})


def widen(stage: ConfigDict, factor: int = 8) -> None:
    """Makes a stage one for accelerators: s, m and l have 11, 30 and 103 million parameters.

    A model is `factor` times as wide (its heads, too) and twice as deep, in bfloat16; pretraining
    and PPO have `factor` times the rows. Rates fall as the width rises (Yang et al. 2022, arXiv
    2203.03466, table 3, hidden weights under Adam). No such run has been made.
    """
    if stage.stage == "pretrain" and stage.model is not None:
        stage.model.dtype = "bfloat16"
        stage.model.n_layers *= 2
        for name in ("d_model", "d_ff"):
            stage.model[name] *= factor
    if stage.stage in ("pretrain", "ppo", "collect"):
        stage.batch_size *= factor
    for name in ("optim", "value_optim"):
        if name in stage:
            stage[name].learning_rate /= factor
