"""Jinja for chat templates, which come with other people's models: the environment of transformers, sandboxed."""

import datetime
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from rlhfjax.errors import DataError


def compile_template(source: str, where: str) -> jinja2.Template:
    """The source in the environment that transformers gives it; its date stays the one of this call.

    Raises:
      DataError: it is not Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    now = datetime.datetime.now()
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": now.strftime,
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = (
            f", line {error.lineno}"
            if isinstance(error, jinja2.TemplateSyntaxError)
            else ""
        )
        raise DataError(
            f"{where}: the chat template is not Jinja: {error.message}{line}"
        ) from None


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, transformers' mark of what the assistant says: it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(
            self.call_method("_inside"), [], [], body
        ).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without its way out of the sandbox: no name starts with an underscore."""

    def __init__(
        *args: Any, **kwargs: Any
    ):  # so that `namespace(self=...)` works, as in Jinja
        names = dict(*args[1:], **kwargs)
        for name in names:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        self._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys=False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
