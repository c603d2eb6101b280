"""Configs: experiment files (`ml_collections`) outside, frozen dataclasses in the rest of the code.

An experiment file has a function `get_config(arg=None)`. It returns either the config of one stage,
made by `stages.stage_config`, or a recipe: `stages`, a tuple of names, and the config of each name.
"""

import dataclasses
import enum
import functools
import itertools
import os
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import pydantic
from ml_collections import ConfigDict, config_dict

from rlhfjax import hosts, json_text, options, paths, renamed
from rlhfjax.arguments import did_you_mean
from rlhfjax.errors import ConfigError, cut, first_line
from rlhfjax.experiment_args import Argument as Argument
from rlhfjax.experiment_args import parse_arg as parse_arg
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
    samples_every: Count = 10
    """Steps between responses in samples_steps.jsonl, after those of step 1; 0: none. Policy stages
    have them."""
    samples: PositiveCount = 4
    """Responses that are written there, the first ones of the step's batch."""
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
    keep_best: str = ""
    """Held-out metric by whose best evaluation the stage's model is chosen, min:METRIC or
    max:METRIC such as min:val_loss; empty: the model is that of the last step."""
    patience: Count = 0
    """Evaluations in a row that are no better than the best one, after which the stage ends; 0: it
    never ends early. Needs keep_best."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """At a loss or gradient that is NaN or infinite: end the run, or skip the update."""
    mesh: MeshConfig = MeshConfig()
    """The mesh of devices that the stage runs on."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the training state is saved."""
    log: LogConfig = LogConfig()
    """What is logged, and where."""


_type_hints = functools.cache(typing.get_type_hints)


def defaults(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of a dataclass as a nested dict: `values` laid over the defaults.

    Raises:
      ConfigError: a value for a field that the dataclass does not have.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = _type_hints(cls)
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
    hints = _type_hints(cls)
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
    location = options.without_arms(cls, first["loc"])
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
    hint = did_you_mean(name, known)
    return f"{where}.{name}: no such option; {where} has {', '.join(known)}{hint}"


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
