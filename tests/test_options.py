"""Options: what a command prints of a config, by hand for a small one, and demanded of all."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest
from annotated_types import Interval

from rlhfjax.config import Argument, parse_arg
from rlhfjax.errors import ConfigError
from rlhfjax.options import REQUIRED, Option, meanings_of, options
from rlhfjax.ranges import Count
from tests.test_ranges import CONFIGS


@dataclasses.dataclass(frozen=True)
class Part:
    size: Annotated[int, Interval(ge=1, le=9)] = 3
    """Number of things."""
    how: Literal["up", "down"] = "up"
    """Direction,
    in two lines."""


@dataclasses.dataclass(frozen=True)
class Base:
    steps: int
    """Number of updates."""
    rate: float | None = None
    # a comment is no meaning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Base):
    """A docstring of the class is no meaning."""

    rate: float | None = 0.5
    """Learning rate."""
    part: Part = Part(size=7)
    """One part."""
    maybe: Part | None = None
    """Another, or none."""
    several: tuple[Part, ...] = ()
    """More parts."""

    def __post_init__(self):
        """Nor is that of a method."""


def test_options_of_a_config_by_hand():
    size, how = "int >= 1 and <= 9", "one of 'up', 'down'"
    direction = "Direction,\nin two lines."
    assert options(Whole) == [
        Option("steps", "int", REQUIRED, "Number of updates."),
        Option("rate", "float | None", 0.5, "Learning rate."),
        Option("part", "Part", Part(size=7), "One part."),
        Option("part.size", size, 7, "Number of things."),
        Option("part.how", how, "up", direction),
        Option("maybe", "Part | None", None, "Another, or none."),
        Option("maybe.size", size, 3, "Number of things."),
        Option("maybe.how", how, "up", direction),
        Option("several", "tuple[Part, ...]", (), "More parts."),
        Option("several[].size", size, 3, "Number of things."),
        Option("several[].how", how, "up", direction),
    ]


def test_a_field_without_a_docstring_has_no_meaning():
    assert options(Base)[1] == Option("rate", "float | None", None, "")


def test_a_class_without_source_has_no_meanings():
    made = dataclasses.make_dataclass("Made", [("x", int, 3)])
    assert options(made) == [Option("x", "int", 3, "")]


CONVERTED = (
    "rlhfjax.config.",
    "rlhfjax.data.config.",
    "rlhfjax.mesh.",
    "rlhfjax.models.config.",
    "rlhfjax.models.lora.",
    "rlhfjax.optim.",
)


def without_meaning(names: dict[str, type]) -> list[str]:
    return [
        f"{name}.{field.name}"
        for name, cls in sorted(names.items())
        for field in dataclasses.fields(cls)
        if not meanings_of(cls).get(field.name)
    ]


def test_every_option_of_the_shared_configs_has_a_meaning():
    shared = {name: cls for name, cls in CONFIGS.items() if name.startswith(CONVERTED)}
    assert len(shared) == 8
    assert without_meaning(shared) == []


def test_every_option_has_a_meaning():
    missing = without_meaning(CONFIGS)
    assert not missing, (
        f"{len(missing)} options without a meaning: {', '.join(missing)}"
    )


def test_an_argument_accepts_the_values_of_its_tuple():
    assert parse_arg(None, size=("full", "smoke")).size == "full"
    assert parse_arg("size=smoke", size=("full", "smoke")).size == "smoke"
    assert parse_arg("k=4", k=(2, 4)).k == 4
    message = "^config argument size=smok: expected one of 'full', 'smoke'$"
    with pytest.raises(ConfigError, match=message):
        parse_arg("size=smok", size=("full", "smoke"))
    with pytest.raises(ConfigError, match="k=3: expected one of 2, 4"):
        parse_arg("k=3", k=(2, 4))


def test_an_argument_has_a_range():
    assert parse_arg("rounds=5", rounds=Argument(3, Count)).rounds == 5
    assert parse_arg("", rounds=Argument(3, Count)).rounds == 3
    for text in ("-1", "x", "1.5", str(2**31)):
        message = (
            f"^config argument rounds={text}: expected int >= 0 and <= 2147483647$"
        )
        with pytest.raises(ConfigError, match=message):
            parse_arg(f"rounds={text}", rounds=Argument(3, Count))
    share = Argument(0.5, Annotated[float, Interval(ge=0, le=1)])
    for number in (math.nan, math.inf, 2.0):
        with pytest.raises(ConfigError, match="expected float >= 0 and <= 1"):
            parse_arg(f"share={number}", share=share)
