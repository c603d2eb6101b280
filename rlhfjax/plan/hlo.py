"""Parses the HLO text of a compiled program: computations, loops, buffers, collectives."""

import dataclasses
import math
import re
from collections.abc import Iterable

from rlhfjax.errors import DataError

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Operations that neither read nor write memory.
NO_MEMORY = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "iota",
    "domain",
)
# Operations whose result is that of a computation they call.
CONTROL_FLOW = ("while", "call", "conditional")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_BRACKETS = re.compile(r"\{[^}]*\}|\[[^\]]*\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|([^,\s]*))"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False  # in VMEM or scalar memory, not in HBM

    @property
    def size(self) -> float:
        """Size in bytes."""
        bits = re.search(r"\d+", self.dtype)  # of f32, bf16, f8e4m3fn; a token has none
        element = 1 if self.dtype == "pred" else int(bits[0]) / 8 if bits else 0
        return float(element * math.prod(self.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation: `name = result op(operands), attributes`."""

    name: str
    op: str
    result: tuple[Array, ...] = ()
    operands: tuple["Instruction", ...] = dataclasses.field(default=(), repr=False)
    number: int = 0  # of a parameter, or the value of an integer constant
    attributes: str = ""

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return float(sum(array.size for array in self.result))

    @property
    def hbm_size(self) -> float:
        """Bytes of the result in HBM."""
        return float(sum(array.size for array in self.result if not array.on_chip))

    @property
    def called(self) -> list[str]:
        """The names of the computations that the instruction calls."""
        names = [several or one for several, one in _CALLS.findall(self.attributes)]
        return [name.strip().lstrip("%") for name in ",".join(names).split(",") if name]

    @property
    def integer(self) -> int | None:
        """The value of a scalar int32 constant; None for any other instruction."""
        is_integer = self.op == "constant" and self.result == (Array("s32", ()),)
        return self.number if is_integer else None

    @property
    def source(self) -> str:
        """The operation of the source program that it comes from, or its own name."""
        return (self.find(r'op_name="([^"]*)"') or self.name).replace("\\'", "'")

    def find(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes; None without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def computation(self, role: str) -> str:
        """Returns the name of a loop's `body` or `condition`."""
        return self.find(rf"{role}=%?([\w.\-]+)") or ""


Instructions = dict[str, Instruction]


class Module:
    """A compiled program: its computations by name, each a dict of instructions by name.

    Raises:
      DataError: a line cannot be read, for example because a newer compiler writes it otherwise.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Instructions] = {}
        self.entry = ""
        instructions: Instructions = {}
        for line in _COMMENT.sub("", text).splitlines():
            if head := _COMPUTATION.match(line):
                instructions = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif body := _INSTRUCTION.match(line):
                try:
                    instructions[body[1]] = _parse(body[1], body[2], instructions)
                except ValueError:
                    raise DataError(
                        f"the compiled program: {line.strip()[:60]!r}: "
                        "expected NAME = TYPE OPERATION(OPERANDS)"
                    ) from None

    def parameters(self, computation: str) -> list[Instruction]:
        """Returns the parameters of a computation, in the order of its arguments."""
        instructions = self.computations[computation].values()
        parameters = [i for i in instructions if i.op == "parameter"]
        return sorted(parameters, key=lambda parameter: parameter.number)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a loop runs; None if the text does not say it.

        Where XLA does not state it, this is the bound that the loop's condition compares a counter
        with. A loop that may end earlier (sampling) has the count of the longest response.
        """
        if known := loop.find(r"known_trip_count[^\d]*(\d+)"):
            return int(known)
        visited = [loop.computation("condition")]
        bounds: list[int | None] = []
        for name in visited:
            for i in self.computations.get(name, {}).values():
                bounds.append(i.integer)
                if i.op == "get-tuple-element":
                    index = int(i.find(r"index=(\d+)") or 0)
                    bounds.append(_initial_value(loop.operands[0], index))
                visited += [called for called in i.called if called not in visited]
        return max((n for n in bounds if n is not None), default=None)

    def buffers(
        self, live: Iterable[tuple[str, float]] = (), most: int = 8
    ) -> list[tuple[str, float]]:
        """Returns the largest buffers in HBM as (description, bytes), the largest first.

        Args:
          live: the buffers at the peak, as `instruction{index}` and bytes. If the compiler does not
            list them, every result outside of fusions counts.
        """
        instructions = {
            name: i for scope in self.computations.values() for name, i in scope.items()
        }
        sizes: dict[str, float] = {}
        for value, size in live:
            name, _, index = value.rstrip("}").partition("{")
            if name not in instructions:
                continue
            arrays = instructions[name].result[int(index.split(",")[0] or 0) :]
            if arrays and not arrays[0].on_chip:
                label = _label(instructions[name], arrays[0])
                sizes[label] = sizes.get(label, 0.0) + size
        sizes = sizes or self._result_sizes()
        return sorted(sizes.items(), key=lambda item: -item[1])[:most]

    def _result_sizes(self) -> dict[str, float]:
        """Returns the bytes of every result in HBM outside of fusions, by description."""
        fused = {
            called
            for scope in self.computations.values()
            for i in scope.values()
            if i.op == "fusion"
            for called in i.called
        }
        sizes: dict[str, float] = {}
        for computation, scope in self.computations.items():
            if computation in fused:
                continue
            for i in scope.values():
                if i.op == "parameter":
                    allocates = computation == self.entry
                else:
                    allocates = i.op not in (*NO_MEMORY, *CONTROL_FLOW)
                if not allocates or "-done" in i.op:
                    continue
                for array in i.result:
                    if not array.on_chip:
                        label = _label(i, array)
                        sizes[label] = max(sizes.get(label, 0.0), array.size)
        return sizes


def group_size(attributes: str) -> int:
    """Returns how many devices take part in one collective.

    `{{0,1},{2,3}}`, `[2,2]<=[4]` and `mesh['a'=2,'b'=2] {'a'}` are 2. A mesh whose devices are not
    in order lists them before its axes: `mesh['a'=4,'b'=2], device_ids=(...) {'a'}` is 4.
    """
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(groups[1])
    if groups := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=[^{}]*)?\s*\{([^}]*)\}",
        attributes,
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 1


def _parse(name: str, text: str, scope: Instructions) -> Instruction:
    """Parses `TYPE op(operands), attributes`.

    Args:
      scope: the instructions before it, with its operands.
    """
    if text.startswith("("):  # the type is a tuple
        result, text = _balanced(text)
    else:
        result, text = text.split(" ", 1)
    op, text = text.strip().split("(", 1)
    arguments, attributes = _balanced("(" + text)
    arrays = []
    for dtype, shape, layout in _ARRAY.findall(result):
        sizes = tuple(int(n) for n in shape.split(",") if n)
        arrays.append(Array(dtype, sizes, on_chip="S(" in layout))
    number, operands = 0, []
    if op in ("parameter", "constant"):
        if digits := re.fullmatch(r"\((-?\d+)\)", arguments):
            number = int(digits[1])
    else:
        for part in _BRACKETS.sub("", arguments[1:-1]).split(","):
            operand = part.split(" ")[-1].lstrip("%")
            if operand:
                operands.append(scope.get(operand) or Instruction(operand, "unknown"))
    return Instruction(
        name=name,
        op=op,
        result=tuple(arrays),
        operands=tuple(operands),
        number=number,
        attributes=attributes,
    )


def _balanced(text: str) -> tuple[str, str]:
    """Splits a text that begins with a parenthesis behind the one that closes it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :].lstrip()
    return text, ""


def _initial_value(initial: Instruction, index: int) -> int | None:
    """Returns element `index` of the tuple that a loop starts with, if it is a constant above 0."""
    if initial.op != "tuple":
        return None
    element = initial.operands[index]
    while element.op in ("copy", "bitcast"):
        element = element.operands[0]
    return element.integer if (element.integer or 0) > 0 else None


def _label(i: Instruction, array: Array) -> str:
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype}[{shape}] {i.source}"
