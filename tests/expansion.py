"""Experiments as texts: the options of a stage by default, and what a variant sets otherwise.

A config is flat here: {option: JSON}, an option being `optim.b2`, `sources.0.spec` or
`model.d_model`. Texts have one line per option, `option = JSON`, in alphabetical order.

golden/defaults/STAGE.txt   every option of a stage with its default, or `required`;
                            `sources[].kind` is of each source, `model?.d_model` of a model,
                            where there is one
golden/FOLDER_FILE.txt      the options of an experiment's variants that differ from these defaults,
                            `NAME.option` for the stage NAME; each line once, in the section of the
                            variants that have it
"""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhfjax.stages import config_class

Flat = dict[str, str]  # {option: JSON}
REQUIRED = "required"  # an option without a default
ALL, PLAIN = "every variant", "no argument"  # in headings
VARIANTS, SEPARATOR = "variants: ", " | "


# ------------------------------------------------------------------ configs


def flatten(value: Any, option: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested dict; a tuple is a leaf unless it holds dicts."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple | list) and value and isinstance(value[0], Mapping):
        parts = enumerate(value)
    if not parts:
        yield option, json.dumps(value)
    for name, part in parts:
        yield from flatten(part, f"{option}.{name}" if option else str(name))


def default_options(stage: str) -> Flat:
    """Every option of a stage with its default; see the module."""
    return dict(sorted(_defaults(config_class(stage))))


def _defaults(
    cls: type, instance: Any = None, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Options of a dataclass with the values of an instance, or with the defaults of the class."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        option, hint = prefix + field.name, hints[field.name]
        value = _default(field) if instance is None else getattr(instance, field.name)
        if dataclasses.is_dataclass(hint):
            given = None if value is dataclasses.MISSING else value
            yield from _defaults(hint, given, f"{option}.")
            continue
        if value is dataclasses.MISSING:
            yield option, REQUIRED
        else:
            yield from flatten(value, option)
        for inner in filter(dataclasses.is_dataclass, typing.get_args(hint)):
            mark = "[]" if typing.get_origin(hint) is tuple else "?"
            yield from _defaults(inner, prefix=f"{option}{mark}.")


def _default(field: dataclasses.Field) -> Any:
    has_factory = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if has_factory else field.default


# ------------------------------------------------------------------ differences


def differences(defaults: Flat, options: Flat) -> Flat:
    """The options whose values are not the defaults; `rebuilt` is the inverse.

    An element or an optional part all of whose options have their defaults is written whole: that
    it is there is a difference.
    """
    base, own = _instantiated(defaults, options), {}
    for option, value in options.items():
        if base.get(option) != value:
            own[option] = value
    for part in _parts(defaults, options):
        if not _inside(part, own):
            own |= _inside(part, options)
    return own


def rebuilt(defaults: Flat, own: Flat) -> Flat:
    """All options of a config: the defaults, and in their place what it sets otherwise."""
    options = _instantiated(defaults, own)
    for option, value in own.items():
        for replaced in _inside(option, options):  # `model = null` instead of a model
            del options[replaced]
        options[option] = value
    # `sources = []` goes where there are some.
    given = {option for option, value in options.items() if value != REQUIRED}
    return {option: options[option] for option in given if not _inside(option, options)}


def _inside(part: str, options: Flat) -> Flat:
    return {
        name: value for name, value in options.items() if name.startswith(f"{part}.")
    }


def _instantiated(defaults: Flat, own: Flat) -> Flat:
    """The defaults, those of elements and optional parts once for each that is there."""
    options: Flat = {}
    for option, value in defaults.items():
        container, rest = _container(option)
        for part in _there(container, own):
            options[part + rest] = value
    return options


def _parts(defaults: Flat, own: Flat) -> set[str]:
    """The elements and optional parts that are there: `sources.0`, `model`."""
    containers = {_container(option)[0] for option in defaults} - {""}
    return {part for container in containers for part in _there(container, own)}


def _container(option: str) -> tuple[str, str]:
    """`sources[]` and `.kind` of `sources[].kind`; nothing and the option itself of others."""
    container, rest = re.fullmatch(r"(.*(?:\[\]|\?))?(.*)", option).groups("")
    return container, rest


@functools.cache
def _pattern(container: str) -> re.Pattern:
    escaped = re.escape(container).replace(r"\[\]", r"\.\d+").replace(r"\?", "")
    return re.compile(escaped + r"(?=\.)")


def _there(container: str, own: Flat) -> set[str]:
    """`sources.0` and `sources.1` of `sources[]`; `model` of `model?`; of nothing, nothing once."""
    if not container:
        return {""}
    matches = (_pattern(container).match(option) for option in own)
    return {match[0] for match in matches if match}


# ------------------------------------------------------------------ texts


def text_of(options: Flat) -> str:
    """One line per option, in alphabetical order."""
    return "".join(f"{option} = {options[option]}\n" for option in sorted(options))


def text_of_variants(variants: Mapping[str, Flat]) -> str:
    """The names of the variants, then each line once, in the section of the variants that have it.

    What more variants have comes first.
    """
    sections: dict[tuple[int, ...], Flat] = {}
    lines = {line for options in variants.values() for line in options.items()}
    for option, value in sorted(lines):
        having = [
            i for i, one in enumerate(variants.values()) if one.get(option) == value
        ]
        sections.setdefault(tuple(having), {})[option] = value
    names = [variant or PLAIN for variant in variants]
    parts = [f"{VARIANTS}{SEPARATOR.join(names)}\n"]
    for having in sorted(sections, key=lambda one: (-len(one), one)):
        heading = (
            SEPARATOR.join(names[i] for i in having)
            if len(having) < len(names)
            else ALL
        )
        parts.append(f"[{heading}]\n{text_of(sections[having])}")
    return "\n".join(parts)


def read_variants(text: str) -> dict[str, Flat]:
    """The inverse of `text_of_variants`."""
    first, *lines = text.splitlines()
    names = first.removeprefix(VARIANTS).split(SEPARATOR)
    variants: dict[str, Flat] = {name: {} for name in names}
    having = names
    for line in filter(None, lines):
        if line.startswith("["):
            heading = line[1:-1]
            having = names if heading == ALL else heading.split(SEPARATOR)
        else:
            option, _, value = line.partition(" = ")
            for name in having:
                variants[name][option] = value
    return {
        "" if name == PLAIN else name: options for name, options in variants.items()
    }
