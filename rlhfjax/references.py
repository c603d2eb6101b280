"""Validates what the stages of a recipe refer to, before the first of them runs.

Models, rewards, labelers, tokenizers, sources and files. What an earlier stage makes is described
by that stage's config; anything else must be there, or at least be known: a dataset is not
downloaded. Models are found by the roles that a stage declares. Other options are found by their
types and names, which mean the same in every stage.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhfjax import paths, stages
from rlhfjax.data import formats
from rlhfjax.data.config import SourceConfig, split_of_preferences
from rlhfjax.data.dataset_folders import is_dataset
from rlhfjax.data.forms import Reader
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    UserError,
    first_line,
)
from rlhfjax.interop import peft_config, peft_modules
from rlhfjax.models.config import TransformerConfig
from rlhfjax.origins import Origins, Unknown, roles_of
from rlhfjax.paths import Path
from rlhfjax.rewards.load import (
    KINDS,
    RewardSource,
    describe,
    label,
    validate_acyclic,
    validate_kind,
)
from rlhfjax.roles import Head

HEADS: dict[str, str] = {"lm": "a language model", "scalar": "a reward model"}
REWARDS = (
    "gold:NAME, rule:MODULE:FUNCTION, or the workdir of a stage that makes a reward"
)


def validate(
    configs: Mapping[str, Any],
    folders: Mapping[str, Path],
    done: str,
    again: Collection[str] = (),
) -> None:
    """Validates the references of all stages of a recipe.

    Args:
      configs: typed configs by the names of the stages, in order.
      folders: workdirs by the names of the stages.
      done: name of the file that a finished stage has; a finished stage needs nothing any more.
      again: names of finished stages that are to run again.

    Raises:
      ConfigError, CheckpointError, DataError: the message names the option and what is accepted.
    """
    earlier: dict[str, Any] = {}
    for name, config in configs.items():
        if name in again or not (folders[name] / done).exists():
            _Stage(name, config, Origins(earlier), tuple(earlier)).validate()
        earlier[str(folders[name])] = config


class _Stage(NamedTuple):
    """One stage whose references are validated."""

    name: str
    config: Any
    origins: Origins
    earlier: Sequence[str]  # folders of the stages before it

    def validate(self) -> None:
        options = list(leaves(self.config, self.name))
        for role_name, role in roles_of(self.config).items():
            if isinstance(role.source, TransformerConfig) or not role.source:
                continue
            option = _option_of(options, role_name, role.source)
            if role.scores:
                self._validate_reward(option, role.source, labels=role.labels)
                if role.optim is not None:
                    start = f'{self.name}.{role_name}="{role.shares}"'
                    self._validate_trainable(start, role.source)
            elif isinstance(role.source, str):
                any_head = role.optim is not None and not role.keeps_head
                self._validate_model(
                    option, role.source, None if any_head else role.head
                )
        description = getattr(stages.find(self.config.stage), "describe", None)
        if description is not None:
            self._validate_reward(self.name, description(self.config), labels=True)
        for option, value in options:
            if isinstance(value, SourceConfig):
                self._validate_source(option, value)
            validate_named = NAMED.get(last_name(option))
            if validate_named and isinstance(value, str) and not self._is_made(value):
                validate_named(option, value)

    def _is_made(self, place: str) -> bool:
        """Returns whether a file or folder is one of an earlier stage's."""
        return any(paths.path(place).is_relative_to(folder) for folder in self.earlier)

    def _validate_model(self, option: str, source: str, head: Head | None) -> None:
        """Validates that there is a model, with a certain head unless that is None."""
        try:
            model = self.origins.describe(source)
        except Unknown:
            return
        except CheckpointError as e:
            raise CheckpointError(f"{option}={e}") from None
        if head is not None and model.head != head:
            raise ConfigError(
                f"{option}={source}: expected {HEADS[head]}, found {HEADS[model.head]}"
            )

    def _validate_reward(
        self,
        option: str,
        source: RewardSource,
        labels: bool = False,
        around: tuple[RewardSource, ...] = (),
    ) -> None:
        """Validates a reward, or with `labels` a labeler, and all that it is made of.

        Args:
          around: the rewards that it is a part of.
        """
        try:
            validate_acyclic(source, around)
            kind, config = describe(source, self.origins)
            KINDS[kind].check(config)
        except UserError as e:
            raise type(e)(f"{option}={label(source)}: {e}") from None
        validate_kind(kind, f"{option}={label(source)}", labels)
        if kind == "model":
            self._validate_reward_model(option, config.model, labels)
            return
        where = f"{option}={source}: " if isinstance(source, str) else f"{option}."
        for file in KINDS[kind].files:
            if pattern := getattr(config, file):
                _validate_glob(where + file, pattern, self._is_made)
        for part in KINDS[kind].parts(config):
            if part.head is None:
                within = (*around, source)
                self._validate_reward(where + part.option, part.source, around=within)
            else:
                self._validate_model(where + part.option, str(part.source), part.head)

    def _validate_trainable(self, start: str, source: RewardSource) -> None:
        """Validates that a reward from which training starts is a model."""
        kind, config = describe(source, self.origins)
        if not KINDS[kind].is_model(config):
            raise ConfigError(
                f"{start}: {label(source)} is no model to start from; "
                'another value, such as "policy", is needed'
            )

    def _validate_reward_model(self, option: str, name: str, labels: bool) -> None:
        try:
            self._validate_model(option, name, "scalar")
        except CheckpointError as e:
            accepted = f"rankings:GLOB, {REWARDS}" if labels else REWARDS
            raise ConfigError(
                f"{option}={name}: there is no such reward ({first_line(e)});"
                f" expected {accepted}"
            ) from None

    def _validate_source(self, option: str, config: SourceConfig) -> None:
        is_rankings = last_name(option) == "preferences"
        kind = config.kind or ("preferences" if is_rankings else None)
        # Raises for a form that there is not, or that gives rows of another kind.
        Reader(kind, config.columns, config.form, option)
        if is_rankings and (self._is_made(config.spec) or is_dataset(config.spec)):
            return
        option = f"{option}.spec"
        if self._is_made(formats.without_scheme(config.spec)):
            return
        context = f"{option}={config.spec}"
        named = formats.parse(config.spec, config.format, context)
        if named.scheme == formats.TFDS:
            _validate_dataset(option, config.spec, named.rest, config.data_dir)
        else:
            split = config.split
            if is_rankings:
                split = split_of_preferences(config, "train")
            formats.validate(option, config.spec, named, split)


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yields the texts, sources and mappings of a config with their options."""
    if isinstance(value, str | SourceConfig | Mapping):
        yield place, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{place}.{field.name}")
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from leaves(part, f"{place}[{i}]")


def last_name(option: str) -> str:
    """Returns `preferences` of `reward.preferences[0]`."""
    return option.rpartition(".")[2].partition("[")[0]


def _option_of(
    options: Sequence[tuple[str, Any]], role: str, source: RewardSource
) -> str:
    """Returns the option that names the source of a role.

    Of several with this value, the one that is called like the role, else the first.
    """
    places = [option for option, value in options if value == source]
    named = [option for option in places if last_name(option) == role]
    return (named or places or [role])[0]


def _validate_glob(option: str, pattern: str, is_made: Callable[[str], bool]) -> None:
    if not is_made(pattern) and not paths.glob(pattern):
        raise DataError(f"{option}={pattern}: no file matches")


def _validate_file(option: str, name: str) -> None:
    _validate_glob(option, name, lambda _: False)


def _validate_tokenizer(option: str, name: str) -> None:
    try:
        load_tokenizer(name)
    except (UserError, OSError) as e:
        raise DataError(
            f"{option}={name}: expected a tokenizer's file or folder ({e})"
        ) from None


def _validate_adapter(option: str, name: str) -> None:
    """Validates that there is an adapter of the kind that is read; empty: none is asked for."""
    if not name:
        return
    folder = paths.path(name)
    try:
        peft_modules.validate_whole(folder)
        peft_config.read(folder / peft_config.CONFIG)
    except CheckpointError as e:
        raise CheckpointError(f"{option}={e}") from None


def _validate_preferences(option: str, name: str) -> None:
    """Validates a folder with a dataset, or the spec of a source."""
    expected = "expected a folder with a dataset, or jsonl:GLOB or another source"
    if not formats.is_spec(name):
        if not is_dataset(paths.path(name)):
            raise DataError(f"{option}={name}: {expected}")
        return
    named = formats.parse(name, context=f"{option}={name}")
    if named.scheme == "text":
        raise ConfigError(f"{option}={name}: {expected}")
    if named.scheme == formats.TFDS:
        _validate_dataset(option, name, named.rest, None)
    else:
        formats.validate(option, name, named, "train")


def _validate_dataset(option: str, spec: str, name: str, data_dir: str | None) -> None:
    """Validates that a TFDS dataset is known, and that a package with its text is installed."""
    if is_dataset(paths.path(name)):
        return
    # TFDS takes a second to import, which no other source needs.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    from rlhfjax.data import corpora

    own = corpora.BUILDERS.get(name)
    if own is not None:
        data_dir = data_dir or str(constants.DATA_DIR)
        if not (paths.path(data_dir) / name).exists():
            own.validate()
        return
    try:
        tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError):
        names = ", ".join(f"tfds:{one}" for one in corpora.BUILDERS)
        raise DataError(
            f"{option}={spec}: no such TFDS dataset or folder; our own are {names}"
        ) from None


NAMED: dict[str, Callable[[str, str], None]] = {
    "adapter": _validate_adapter,
    "answers": _validate_preferences,
    "feedback": _validate_file,
    "held_out": _validate_file,
    "preferences": _validate_preferences,
    "principles": _validate_file,
    "rankings": _validate_file,
    "tokenizer": _validate_tokenizer,
}
