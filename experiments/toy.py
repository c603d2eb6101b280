"""Builds the toy recipes of the papers: the smallest quickstart, then stages of a paper.

Experiment files are not a package. They load this file, or a file beside them, by its path:
  TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
  config = TOY["quickstart"](seed, until="collect")
  TOY["add"](config, ppo=TOY["policy"]("ppo", seed, …),
      evaluate=TOY["evaluate"](seed, policy="stage:ppo"))
A model of 200 thousand parameters needs larger steps than one of billions, so learning rates are
not the papers'. `VARIANTS` of an experiment file holds the arguments that the tests expand.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhfjax.stages import stage_config

QUICKSTART = Path(__file__).parent / "quickstart" / "recipe.py"
SAMPLING = ("prompt_length", "max_new_tokens", "temperature")
GOLD = "gold:sentiment"  # that the results of the toys were measured with


def quickstart(
    seed: int = 0, until: str | None = None, size: str = "smoke"
) -> ConfigDict:
    """Returns the quickstart: the stages before `until`, or all of them."""
    whole = runpy.run_path(str(QUICKSTART))["get_config"](f"size={size},seed={seed}")
    whole.collect.labeler = whole.ppo.gold = whole.evaluate.gold = GOLD
    names = whole.stages if until is None else whole.stages[: whole.stages.index(until)]
    return ConfigDict({"stages": tuple(names), **{name: whole[name] for name in names}})


def add(config: ConfigDict, **stages: ConfigDict) -> ConfigDict:
    """Appends stages to a recipe, in their order; returns the recipe."""
    for name, stage in stages.items():
        config[name] = stage
    config.stages = (*config.stages, *stages)
    return config


def sampling(seed: int = 0) -> dict[str, Any]:
    """Returns prompt_length, max_new_tokens and temperature of the quickstart."""
    return {name: quickstart(seed).collect[name] for name in SAMPLING}


def loop(steps: int, evals: int = 3) -> dict[str, Any]:
    """Returns the options of a stage that trains for `steps`, evaluated and saved `evals` times.

    Every step is logged.
    """
    every = max(1, steps // evals)
    return {
        "steps": steps,
        "eval_every": every,
        "checkpoint": {"every": every},
        "log": {"every": 1},
    }


def tuned(seed: int = 0) -> ConfigDict:
    """Returns the quickstart up to SFT, trained longer, so that its responses differ in quality."""
    config = quickstart(seed, until="collect")
    config.pretrain.update(loop(300))
    config.sft.update(loop(150))
    return config


def collect(
    seed: int, samples_per_prompt: int, prompts: int, held_out: int, **changes: Any
) -> ConfigDict:
    """Returns the quickstart's `collect` with other numbers of responses and prompts."""
    config = quickstart(seed).collect
    config.update({"samples_per_prompt": samples_per_prompt, **changes})
    config.prompts.limit, config.eval_prompts.limit = prompts, held_out
    return config


def ranked(
    stage: str, collect: ConfigDict, batch_size: int, evals: int = 3, **changes: Any
) -> ConfigDict:
    """Returns a stage that trains on the rankings of `collect`, from SFT and for one epoch."""
    options = {
        "init_from": "stage:sft",
        "preferences": ("stage:collect/preferences",),
        "length": collect.prompt_length + collect.max_new_tokens,
        "batch_size": batch_size,
        "seed": collect.seed,
        **loop(collect.prompts.limit // batch_size, evals),
    }
    return stage_config(stage, **options | changes)


def policy(stage: str, seed: int, **changes: Any) -> ConfigDict:
    """Returns a stage that improves SFT by the reward model, on the prompts of the quickstart's
    PPO.
    """
    ppo = quickstart(seed).ppo
    options = {
        "init_from": "stage:sft",
        "reward": "stage:reward",
        "gold": "gold:sentiment",
        "prompts": ppo.prompts,
        "eval_prompts": ppo.eval_prompts,
        "seed": seed,
        **sampling(seed),
    }
    return stage_config(stage, **options | changes)


def best_of_n(seed: int, **changes: Any) -> ConfigDict:
    """Returns a stage that picks from pools of SFT's responses to the prompts of `evaluate`."""
    options = {
        "init_from": "stage:sft",
        "gold": "gold:sentiment",
        "prompts": quickstart(seed).evaluate.prompts,
        "pool": 32,
        "batch_size": 256,
        "seed": seed + 2000,
        **sampling(seed),
    }
    return stage_config("best_of_n", **options | changes)


def evaluate(seed: int = 0, **changes: Any) -> ConfigDict:
    """Returns the quickstart's evaluation: `policy` against `baseline` on 64 held-out prompts."""
    config = quickstart(seed).evaluate
    config.update(changes)
    return config
