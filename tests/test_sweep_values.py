"""Values of a sweep: they reach the run's config as they are, or are refused in one line."""

import dataclasses
import enum
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from rlhfjax.config import parse_arg, to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.sweep import command, pool
from rlhfjax.sweep.expand import (
    Run,
    name_of,
    plain,
    with_arguments,
    with_options,
)


@dataclasses.dataclass
class Inner:
    a: int


class Color(enum.Enum):
    RED = "red"


VALUES = [
    ("rate", np.float64(0.01), "0.01"),
    ("rate", np.float32(0.5), "0.5"),
    ("rate", np.array(0.25), "0.25"),
    ("rate", jnp.float32(0.25), "0.25"),
    ("rate", np.arange(2)[1], "1"),
    ("size", np.int64(3), "3"),
    ("on", np.bool_(False), "false"),
    ("text", np.str_("x"), "x"),
    ("text", Path("a b/c"), "a b/c"),
    ("text", Color.RED, "red"),
    ("maybe", None, "None"),
    ("maybe", np.int64(2), "2"),
    ("names", ["a,b", "c"], "('a,b', 'c')"),
    ("names", np.array([1, 2]), "(1, 2)"),
    ("inner", {"a": np.int64(2)}, "{'a': 2}"),
    ("inner", Inner(a=2), "{'a': 2}"),
    ("free", "0.5", "'0.5'"),
    ("free", "a b", "a b"),
    ("free", {"kind": "x"}, "{'kind': 'x'}"),
    *(
        ("text", text, text)
        for text in (
            " a ",
            "it's",
            'say "x"',
            "$HOME `ls`",
            "a\nb",
            "日本 é",
            "-x",
            "--x=3",
        )
    ),
    *(
        ("text", text, text)
        for text in ("", "true", "{slot} {name}", "\\", "y" * 10_000)
    ),
]


@pytest.mark.parametrize(("option", "value", "text"), VALUES, ids=range(len(VALUES)))
def test_a_value_reaches_the_run_as_it_is(option, value, text):
    """Also through a shell, and with the run's words kept as they are by launchers."""

    def config():
        values = {"rate": 0.1, "size": 1, "on": True, "text": "t", "names": ("a",)}
        free = config_dict.FieldReference("f", field_type=object)
        maybe = config_dict.placeholder(int)
        return ConfigDict(values | {"inner": {"a": 1}, "free": free, "maybe": maybe})

    value = plain(option, value)
    parsed, words = with_options(config, {option: value})
    assert words == [f"--config.{option}={text}"]
    assert to_dict(parsed[option]) == to_dict(value)
    assert shlex.split(shlex.join(words)) == words
    run = Run("r", {}, Path("w"), tuple(words), {})
    (*_, word) = command.whole_command(run, ("start", "--name={name}"))
    assert pool._with_slot(word, 7) == words[0]


@pytest.mark.parametrize(
    "value",
    [np.nan, np.inf, (1, -np.inf), b"x", object(), 1j, "a\0b", "\ud800", "y" * 200_000],
)
def test_a_value_that_no_command_line_holds_is_refused(value):
    with pytest.raises(ConfigError, match="sweep: text") as caught:
        plain("text", value)
    assert len(str(caught.value)) < 300


def test_an_argument_is_quoted_where_it_has_to_be():
    arguments = {"run": 'kl=0.05,seed="1"', "seed": np.int64(2)}
    text = with_arguments("size=smoke", arguments)
    assert text == r'size=smoke,run="kl=0.05,seed=\"1\"",seed=2'
    parsed = parse_arg(text, size="", run="", seed=0)
    assert (parsed.run, parsed.seed) == (arguments["run"], 2)
    with pytest.raises(ConfigError, match="is what the sweep varies"):
        with_arguments(text, {"run": "x"})


def test_names_differ_where_overrides_do_and_fit_a_file_system():
    one, two = {"a": "1,b=2"}, {"a": 1, "b": 2}
    assert name_of(one) != name_of(two) == "a=1,b=2"
    for value in ("日本" * 100, "x" * 10_000, "/../..", "."):
        name = name_of({"a": value})
        assert len(name.encode()) < 150 and "/" not in name
