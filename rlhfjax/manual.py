"""The texts of `rlhfjax --help`, `rlhfjax COMMAND --help`, `rlhfjax options` and `--version`.

The docstring of a command's function is its help: a summary, paragraphs, and lines that begin with
`rlhfjax`, which are examples.
"""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from rlhfjax import __doc__ as package
from rlhfjax import __version__, command_flags

WIDEST = 100  # columns of text
# Ranges of 32-bit numbers, which say nothing about an option.
_LIMITS = re.compile(r" and <= (2147483647|4294967294|3\.4e\+38)| and not subnormal")


def versions() -> str:
    """Returns the versions of rlhfjax, jax and Python, without importing jax."""
    jax = importlib.metadata.version("jax")
    return f"rlhfjax {__version__} (jax {jax}, Python {platform.python_version()})"


def overview(commands: Mapping[str, Callable[..., Any]]) -> str:
    """Returns the list of commands.

    Args:
      commands: the functions of the commands by name.
    """
    rows = [(name, _paragraphs(run)[0]) for name, run in commands.items()]
    return "\n".join(
        [
            "usage: rlhfjax COMMAND [flags]",
            "",
            *_wrap(str(package)),
            "",
            *_table(rows),
            "",
            "rlhfjax COMMAND --help   flags and examples of a command",
            "rlhfjax options STAGE    options of a stage",
            "rlhfjax --version        versions",
        ]
    )


def page(name: str, usage: str, run: Callable[..., Any], fv: flags.FlagValues) -> str:
    """Returns the help of a command.

    Args:
      usage: the flags that it needs.
      run: its function.
    """
    paragraphs = _paragraphs(run)
    lines = [f"usage: rlhfjax {name} {usage} [flags]"]
    for paragraph in paragraphs:
        if not paragraph.startswith("rlhfjax "):
            lines += ["", *_wrap(paragraph)]
    lines += ["", "flags:", *_table(list(_flag_rows(fv)))]
    if examples := [text for text in paragraphs if text.startswith("rlhfjax ")]:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    return "\n".join(lines)


def _paragraphs(run: Callable[..., Any]) -> list[str]:
    """Returns the paragraphs of a docstring, each as one line; an example is a paragraph."""
    text = inspect.cleandoc(run.__doc__ or "").replace("\nrlhfjax ", "\n\nrlhfjax ")
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    return [part for part in parts if part]


def _flag_rows(fv: flags.FlagValues) -> Iterator[tuple[str, str]]:
    """Yields (--name=VALUE, meaning) per flag, --config first."""
    for name in sorted(fv, key=lambda name: name != "config"):
        flag = fv[name]
        if name != flag.name:  # a short name
            continue
        yield f"--{name}{_placeholder(flag)}", f"{flag.help}{_default(flag)}"


def _placeholder(flag: flags.Flag) -> str:
    """Returns what follows a flag's name, such as `=DIR`."""
    parser = flag.parser
    if flag.boolean:
        return ""
    if isinstance(parser, flags.EnumParser):
        return f"={'|'.join(parser.enum_values)}"
    if isinstance(parser, flags.ListParser):
        return "=A,B,…"
    if isinstance(parser, flags.IntegerParser | flags.FloatParser):
        return "=N"
    return f"={command_flags.PLACEHOLDERS.get(flag.name, 'TEXT')}"


def _default(flag: flags.Flag) -> str:
    if flag.default in (None, False, "") or flag.default == []:
        return ""
    default = flag.default
    text = ",".join(default) if isinstance(default, list) else str(default)
    return f"; default: {text}"


# ------------------------------------------------------------------ options of stages


def stages() -> str:
    """Returns the list of stages. It imports none of them."""
    rows = [(name, _summary_of(name)) for name in stage_names()]
    return "\n".join(
        [
            "usage: rlhfjax options STAGE",
            "",
            "stages:",
            *_table(rows),
            "",
            "A stage of your own: rlhfjax options package.module:Config",
        ]
    )


def stage_names() -> tuple[str, ...]:
    from rlhfjax.stages import names

    return names()


def _summary_of(stage: str) -> str:
    """Returns the first sentence of a stage's docstring."""
    spec = importlib.util.find_spec(f"rlhfjax.stages.{stage}")
    if spec is None or spec.origin is None:
        return ""
    with open(spec.origin, encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def options(stage: str) -> str:
    """Returns the options of a stage: name, default, type with range, and meaning.

    Raises:
      ConfigError: there is no such stage.
    """
    from rlhfjax.options import options
    from rlhfjax.stages import config_class

    found = options(config_class(stage))
    rows = [
        (option.name, shown_default(option.default), _LIMITS.sub("", option.type))
        for option in found
    ]
    name_width = max(len(name) for name, _, _ in rows)
    default_width = max(len(text) for _, text, _ in rows if len(text) <= 16)
    lines = []
    for option, (name, default, kind) in zip(found, rows, strict=True):
        begin = f"{name:{name_width}}  {default:{default_width}}  "
        lines += _hanging(begin, kind, len(begin))
        lines += _wrap(option.meaning, "    ")
    header = f"{'option':{name_width}}  {'default':{default_width}}  accepted"
    return "\n".join([header, *lines])


def shown_default(default: Any) -> str:
    """Returns the default of an option; empty for a dataclass, whose options follow."""
    from rlhfjax.options import REQUIRED

    if default is REQUIRED:
        return "required"
    return "" if dataclasses.is_dataclass(default) else repr(default)


# ------------------------------------------------------------------ layout


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def _wrap(text: str, indent: str = "") -> list[str]:
    """Returns the lines of a text, as wide as the terminal."""
    words = " ".join(text.split())
    return textwrap.wrap(
        words, max(_width(), 40), initial_indent=indent, subsequent_indent=indent
    )


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Returns two columns; a long name has a separate line."""
    fitting = [len(name) for name, _ in rows if len(name) <= 28]
    column = max(fitting, default=0) + 4
    lines: list[str] = []
    for name, text in rows:
        begin = f"  {name}"
        if len(begin) + 2 > column:
            lines.append(begin)
            begin = ""
        lines += _hanging(f"{begin:{column}}", text, column)
    return lines


def _hanging(begin: str, text: str, column: int) -> list[str]:
    """Returns a text after `begin`, wrapped, its other lines indented to `column`."""
    return textwrap.wrap(
        text,
        max(_width(), column + 30),
        initial_indent=begin,
        subsequent_indent=" " * column,
        break_long_words=False,
    ) or [begin.rstrip()]
