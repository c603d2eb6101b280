"""The Jinja environment of chat templates: as in transformers, but sandboxed and with a limit.

Chat templates are programs that come with other people's models. Jinja's sandbox keeps them from
everything but their arguments. It does not keep them from running for ever or from filling memory,
so every rendering has a `Budget`, see `template_cost`.

The limit is counted in this process. A separate process for each template could be stopped from
outside, but rendering is done once per conversation, and a message to another process takes longer
than a rendering. A clock would make the result depend on the machine, and no clock interrupts
`10**10**8`. What a template does can be counted in advance, because all that it can do is in
Jinja's hands: operators, filters, tests, methods of text, lists and dicts, loops, macros. Functions
that are random, or that cannot be counted, are absent; no chat template uses them.
"""

import datetime
import functools
import json
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

from rlhfjax import template_date
from rlhfjax.data import template_cost
from rlhfjax.data.template_cost import CALL, ESCAPE, ITEM, Budget, Metered
from rlhfjax.errors import DataError, first_line

LONGEST_SOURCE = 100_000  # characters; templates of models have up to 30,000
MOST_NODES = 20_000  # of the syntax tree, which takes longer to compile than to parse
LONGEST_REASON = 300  # characters
_FILE = "<template>"  # what Jinja calls a source without a file
_ABSENT_FILTERS = ("pprint", "random", "striptags", "urlize", "xmlattr")
_ABSENT_METHODS = ("encode", "maketrans", "striptags", "translate")
_INTERNAL = ("_block_vars", "_loop_vars")
_SAFE = {
    jinja2.runtime.LoopContext: frozenset(
        ["first", "index", "index0", "last", "length", "nextitem", "previtem"]
    ),
    str: frozenset(
        ["endswith", "lstrip", "replace", "rstrip", "split", "startswith", "strip"]
    ),
    dict: frozenset(["get", "items", "keys", "values"]),
}
_DICT_METHODS = frozenset(dir(dict))
_COMPARING_TESTS = frozenset(
    [
        "in",
        "lower",
        "upper",
        "==",
        "eq",
        "equalto",
        "!=",
        "ne",
        ">",
        "gt",
        "greaterthan",
        ">=",
        "ge",
        "<",
        "lt",
        "lessthan",
        "<=",
        "le",
    ]
)


class Program:
    """A compiled chat template. Its date is that of `template_date` at the compilation.

    Args:
      source: Jinja source.
      context: the file, for errors.

    Raises:
      DataError: the source is not Jinja, or longer than LONGEST_SOURCE.
    """

    def __init__(self, source: str, context: str):
        self._budget = Budget()
        self._lock = threading.Lock()
        environment = _Environment(self._budget)
        try:
            _validate_size("characters", len(source), LONGEST_SOURCE)
            tree = environment.parse(source)
            nodes = sum(1 for _ in tree.find_all(jinja2.nodes.Node))
            _validate_size("expressions", nodes, MOST_NODES)
            self._template = environment.from_string(Metered().visit(tree))
        except (
            Exception
        ) as error:  # Jinja's errors, and Python's for the code made of it
            line = getattr(error, "lineno", None)
            where = (
                f", line {line}"
                if isinstance(error, jinja2.TemplateSyntaxError)
                else ""
            )
            raise DataError(
                f"{context}: the chat template is not Jinja: {_reason(error)}{where}"
            ) from None
        self._globals = dict(self._template.globals)

    @property
    def spent(self) -> int:
        """The units that all renderings before the last have cost."""
        return self._budget.spent

    def render(self, messages: Sequence[Mapping[str, str]], **names: Any) -> str:
        """Returns the text of a conversation.

        Raises:
          Exception: any, because a template is a program; `explain` says what happened.
        """
        names = {**self._globals, **names, "messages": messages}
        # As Template.render does, but for the time in which that copies globals.
        context = self._template.new_context(names, shared=True)
        with self._lock:
            self._budget.start(messages)
            try:
                return "".join(self._template.root_render_func(context))
            except Exception:  # raised again, with the template's lines
                self._template.environment.handle_exception()


def explain(error: Exception) -> str:
    """Returns why a template failed, in one line, with the template's line.

    What the template itself says with raise_exception is returned as it is.
    """
    reason = _reason(error)
    if isinstance(error, Refusal):
        return reason
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"{reason}, line {lines[-1]}" if lines else reason


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    reason = first_line(error)[:LONGEST_REASON]
    return reason.encode(errors="backslashreplace").decode()


def _validate_size(what: str, size: int, most: int) -> None:
    if size > most:
        raise template_cost.TooMuch(
            f"it has {size:,} {what}; at most {most:,} are accepted"
        )


class Refusal(jinja2.TemplateError):
    """A template does not take these messages; raised by raise_exception."""


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment that charges what its templates do to a budget."""

    # Sums are charged in the syntax tree instead.
    intercepted_binops = frozenset(("*", "//", "**", "%"))

    def __init__(self, budget: Budget):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Without what Jinja computes at compile time, before a budget begins.
            optimized=False,
            finalize=self._written,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.budget = budget
        self.filters["tojson"] = self._to_json
        for name in _ABSENT_FILTERS:
            del self.filters[name]
        self.filters = {
            name: self._charged(name, function)
            for name, function in self.filters.items()
        }
        self.filters[template_cost.SPEND] = budget.spend
        self.filters[template_cost.SIZE] = budget.spend_size
        self.filters[template_cost.DEEP] = budget.spend_deep
        for name in _COMPARING_TESTS:
            self.tests[name] = self._measured(self.tests[name])
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": self._clock(template_date.now()),
            "namespace": _Namespace,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }

    @jinja2.pass_context
    def _written(self, context: jinja2.runtime.Context, value: Any) -> Any:
        return self.budget.spend_deep(value)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        cost = template_cost.operation(self.budget, operator, left, right)
        self.budget.spend(cost)
        return self.binop_table[operator](left, right)

    def call(
        self,
        context: jinja2.runtime.Context,
        function: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if type(function) is types.BuiltinMethodType:
            name, owner = function.__name__, function.__self__
            if args:
                args = tuple(_materialized(args))
            self.budget.spend(template_cost.method(self.budget, owner, name, args))
            for name in _INTERNAL:  # which Jinja adds for its own functions
                kwargs.pop(name, None)
            return function(*args, **kwargs)
        cost = CALL + ITEM * len(args)
        if not isinstance(function, jinja2.runtime.Macro):  # whose body is charged
            cost += template_cost.call(self.budget, [*args, *kwargs.values()])
        self.budget.spend(cost)
        return super().call(context, function, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if attribute in _SAFE.get(
            kind, ()
        ):  # most uses, for which Jinja takes microseconds
            return getattr(obj, attribute)
        if kind is dict and attribute in obj and attribute not in _DICT_METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes) or attr in _ABSENT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        formatter = _Formatter(self)

        def write(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                args, kwargs = (), *args
            return formatter.vformat(value.__self__, args, kwargs)

        return write

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a filter that charges its work. Iterators become lists, whose work is known."""
        first = int(hasattr(function, "jinja_pass_arg"))
        simple = not first and name in template_cost.SIMPLE

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and type(args[0]) is str and simple:
                self.budget.spend(ESCAPE * len(args[0]))
                return function(args[0])
            values = _materialized(args[first:])
            value, *options = values
            self.budget.spend(
                CALL + template_cost.filtered(self.budget, name, value, options, kwargs)
            )
            return function(*args[:first], *values, **kwargs)

        return charged

    def _measured(self, test: Callable[..., bool]) -> Callable[..., bool]:
        """Returns a test that charges what it compares."""

        def measured(*args: Any) -> bool:
            for value in args:
                self.budget.spend_deep(value)
            return test(*args)

        return measured

    def _clock(self, now: datetime.datetime) -> Callable[[str], str]:
        def strftime_now(form: str) -> str:
            width = len(form) + template_cost.numbers_in(form)
            self.budget.spend(CALL * width)
            return template_date.written(now, form)

        return strftime_now

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        if indent is None and separators is None:
            return encoder.encode(value)
        return "".join(map(self.budget.spend_size, encoder.iterencode(value)))


def _materialized(values: Sequence[Any]) -> list[Any]:
    """Returns some values with lists for iterators."""
    return [list(x) if isinstance(x, Iterator) else x for x in values]


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """str.format, charged."""

    def __init__(self, environment: _Environment):
        super().__init__(environment)
        self._budget = environment.budget

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._budget.spend(CALL + ESCAPE * self._budget.size(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        self._budget.spend(template_cost.numbers_in(format_spec))
        return super().format_field(value, format_spec)


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
        _Namespace._validate(name)  # `self.…` is a name in the namespace
        super().__setitem__(name, value)

    @staticmethod
    def _validate(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def _raise(message: str) -> None:
    raise Refusal(message)
