"""Describes the options of config dataclasses: their types, ranges, defaults and meanings.

The meaning of an option is the string literal right below its field:

    steps: PositiveCount
    "Number of updates."
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Predicate

REQUIRED = dataclasses.MISSING


class Option(NamedTuple):
    """One option of a config."""

    name: str  # such as optim.learning_rate, or sources[].spec
    type: str  # with its range, such as "int >= 1 and <= 1024"
    default: Any  # REQUIRED for an option without a default
    meaning: str  # empty for a field without a docstring


def options(cls: type, prefix: str = "", values: Any = None) -> list[Option]:
    """Returns the options of a config dataclass, each followed by those of the dataclass it holds.

    Args:
      prefix: what the names begin with, such as "optim.".
      values: an instance whose values are the defaults; None: the defaults of the class.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    meanings = meanings_of(cls)
    found: list[Option] = []
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        default = (
            declared_default(field) if values is None else getattr(values, field.name)
        )
        meaning = meanings.get(field.name, "")
        found.append(Option(name, describe(hints[field.name]), default, meaning))
        inner = dataclass_of(hints[field.name])
        if inner:
            several = typing.get_origin(hints[field.name]) is tuple
            inner_values = default if isinstance(default, inner) else None
            found += options(
                inner, f"{name}[]." if several else f"{name}.", inner_values
            )
    return found


@functools.cache
def meanings_of(cls: type) -> dict[str, str]:
    """Returns the docstrings of a dataclass's fields, inherited ones too."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            meanings |= _own_meanings(base)
    return meanings


def _own_meanings(cls: type) -> dict[str, str]:
    """Returns the docstrings of the fields that a class itself declares."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class made by a program, or in an interpreter
        return {}
    (definition,) = ast.parse(textwrap.dedent(source)).body
    statements = getattr(definition, "body", [])
    meanings = {}
    for field, text in itertools.pairwise(statements):
        if not isinstance(field, ast.AnnAssign) or not isinstance(
            field.target, ast.Name
        ):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            meanings[field.target.id] = inspect.cleandoc(str(text.value.value))
    return meanings


def declared_default(field: dataclasses.Field) -> Any:
    """Returns the default of a field, or REQUIRED."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def dataclass_of(hint: Any) -> type | None:
    """Returns the dataclass of which a value may be an instance, or a tuple of instances."""
    for arm in typing.get_args(hint) or (hint,):
        if isinstance(arm, type) and dataclasses.is_dataclass(arm):
            return arm
        if is_union(arm) and (inner := dataclass_of(arm)):
            return inner
    return None


def without_arms(hint: Any, location: Sequence[str | int]) -> list[str | int]:
    """Returns the location of a part of a value without the names that pydantic adds.

    Within a union of several types, these are the names of the type that was tried.
    """
    plain: list[str | int] = []
    for part in location:
        inside = hint_at(hint, plain)
        arms = typing.get_args(inside) if is_union(inside) else ()
        if part not in [getattr(arm, "__name__", None) for arm in arms]:
            plain.append(part)
    return plain


def hint_at(hint: Any, location: Sequence[str | int]) -> Any:
    """Returns the annotation of a part of a value, given the annotation of the whole.

    Args:
      location: names of fields, keys of dicts and indices of tuples, from the outside in.
    """
    for part in location:
        cls = None if isinstance(part, int) else dataclass_of(hint)
        if cls:
            hint = typing.get_type_hints(cls, include_extras=True)[str(part)]
        else:  # all elements of a tuple have one type, and all values of a dict
            hint = typing.get_args(hint)[0 if isinstance(part, int) else -1]
    return hint


def describe(hint: Any) -> str:
    """Returns the values that an annotation accepts: `int >= 1 | None`, `one of 'up', 'down'`."""
    arms = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, arms))
    if is_union(hint):
        return " | ".join(map(describe, arms))
    if typing.get_origin(hint) is Annotated:
        conditions = " and ".join(_conditions(arms[1:]))
        return f"{describe(arms[0])} {conditions}".rstrip()
    if typing.get_origin(hint) is tuple:
        return f"tuple[{', '.join(map(describe, arms))}]"
    return _NAMES.get(hint) or getattr(hint, "__name__", str(hint))


_NAMES = {type(None): "None", ...: "..."}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _conditions(ranges: Iterable[Any]) -> Iterator[str]:
    """Yields the conditions of ranges of annotated_types."""
    for part in ranges:
        if isinstance(part, Predicate):
            yield part.func.__name__.replace("_", " ")
            continue
        bounds = dataclasses.asdict(part)
        for name, sign in _SIGNS.items():
            if bounds.get(name) is not None:
                yield f"{sign} {bounds[name]}"
