"""Describes rewards and labelers, by name or in place, and loads them.

    reward = load_reward("gold:sentiment", layout, tokenizer)
    reward = load_reward({"kind": "gold", "name": "sentiment"}, layout, tokenizer)  # the same
    scores = reward(tokens, attention_mask, mask)  # [n]
    labeler = load_labeler("rankings:people/*.jsonl", layout, tokenizer)
    scores = labeler(answers)  # [p, k], higher is better, equal is a tie

A description is a mapping with `kind`, a key of KINDS, and the options of that kind. A name stands
for one description:

    gold:NAME, rule:MODULE:FUNCTION?OPTION=VALUE, rankings:GLOB@LABELER
    the workdir of a stage that describes a reward: what its reward.json holds
    any other workdir or model: {"kind": "model", "model": NAME}
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import PlainValidator

from rlhfjax import paths, sums
from rlhfjax.config import PLACE, build, to_dict, write_json
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.rewards.labelers import Labeler, RewardLabeler
from rlhfjax.rewards.responses import Reward
from rlhfjax.roles import DISK, REWARD, Descriptions, Head, Sources


class Part(NamedTuple):
    """A model or a reward that a reward is made of."""

    option: str
    """its place in the description, such as members[0].reward"""
    source: str | Mapping[str, Any]
    head: Head | None
    """of a model; None: `source` is a reward"""
    suffix: str = ""
    """what its role and its program have after the name of the whole"""


class Loader(NamedTuple):
    """What a kind of reward needs to load its models."""

    layout: Layout
    tokenizer: Tokenizer  # of the policy
    sources: Sources
    program: str  # the name of what a model computes

    def load(self, part: Part) -> Reward:
        """Returns a reward that is part of another."""
        program = self.program + part.suffix
        return load_reward(
            part.source, self.layout, self.tokenizer, self.sources, program
        )


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one kind of reward, or of labeler, is described, validated, planned and loaded."""

    config: type[Any]
    """the dataclass of its options"""
    load: Callable[[Any, Loader], Any]
    """returns the reward, or the labeler, of a config"""
    parts: Callable[[Any], Iterator[Part]] = lambda config: iter(())
    """yields the models and the rewards that it is made of"""
    check: Callable[[Any], object] = lambda config: None
    """raises UserError where code that it needs cannot be imported"""
    parse: Callable[[str], dict[str, Any]] | None = None
    """returns the options that the name `KIND:TEXT` stands for; None: the kind has no such names"""
    sources: tuple[str, ...] = ()
    """options that hold names of models or rewards"""
    files: tuple[str, ...] = ()
    """options that hold globs of files"""
    labels: bool = False
    """it labels several responses to a prompt, and cannot score one alone"""
    is_model: Callable[[Any], bool] = lambda config: False
    """returns whether it loads a ModelReward, from which a value function can be initialized"""


OWN_MODEL = ("dense", "process")
"""Kinds whose model, in a folder's reward.json, is that of the folder itself."""

KINDS: dict[str, Kind] = {}
"""The registry, filled by the table in `load.py`: import from there what uses it."""


class Description(NamedTuple):
    """A reward as its kind and the typed options of it."""

    kind: str
    config: Any


# ------------------------------------------------------------------ in configs


def validate(source: Any, place: str, labels: bool = False) -> None:
    """Validates a name or a description without a look at files.

    Args:
      place: where the value stands, for an error.
      labels: whether a labeler is accepted too.

    Raises:
      ConfigError: an unknown kind or option, or a value out of its range.
    """
    if not isinstance(source, str | Mapping):
        expected = "the name of a reward, or a mapping with its `kind`"
        raise ConfigError(f"{place}={source!r}: expected {expected}")
    values = _parse_name(source) if isinstance(source, str) else source
    if values is not None:
        kind, _ = _typed(values, place)
        validate_kind(kind, f"{place}={label(source)}", labels)


def validate_kind(kind: str, place: str, labels: bool) -> None:
    """Raises ConfigError if `labels` is False and the kind only labels responses."""
    if KINDS[kind].labels and not labels:
        raise ConfigError(f"{place}: expected a reward, {kind} only labels responses")


def _validated(source: Any, labels: bool) -> Any:
    """Validates an option for pydantic, which does not tell its place."""
    try:
        validate(source, PLACE, labels)
    except ConfigError as error:
        message = str(error)
        if PLACE not in message:
            name = f"={source}" if isinstance(source, str) else ""
            message = f"{PLACE}{name}: {message}"
        raise ValueError(message) from None
    return source


RewardSource = Annotated[
    str | Mapping[str, Any], PlainValidator(functools.partial(_validated, labels=False))
]
"""An option that holds a reward: its name, or its description in place."""

LabelerSource = Annotated[
    str | Mapping[str, Any], PlainValidator(functools.partial(_validated, labels=True))
]
"""An option that holds a labeler or any reward."""


def label(source: RewardSource) -> str:
    """Returns the name of a reward, or the kind of one that is described in place."""
    return source if isinstance(source, str) else str(source["kind"])


# ------------------------------------------------------------------ descriptions


def describe(source: RewardSource, sources: Descriptions = DISK) -> Description:
    """Returns what a reward's name stands for, or its description in place, typed.

    Raises:
      ConfigError: the description is invalid.
    """
    if not isinstance(source, str):
        return _typed(source, "reward")
    if not source:
        raise ConfigError("reward='': expected the name of a reward")
    if (values := _parse_name(source)) is not None:
        return _typed(values, source)
    values = sources.described(source)
    if values is None:
        return _typed({"kind": "model", "model": source}, source)
    folder = paths.path(source)
    if values.get("kind") in OWN_MODEL:
        values = values | {"model": source}
    reachable = _with_names(values, lambda name: _found(name, folder))
    file = str(folder / REWARD)
    try:
        return _typed(reachable, file)
    except ConfigError as error:
        if file in str(error):
            raise
        raise ConfigError(f"{file}: {error}") from None  # options that do not fit


def _parse_name(name: str) -> dict[str, Any] | None:
    """Returns the description that `KIND:TEXT` stands for; None for a workdir or a model."""
    prefix, colon, text = name.partition(":")
    parse = KINDS[prefix].parse if prefix in KINDS else None
    return {"kind": prefix, **parse(text)} if colon and parse else None


def _typed(values: Mapping[str, Any], context: str) -> Description:
    options = dict(values)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ConfigError(f"{context}.kind={kind!r}: expected one of {known}")
    return Description(kind, build(KINDS[kind].config, options, context))


def stage_description(kind: str, config: Any) -> dict[str, Any]:
    """Returns the reward that a stage's config describes, with names as the config has them."""
    fields = dataclasses.fields(KINDS[kind].config)
    options = {field.name: getattr(config, field.name) for field in fields}
    return {"kind": kind, **to_dict(options)}


def write(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes reward.json. Its paths are relative to the folder, so that a workdir can be moved."""
    relative = _with_names(description, lambda name: paths.relative(name, folder))
    write_json(folder / REWARD, relative)
    sums.write(folder, [REWARD])


def _found(name: str, folder: Path) -> str:
    """Returns a name in a folder's reward.json as it is reached from here."""
    path = paths.within(folder, name)
    return str(path) if paths.exists(path) else name


def _with_names(
    value: Any, change: Callable[[str], str], names: tuple[str, ...] = ()
) -> Any:
    """Returns a description with `change` of every name in it; its parts are described too."""
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if isinstance(kind, str) and kind in KINDS:
            names = KINDS[kind].sources + KINDS[kind].files
        changed = {}
        for option, part in value.items():
            is_name = option in names and isinstance(part, str) and part
            changed[option] = (
                change(part) if is_name else _with_names(part, change, names)
            )
        return changed
    if isinstance(value, list):
        return [_with_names(part, change, names) for part in value]
    return value


def validate_acyclic(source: RewardSource, around: Sequence[RewardSource]) -> None:
    """Raises ConfigError if a reward is one of those that it is a part of.

    Args:
      around: the rewards that it is a part of, from the outermost.
    """
    if _identity(source) in map(_identity, around):
        chain = " → ".join(map(label, [*around, source]))
        raise ConfigError(f"reward {label(source)} is a part of itself: {chain}")


def _identity(source: RewardSource) -> Any:
    """Returns what is equal for two names of one folder."""
    if isinstance(source, str):
        return str(paths.absolute(paths.path(source)))
    return source


def models_of(
    source: RewardSource,
    sources: Descriptions,
    suffix: str = "",
    around: tuple[RewardSource, ...] = (),
) -> list[Part]:
    """Returns the models that a reward or labeler runs; none where rules score.

    Args:
      suffix: of the parts' names.
      around: the rewards that it is a part of.
    """
    validate_acyclic(source, around)
    kind, config = describe(source, sources)
    models: list[Part] = []
    for part in KINDS[kind].parts(config):
        whole = part._replace(suffix=suffix + part.suffix)
        if part.head is None:
            models += models_of(part.source, sources, whole.suffix, (*around, source))
        else:
            models.append(whole)
    return models


# ------------------------------------------------------------------ loading


def load_reward(
    source: RewardSource,
    layout: Layout,
    tokenizer: Tokenizer,
    sources: Sources = DISK,
    program: str = "score",
) -> Reward:
    """Returns a reward by its name or description.

    Args:
      program: the name of what a model computes; a member of several has its number after it.

    Raises:
      ConfigError: the description is invalid, or its model has no scalar head or another
        vocabulary.
      CheckpointError: there is no model.
    """
    kind, config = describe(source, sources)
    validate_kind(kind, label(source), labels=False)
    return KINDS[kind].load(config, Loader(layout, tokenizer, sources, program))


def load_labeler(
    source: LabelerSource, layout: Layout, tokenizer: Tokenizer, sources: Sources = DISK
) -> Labeler:
    """Returns a labeler by its name or description; a reward labels with its scores.

    Raises: as `load_reward` does.
    """
    kind, config = describe(source, sources)
    loaded = KINDS[kind].load(config, Loader(layout, tokenizer, sources, "score"))
    return loaded if KINDS[kind].labels else RewardLabeler(loaded)
