"""The golden form of configs, by hand: defaults, what differs from them, and all of it again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from tests import expansion


@dataclasses.dataclass(frozen=True)
class Source:
    spec: str
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8
    depth: int = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int
    rate: float = 0.5
    sources: tuple[Source, ...] = ()
    model: Model | None = None
    fixed: Model = dataclasses.field(default_factory=lambda: Model(depth=3))
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    delay: tuple[float, float] = (0.2, 0.8)


DEFAULTS = """delay = [0.2, 0.8]
fixed.depth = 3
fixed.width = 8
model = null
model?.depth = 2
model?.width = 8
rate = 0.5
rules = {}
sources = []
sources[].spec = required
sources[].split = "train"
steps = required
"""


@pytest.fixture
def defaults(monkeypatch):
    monkeypatch.setattr(expansion, "config_class", lambda stage: Stage)
    return expansion.default_options("anything")


def flat(config):
    return dict(expansion.flatten(dataclasses.asdict(config)))


def test_every_option_is_a_line_with_its_default(defaults):
    assert expansion.text_of(defaults) == DEFAULTS


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (Stage(3), {"steps": "3"}),
        (Stage(3, rate=0.25), {"steps": "3", "rate": "0.25"}),
        (Stage(3, delay=(0.2, 0.9)), {"steps": "3", "delay": "[0.2, 0.9]"}),
        (
            Stage(3, sources=(Source("a"), Source("b", "c"))),
            {
                "steps": "3",
                "sources.0.spec": '"a"',
                "sources.1.spec": '"b"',
                "sources.1.split": '"c"',
            },
        ),
        (Stage(3, model=Model(16)), {"steps": "3", "model.width": "16"}),
        # that there is a model is a difference, so that this one is written whole
        (
            Stage(3, model=Model()),
            {"steps": "3", "model.width": "8", "model.depth": "2"},
        ),
        (Stage(3, fixed=Model(8, 2)), {"steps": "3", "fixed.depth": "2"}),
        (
            Stage(3, rules={"vocab": (), "heads": {"a": 1}}),
            {"steps": "3", "rules.vocab": "[]", "rules.heads.a": "1"},
        ),
    ],
)
def test_what_differs_is_written_and_gives_the_whole_again(defaults, config, own):
    assert expansion.differences(defaults, flat(config)) == own
    assert expansion.rebuilt(defaults, own) == flat(config)


def test_a_tuple_of_few_of_many_sources_is_not_mixed_up(defaults):
    """Element 1 and element 10 share a prefix."""
    sources = tuple(
        Source(str(i), "test" if i in (1, 10) else "train") for i in range(12)
    )
    options = flat(Stage(3, sources=sources))
    own = expansion.differences(defaults, options)
    splits = [option for option in own if option.endswith("split")]
    assert splits == ["sources.1.split", "sources.10.split"]
    assert expansion.rebuilt(defaults, own) == options


def test_an_optional_part_that_is_there_by_default_can_be_left_out(defaults):
    by_default = {"model.width": "8", "rate": "0.5"}
    assert expansion.differences(by_default, {"model": "null", "rate": "0.5"}) == {
        "model": "null"
    }
    assert expansion.rebuilt(by_default, {"model": "null"}) == {
        "model": "null",
        "rate": "0.5",
    }


def test_a_changed_default_is_one_line_and_none_of_an_experiment(defaults, monkeypatch):
    before = expansion.differences(defaults, flat(Stage(3)))

    @dataclasses.dataclass(frozen=True)
    class Changed(Stage):
        rate: float = 0.75

    monkeypatch.setattr(expansion, "config_class", lambda stage: Changed)
    after = expansion.default_options("anything")
    old, new = (
        set(expansion.text_of(options).splitlines()) for options in (defaults, after)
    )
    assert (old - new, new - old) == ({"rate = 0.5"}, {"rate = 0.75"})
    assert expansion.differences(after, flat(Changed(3))) == before


VARIANTS = {
    "": {"a": "1", "b": "2", "c": '"x = [y]"'},
    "size=toy": {"a": "1", "b": "3"},
    "size=big": {"a": "1", "b": "2"},
}
TEXT = """variants: no argument | size=toy | size=big

[every variant]
a = 1

[no argument | size=big]
b = 2

[no argument]
c = "x = [y]"

[size=toy]
b = 3
"""


def test_each_line_of_a_file_stands_once_under_the_variants_that_have_it():
    assert expansion.text_of_variants(VARIANTS) == TEXT
    assert expansion.read_variants(TEXT) == VARIANTS
    single = {"": {"a": "1"}}
    assert (
        expansion.text_of_variants(single)
        == "variants: no argument\n\n[every variant]\na = 1\n"
    )
    for variants in (single, {"": {}, "x=1": {}}):
        assert expansion.read_variants(expansion.text_of_variants(variants)) == variants
