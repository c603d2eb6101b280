"""Experiment files: FILE.py[:ARGS] with get_config, and the overrides of its config."""

import ast
import inspect
import os
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from rlhfjax import arguments, paths, renamed
from rlhfjax.config import explain, to_dict
from rlhfjax.errors import ConfigError, UserError, cut, first_line

T = TypeVar("T")
_MODULE = "config_config"  # in sys.modules, as ml_collections calls it
_OTHER = (".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".ipynb")
EXPECTED = "expected FILE.py[:ARGS], a Python file with get_config(arg=None)"


class Experiment(NamedTuple):
    """A file that was run, and the arguments for its `get_config`."""

    file: str
    arg: str | None  # None: without a colon
    names: Mapping[str, Any]  # what the file defines

    def config(self, arg: str | None = None) -> ConfigDict:
        """Returns the config for other arguments, or by default for those of the experiment.

        Raises:
          ConfigError: `get_config` fails, takes no arguments, or returns anything but a config.
        """
        get_config = self.names.get("get_config")
        if not callable(get_config):
            raise ConfigError(f"{self.file}: it has no get_config(arg=None)")
        arg = self.arg if arg is None else arg
        words = () if arg is None else (arg,)
        self._validate_signature(get_config, words)
        config = guarded(self.file, lambda: get_config(*words))
        if not isinstance(config, Mapping | ConfigDict):
            raise ConfigError(
                f"{self.file}: its get_config returned {cut(repr(config), 60)};"
                " expected an ml_collections.ConfigDict"
            )
        if isinstance(config, Mapping):
            values = dict(config)
            return guarded(self.file, lambda: ConfigDict(values))
        return config

    def _validate_signature(
        self, get_config: Callable[..., Any], words: Sequence[str]
    ) -> None:
        try:
            inspect.signature(get_config).bind(*words)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.file}: its get_config{_signature(get_config)} cannot be called with"
                f" {cut(repr(words[0])) if words else 'no arguments'};"
                " expected get_config(arg=None)"
            ) from None


def _signature(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(…)"


def load(spec: str) -> Experiment:
    """Runs the file of FILE.py[:ARGS].

    Raises:
      ConfigError: there is no such file, it is no Python, or it fails.
    """
    file, arg = split(spec)
    source = _source(file)
    module = types.ModuleType(_MODULE)
    module.__file__ = file

    def run() -> None:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)

    sys.modules[_MODULE] = module
    guarded(file, run)
    return Experiment(file, arg, module.__dict__)


def split(spec: str) -> tuple[str, str | None]:
    """Splits FILE[:ARGS], at the last colon before which there is a file.

    A name that exists may thus have colons in it. Without ARGS, None takes their place.
    """
    for colon in reversed(list(re.finditer(":|$", spec))):
        file = spec[: colon.start()]
        if os.path.isfile(file):
            return file, spec[colon.end() :] if colon[0] else None
    suffix = re.search(r"\.py(:|$)", spec)
    end = suffix.start() + len(".py") if suffix else len(spec.partition(":")[0])
    return spec[:end], spec[end + 1 :] if end < len(spec) else None


def _source(file: str) -> bytes:
    if file.endswith(_OTHER):
        raise ConfigError(f"--config={cut(file)}: {EXPECTED}")
    if paths.remote(file):
        raise ConfigError(f"--config={cut(file)}: is in a bucket; {EXPECTED}")
    if not file or not paths.lexists(file):
        raise ConfigError(f"--config={cut(file)}: there is no such file; {EXPECTED}")
    try:
        return paths.read(paths.path(file), ConfigError)
    except ConfigError as e:
        raise ConfigError(f"--config={cut(str(e), 200)}; {EXPECTED}") from None


def guarded(file: str, call: Callable[[], T]) -> T:
    """Returns the call's result; an error of an experiment file becomes one line with its place."""
    try:
        return call()
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(explain(e, file)) from e


# ------------------------------------------------------------------ overrides


class _Int(flags.IntegerParser):
    def parse(self, argument: Any) -> Any:
        return _none_or(argument, super().parse)


class _Float(flags.FloatParser):
    def parse(self, argument: Any) -> Any:
        return _none_or(argument, super().parse)


class _Bool(flags.BooleanParser):
    def parse(self, argument: Any) -> Any:
        return _none_or(argument, super().parse)


class _Text(flags.ArgumentParser):
    def parse(self, argument: Any) -> Any:
        return _none_or(argument, str)


class _Tuple(tuple_parser.TupleParser):
    syntactic_help = "a tuple, such as (1, 2) or ('a', 'b')"

    def parse(self, argument: Any) -> Any:
        return _shallow(argument, super().parse)


class _Options(flags.ArgumentParser):
    syntactic_help = "a dict, such as {'a': 1}; .a=1 after its name sets one option"

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # the default
            return argument
        value = _shallow(argument, _literal)
        if not isinstance(value, dict):
            raise ValueError("not a dict")
        return ConfigDict(value)


class _Anything(flags.ArgumentParser):
    """For options that take a name or a mapping: a Python literal, or else a text."""

    syntactic_help = "a text or a Python literal"

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # the default
            return argument
        try:
            return _shallow(
                {"true": "True", "false": "False"}.get(argument, argument), _literal
            )
        except ValueError:
            return argument

    def flag_type(self) -> str:
        return "config_literal"


def _none_or(argument: Any, parse: Callable[[Any], Any]) -> Any:
    return None if argument == "None" else parse(argument)


def _shallow(argument: Any, parse: Callable[[Any], Any]) -> Any:
    """Returns what `parse` returns; a text of too many brackets is a ValueError as others are."""
    try:
        return parse(argument)
    except (MemoryError, RecursionError, SyntaxError) as e:
        raise ValueError(str(e)) from None


def _literal(text: str) -> Any:
    return ast.literal_eval(text)


_PARSERS: dict[type, flags.ArgumentParser] = {
    int: _Int(),
    float: _Float(),
    bool: _Bool(),
    str: _Text(),
    tuple: _Tuple(),
    object: _Anything(),
    type(None): _Anything(),  # a dataclass or None, such as frozen_mesh
    ConfigDict: _Options(),
}
for _type, _parser in _PARSERS.items():
    config_flags.register_flag_parser_for_type(_type, _parser)


def define_config(
    fv: flags.FlagValues, config: ConfigDict, words: Sequence[str], spec: str
) -> None:
    """Defines --config, whose value is the config, and a flag per override in `words`.

    Raises:
      ConfigError: an override of an option that there is not.
    """
    for word in words:
        if name := re.match(r"--?(?:no)?config\.([^=]*)", word):
            validate_option(config, name[1], word.partition("=")[0])
    try:
        config_flags.DEFINE_config_dict(
            "config", config, spec, flag_values=fv, sys_argv=["", *words]
        )
    except config_flags.config_flags.FlagOrderError as e:
        pair = sorted(set(re.findall(r"--config\.[^\s,]+", str(e))))
        raise ConfigError(f"{' and '.join(pair)}: one contains the other") from None
    except (flags.Error, ValueError, TypeError, LookupError) as e:
        raise ConfigError(f"--config: {first_line(e)}") from None


def validate_option(config: ConfigDict, option: str, flag: str) -> None:
    """Raises ConfigError if the config has no such option; `flag` begins the message."""
    node: Any = config
    place = "the config"
    for part in option.split("."):
        name, *indices = re.split(r"\[(\d+)\]", part)
        if not isinstance(node, Mapping | ConfigDict):
            raise ConfigError(f"{flag}: {place} has no options")
        if name not in node:
            raise ConfigError(
                f"{flag}: the config has no option {name!r}{_hint(name, node)}"
            )
        node, place = node[name], name
        for index in filter(None, indices):
            if not isinstance(node, list | tuple) or int(index) >= len(node):
                raise ConfigError(f"{flag}: {place} has no element [{index}]")
            node, place = node[int(index)], f"{place}[{index}]"


def _hint(name: str, node: Mapping[str, Any] | ConfigDict) -> str:
    present = renamed.hint(name, renamed.OPTIONS)
    return present or arguments.did_you_mean(name, map(str, node))


def words_of(config: Any, place: str = "--config") -> Iterator[str]:
    """Yields the overrides that set every option of a config, quoted for a shell, in order."""
    values = to_dict(config)
    if isinstance(values, dict) and values:
        for name in sorted(values):
            yield from words_of(values[name], f"{place}.{name}")
    elif isinstance(values, list) and any(isinstance(x, dict | list) for x in values):
        for i, value in enumerate(values):
            yield from words_of(value, f"{place}[{i}]")
    else:
        yield shlex.quote(f"{place}={_text_of(values)}")


def _text_of(value: Any) -> str:
    """Returns a value as a flag takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return repr(tuple(value))
    return value if isinstance(value, str) else repr(value)


def overridden(config: ConfigDict, words: Sequence[str]) -> ConfigDict:
    """Returns the config with overrides, such as `--config.ppo.steps=3`, applied to it.

    Raises:
      ConfigError: an unknown option, or a value that its type does not accept.
    """
    fv = flags.FlagValues()
    define_config(fv, config, words, "")
    try:
        arguments.parse(fv, ["", *words])
    except flags.Error as e:
        raise ConfigError(str(e)) from None
    return fv.config
