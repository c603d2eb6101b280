"""The Jinja environment of chat templates: as in transformers, but sandboxed.

Chat templates are programs that come with other people's models.
"""

import datetime
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from rlhfjax.errors import DataError


def compile_template(source: str, context: str) -> jinja2.Template:
    """Returns a template in the environment that transformers gives it.

    The date that the template sees is that of this call.

    Raises:
      DataError: the source is not Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": datetime.datetime.now().strftime,
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = ""
        if isinstance(error, jinja2.TemplateSyntaxError):
            line = f", line {error.lineno}"
        raise DataError(
            f"{context}: the chat template is not Jinja: {error.message}{line}"
        ) from None


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's text in transformers.

    It changes no text.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_inside")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without its way out of the sandbox: no name starts with an underscore."""

    # Without a named `self`, so that `namespace(self=...)` works as in Jinja.
    def __init__(*args: Any, **kwargs: Any):
        names = dict(*args[1:], **kwargs)
        for name in names:
            _Namespace._validate(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        self._validate(name)
        super().__setitem__(name, value)

    @staticmethod
    def _validate(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
