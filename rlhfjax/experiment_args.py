"""Arguments of experiment files: the ARGS of FILE.py:ARGS."""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pydantic
from ml_collections import ConfigDict

from rlhfjax import json_text, options
from rlhfjax.errors import ConfigError, cut


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of an experiment file: its default and the annotation of its values."""

    default: Any
    hint: Any


_QUOTED = re.compile(r'("(?:[^"\\]|\\.)*")(?=,|$)', re.DOTALL)
_SWITCH = {"": True, "1": True, "true": True, "0": False, "false": False}


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Returns the arguments of an experiment file, parsed from `"size=tiny,seed=3"`.

    A value that holds a comma is in double quotes, as in JSON: `run="a,b"`. The name of a file or
    folder that exists needs none.

    Args:
      defaults: per argument its default, whose type its values have; a tuple of the accepted
        values, the default first; or an `Argument` with a range.

    Raises:
      ConfigError: an unknown name, a name given twice, or a value that is not accepted.
    """
    arguments = {name: _argument(default) for name, default in defaults.items()}
    parsed = {name: argument.default for name, argument in arguments.items()}
    given: set[str] = set()
    for name, text in split_arg(arg or ""):
        if name not in arguments:
            known = ", ".join(arguments) or "none"
            raise ConfigError(
                f"config argument {cut(name)!r} is unknown{_close(name, arguments)};"
                f" known: {known}"
            )
        if name in given:
            raise ConfigError(f"config argument {name}: given twice")
        given.add(name)
        parsed[name] = _parse_value(arguments[name], name, text)
    return ConfigDict(parsed)


def split_arg(arg: str) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of the arguments of an experiment file; see `parse_arg`.

    Raises:
      ConfigError: a double quote is not closed.
    """
    while arg:
        name = re.match("[^,=]*", arg)[0]  # type: ignore[index]
        arg = arg[len(name) :]
        text = ""
        if arg.startswith("="):
            text, arg = _value_of(name, arg[1:])
        if name or text:
            yield name, text
        arg = arg.removeprefix(",")


def _value_of(name: str, rest: str) -> tuple[str, str]:
    """Returns the value that a text begins with, and what follows it."""
    if rest.startswith('"'):
        quoted = _QUOTED.match(rest)
        if quoted is None:
            raise ConfigError(
                f"config argument {name}={cut(rest)}: expected a closing double quote"
            )
        try:
            return json_text.parse(quoted[1]), rest[quoted.end() :]
        except json_text.NotJson as e:
            raise ConfigError(f"config argument {name}={cut(quoted[1])}: {e}") from None
    parts = rest.split(",")
    ends = range(len(parts), 1, -1) if not os.path.exists(parts[0]) else ()
    for end in ends:
        if os.path.exists(",".join(parts[:end])):
            return ",".join(parts[:end]), "".join(f",{part}" for part in parts[end:])
    return parts[0], "".join(f",{part}" for part in parts[1:])


def quote_arg(text: str) -> str:
    """Returns a value as `parse_arg` reads it, quoted if it has to be."""
    if "," in text or text.startswith('"'):
        return json_text.encode(text, "argument")
    return text


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.strip().lower(), list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _argument(default: Any) -> Argument:
    if isinstance(default, Argument):
        return default
    if isinstance(default, tuple):
        return Argument(default[0], Literal[default])
    return Argument(default, type(default))


def _parse_value(argument: Argument, name: str, text: str) -> Any:
    kind = type(argument.default)
    try:
        value = _SWITCH[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("not finite")
        return pydantic.TypeAdapter(argument.hint).validate_python(value)
    except (ValueError, KeyError):
        expected = options.describe(argument.hint)
        raise ConfigError(
            f"config argument {name}={cut(text)}: expected {expected}"
        ) from None
