"""The overrides that change a stage's config as a plan chose, as a person would type them."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.config import to_dict
from rlhfjax.experiment import words_of


def overrides(
    config: Any,
    stage: str,
    changed: Mapping[str, Any],
    given: Sequence[str] = (),
) -> list[str]:
    """Returns the words --config.NAME=VALUE that a command line needs.

    Args:
      config: of a stage or a recipe, with what the command line has overridden already.
      stage: the name of the stage in a recipe.
      changed: options of the stage's config by dotted names.
      given: dotted names of the options that the command line has overridden.
    """
    values = to_dict(config)
    prefix = f"{stage}." if "stages" in values else ""
    names = list(given)
    for name, value in changed.items():
        names.append(_set(values, prefix + name, value))
    words = []
    for name in _outermost(names):
        words += _words(f"--config.{name}", _get(values, name))
    return words


def _set(values: dict[str, Any], name: str, value: Any) -> str:
    """Sets an option; returns the name of what a flag can set.

    A flag cannot add `overrides.remat` to a dict without it: then it is the whole dict `overrides`.
    """
    parent, _, last = name.rpartition(".")
    node = _get(values, parent) if parent else values
    is_new = last not in node
    node[last] = value
    return parent if is_new else name


def _get(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _outermost(names: Sequence[str]) -> list[str]:
    """Returns the names, once each, of which no other contains them."""
    unique = dict.fromkeys(names)
    return [
        name for name in unique if not any(name.startswith(f"{k}.") for k in unique)
    ]


def _words(place: str, value: Any) -> list[str]:
    """Returns the words that set an option; a dict is set as a whole."""
    if isinstance(value, Mapping):
        return [f"{place}={_plain(value)}"]
    return [shlex.split(word)[0] for word in words_of(value, place)]


def _plain(value: Any) -> Any:
    """Returns a value with dicts and tuples alone, as a Python literal has them."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(part) for part in value)
    return value


def line(words: Sequence[str]) -> str:
    """Returns words as a line for a shell, in double quotes where that is enough."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)
