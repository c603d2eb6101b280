"""Configs: experiment files (`ml_collections`) outside, frozen dataclasses in the rest of the code.

An experiment file has a function `get_config(arg=None)`. It returns either the config of one stage,
made by `stages.stage_config`, or a recipe: `stages`, a tuple of names, and the config of each name.
"""

import dataclasses
import difflib
import enum
import functools
import itertools
import math
import os
import re
import traceback
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pydantic
from ml_collections import ConfigDict, config_dict

from rlhfjax import hosts, json_text, options, paths, renamed
from rlhfjax.errors import ConfigError, cut, first_line
from rlhfjax.mesh import MeshConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Count, NonNegative, PositiveCount, Seed
from rlhfjax.redact import has_form

T = TypeVar("T")
PLACE = "\0"
"""The place of a value in the error of a field's validator, which is not told its place."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved: by steps, by time or by both. The last step is always saved."""

    every: Count = 0
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    minutes: NonNegative = 0.0
    """Minutes since the last checkpoint, by the first host's clock; 0: not by time."""
    keep_last: PositiveCount = 2
    """Number of latest checkpoints to keep; if the last is damaged, the one before is read."""
    keep_every: Count = 0
    """Checkpoints at multiples of this many steps are kept for good; 0: none."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged, and where."""

    every: PositiveCount = 10
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
    wandb: str = ""
    """Project name in Weights & Biases; empty: off."""
    profile: str = ""
    """Steps to trace with jax.profiler, FIRST:LAST such as 10:15; empty: off."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of every stage that trains."""

    stage: str
    """Name of the stage; package.module:Config for a stage of your own."""
    steps: PositiveCount
    """Number of training steps; in a policy stage a step is an iteration."""
    seed: Seed = 0
    """Seed of initialization, sampling, dropout and the order of the data."""
    init_from: str | None = None
    """Workdir or name of the model whose parameters training starts from."""
    eval_every: Count = 0
    """Steps between evaluations on held-out data; 0: only at the end."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """At a loss or gradient that is NaN or infinite: end the run, or skip the update."""
    mesh: MeshConfig = MeshConfig()
    """The mesh of devices that the stage runs on."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the training state is saved."""
    log: LogConfig = LogConfig()
    """What is logged, and where."""


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
        return _adapter(argument.hint).validate_python(value)
    except (ValueError, KeyError):
        expected = options.describe(argument.hint)
        raise ConfigError(
            f"config argument {name}={cut(text)}: expected {expected}"
        ) from None


def defaults(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of a dataclass as a nested dict: `values` laid over the defaults.

    Raises:
      ConfigError: a value for a field that the dataclass does not have.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ConfigError(_no_such_option(cls, where, name))
    config: dict[str, Any] = {}
    for name, field in fields.items():
        inner = options.dataclass_of(hints[name])
        value = values.get(name, _default_of(field, hints[name]))
        if inner and isinstance(value, Mapping | ConfigDict):
            value = defaults(inner, dict(value), f"{where}.{name}")
        elif inner and isinstance(value, inner):
            inner_values = {
                f.name: getattr(value, f.name) for f in dataclasses.fields(inner)
            }
            value = defaults(inner, inner_values, where)
        elif Mapping in [
            typing.get_origin(arm) for arm in typing.get_args(hints[name])
        ]:
            # A name or a mapping: each can be put in place of the other, in a file or by a flag.
            if isinstance(value, config_dict.FieldReference):
                value = value.get()
            value = ConfigDict(value) if isinstance(value, Mapping) else value
            value = config_dict.FieldReference(value, field_type=object)
        config[name] = value
    return config


def fill_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a dataclass, as JSON has it, with the default of every absent option.

    Elements of a tuple of dataclasses are filled too. An option without a default stays absent. An
    unknown option and the contents of a free-form dict stay as they are.
    """
    config: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default = options.declared_default(field)
        if default is not options.REQUIRED:
            config[field.name] = default
    config = to_dict(config | dict(values))
    hints = typing.get_type_hints(cls)
    return {name: _fill(hints.get(name), value) for name, value in config.items()}


def _fill(hint: Any, value: Any) -> Any:
    """Returns the value of an option, filled if it is a dataclass or several."""
    cls = options.dataclass_of(hint)
    if cls and isinstance(value, Mapping):
        return fill_defaults(cls, value)
    if isinstance(value, list):
        element = next(iter(typing.get_args(hint)), None)
        return [_fill(element, part) for part in value]
    return value


def _default_of(field: dataclasses.Field, hint: Any) -> Any:
    """Returns the default of a field for a ConfigDict.

    A placeholder keeps the type of an option that is None by default, so that `--config.x=3` is
    parsed as an int.
    """
    value = options.declared_default(field)
    if value is options.REQUIRED:
        value = None  # `build` will ask for it
    plain = _plain_type(hint)
    if value is None and plain in (int, float, str, bool):
        return config_dict.placeholder(plain)
    return value


def _plain_type(hint: Any) -> type:
    """Returns the type that a flag's text is parsed as; object for types that flags lack."""
    if options.is_union(hint):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is Literal:
        return str
    return hint if isinstance(hint, type) else object


def build(
    cls: type[T], values: Mapping[str, Any] | ConfigDict, where: str = "config"
) -> T:
    """Returns a frozen dataclass of a config's values.

    Types are checked strictly; the one conversion is from an int to a float.

    Raises:
      ConfigError: an unknown or a missing option, a wrong type, a number out of its field's range,
        NaN or an infinity, or an error of the dataclass's own `__post_init__`.
    """
    values = to_dict(values)
    if nonfinite := json_text.first_nonfinite(values, where):
        option, number = nonfinite
        raise ConfigError(f"{option}={number}: expected a finite number")
    try:
        text = json_text.encode(values, where)
    except TypeError as e:
        raise ConfigError(f"{where}: {e}{_not_json(values, where)}") from None
    validate_without_secrets(values, where)
    try:  # strict JSON has no tuples and no dataclasses: lists and objects stand for them
        return _adapter(cls).validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as e:
        mistakes = e.errors(include_url=False)
        raise ConfigError(_first_mistake(cls, mistakes, where)) from None


def _not_json(values: Any, where: str) -> str:
    """Returns the end of the message about a value of a type that JSON lacks: its place."""
    for place, value in json_text.parts(values, where):
        if isinstance(value, dict | list):
            if inner := _not_json(value, place):
                return inner
        elif not isinstance(value, str | int | float | None):
            return f" ({place}={json_text.shown(value)})"
    return ""


def validate_without_secrets(value: Any, where: str) -> None:
    """Raises ConfigError if a text has the form of a secret, which config.json would show."""
    if isinstance(value, str) and has_form(value):
        raise ConfigError(
            f"{where}=…: this is a secret, which config.json would show; expected it in the"
            " environment of the process"
        )
    if isinstance(value, dict | list):
        for place, part in json_text.parts(value, where):
            validate_without_secrets(part, place)


@functools.cache
def _adapter(cls: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(cls)


def _first_mistake(cls: type, mistakes: Sequence[Mapping[str, Any]], where: str) -> str:
    """Returns the message of an unknown option, if there is one, else of the first mistake."""
    unknown = [one for one in mistakes if one["type"] == "unexpected_keyword_argument"]
    first = (unknown or mistakes)[0]
    location = first["loc"]
    *parents, place = itertools.accumulate(location, _place, initial=where)
    if unknown:
        owner = options.dataclass_of(options.hint_at(cls, location[:-1])) or cls
        return _no_such_option(owner, parents[-1], str(location[-1]))
    if first["type"] == "missing":
        return f"{place}: a value is required"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]).replace(PLACE, place)
    if first["type"] == "string_unicode":
        return f"{where}: it contains text that is not Unicode"
    expected = options.describe(options.hint_at(cls, location))
    return f"{place}={first['input']!r}: expected {expected}"


def _no_such_option(cls: type, where: str, name: str) -> str:
    known = [field.name for field in dataclasses.fields(cls)]
    present = renamed.OPTIONS.get(name)
    if present in known:
        return f"{where}.{name}: no such option; it is now called {present}"
    return f"{where}.{name}: no such option; {where} has {', '.join(known)}"


def _place(parent: str, part: str | int) -> str:
    return f"{parent}[{part}]" if isinstance(part, int) else f"{parent}.{part}"


def explain(error: BaseException, path: str, flags: Sequence[str] = ()) -> str:
    """Returns one line that says why a config file or its overrides could not be read.

    A config file is a program, so any exception may come out of it.

    Args:
      error: the exception that the file, or its reader, raised.
      path: path of the file.
      flags: the names on the command line, such as `--config.a.b`.
    """
    link: BaseException | None = error
    while link is not None:
        line = _last_line_in(path, link)
        if line:
            return f"{path}:{line}: {type(link).__name__}{_reason(link)}"
        link = link.__cause__ or link.__context__
    if isinstance(error, SyntaxError):
        line = "" if error.lineno is None else f":{error.lineno}"
        return f"{path}{line}: {error.msg}"
    return f"{path}: {first_line(error, kind=True)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return ": a config file must not end the process"
    reason = " ".join(str(error).split())
    return f": {cut(reason, 400)}" if reason else ""


def _last_line_in(path: str, error: BaseException) -> int | None:
    """Returns the number of the last line of a file that an exception passed through."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if path and os.path.abspath(frame.filename) == os.path.abspath(path)
    ]
    return lines[-1] if lines else None


def to_dict(config: Any) -> Any:
    """Returns ConfigDicts, dataclasses and tuples as plain dicts and lists, as JSON has them.

    Numbers and texts of NumPy and JAX, enums and paths become Python's own.

    Raises:
      ConfigError: a required value of the config was not given.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return to_dict(dataclasses.asdict(config))
    if isinstance(config, Mapping | ConfigDict):
        return {k: to_dict(_item(config, k)) for k in config}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    value = scalar(config)
    return to_dict(value) if isinstance(value, list) else value


def _item(config: Mapping[str, Any] | ConfigDict, key: str) -> Any:
    try:
        return config[key]
    except config_dict.RequiredValueError:
        raise ConfigError(f"{key}: a value is required") from None


def scalar(value: Any) -> Any:
    """Returns a number or text of NumPy or JAX, an enum's value, or a path, of Python's own types.

    An array becomes a list. Anything else stays as it is.
    """
    if isinstance(value, enum.Enum):
        return scalar(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_array = hasattr(value, "dtype") and hasattr(value, "tolist")
    return value.tolist() if is_array else value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, on the first host.

    Raises:
      DataError: the value contains NaN or an infinity.
    """
    if hosts.first():
        text = json_text.encode(
            value, path, indent=2, sort_keys=True, ensure_ascii=True
        )
        paths.write(path, text + "\n")
