"""Configs: experiment files (`ml_collections`) at the edge, frozen dataclasses everywhere else.

An experiment file has `get_config(arg=None)` and returns either one stage's config, made by `stages.stage_config`, or a
recipe: `stages`, a tuple of names, and beside it the config of each name.
"""

import dataclasses
import functools
import itertools
import os
import re
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from annotated_types import Predicate
from ml_collections import ConfigDict, config_dict

from rlhfjax import hosts, json_text, paths, renamed
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Count, NonNegative, PositiveCount, Seed

T = TypeVar("T")
PLACE = "\0"
"""The place of a value in the error of a field's validator, which is not told its place."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, by steps, by time or by both; the last step always is."""

    every: Count = 0  # steps; 0: only at the end and on SIGTERM
    minutes: NonNegative = (
        0.0  # minutes since the save before, by the first host's clock; 0: not by time
    )
    keep_last: PositiveCount = 2  # with two, a damaged one has one before it
    keep_every: Count = 0  # steps; 0: none kept beyond keep_last


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: PositiveCount = 10  # steps between lines in metrics.jsonl
    tensorboard: bool = True
    wandb: str = ""  # a project name; empty: off
    profile: str = ""  # steps to trace, FIRST:LAST such as 10:15; empty: off


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What every stage that trains has in common."""

    stage: str
    steps: PositiveCount
    seed: Seed = 0
    init_from: str | None = None  # workdir whose parameters training starts from
    eval_every: Count = 0  # steps; 0: only at the end
    on_nonfinite: Literal["error", "skip"] = "error"
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


_SWITCH = {"": True, "1": True, "true": True, "0": False, "false": False}


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """`"size=tiny,seed=3"` over typed defaults, as big_vision has it.

    Raises:
      ConfigError: an unknown name, or a value that is not of the default's type.
    """
    parsed = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise ConfigError(
                f"config argument {name!r} is unknown; known: {', '.join(defaults) or 'none'}"
            )
        kind = type(defaults[name])
        try:
            parsed[name] = _SWITCH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ConfigError(
                f"config argument {name}={text!r} is not of type {kind.__name__}"
            ) from None
    return ConfigDict(parsed)


def defaults(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a dataclass as a nested dict, `values` laid over the defaults.

    Raises:
      ConfigError: a value for a field that there is not.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ConfigError(_no_such_option(cls, where, name))
    config: dict[str, Any] = {}
    for name, field in fields.items():
        inner = _dataclass_of(hints[name])
        value = values.get(name, _default_of(field, hints[name]))
        if inner and isinstance(value, Mapping | ConfigDict):
            value = defaults(inner, dict(value), f"{where}.{name}")
        elif inner and dataclasses.is_dataclass(value):
            value = defaults(
                inner,
                {f.name: getattr(value, f.name) for f in dataclasses.fields(inner)},
                where,
            )
        config[name] = value
    return config


def fill_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a dataclass, as JSON has it, with the default of every absent option.

    Elements of a tuple of dataclasses are filled too. An option without a default stays absent. An
    option that the dataclass does not have, and what a free-form dict holds, stay as they are.
    """
    declared = {
        field.name: _declared_default(field) for field in dataclasses.fields(cls)
    }
    config = {
        name: value
        for name, value in declared.items()
        if value is not dataclasses.MISSING
    }
    config = to_dict(config | dict(values))
    hints = typing.get_type_hints(cls)
    return {name: _fill(hints.get(name), value) for name, value in config.items()}


def _fill(hint: Any, value: Any) -> Any:
    """Returns the value of an option, filled if it is one dataclass or several."""
    cls = _dataclass_of(hint)
    if cls and isinstance(value, Mapping):
        return fill_defaults(cls, value)
    if isinstance(value, list):
        element = next(iter(typing.get_args(hint)), None)
        return [_fill(element, part) for part in value]
    return value


def _declared_default(field: dataclasses.Field) -> Any:
    """Returns the default of a field, or MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _default_of(field: dataclasses.Field, hint: Any) -> Any:
    value = _declared_default(field)
    if value is dataclasses.MISSING:
        value = None  # `build` will ask for it
    if _is_union(hint) and str in (arms := typing.get_args(hint)):
        # Text or a mapping: an experiment file and a flag may put either in place of the other.
        if any(typing.get_origin(arm) is Mapping for arm in arms):
            value = ConfigDict(value) if isinstance(value, Mapping) else value
            return config_dict.FieldReference(value, field_type=object)
    plain = _plain_type(hint)
    # a placeholder keeps the type: `--config.x=3` on an option that is None by default is still parsed as an int
    return (
        config_dict.placeholder(plain)
        if value is None and plain in (int, float, str, bool)
        else value
    )


def _plain_type(hint: Any) -> type:
    arms = (
        [a for a in typing.get_args(hint) if a is not type(None)]
        if _is_union(hint)
        else [hint]
    )
    if typing.get_origin(arms[0]) is Literal:
        return str
    return arms[0] if isinstance(arms[0], type) else object


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _dataclass_of(hint: Any) -> type | None:
    """Returns the dataclass that a value is, may be or is several of, or None."""
    return next(
        (
            arm
            for arm in typing.get_args(hint) or (hint,)
            if dataclasses.is_dataclass(arm)
        ),
        None,
    )


def build(
    cls: type[T], values: Mapping[str, Any] | ConfigDict, where: str = "config"
) -> T:
    """Returns a frozen dataclass of a config's values, strictly: an int where a float is meant is the one conversion.

    Raises:
      ConfigError: an unknown key, a missing one, a wrong type, a number out of its field's range,
        NaN or an infinity, or what the dataclass itself refuses.
    """
    values = to_dict(values)
    if found := json_text.first_nonfinite(values, where):
        option, number = found
        raise ConfigError(f"{option}={number}: expected a finite number")
    try:
        text = json_text.encode(values, where)
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from None
    try:  # in JSON a list may be a tuple, and an object a dataclass, strict as it is
        return _adapter(cls).validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as e:
        raise ConfigError(
            _first_mistake(cls, e.errors(include_url=False), where)
        ) from None


@functools.cache
def _adapter(cls: type) -> Any:
    return pydantic.TypeAdapter(cls)


def _first_mistake(cls: type, mistakes: Sequence[Mapping[str, Any]], where: str) -> str:
    """Returns the message of an unknown option, if there is one, else of the first mistake."""
    unknown = [
        mistake
        for mistake in mistakes
        if mistake["type"] == "unexpected_keyword_argument"
    ]
    first = (unknown or mistakes)[0]
    *parents, place = itertools.accumulate(first["loc"], _place, initial=where)
    if unknown:
        owner = _dataclass_of(_hint_at(cls, first["loc"][:-1]))
        return _no_such_option(owner, parents[-1], str(first["loc"][-1]))
    if first["type"] == "missing":
        return f"{place}: a value is required"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]).replace(PLACE, place)
    if first["type"] == "string_unicode":
        return f"{where}: a text in it is not Unicode"
    return (
        f"{place}={first['input']!r}: expected {_describe(_hint_at(cls, first['loc']))}"
    )


def _no_such_option(cls: type, where: str, name: str) -> str:
    known = [field.name for field in dataclasses.fields(cls)]
    present = renamed.OPTIONS.get(name)
    if present in known:
        return f"{where}.{name}: no such option; it is now called {present}"
    return f"{where}.{name}: no such option; {where} has {', '.join(known)}"


def _place(parent: str, part: str | int) -> str:
    return f"{parent}[{part}]" if isinstance(part, int) else f"{parent}.{part}"


def _hint_at(hint: Any, location: Sequence[str | int]) -> Any:
    """Returns the annotation of the value at a place within a value."""
    for part in location:
        cls = None if isinstance(part, int) else _dataclass_of(hint)
        if cls:
            hint = typing.get_type_hints(cls, include_extras=True)[part]
        else:  # of a tuple all elements have one type; of a dict the values
            hint = typing.get_args(hint)[0 if isinstance(part, int) else -1]
    return hint


def _describe(hint: Any) -> str:
    """Returns what a value may be: `int >= 1 | None`, `one of 'up', 'down'`."""
    arms = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, arms))
    if _is_union(hint):
        return " | ".join(map(_describe, arms))
    if typing.get_origin(hint) is Annotated:
        return f"{_describe(arms[0])} {' and '.join(_conditions(arms[1:]))}"
    if typing.get_origin(hint) is tuple:
        return f"tuple[{', '.join(map(_describe, arms))}]"
    return _NAMES.get(hint) or getattr(hint, "__name__", str(hint))


_NAMES = {type(None): "None", ...: "..."}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _conditions(ranges: Iterable[Any]) -> Iterator[str]:
    """Yields the conditions of ranges of annotated_types."""
    for part in ranges:
        if isinstance(part, Predicate):
            yield part.func.__name__.replace("_", " ")
        else:
            bounds = dataclasses.asdict(part)
            yield from (
                f"{sign} {bounds[name]}"
                for name, sign in _SIGNS.items()
                if bounds.get(name) is not None
            )


def explain(error: BaseException, path: str, options: Sequence[str] = ()) -> str:
    """Why a config file or its overrides could not be read, in one line; such a file is a program: anything can fail.

    Args:
      error: what was raised, by the file or by what reads it.
      path: of the file.
      options: the names on the command line, `--config.a.b` among them.
    """
    link: BaseException | None = error
    while link is not None:
        frames = traceback.extract_tb(link.__traceback__)
        if lines := [
            f.lineno
            for f in frames
            if path and os.path.abspath(f.filename) == os.path.abspath(path)
        ]:
            return f"{path}:{lines[-1]}: {type(link).__name__}: {_flat(link)}"
        link = link.__cause__ or link.__context__
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}: {error.msg}"
    if isinstance(
        error, KeyError | AttributeError
    ):  # ml_collections names the last part only
        name = re.search(r"\w+", str(error))
        missing = name[0] if name else ""
        close = re.search(r'Did you mean "(\w+)"', str(error))
        hint = renamed.hint(missing, renamed.OPTIONS)
        if close and not hint:
            hint = f"; did you mean {close[1]}?"
        for option in options:
            if option.startswith("--config.") and missing in option.split("."):
                return f"{option}: the config has no option {missing!r}{hint}"
    return _flat(error) or type(error).__name__


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def to_dict(config: Any) -> Any:
    """ConfigDicts, dataclasses and tuples to plain dicts and lists, as JSON has them."""
    if dataclasses.is_dataclass(config):
        return to_dict(dataclasses.asdict(config))
    if isinstance(config, Mapping | ConfigDict):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all, on the first host. Raises DataError for NaN and infinities."""
    if hosts.first():
        text = json_text.encode(
            value, path, indent=2, sort_keys=True, ensure_ascii=True
        )
        paths.write(path, text + "\n")
