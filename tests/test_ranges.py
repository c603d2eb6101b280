"""Every number of every config has a range, and an invalid one is an error with its place."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pytest
from annotated_types import Interval
from pydantic import TypeAdapter

from rlhfjax import stages
from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.recipe import stage_folders
from rlhfjax.rewards.judge import JudgeConfig
from rlhfjax.rewards.load import KINDS


def arms(hint: Any) -> Iterator[Any]:
    """Yields the types of values within an annotation; a range stays with its number."""
    if typing.get_origin(hint) is Annotated or not typing.get_args(hint):
        yield hint
    else:
        for arm in typing.get_args(hint):
            yield from arms(arm)


def configs() -> dict[str, type]:
    """Returns every dataclass that a stage's config, or a reward's description, is made of."""
    found: dict[str, type] = {}
    left = [kind.config for kind in KINDS.values()]
    left += [stages.config_class(name) for name in stages.names()]
    while left:
        cls = left.pop()
        if f"{cls.__module__}.{cls.__name__}" not in found:
            found[f"{cls.__module__}.{cls.__name__}"] = cls
            hints = typing.get_type_hints(cls, include_extras=True).values()
            left += [
                arm
                for hint in hints
                for arm in arms(hint)
                if dataclasses.is_dataclass(arm)
            ]
    return found


CONFIGS = configs()


def numbers(cls: type) -> Iterator[tuple[str, Any]]:
    """Yields (field, annotation) of every number of a dataclass."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        for arm in arms(hint):
            if (typing.get_args(arm) or (arm,))[0] in (int, float):
                yield name, arm


def test_every_config_is_found():
    names = {
        "rl.config.PolicyConfig",
        "config.TrainConfig",
    }  # only ever a part of others
    assert len(CONFIGS) == 62 and not {f"rlhfjax.{name}" for name in names} & set(
        CONFIGS
    )
    for name in (
        "mesh.MeshConfig",
        "models.config.TransformerConfig",
        "rl.config.PtxConfig",
        "rewards.direct.LossConfig",
    ):
        assert f"rlhfjax.{name}" in CONFIGS


@pytest.mark.parametrize("cls", CONFIGS.values(), ids=CONFIGS)
def test_every_number_has_a_range(cls):
    """With both ends: the smallest and the largest value that are meant."""
    for name, hint in numbers(cls):
        ranges = [
            part for part in typing.get_args(hint)[1:] if isinstance(part, Interval)
        ]
        assert len(ranges) == 1, f"{cls.__name__}.{name} has no range"
        low, high = ((ranges[0].ge, ranges[0].gt), (ranges[0].le, ranges[0].lt))
        assert low != (None, None) and high != (None, None), (
            f"{cls.__name__}.{name} is not bounded on both sides"
        )


def test_a_number_without_a_range_is_found():
    @dataclasses.dataclass
    class Some:
        bare: int
        several: tuple[float, float]
        ranged: Annotated[float, Interval(ge=0, le=1)] | None
        switch: bool
        text: str

    assert [(name, typing.get_origin(hint)) for name, hint in numbers(Some)] == [
        ("bare", None),
        ("several", None),
        ("several", None),
        ("ranged", Annotated),
    ]


@pytest.mark.parametrize("cls", CONFIGS.values(), ids=CONFIGS)
def test_defaults_are_in_their_ranges(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in {name for name, _ in numbers(cls)}:
        default = next(
            field.default for field in dataclasses.fields(cls) if field.name == name
        )
        if default is not dataclasses.MISSING:
            assert TypeAdapter(hints[name]).validate_python(default) == default, name


def refused(stage: str, **values: Any) -> str:
    """Returns the error of `build` for a stage's config with these values, the rest being valid."""
    cls = stages.config_class(stage)
    hints = typing.get_type_hints(cls)
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory
    ]
    needed = {name: NEEDED[hints[name]] for name in required} | ALSO_NEEDED.get(
        stage, {}
    )
    build(cls, needed, stage)
    with pytest.raises(ConfigError) as caught:
        build(cls, needed | values, stage)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MODEL = {
    "vocab_size": 9,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 8,
    "max_length": 8,
}
NEEDED = {
    str: "x",
    str | Mapping[str, Any]: "x",
    int: 8,
    JudgeConfig: {"model": "x", "length": 8},
}  # options without a default, by type
ALSO_NEEDED = {
    "compose": {"members": [{"reward": "x"}]},
    "tasks": {"tasks": ["chain_sum"], "size": 100},
}
HUGE = 10**400  # an int, which is infinite as a float


@pytest.mark.parametrize(
    ("stage", "values", "said"),
    [
        ("ppo", {"temperature": math.inf}, "ppo.temperature=inf: expected a finite number"),
        ("ppo", {"temperature": 1e39},
         "ppo.temperature=1e+39: expected float >= 0.0001 and <= 10000.0"),
        ("ppo", {"optim": {"clip_norm": 1e-45}}, "clip_norm=1e-45: expected float >= 0"),
        ("ppo", {"optim": {"clip_norm": 1e-45}}, "and <= 3.4e+38 and not subnormal"),
        ("ppo", {"optim": {"eps": 0}}, "ppo.optim.eps=0: expected float >= 1.2e-38 and <= 3.4e+38"),
        ("ppo", {"optim": {"b2": 1.0}}, "ppo.optim.b2=1.0: expected float >= 0 and < 1"),
        ("ppo", {"optim": {"b2": 1.5}}, "ppo.optim.b2=1.5: expected float >= 0 and < 1"),
        ("ppo", {"optim": {"eps": 1e-39}}, "ppo.optim.eps=1e-39: expected float >= 1.2e-38"),
        ("ppo", {"clip": 0}, "ppo.clip=0: expected float >= 1.2e-38"),
        ("ppo", {"init_from": None}, "ppo.init_from=None: expected str"),
        ("ppo", {"kl": {"horizon": 2**70}},
         f"ppo.kl.horizon={2**70}: expected int >= 0 and <= 2147483647"),
        ("ppo", {"decode_batch": 10**9},
         "ppo.decode_batch=1000000000: expected int >= 0 and <= 1048576"),
        ("ppo", {"entropy_coefficient": -0.1}, "ppo.entropy_coefficient=-0.1: expected float >= 0"),
        ("ppo", {"value_coefficient": -0.1}, "ppo.value_coefficient=-0.1: expected float >= 0"),
        ("ppo", {"prompts": {"per_conversation": -1}},
         "ppo.prompts.per_conversation=-1: expected int >= 0"),
        ("ppo", {"seed": -1}, "ppo.seed=-1: expected int >= 0 and <= 4294967294"),
        ("ppo", {"steps": True}, "ppo.steps=True: expected int >= 1 and <= 2147483647"),
        ("ppo", {"score_clip": "3"}, "ppo.score_clip='3': expected float >= 0"),
        ("ppo", {"mesh": {"fsdp": 0}},
         "ppo.mesh.fsdp=0: expected int >= -1 and <= 1048576 and not 0"),
        ("ppo", {"frozen_mesh": {"data": -2}}, "ppo.frozen_mesh.data=-2: expected int >= -1"),
        ("pretrain", {"model": MODEL | {"rope_theta": HUGE}},
         "expected float >= 1 and <= 1000000000000.0"),
        ("pretrain", {"model": MODEL | {"rope_theta": 1e30}},
         "pretrain.model.rope_theta=1e+30: expected float >= 1"),
        ("pretrain", {"model": MODEL | {"norm_eps": math.inf}},
         "model.norm_eps=inf: expected a finite number"),
        ("pretrain", {"model": MODEL | {"norm_eps": 0.0}},
         "pretrain.model.norm_eps=0.0: expected float >= 1.2e-38"),
        ("pretrain", {"model": MODEL | {"n_layers": 10**6}},
         "n_layers=1000000: expected int >= 1 and <= 1024"),
        ("pretrain", {"sources": [{"spec": "x"}, {"spec": "y", "limit": -1}]},
         "[1].limit=-1: expected int >= 0"),
        ("tamer", {"batch_size": 0}, "tamer.batch_size=0: expected int >= 1"),
        ("tamer", {"batch_size": -8}, "tamer.batch_size=-8: expected int >= 1"),
        ("tamer", {"microbatches": 0}, "tamer.microbatches=0: expected int >= 1"),
        ("tamer", {"eval_batches": -1}, "tamer.eval_batches=-1: expected int >= 0"),
        ("tamer", {"length": 0}, "tamer.length=0: expected int >= 1"),
        ("tamer", {"delay": [-0.1, 0.8]}, "tamer.delay[0]=-0.1: expected float >= 0"),
        ("best_of_n", {"pool": 0}, "best_of_n.pool=0: expected int >= 1"),
        ("best_of_n", {"batch_size": -64}, "best_of_n.batch_size=-64: expected int >= 1"),
        ("best_of_n", {"prompts": {"limit": -1}}, "best_of_n.prompts.limit=-1: expected int >= 0"),
        ("best_of_n", {"pool": -64}, "best_of_n.pool=-64: expected int >= 1"),
        ("critique", {"batch_size": -1}, "critique.batch_size=-1: expected int >= 1"),
        ("critique", {"rounds": 0}, "critique.rounds=0: expected int >= 1"),
        ("critique", {"batch_size": 0}, "critique.batch_size=0: expected int >= 1"),
        ("critique", {"prompts": {"limit": -3}}, "critique.prompts.limit=-3: expected int >= 0"),
        ("collect", {"batch_size": 0}, "collect.batch_size=0: expected int >= 1"),
        ("collect", {"batch_size": -32}, "collect.batch_size=-32: expected int >= 1"),
        ("collect", {"prompts": {"limit": -1}}, "collect.prompts.limit=-1: expected int >= 0"),
        ("collect", {"eval_prompts": {"limit": -1}}, "eval_prompts.limit=-1: expected int >= 0"),
        ("collect", {"temperature": math.inf}, "collect.temperature=inf: expected a finite number"),
        ("collect", {"decode_batch": -1}, "collect.decode_batch=-1: expected int >= 0"),
        ("collect", {"samples_per_prompt": 1}, "collect.samples_per_prompt=1: expected int >= 2"),
        ("select", {"keep": 0}, "select.keep=0: expected int >= 1"),
        ("direct", {"loss": {"beta": 0}},
         "direct.loss.beta=0: expected float >= 1.2e-38 and <= 3.4e+38 | None"),
        ("feedback", {"clamp": [-0.5, 1.5]},
         "feedback.clamp[0]=-0.5: expected float >= 0 and <= 1"),
        ("feedback", {"judge": {"model": "x", "length": 0}},
         "feedback.judge.length=0: expected int >= 1"),
        ("tasks", {"held_out": 0.5}, "tasks.held_out=0.5: expected float >= 0 and < 0.5"),
        ("import_rankings", {"validation": 1.0},
         "import_rankings.validation=1.0: expected float > 0 and < 1"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_with_its_place(stage, values, said):
    assert said in refused(stage, **values)


def test_what_relates_two_options_is_refused_by_the_config_itself():
    """A ConfigError of `__post_init__` passes through the library."""
    assert "compose.members: combine" in refused("compose", members=[])


def test_a_recipe_without_stages_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="recipe: `stages` is empty"):
        stage_folders({"stages": ()}, tmp_path)
