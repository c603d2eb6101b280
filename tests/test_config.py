"""Configs: every mistake is one clear error, before anything is computed."""

import ast
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import pytest
from annotated_types import Interval
from ml_collections import ConfigDict

from rlhfjax import ranges
from rlhfjax.config import (
    TrainConfig,
    build,
    explain,
    fill_defaults,
    parse_arg,
    to_dict,
    write_json,
)
from rlhfjax.errors import ConfigError
from rlhfjax.models.config import TransformerConfig
from rlhfjax.stages import config_class, names, stage_config
from rlhfjax.stages.ppo import Config as PPO
from tests import sources, tiny


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3
    how: Literal["up", "down"] = "up"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    steps: int = 1
    on: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    maybe: int | None = None
    several: tuple[float, float] = (0.0, 1.0)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    share: Annotated[float, Interval(ge=0, le=1)] | None = None


def test_values_arrive_as_their_types():
    made = build(
        Outer,
        {
            "name": "a",
            "rate": 2,
            "inner": {"size": 7},
            "many": [{"size": 1}, {"how": "down"}],
        },
    )
    assert made == Outer(
        "a", 2.0, 1, False, Inner(7, "up"), (Inner(1, "up"), Inner(3, "down"))
    )
    assert isinstance(made.rate, float)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "a", "bogus": 1}, ("c.bogus", "no such option", "name, rate")),
        ({"name": "a", "inner": {"bogus": 1}}, ("c.inner.bogus", "size, how")),
        (
            {"name": "a", "many": [{"size": 1}, {"bogus": 1}]},
            ("c.many[1].bogus", "c.many[1] has size, how"),
        ),
        ({"bogus": 1}, ("c.bogus", "no such option")),
        (
            {"name": "a", "many": [{}, {"size": "x"}]},
            ("c.many[1].size='x': expected int",),
        ),
        ({"name": "a", "several": [1.0]}, ("c.several[1]: a value is required",)),
        (
            {"name": "a", "several": [1, 2, 3]},
            ("c.several=[1, 2, 3]: expected tuple[float, float]",),
        ),
        ({"name": "a", "names": {"x": 3}}, ("c.names.x=3: expected str",)),
        (
            {"name": "a", "share": 2},
            ("c.share=2: expected float >= 0 and <= 1 | None",),
        ),
        (
            {"name": "a", "share": 10**400},
            ("c.share=1000", "expected float >= 0 and <= 1 | None"),
        ),
        (
            {"name": "a", "share": True},
            ("c.share=True: expected float >= 0 and <= 1 | None",),
        ),
        ({"name": "\udcff"}, ("c: it contains text that is not Unicode",)),
        ({"name": object()}, ("c: Object of type object is not JSON serializable",)),
        ({}, ("c.name", "required")),
        ({"name": 3}, ("c.name=3", "str")),
        ({"name": "a", "steps": 1.5}, ("c.steps=1.5", "int")),
        ({"name": "a", "steps": "1"}, ("c.steps='1'", "int")),
        ({"name": "a", "steps": True}, ("c.steps", "True", "int")),
        ({"name": "a", "rate": True}, ("c.rate=", "True", "float")),
        ({"name": "a", "rate": "0.1"}, ("c.rate='0.1'", "float")),
        ({"name": "a", "on": 1}, ("c.on=1", "bool")),
        (
            {"name": "a", "inner": {"how": "left"}},
            ("c.inner.how='left'", "'up', 'down'"),
        ),
        ({"name": "a", "inner": 3}, ("c.inner=3", "Inner")),
        ({"name": "a", "maybe": "x"}, ("c.maybe='x'", "int")),
        ({"name": "a", "rate": math.nan}, ("c.rate=nan", "expected a finite number")),
        ({"name": "a", "inner": {"size": -math.inf}}, ("c.inner.size=-inf", "finite")),
        (
            {"name": "a", "many": [{}, {"size": math.inf}]},
            ("c.many[1].size=inf", "finite"),
        ),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_place(values, said):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values, "c")
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_impossible_models_are_refused_by_their_own_dataclass():
    shape = {
        "vocab_size": 9,
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 3,
        "d_ff": 8,
        "max_length": 8,
    }
    with pytest.raises(
        ConfigError, match=r"n_heads = 3 does not divide model\.d_model = 16"
    ):
        build(TransformerConfig, shape)
    with pytest.raises(ConfigError, match="n_kv_heads = 3 does not divide"):
        build(TransformerConfig, shape | {"n_heads": 4, "n_kv_heads": 3})


def test_parse_arg_types_defaults_and_mistakes():
    parsed = parse_arg(
        "size=tiny,seed=3,fast", size="base", seed=0, fast=False, rate=0.5
    )
    assert parsed.to_dict() == {"size": "tiny", "seed": 3, "fast": True, "rate": 0.5}
    assert parse_arg("fast=false", fast=True).fast is False
    assert parse_arg(None, seed=1).seed == 1
    with pytest.raises(ConfigError, match="'bogus' is unknown; known: seed"):
        parse_arg("bogus=1", seed=0)
    with pytest.raises(ConfigError, match="config argument seed=x: expected int"):
        parse_arg("seed=x", seed=0)
    with pytest.raises(ConfigError, match=r"seed=1\.5: expected int"):
        parse_arg("seed=1.5", seed=0)


def test_parse_arg_refuses_a_word_that_is_neither_true_nor_false():
    with pytest.raises(ConfigError, match="fast=maybe: expected bool"):
        parse_arg("fast=maybe", fast=True)


def test_stage_config_has_every_option_and_names_unknown_ones():
    config = stage_config(
        "ppo",
        init_from="a",
        reward="b",
        prompt_length=4,
        max_new_tokens=4,
        batch_size=2,
        steps=1,
    )
    assert set(config) == {f.name for f in dataclasses.fields(PPO)}
    assert config.kl.horizon == 0 and config.mesh.data == -1
    with pytest.raises(
        ConfigError, match=r"ppo\.kl\.bogus: no such option; ppo\.kl has coefficient"
    ):
        stage_config("ppo", kl={"bogus": 1})
    with pytest.raises(ConfigError, match="stage 'bogus' is unknown; known: "):
        stage_config("bogus")


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_defaults_build_back_into_the_same_dataclass(stage):
    """A config written to config.json and read again is the same config."""
    config = to_dict(tiny.get_config("data=x")[stage])
    typed = build(config_class(stage), config, stage)
    again = build(
        config_class(stage), json.loads(json.dumps(dataclasses.asdict(typed))), stage
    )
    assert typed == again


def test_every_stage_has_a_typed_config():
    assert set(tiny.STAGES) <= set(names())
    for name in names():
        assert (
            dataclasses.is_dataclass(config_class(name))
            and config_class(name).__dataclass_params__.frozen
        )
    assert issubclass(PPO, TrainConfig)


def test_options_that_are_none_by_default_keep_their_type_for_overrides():
    config = stage_config("pretrain", length=8, batch_size=2, steps=1)
    assert config.init_from is None and config.get_type("init_from") is str
    config.init_from = "there"
    with pytest.raises(TypeError):
        config.seed = "three"


@dataclasses.dataclass(frozen=True)
class Part:
    width: int
    depth: int = 2
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Whole:
    steps: int
    rate: float = 0.5
    delay: tuple[float, float] = (0.2, 0.8)
    inner: Part = dataclasses.field(default_factory=lambda: Part(3))
    perhaps: Part | None = None
    several: tuple[Part, ...] = ()
    standard: tuple[Part, ...] = (Part(4),)


def test_absent_options_are_filled_with_their_defaults():
    inner = {"width": 3, "depth": 2, "free": {}}
    plain = {
        "rate": 0.5,
        "delay": [0.2, 0.8],
        "inner": inner,
        "perhaps": None,
        "several": [],
    }
    plain["standard"] = [{"width": 4, "depth": 2, "free": {}}]
    assert fill_defaults(Whole, {}) == plain
    assert fill_defaults(Whole, {"steps": 7, "rate": 0.1}) == plain | {
        "steps": 7,
        "rate": 0.1,
    }
    assert fill_defaults(Whole, fill_defaults(Whole, {})) == plain


def test_absent_options_of_parts_and_elements_are_filled():
    """`width` has no default; the 3 of `Whole.inner` is that of the whole part."""
    several = ({}, {"width": 6, "depth": 7})
    given = {"inner": {"depth": 9}, "perhaps": {"width": 5}, "several": several}
    filled = fill_defaults(Whole, given)
    assert filled["inner"] == {"depth": 9, "free": {}}
    assert filled["perhaps"] == {"width": 5, "depth": 2, "free": {}}
    assert filled["several"] == [
        {"depth": 2, "free": {}},
        {"width": 6, "depth": 7, "free": {}},
    ]


def test_what_is_unknown_or_free_form_stays_as_it_is():
    given = {"gone": {"a": (1,)}, "inner": {"free": {"depth": {}}, "gone": 1}}
    filled = fill_defaults(Whole, given)
    assert filled["gone"] == {"a": [1]}
    assert filled["inner"] == {"free": {"depth": {}}, "gone": 1, "depth": 2}


def test_to_dict_is_plain_json():
    config = ConfigDict({"a": (1, 2), "b": {"c": ({"d": 1},)}})
    assert to_dict(config) == {"a": [1, 2], "b": {"c": [{"d": 1}]}}
    assert to_dict((Part(1, free={"a": (2,)}),)) == [
        {"width": 1, "depth": 2, "free": {"a": [2]}}
    ]


def test_write_json_leaves_no_half_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_explain_points_into_the_config_file(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def get_config(arg=None):\n    return {}['missing']\n")
    code = compile(file.read_text(), str(file), "exec")
    scope: dict = {}
    exec(code, scope)
    with pytest.raises(KeyError) as caught:
        scope["get_config"]()
    assert explain(caught.value, str(file)) == f"{file}:2: KeyError: 'missing'"


def test_config_does_not_start_jax():
    """Reading a config must not take the accelerator: `--help` and mistakes answer at once."""
    code = "import rlhfjax.main, rlhfjax.errors, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ an option set to 0 is 0

PACKAGE = Path(__file__).parents[1] / "rlhfjax"
NUMBERS = {
    "int",
    "float",
    *(name for name, hint in vars(ranges).items() if get_origin(hint) is Annotated),
}


def test_no_number_has_a_default_that_stands_in_for_0():
    """No `x or default` or `x if x else default`, x an option or argument; `x or 0` may be."""
    files = {path: list(ast.walk(sources.tree(path))) for path in PACKAGE.rglob("*.py")}
    options = {name for nodes in files.values() for name in numeric_fields(nodes)}
    assert {"gamma", "lam", "beta", "decay_steps", "min_score"} <= options
    found = []
    for path, nodes in files.items():
        annotated = [node for node in nodes if isinstance(node, ast.arg)]
        arguments = {node.arg for node in annotated if numeric(node.annotation)}
        for node, value in stood_in_for(nodes):
            option = isinstance(value, ast.Attribute) and value.attr in options
            if option or (isinstance(value, ast.Name) and value.id in arguments):
                found.append(
                    f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
                )
    assert found == []


def numeric(annotation: ast.expr | None) -> bool:
    """Whether an annotation is of int and float, or of ranges of them, and None perhaps."""
    kinds = set() if annotation is None else set(ast.unparse(annotation).split(" | "))
    return bool(kinds & NUMBERS) and kinds <= NUMBERS | {"None"}


def numeric_fields(nodes: list[ast.AST]) -> set[str]:
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    statements = [statement for node in classes for statement in node.body]
    fields = [
        statement for statement in statements if isinstance(statement, ast.AnnAssign)
    ]
    return {ast.unparse(field.target) for field in fields if numeric(field.annotation)}


def stood_in_for(nodes: list[ast.AST]) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(expression, value) of every value that is replaced where it is false."""
    branches = [
        n for n in nodes if isinstance(n, ast.If | ast.While | ast.IfExp | ast.Assert)
    ]
    filters = [n.ifs for n in nodes if isinstance(n, ast.comprehension)]
    conditions = [node.test for node in branches] + [
        test for tests in filters for test in tests
    ]
    within = {node for condition in conditions for node in ast.walk(condition)}
    for node in nodes:
        if (
            isinstance(node, ast.BoolOp)
            and isinstance(node.op, ast.Or)
            and node not in within
        ):
            if ast.unparse(node.values[-1]) not in ("0", "0.0"):
                yield from ((node, value) for value in node.values[:-1])
        elif isinstance(node, ast.IfExp) and ast.dump(node.test) == ast.dump(node.body):
            yield node, node.test
