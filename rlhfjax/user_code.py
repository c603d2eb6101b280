"""Imports what a config names as `package.module:name`: rules, and stages outside of the package.

Modules are looked for where Python looks for them, and last in the working directory: a file there
never takes the place of an installed package.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from rlhfjax.errors import ConfigError, cut, first_line

SIGNATURE = "def f(prompt: str, response: str, metadata: dict) -> float"
RULE = f"package.module:function with {SIGNATURE}"
STAGE = "package.module:Config"
MOST_SHOWN = 300  # characters of a name or of an error in a message


def split(name: str, kind: str, expected: str) -> tuple[str, str]:
    """Returns the module and the attribute of `package.module:attribute`.

    Args:
      kind: what the name is of, for an error.
      expected: RULE or STAGE, for an error.

    Raises:
      ConfigError: it is not such a name, a path for instance.
    """
    module, _, attribute = name.rpartition(":")
    if _is_file(module or name):
        raise ConfigError(
            f"{kind} {_shown(name)}: a path, not the name of a module"
            f"{_as_module(module or name, attribute)}; expected {expected}"
        )
    parts = module.split(".")
    if not (all(map(str.isidentifier, parts)) and attribute.isidentifier()):
        raise ConfigError(f"{kind} {_shown(name)}: expected {expected}")
    return module, attribute


def _is_file(module: str) -> bool:
    return module.endswith(".py") or "/" in module or "\\" in module


def _as_module(path: str, attribute: str) -> str:
    """Returns the name of a file's module as a hint, if the working directory has the file."""
    relative = os.path.normpath(path.replace("\0", "?"))
    if os.path.isabs(relative):
        relative = os.path.relpath(relative, _working_directory() or "/")
    parts = relative.removesuffix(".py").split(os.sep)
    if all(map(str.isidentifier, parts)) and attribute.isidentifier():
        return f", which would be {'.'.join(parts)}:{attribute}"
    return ", which is looked for in the working directory and in PYTHONPATH"


def load(name: str, kind: str, expected: str) -> Any:
    """Returns the attribute of a module that `package.module:attribute` names.

    Raises:
      ConfigError: it is no such name, or the module cannot be imported or lacks the attribute.
    """
    module, attribute = split(name, kind, expected)
    loaded = load_module(module, f"{kind} {_shown(name)}", expected)
    try:
        return getattr(loaded, attribute)
    except Exception:  # a module may have its own __getattr__
        raise ConfigError(
            f"{kind} {_shown(name)}: the module {module} has no {attribute!r};"
            f" expected {expected}"
        ) from None


def load_module(module: str, context: str, expected: str) -> Any:
    """Returns a module, the working directory being the last place where it is looked for.

    Raises:
      ConfigError: it cannot be imported, whatever it raises.
    """
    add_working_directory()
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of other people, which may even call sys.exit
        raise ConfigError(
            f"{context}: {module} cannot be imported ({describe(error)});"
            f" expected {expected}"
        ) from error


def add_working_directory() -> None:
    """Makes the modules of the working directory importable, after all others.

    A console script has its own folder in the place of the working directory.
    """
    folder = _working_directory()
    if folder and folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def validate_rule(function: Any, name: str) -> Callable[..., Any]:
    """Returns an object that can be called as a rule.

    Raises:
      ConfigError: it is no Python function of (prompt, response, metadata) that returns a value.
    """
    problem = _no_rule(function)
    if problem:
        raise ConfigError(f"rule {_shown(name)}: {problem}; expected {SIGNATURE}")
    return function


def _no_rule(function: Any) -> str:
    """Returns why an object is no rule; "" if it may be one."""
    if not callable(function):
        return f"it is of type {type(function).__name__}"
    if isinstance(function, type):
        return "it is a class"
    if inspect.isbuiltin(function):
        return "it is a builtin, not a Python function"
    for is_other, kind in (
        (inspect.iscoroutinefunction, "a coroutine function"),
        (inspect.isgeneratorfunction, "a generator function"),
        (inspect.isasyncgenfunction, "a generator function"),
    ):
        if is_other(function) or is_other(getattr(function, "__call__", None)):  # noqa: B004
            return f"it is {kind}"
    try:
        signature = inspect.signature(function)
    except Exception:  # code of other people may give any object as its signature
        return "its signature cannot be read"
    try:
        signature.bind("prompt", "response", {})
    except TypeError as error:
        return f"its signature is {_cut(str(signature))} ({first_line(error)})"
    return ""


def describe(error: BaseException) -> str:
    """Returns an exception in one short line, even if its own text cannot be made."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    name = type(error).__name__
    return _cut(f"{name}: {text}" if text else name)


def _shown(name: str) -> str:
    return _cut(repr(name))


def _cut(text: str) -> str:
    return cut(text, MOST_SHOWN)
