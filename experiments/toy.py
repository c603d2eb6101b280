"""What the papers' toy recipes are made of: the quickstart at its smallest, a paper's stages after some of its own.

Experiment files are no package; one takes this file, or another file of its folder, by its path:
  TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
  config = TOY["quickstart"](seed, until="collect")
  TOY["add"](config, reward=stage_config("reward", …), evaluate=TOY["evaluate"](seed, policy="stage:ppo"))
`VARIANTS` of an experiment file names the arguments, "" and "size=toy" among them, that the tests expand.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

QUICKSTART = Path(__file__).parent / "quickstart" / "recipe.py"
SAMPLING = ("prompt_length", "max_new", "temperature")


def quickstart(seed: int = 0, until: str | None = None) -> ConfigDict:
    """The recipe of the quickstart at size=smoke: the stages that come before `until`, or all of them."""
    whole = runpy.run_path(str(QUICKSTART))["get_config"](f"size=smoke,seed={seed}")
    names = whole.stages if until is None else whole.stages[: whole.stages.index(until)]
    return ConfigDict({"stages": tuple(names), **{name: whole[name] for name in names}})


def add(config: ConfigDict, **stages: ConfigDict) -> ConfigDict:
    """Appends stages to a recipe, in their order; returns the recipe."""
    for name, stage in stages.items():
        config[name] = stage
    config.stages = (*config.stages, *stages)
    return config


def sampling(seed: int = 0) -> dict[str, Any]:
    """prompt_length, max_new and temperature of the quickstart."""
    return {name: quickstart(seed).collect[name] for name in SAMPLING}


def loop(steps: int, evals: int = 3) -> dict[str, Any]:
    """Options of a stage that trains for so many steps, validated and saved `evals` times, every step in the log."""
    every = max(1, steps // evals)
    return {"steps": steps, "eval_every": every, "checkpoint": {"every": every}, "log": {"every": 1}}


def evaluate(seed: int = 0, **changes: Any) -> ConfigDict:
    """The quickstart's last stage: `policy` against `baseline` by the gold reward, on 64 held-out prompts."""
    config = quickstart(seed).evaluate
    config.update(changes)
    return config
