"""Expands an experiment file's `sweep(add)` to named runs and validates each of them."""

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rlhfjax import claims, experiment, precision, recipe
from rlhfjax.config import scalar, to_dict
from rlhfjax.errors import ConfigError, cut
from rlhfjax.experiment import Experiment
from rlhfjax.experiment_args import quote_arg, split_arg
from rlhfjax.json_text import shown
from rlhfjax.paths import Path
from rlhfjax.sweep import Overrides, is_seed

ARG = "arg."
NAME_LENGTH = 120  # maximum bytes of a run's name, before its hash
LONGEST_TEXT = 100_000  # bytes; Linux takes 131,071 per argument


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    overrides: Overrides
    workdir: Path
    command: tuple[str, ...]  # the words after `rlhfjax`
    config: dict[str, Any]  # the complete config, overrides applied, of JSON types

    @property
    def setting(self) -> Overrides:
        """The overrides that are no seeds."""
        return {key: x for key, x in self.overrides.items() if not is_seed(key)}

    @property
    def seeds(self) -> Overrides:
        """The overrides that are seeds."""
        return {key: x for key, x in self.overrides.items() if is_seed(key)}

    @property
    def finished(self) -> bool:
        return recipe.finished(self.config, self.workdir)


def expand(
    config: str, workdir: Path, given: Mapping[str, Any] | None = None
) -> list[Run]:
    """Returns the runs of a sweep, in the file's order.

    Args:
      config: FILE.py[:args].
      given: options of the command line, which all runs have.
    Raises:
      ConfigError: the file has no `sweep`; two runs are equal; or an override names an unknown
        option, has a wrong type, sets a given option, or leads to an invalid config.
    """
    return expand_loaded(experiment.load(config), workdir, given)


def expand_loaded(
    loaded: Experiment, workdir: Path, given: Mapping[str, Any] | None = None
) -> list[Run]:
    """Returns the runs of a sweep whose file is loaded, as `expand` does."""
    add_all = loaded.names.get("sweep")
    if not callable(add_all):
        raise ConfigError(
            f"{loaded.file}: it has no sweep(add), which says what to run"
        )
    found: list[Any] = []
    experiment.guarded(loaded.file, lambda: add_all(found.append))
    if not found:
        raise ConfigError(f"{loaded.file}: its sweep(add) added nothing")
    runs = [
        _run(loaded, given or {}, _overrides(loaded.file, added), workdir)
        for added in found
    ]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{loaded.file}: its sweep adds {twice[0]} twice")
    for run in runs:
        if run.workdir.is_dir():
            # config.json has the dtype that "auto" stood for.
            claims.compare(run.workdir, precision.resolved(run.config, run.workdir))
    return runs


def _overrides(file: str, added: Any) -> Overrides:
    """Returns what was passed to `add`, its values plain.

    Raises:
      ConfigError: it is no mapping of options, or a command line cannot hold a value.
    """
    try:
        overrides = dict(added)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{file}: add({shown(added)}): expected a dict {{option: value}}"
        ) from None
    for option in overrides:
        if not isinstance(option, str) or not re.fullmatch(r"[^\s=]+", option):
            raise ConfigError(
                f"{file}: add: {shown(option)}: expected an option's name"
            )
    return {option: plain(option, value) for option, value in overrides.items()}


def _run(
    loaded: Experiment, given: Mapping[str, Any], overrides: Overrides, workdir: Path
) -> Run:
    name = name_of(overrides)
    arguments = {
        key.removeprefix(ARG): value
        for key, value in overrides.items()
        if key.startswith(ARG)
    }
    options = {
        key: value for key, value in overrides.items() if not key.startswith(ARG)
    }
    if both := sorted(options.keys() & given.keys()):
        raise ConfigError(f"--config.{both[0]}: this option is what the sweep varies")
    options = {key: plain(key, value) for key, value in given.items()} | options
    text = with_arguments(loaded.arg or "", arguments)
    config, words = with_options(lambda: loaded.config(text or None), options)
    values = to_dict(config)
    with _naming_nulls(options):
        for stage in (
            recipe.stage_folders(values, workdir) if "stages" in values else ()
        ):
            recipe.check(values[stage], stage)
        if "stages" not in values:
            recipe.check(values, values.get("stage", "config"))
    source = f"--config={loaded.file}:{text}" if text else f"--config={loaded.file}"
    command = (
        "run" if "stages" in values else "train",
        source,
        f"--workdir={workdir / name}",
        *words,
    )
    return Run(name, overrides, workdir / name, command, values)


@contextlib.contextmanager
def _naming_nulls(options: Mapping[str, Any]) -> Iterator[None]:
    """Says of a None that the option does not take that a sweep has it."""
    try:
        yield
    except ConfigError as e:
        for key, value in options.items():
            if value is None and f"{key}=None" in str(e):
                raise ConfigError(
                    f"sweep: {key}=None: expected a number or a text ({e})"
                ) from None
        raise


def with_options(
    get_config: Callable[[], ConfigDict], options: Mapping[str, Any]
) -> tuple[ConfigDict, list[str]]:
    """Returns the config with options, and the words of a command line that lead to it.

    Raises:
      ConfigError: an unknown option, a value of another type, or one that no word leads to.
    """
    if not options:
        return get_config(), []
    wanted = overlay(get_config(), options)
    texts = {key: literal(key, value) for key, value in options.items()}
    for spell in (repr, None):  # a text that looks like a literal is quoted
        words = [f"--config.{key}={text}" for key, text in texts.items()]
        config = experiment.overridden(get_config(), words)
        wrong = [key for key in texts if not _equal(config, wanted, key)]
        if not wrong:
            return config, words
        if spell is not None:
            texts |= {key: spell(options[key]) for key in wrong}
    key = wrong[0]
    raise ConfigError(
        f"sweep: {key}={shown(options[key])}: the command line cannot pass this value"
    )


def _equal(config: ConfigDict, wanted: ConfigDict, option: str) -> bool:
    one, other = (to_dict(_at(values, option)) for values in (config, wanted))
    return type(one) is type(other) and one == other


def _at(config: ConfigDict, option: str) -> Any:
    node: Any = config
    for part in option.split("."):
        node = node[part]
    return node


def with_arguments(arg: str, arguments: Mapping[str, Any]) -> str:
    """Appends arguments: `"size=smoke"` and {"seed": 3} give `"size=smoke,seed=3"`.

    Raises:
      ConfigError: an argument is in both.
    """
    for name, text in split_arg(arg):
        if name in arguments:
            raise ConfigError(
                f"--config=…:{name}={cut(text)}: this argument is what the sweep varies"
            )
    items = [
        f"{name}={quote_arg(literal(name, value))}" for name, value in arguments.items()
    ]
    return ",".join(filter(None, [arg, *items]))


def overlay(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Applies overrides to the config, strictly, and returns it.

    Raises:
      ConfigError: an option that there is not, or a value of another type.
    """
    for key, value in overrides.items():
        *path, last = key.split(".")
        node: Any = config
        for part in path:
            node = node[part] if isinstance(node, ConfigDict) and part in node else None
        if not isinstance(node, ConfigDict) or last not in node:
            raise ConfigError(f"sweep: the config has no option {key!r}")
        try:
            node[last] = value
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"sweep: {key}={shown(value)} is not of type {type(node[last]).__name__}"
            ) from None
    return config


def plain(option: str, value: Any) -> Any:
    """Returns a swept value as Python's own number, text, bool, None, tuple or dict of them.

    Raises:
      ConfigError: it is something else, or the command line cannot hold it.
    """
    value = scalar(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping | ConfigDict):
        return {key: plain(f"{option}.{key}", value[key]) for key in value}
    if isinstance(value, list | tuple):
        return tuple(plain(f"{option}[{i}]", part) for i, part in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"sweep: {option}={value}: expected a finite number")
    if isinstance(value, str):
        _validate_text(option, value)
    elif not isinstance(value, bool | int | float | None):
        raise ConfigError(
            f"sweep: {option}={shown(value)}: expected a number, a text, a bool, None, or a tuple"
            " or dict of them"
        )
    return value


def _validate_text(option: str, text: str) -> None:
    """Raises ConfigError if an argument of a process cannot be this text."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"sweep: {option}={shown(text)}: not Unicode") from None
    if "\0" in text or length > LONGEST_TEXT:
        raise ConfigError(
            f"sweep: {option}={shown(text)}: expected at most {LONGEST_TEXT} bytes without NUL"
        )


def literal(option: str, value: Any) -> str:
    """Formats a value for the command line.

    Raises:
      ConfigError: the command line cannot hold such a value.
    """
    value = plain(option, value)
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def name_of(overrides: Mapping[str, Any]) -> str:
    """Returns the name of a run's folder, such as `ppo.kl.coefficient=0.05,seed=1`.

    The name depends on this run's overrides alone, so that a sweep may grow. Unsuitable characters
    are replaced and a long name is cut; then a hash of the full name keeps it unique.
    """
    for key in overrides:
        _validate_text(key, key)
    items = [
        f"{key.removeprefix(ARG)}={_name_of_value(key, value)}"
        for key, value in overrides.items()
    ]
    full_name = ",".join(items) or "base"
    name = re.sub(r"[^\w.=,+-]+", "-", full_name).lstrip(".")
    cut_name = name.encode()[:NAME_LENGTH].decode(errors="ignore")
    if cut_name == full_name:
        return full_name
    digest = hashlib.sha256(full_name.encode()).hexdigest()
    return f"{cut_name}-{digest[:8]}"


def _name_of_value(option: str, value: Any) -> str:
    """Returns a value's text; quoted, which no name is, if several options could have it."""
    text = literal(option, value)
    return repr(text) if re.search(",.*=", text, re.DOTALL) else text
