"""What a chat template costs, charged before the work is done, so that none hangs or fills memory.

The unit is a character of text, about 4 bytes and a nanosecond. A list's item costs ITEM, a node
of the template's syntax tree NODE each time its loop or macro runs, a call CALL. Costs depend on
the template and the conversation alone: what renders here renders on any machine.
"""

import collections.abc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.runtime
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

ITEM = 16
NODE = 20
CALL = 100
COMPARE = 20  # per unit of what is sorted
ESCAPE = 12  # characters that one character becomes at most, in JSON or a URL
LONGEST_SUM = 8  # terms that are added before their sum is charged
LIMIT = 1_000_000  # of an empty conversation
PER_MESSAGE = 50_000
PER_CHARACTER = 300

# Filters of the syntax tree that `Metered` inserts. No template can spell their names.
SPEND, SIZE, DEEP = "cost: spend", "cost: size", "cost: deep size"


class TooMuch(jinja2.TemplateError):
    """A template that exceeds its limit."""


class Budget:
    """The units that a rendering may still spend."""

    __slots__ = ("left", "limit", "spent")

    def __init__(self):
        self.limit = self.left = LIMIT
        self.spent = 0  # of all renderings but the last

    def start(self, messages: Sequence[Mapping[str, str]] = ()) -> None:
        """Begins the rendering of a conversation, whose length decides the limit."""
        self.spent += self.limit - self.left
        length = sum([len(message["content"]) for message in messages])
        self.limit = LIMIT + PER_MESSAGE * len(messages) + PER_CHARACTER * length
        self.left = self.limit

    def spend(self, units: int) -> bool:
        """Charges some units; returns True. Raises TooMuch beyond the limit."""
        self.left -= units
        if self.left < 0:
            raise TooMuch(too_much(self.limit))
        return True

    def spend_size(self, value: Any) -> Any:
        """Charges the length of a text or of a list; returns the value."""
        self.spend(len(value) if type(value) is str else length_of(value))
        return value

    def spend_deep(self, value: Any) -> Any:
        """Charges a value and all that it contains; returns the value."""
        self.spend(len(value) if type(value) is str else self.size(value))
        return value

    def size(self, value: Any) -> int:
        """Returns the units of a value and all that it contains, as often as it contains it.

        A list that contains itself or another one many times is as long as what prints it, so the
        walk ends at the limit.
        """
        total, pending = 0, [value]
        while pending:
            value = pending.pop()
            total += ITEM
            if isinstance(value, jinja2.runtime.Undefined):
                continue
            if isinstance(value, str | int | float):
                total += length_of(value)
                continue
            if isinstance(value, jinja2.utils.Namespace):
                value = getattr(value, "_Namespace__attrs")  # noqa: B009  # not of this class
            if isinstance(value, collections.abc.Collection):
                total += ITEM * len(value)
                if total > self.left:
                    break
                pending += value
                if isinstance(value, Mapping):
                    pending += value.values()
        self.spend(0 if total <= self.left else total)
        return total


def too_much(limit: int) -> str:
    """Returns the message of a template that exceeds its limit."""
    return (
        f"it exceeds the limit on time and output: {limit:,} characters, "
        f"or {limit // NODE:,} operations"
    )


def length_of(value: Any) -> int:
    """Returns the units of a text, a number, or the items of a list without their contents."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 8
    return ITEM * len(value) if isinstance(value, collections.abc.Sized) else 0


# ------------------------------------------------------------------ the syntax tree


class Metered(NodeTransformer):
    """Inserts charges into a template: into loops and macros, and where values grow."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self._with_charged_body(node)
        if node.test is not None:  # evaluated also where the body is not
            node.test = nodes.And(_charge(nodes.Const(NODE), SPEND), node.test)
        return node

    def visit_Macro(self, node: Any) -> Any:
        return self._with_charged_body(node)

    visit_Block = visit_CallBlock = visit_Macro

    def _with_charged_body(self, node: Any) -> Any:
        cost = NODE + sum(map(_cost_of, node.body))
        self.generic_visit(node)
        charge = nodes.ExprStmt(_charge(nodes.Const(cost), SPEND))
        node.body.insert(0, charge.set_lineno(node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """Leaves sums as they are: what is written is charged anyway."""
        self.generic_visit(node)
        node.nodes = [_without_charge(part) for part in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        self.generic_visit(node)
        if _terms(node) <= LONGEST_SUM:
            node.left, node.right = (
                _without_charge(node.left),
                _without_charge(node.right),
            )
        return _charge(node, SIZE)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        self.generic_visit(node)
        node.nodes = [_charge(part, DEEP) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        equality = all(operand.op in ("eq", "ne") for operand in node.ops)
        if equality and any(isinstance(side, nodes.Const) for side in sides):
            return node  # ends at the length of the constant
        node.expr = _charge(node.expr, DEEP)
        for operand in node.ops:
            operand.expr = _charge(operand.expr, DEEP)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # a copy
            node.node = _charge(node.node, SIZE)
        else:  # the hash of a tuple is that of all it contains
            node.arg = _charge(node.arg, DEEP)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _charge(node.key, DEEP)
        return node


def _charge(value: nodes.Expr, how: str) -> nodes.Expr:
    """Returns an expression that charges a value and returns it."""
    if isinstance(value, nodes.Const) and how != SPEND:
        return value
    charged = nodes.Filter(value, how, [], [], None, None)
    charged.set_lineno(value.lineno or 1)
    return charged


def _without_charge(value: Any) -> Any:
    charged = isinstance(value, nodes.Filter) and value.name == SIZE
    return value.node if charged else value


def _terms(node: nodes.Expr) -> int:
    """Returns the number of terms that a sum adds before it is charged."""
    node = _without_charge(node)
    if not isinstance(node, nodes.Add):
        return 1
    return _terms(node.left) + _terms(node.right)


def _cost_of(node: nodes.Node) -> int:
    """Returns the units of running a statement once, without what it calls."""
    if isinstance(node, nodes.TemplateData):
        return len(node.data)
    return NODE + sum(map(_cost_of, node.iter_child_nodes()))


# ------------------------------------------------------------------ operators, calls and filters


def operation(budget: Budget, operator: str, left: Any, right: Any) -> int:
    """Returns the units of a binary operation."""
    if isinstance(left, str) and operator == "%":
        return printf(budget, left, right)
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**" and right > 0:
            return (left.bit_length() * right // 32) ** 2
        # Multiplication and division by hand, in digits of 32 bits.
        return (1 + left.bit_length() // 32) * (1 + right.bit_length() // 32)
    if operator == "*" and isinstance(left, int):
        left, right = right, left
    if operator == "*" and isinstance(right, int):
        return length_of(left) * max(0, right)
    return length_of(left) + length_of(right)


def printf(budget: Budget, text: str, values: Any) -> int:
    """Returns the units of `text % values`; each of its parts may write all values."""
    widths = numbers_in(text)
    if "*" in text:
        widths += _integers(values if isinstance(values, tuple) else (values,))
    parts = 1 + text.count("%")
    return len(text) + parts * (ITEM * widths + ESCAPE * budget.size(values))


def numbers_in(text: str) -> int:
    """Returns the sum of the numbers in a format: its widths and precisions."""
    return sum(int(digits[-18:]) for digits in re.findall(r"[0-9]+", text))


def method(budget: Budget, owner: Any, name: str, args: Sequence[Any]) -> int:
    """Returns the units of a method of a text, list, dict or another built-in value."""
    if not args and name not in _SPLIT:  # strip, items and the like
        return CALL + 3 * length_of(owner)
    cost = CALL + sum(map(budget.size, args))
    if not isinstance(owner, str):
        return cost + budget.size(owner)
    cost += 3 * len(owner)
    if name == "replace":
        return cost + owner.count(str(args[0])) * length_of(args[-1])
    if name == "join":
        return cost + len(owner) * length_of(args[0])
    if name == "expandtabs":
        return cost + owner.count("\t") * _integers(args)
    if name in _SPLIT:
        return cost + ITEM * _parts(owner, args)
    return cost + _integers(args)


_SPLIT = ("split", "rsplit", "splitlines")


def _parts(text: str, args: Sequence[Any]) -> int:
    """Returns the largest number of parts that a text is split into."""
    if args and isinstance(args[0], str) and args[0]:
        return text.count(args[0])
    return 1 + len(text) // 2


def call(budget: Budget, args: Iterable[Any]) -> int:
    """Returns the units of a call of any other function."""
    args = list(args)
    return sum(map(budget.size, args)) + ITEM * _integers(args)


def _integers(values: Iterable[Any]) -> int:
    """Returns the sum of the integers among some values, which may be widths or counts."""
    return sum(abs(value) for value in values if isinstance(value, int))


# Filters that neither read nor copy what a list contains.
_SHALLOW = frozenset(
    [
        "attr",
        "batch",
        "count",
        "d",
        "default",
        "first",
        "items",
        "last",
        "length",
        "list",
        "map",
        "reject",
        "rejectattr",
        "reverse",
        "safe",
        "select",
        "selectattr",
        "slice",
    ]
)
_ITEMIZE = frozenset(
    ["batch", "groupby", "list", "map", "reject", "select", "slice", "sort", "unique"]
)
SIMPLE = frozenset(
    ["capitalize", "length", "list", "lower", "safe", "string", "trim", "upper"]
)
_SLOW = frozenset(
    [
        "dictsort",
        "groupby",
        "max",
        "min",
        "sort",
        "title",
        "unique",
        "wordcount",
        "wordwrap",
    ]
)


def filtered(
    budget: Budget,
    name: str,
    value: Any,
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> int:
    """Returns the units of a filter.

    Args:
      args, options: its positional and named arguments, without the value.
    """
    values = [*args, *options.values()]
    extra = call(budget, values)
    size = length_of(value) if name in _SHALLOW else budget.size(value)
    if isinstance(value, str) and name in _ITEMIZE:
        size *= ITEM
    if name == "format":
        return extra + printf(budget, str(value), tuple(values))
    if name == "sum" and any(isinstance(each, list | tuple) for each in values):
        return (1 + length_of(value)) * size  # every list of lists is copied
    cost = extra + size * (COMPARE if name in _SLOW else ESCAPE)
    if name in _REPEAT:
        old = options.get("old", (*args, "")[0])
        cost += _REPEAT[name](value, old) * (1 + sum(map(_width, values)))
    return cost


# How often a filter writes its arguments: (value, first argument) -> times.
_REPEAT: dict[str, Callable[[Any, Any], int]] = {
    "indent": lambda value, _: 1 + len(str(value).splitlines()),
    "join": lambda value, _: length_of(value),
    "replace": lambda value, old: str(value).count(str(old)),
    "wordwrap": lambda value, _: length_of(str(value)),
}


def _width(value: Any) -> int:
    """Returns the number of characters that an argument stands for."""
    return value if isinstance(value, int) else length_of(value)
