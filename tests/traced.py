"""Which functions a stage's step enters when it runs on shapes.

A stage is written as in docs/algorithms.md: its name and the options that differ from those of the
tiny recipe (tests/tiny.py), such as `ppo kl.place=loss kl.estimator=k3`.
"""

import ast
import functools
import sys
from types import CodeType
from typing import Any

import jax
from ml_collections import ConfigDict

from rlhfjax.config import to_dict
from rlhfjax.mesh import make_layout
from rlhfjax.plan import programs, shapes
from rlhfjax.stages import stage_config
from tests import tiny

LOOP = ("steps", "eval_every", "checkpoint", "log", "optim")
ENSEMBLES = ("mean", "worst", "pessimistic")
BEFORE = ("tokenizer", "pretrain", "sft", "collect", "reward", "process_reward")


def entered(stage: str) -> set[CodeType]:
    """Returns the code of the functions that are entered while the stage's programs are traced."""
    values = recipe_values()
    name, *options = stage.split()
    overrides = dict(option.split("=", 1) for option in options)
    config = ConfigDict(values[name])
    config.update_from_flattened_dict(
        {option: literal(value) for option, value in overrides.items()}
    )
    ensembles = [f"ensemble_{combine}" for combine in ENSEMBLES]
    stages = dict.fromkeys((*BEFORE, *ensembles, name))
    values = {stage: values[stage] for stage in stages} | {
        "stages": tuple(stages),
        name: to_dict(config),
    }
    subject = shapes.subject(values, name)

    codes: set[CodeType] = set()
    # A function that an earlier test had traced on the same shapes would not be entered again.
    jax.clear_caches()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        programs.step_programs(subject, make_layout(subject.config.mesh))
    finally:
        sys.setprofile(None)
    return codes


def literal(text: str) -> Any:
    """Returns a number, a tuple or a boolean as Python writes it, any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@functools.cache
def recipe_values() -> dict[str, Any]:
    """Returns the tiny recipe and a config of every other stage that trains on its models."""
    values = to_dict(tiny.get_config("data=nowhere"))
    ppo = values["ppo"]
    loop = {name: ppo[name] for name in LOOP}
    members = ({"reward": "stage:reward"},) * 2
    for combine in ENSEMBLES:
        stage = stage_config("compose", members=members, combine=combine)
        values[f"ensemble_{combine}"] = to_dict(stage)
    for name, own in (
        ("group", {"batch_size": 4, "samples_per_prompt": 4, "minibatches": 2}),
        ("reinforce_pp", {"minibatches": 2}),
    ):
        accepted = to_dict(stage_config(name))
        shared = {key: value for key, value in ppo.items() if key in accepted}
        values[name] = shared | {"stage": name, "epochs": 1} | own
    values["direct"] = to_dict(
        stage_config(
            "direct",
            init_from="stage:sft",
            preferences=("stage:collect/preferences",),
            length=32,
            batch_size=8,
            **loop,
        )
    )
    values["tamer"] = to_dict(
        stage_config(
            "tamer",
            init_from="stage:sft",
            feedback="feedback.jsonl",
            held_out="feedback.jsonl",
            length=32,
            batch_size=4,
            **loop,
        )
    )
    solutions = {"spec": "jsonl:steps.jsonl", "kind": "steps"}
    values["process_reward"] = to_dict(
        stage_config(
            "process_reward",
            init_from="stage:sft",
            sources=(solutions,),
            eval_sources=(solutions,),
            length=32,
            batch_size=4,
            **loop,
        )
    )
    return values
